"""sinks: the first keys of the sequence (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Pred
from sparsify.patterns.pattern import K, Pattern
from sparsify.sizes import Size


@dataclass(frozen=True)
class Sinks(Pattern):
    """k < n."""

    n: Size

    def keep(self) -> Pred:
        return self.n.expr() > K


def sinks(n: int | str) -> Pattern:
    """The first `n` keys, for every query. Not causal by itself: compose with `& causal()`."""
    return Sinks(Size.read(n, "sinks.n", low=0))
