"""The effect of each candidate of each head on the final output, measured by running the model with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsify.planner.profiles.profile import Profile
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.settings import Settings
from sparsify.planner.state import State


def effect(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """The distance from the dense output with one head of the dense model under a candidate: exact, one run each."""
    total = np.zeros((len(rig.heads), len(rig.candidates)))
    progress.expect([sample.length for sample in samples for _ in range(len(rig.heads))])
    for sample in samples:
        for head in range(len(rig.heads)):
            progress.tell(f"head {head} by itself, at {sample.length} tokens")
            key = "effect", sample.digest(), head
            found = state.of(key, lambda sample=sample, head=head: {"losses": _of_head(rig, sample, head)})
            total[head] += found["losses"] / len(samples)
            progress.advance()
    return Profile(total)


def _of_head(rig: Rig, sample: Sample, head: int) -> np.ndarray:
    found = np.zeros(len(rig.candidates))
    for candidate in range(len(rig.candidates)):
        if candidate != rig.dense:
            chosen = np.full(len(rig.heads), rig.dense)
            chosen[head] = candidate
            found[candidate] = rig.distance(sample, rig.assignment(chosen))
    return found
