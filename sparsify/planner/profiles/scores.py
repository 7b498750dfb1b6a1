"""From a score of each head to losses of its candidates: what a head that looks far loses is what is dropped of it."""

from __future__ import annotations

import numpy as np

from sparsify.planner.heads import Costs
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.rig import Rig

FLOOR = 1e-3  # what is lost of a head without a score, so that a budget is spent on it, too


def by_score(rig: Rig, scores: np.ndarray, longest: int) -> Profile:
    """Losses of (score + a little) x the share of the pairs that a candidate drops, so that a budget keeps the heads of
    the highest scores whole. With one other candidate that is ranking and cutting (RazorAttention, DuoAttention)."""
    shares = Costs(rig.heads, (longest,), "pairs").shares(rig.patterns)[0]
    dropped = 1 - np.minimum(1.0, shares / shares[:, rig.dense, None])
    return Profile((scores[:, None] + FLOOR) * dropped, scores)
