"""`Profile`: what each candidate of each head is expected to lose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparsify.planner.heads import Heads
from sparsify.planner.influence import Sketch

FAR = 0.1  # a head whose score is at least so high is a retrieval head (Wu et al., arXiv 2404.15574)


@dataclass(frozen=True)
class Profile:
    """losses: (heads, candidates), inf where there is none. scores: (heads,) of heads, where the profile makes some.
    current: the sketch of the model's output that the losses come from, and `at` (heads,) where it was made, for
    influence.
    """

    losses: np.ndarray
    scores: np.ndarray | None = None
    current: Sketch | None = None
    at: np.ndarray | None = None

    def scored(self, scores: np.ndarray) -> Profile:
        """The same with scores of heads."""
        return replace(self, scores=scores)

    def far(self) -> list[int]:
        """The places of the heads that look far back, the most important first."""
        if self.scores is None:
            return []
        order = np.argsort(-self.scores, kind="stable")
        return [int(one) for one in order if self.scores[one] >= FAR]

    def retrieval(self, heads: Heads) -> list[tuple[int, int]]:
        """The same as (site, head)."""
        return [(int(heads.site[one]), int(heads.number[one])) for one in self.far()]
