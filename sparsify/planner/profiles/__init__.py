"""Profiles: what each candidate of each head loses, by one of several measures, the cheapest first.

recall      the part of the attention that is kept                                  forward
output      the error of the head's own output                                      forward
local       queries whose attention is local by second moments (QAdA)               forward
echo, induction   attention to repeats of a block of random tokens (RazorAttention) forward
retrieval   the head's greatest weight is on what is copied (Wu et al.)             forward
moa         first-order influence with the softmax renormalised (MoA)               one backward pass a sample
influence   the effect on the final output, all heads together                      a few backward passes a sample
effect      the same by running the model once for each candidate of each head      exact, and slow
gates       trained gates between all keys and a window with sinks (DuoAttention)   training
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsify.planner.profiles import effect, forward, gates, influence, moa, repeats, retrieval
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.settings import Settings
from sparsify.planner.state import State

KINDS: dict[str, Callable[[Rig, Sequence[Sample], Settings, State, Progress], Profile]] = {
    "recall": forward.recall,
    "output": forward.output,
    "local": forward.local,
    "echo": repeats.echo,
    "induction": repeats.induction,
    "retrieval": retrieval.retrieval,
    "moa": moa.moa,
    "influence": influence.influence,
    "effect": effect.effect,
    "gates": gates.gates,
}


def profiled(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """The profile that the settings ask for; with scores of retrieval, where samples have facts to retrieve and the
    model says tokens."""
    found = KINDS[settings.profile](rig, samples, settings, state, progress)
    if found.scores is None and not rig.instead and any(sample.needles for sample in samples):
        found = found.scored(retrieval.retrieval_scores(rig, samples, state, progress))
    return found


__all__ = ["KINDS", "Profile", "profiled"]
