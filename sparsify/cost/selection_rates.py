"""Rates of choosing keys, from those of the tensor operations that it is made of."""

from __future__ import annotations

import math

import torch

from sparsify.cost.machine import Pace, Selection
from sparsify.cost.sample import seconds

# What a compiled selection takes for each thing that `Work` counts, in these operations' times: fitted once to eight
# selections (blocks by means, sorted and by share, anti-diagonals, lines, pages and tokens at decode) on an AMD EPYC
# with AVX2, torch 2.13. A choice is some two hundred small operations, and scores are masked, normed and pooled.
LAUNCH, PRODUCT, SCORE, ORDER, VIEW = 190.0, 1.1, 14.5, 0.05, 4.8


def selection_rates(at: Pace) -> Selection:
    """Those of this machine, at a pace."""
    generator = torch.Generator().manual_seed(0)
    few, q, k = torch.randn(64, generator=generator), *torch.randn(2, 8, 512, 64, generator=generator).unbind(0)
    scores, keys = torch.randn(4096, 256, generator=generator), torch.randn(8, 8192, 64, generator=generator)
    nanoseconds = lambda run: 1e9 * seconds(run, None, 0.1, at=at)  # noqa: E731
    launch = nanoseconds(lambda: few.amax())
    return Selection(
        launch=LAUNCH * launch,
        product=PRODUCT * nanoseconds(lambda: q @ k.mT) / (8 * 512 * 512 * 64),
        score=SCORE * nanoseconds(lambda: torch.softmax(scores, -1)) / scores.numel(),
        order=ORDER * nanoseconds(lambda: torch.sort(scores, -1)) / (scores.numel() * math.log2(256)),
        view=VIEW * nanoseconds(lambda: keys.unflatten(1, (-1, 64)).mean(2)) / keys.numel(),
    )
