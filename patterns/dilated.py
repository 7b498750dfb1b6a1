"""dilated: every d-th key, counted from the query (Longformer, Sparse Transformer "strided")."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Pred, eq
from sparsify.patterns.pattern import K, Pattern, Q
from sparsify.sizes import Size


@dataclass(frozen=True)
class Dilated(Pattern):
    """(q - k) mod every == 0."""

    every: Size

    def keep(self) -> Pred:
        return eq((Q - K) % self.every.divisor(), 0)


def dilated(every: int | str) -> Pattern:
    """Keys at a distance that is a multiple of `every`, on both sides."""
    return Dilated(Size.read(every, "dilated.every", low=1))
