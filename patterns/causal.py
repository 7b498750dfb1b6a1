"""causal: no key after the query."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Pred
from sparsify.patterns.pattern import K, Pattern, Q


@dataclass(frozen=True)
class Causal(Pattern):
    """k <= q."""

    def keep(self) -> Pred:
        return K <= Q


def causal() -> Pattern:
    """Keys up to and including the query's own position."""
    return Causal()
