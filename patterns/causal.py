"""causal: no key after the query."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Expr, Pred, conjunction
from sparsify.patterns.pattern import K, Pattern, Q


@dataclass(frozen=True)
class Causal(Pattern):
    """k <= q."""

    def keep(self) -> Pred:
        return K <= Q


def causal() -> Pattern:
    """Keys up to and including the query's own position."""
    return Causal()


def is_causal(keep: Pred, position: Expr = Q) -> bool:
    """Whether a predicate keeps no key after the query, whose position among the keys is given (as far as its
    canonical form shows)."""
    return conjunction([keep, position >= K]) == keep
