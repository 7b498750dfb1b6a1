"""Retrieval scores: how often a head's greatest weight is on the token that is copied (Wu et al., arXiv 2404.15574).

Published, the model generates the needle; here it reads it, and a step counts where the token that it would have said
is the one that follows. So one forward pass scores a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparsify.errors import InputError
from sparsify.planner.objective import logits_of
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.profiles.scores import by_score
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.settings import Settings
from sparsify.planner.site_call import SiteCall
from sparsify.planner.state import State
from sparsify.planner.study import studied


def retrieval(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """Heads by their retrieval score. Raises InputError where no sample has a fact to retrieve, or the model says no
    tokens."""
    if not any(sample.needles for sample in samples):
        raise InputError("plan: profile: retrieval needs samples with facts to copy; give recall a share above 0")
    if rig.instead:
        what = f"needs a model that gives logits, and this one gives {rig.instead}; take 'output' or 'influence'"
        raise InputError(f"plan: profile: retrieval {what}")
    return by_score(rig, retrieval_scores(rig, samples, state, progress), max(settings.lengths))


def retrieval_scores(rig: Rig, samples: Sequence[Sample], state: State, progress: Progress) -> np.ndarray:
    """(heads,): the share of the facts' tokens that a head points at when they are copied, the mean over samples."""
    with_needles = [sample for sample in samples if sample.needles]
    progress.expect([sample.length for sample in with_needles])
    total = np.zeros(len(rig.heads))
    for sample in with_needles:
        progress.tell(f"who copies, at {sample.length} tokens")
        found = state.of(("retrieval", sample.digest()), lambda sample=sample: {"scores": _scores(rig, sample)})
        total += found["scores"] / len(with_needles)
        progress.advance()
    return total


def _scores(rig: Rig, sample: Sample) -> np.ndarray:
    """A sample's scores; only what the model gets right counts, so they are at most the share of that."""
    pointed: dict[tuple[str, int], torch.Tensor] = {}
    asked = torch.cat([torch.arange(again - 1, again + size - 1) for _, again, size in sample.needles])
    source = torch.cat([torch.arange(fact, fact + size) for fact, _, size in sample.needles])

    def watch(call: SiteCall, out: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(call.launch.q.shape[1], len(asked), dtype=torch.bool)
        for rows in studied(call):
            mine = (asked >= rows.first) & (asked < rows.last)
            if mine.any():
                most = rows.weights[0][:, (asked[mine] - rows.first).to(rows.weights.device)].argmax(-1)
                found[:, mine] = (rows.keys()[most].cpu() - source[mine]) == 0
        pointed[call.key] = found
        return out

    with torch.no_grad():
        result = rig.run(sample, {}, watch)
    logits = logits_of(result)
    assert sample.tokens is not None
    right = logits[0, asked.to(logits.device)].argmax(-1).cpu() == sample.tokens[0, asked + 1]
    return np.concatenate([(pointed[site.key] & right).double().mean(-1).numpy() for site in rig.heads.sites])
