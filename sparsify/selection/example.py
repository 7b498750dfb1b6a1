"""What a selection keeps, as a mask: of made-up data for pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.expr import TRUE
from sparsify.patterns.dense_mask import dense_mask
from sparsify.patterns.lists import choices, with_choices
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Lifetimes, Online, Selector
from sparsify.selection.choose import choose
from sparsify.selection.lifetimes import expiry

SIZE = 32  # of a head


def kept_of_made_up(pattern: Pattern, q_len: int, k_len: int) -> Any:
    """A bool array (1, q_len, k_len): what one head keeps of random queries and keys that drift along the sequence.

    A hook's scores are those of the means of blocks, and types of keys are drawn. What the kernel itself skips
    is not left out.
    """
    keep = pattern.keep()
    (chosen,) = choices(keep)
    mask = dense_mask(with_choices(keep, {chosen: TRUE}), 1, q_len, k_len)
    selector = Choice.parse(chosen.text).selector
    if isinstance(selector, Online):
        return mask.numpy()
    if isinstance(selector, Lifetimes):
        types = torch.rand(1, 1, k_len, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.55, 1.0, 1.0])
        lives = torch.arange(k_len - q_len, k_len)[:, None] <= expiry(types, selector.window)[0, 0]
        return (mask & lives).numpy()
    q, k = _drifting(q_len, 0), _drifting(k_len, 1)
    position = torch.arange(k_len - q_len, k_len).unsqueeze(0)
    scores = _by_means(selector, q, k) if selector.learned else None
    causal = not bool(mask.triu(k_len - q_len + 1).any())
    lists = choose(selector, q, k, scale=SIZE**-0.5, position=position, causal=causal, scores=scores)
    return (mask & mask_of(lists, selector, q_len, k_len)[0]).numpy()


def mask_of(lists: list[tuple[Tensor, Tensor]], selector: Selector, q_len: int, k_len: int) -> Tensor:
    """A selector's lists as a mask (B, L, q_len, k_len)."""
    kept = torch.zeros((), dtype=torch.bool)
    for (index, _), unit in zip(lists, selector.units(), strict=True):
        units = -(-k_len // unit)
        listed = torch.zeros(*index.shape[:-1], units + 1, dtype=torch.bool).scatter(-1, index.long(), True)
        tokens = listed[..., :units].repeat_interleave(unit, -1)[..., :k_len]
        kept = kept | tokens.repeat_interleave(selector.unit.q, -2)[..., :q_len, :]
    return kept


def _drifting(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(1, 1, n, SIZE, generator=generator)
    return own + torch.randn(1, 1, n, SIZE, generator=torch.Generator().manual_seed(2)).cumsum(2) / 8


def _by_means(selector: Selector, q: Tensor, k: Tensor) -> Tensor:
    rows, units = (
        torch.stack([part.mean(2) for part in x.split(size, 2)], 2)
        for x, size in ((q, selector.unit.q), (k, selector.unit.k))
    )
    return torch.softmax(rows @ units.mT * SIZE**-0.5, -1)
