"""Echo and induction scores: where heads look in a block of random tokens that is repeated (RazorAttention)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparsify.errors import InputError
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.profiles.scores import by_score
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.settings import Settings
from sparsify.planner.site_call import SiteCall
from sparsify.planner.state import State
from sparsify.planner.study import studied

REPEATS = 4


def echo(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """Heads by their attention to the same token in earlier repeats."""
    return by_score(rig, repeat_scores(rig, samples, settings, state, progress, 0), max(settings.lengths))


def induction(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """Heads by their attention to the token behind the same one in earlier repeats."""
    return by_score(rig, repeat_scores(rig, samples, settings, state, progress, 1), max(settings.lengths))


def repeat_scores(
    rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress, behind: int
) -> np.ndarray:
    """(heads,): the mean, over positions i of later repeats, of the attention to i - m * block + behind for all m.

    The block is a quarter of the longest length, of tokens that the samples have; 2500 tokens at most, as published.
    Raises InputError for samples that are no tokens.
    """
    sample = max(samples, key=lambda one: one.length)
    if sample.tokens is None or "input_ids" not in sample.inputs:
        raise InputError("plan: profile: echo and induction repeat tokens, and the data are none")
    block = min(2500, sample.length // REPEATS)
    drawn = np.random.default_rng(settings.seed).choice(np.unique(sample.tokens.numpy()), block)
    repeated = Sample.of_tokens(torch.from_numpy(np.tile(drawn, REPEATS)))
    progress.expect([repeated.length])
    progress.tell(f"{REPEATS} repeats of {block} tokens")
    key = "repeats", repeated.digest(), behind
    found = state.of(key, lambda: {"scores": _scores(rig, repeated, block, behind)})
    progress.advance()
    return found["scores"]


def _scores(rig: Rig, sample: Sample, block: int, behind: int) -> np.ndarray:
    found: dict[tuple[str, int], np.ndarray] = {}

    def watch(call: SiteCall, out: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(call.launch.q.shape[1], dtype=torch.float64)
        for rows in studied(call):
            total += _looked(rows.shares(), rows.keys(), rows.first, rows.last, block, behind)
        found[call.key] = (total / (call.at.q_len - block)).numpy()
        return out

    with torch.no_grad():
        rig.run(sample, {}, watch)
    return np.concatenate([found[site.key] for site in rig.heads.sites])


def _looked(weights: torch.Tensor, keys: torch.Tensor, first: int, last: int, block: int, behind: int) -> torch.Tensor:
    """(heads,): weights (B, Hq, rows, columns) on the earlier repeats of what each row is at; keys: of the columns."""
    at = torch.arange(first, last, device=keys.device)[:, None]
    gap = at - keys[None, :] + behind
    there = (gap > 0) & (gap % block == 0) & (gap // block >= 1) & (at >= block)
    return (weights * there).sum((0, 2, 3)).double().cpu() / weights.shape[0]
