"""Influence of candidates on the model's final output: heads count by what they do to it (see `planner.influence`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsify.planner.influence import sketched
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.settings import Settings
from sparsify.planner.state import State


def influence(
    rig: Rig,
    samples: Sequence[Sample],
    settings: Settings,
    state: State,
    progress: Progress,
    at: np.ndarray | None = None,
) -> Profile:
    """Losses where the model is at an assignment `at` (heads,), the dense one by default."""
    at = np.full(len(rig.heads), rig.dense) if at is None else at
    current = sketched(rig, samples, at, settings.probes, state, progress)
    return Profile(current.alone(), None, current, at)
