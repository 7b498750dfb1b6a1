"""dense: every pair is kept."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import TRUE, Pred
from sparsify.patterns.pattern import Pattern


@dataclass(frozen=True)
class Dense(Pattern):
    """Every key for every query."""

    def keep(self) -> Pred:
        return TRUE


def dense() -> Pattern:
    """Every key for every query; under a model's causal mask, full causal attention."""
    return Dense()
