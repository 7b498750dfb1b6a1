"""Keys sorted inside segments: predicates over tokens as ones over slots (PBS-Attn).

A slot holds a token of its own segment. So between segments the order is what it was, and inside one a load says it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsify import bias
from sparsify.bias import Bias
from sparsify.expr import And, Chosen, Expr, Or, Pred, Var, conjunction, disjunction, eq
from sparsify.patterns.layouts.lay_out import LaidOut
from sparsify.program import Layout
from sparsify.walk import substitute

K = Var("k")


@dataclass(frozen=True)
class Segments:
    """size: tokens of a segment. token: that of slot k, over b, h, k and loads, one order for the query heads of a key
    head. position: a query's, over q and loads."""

    size: int
    token: Expr
    position: Expr = Var("q")

    def chosen(self, listed: Pred) -> Pred:
        """What a selection keeps by its lists of slots: those of earlier segments, and the query's own segment."""
        return (listed & self._earlier) | self._own

    def keep(self, rule: Pred) -> Pred:
        """A rule over tokens as one over slots; `Chosen` stays for `chosen` to replace."""
        match rule:
            case Chosen():
                return rule
            case And(parts):
                return conjunction(map(self.keep, parts))
            case Or(parts):
                return disjunction(map(self.keep, parts))
        placed = substitute(rule, {"k": self.token})
        if rule == (self.position >= K):
            return self._earlier | (self._own & placed)  # kernels skip, and run unmasked, whole segments by that
        return placed

    def laid_out(self, keeps: Iterable[Pred], terms: Bias = (), sink: Bias | None = None) -> LaidOut:
        """The fields of a program for rules over slots and for biases over tokens."""
        keys = Layout(Var("N"), self.token)
        return LaidOut(tuple(keeps), bias.substitute(terms, {"k": self.token}), sink, keys=keys)

    @property
    def _earlier(self) -> Pred:
        return self.position // self.size >= K // self.size + 1

    @property
    def _own(self) -> Pred:
        return eq(K // self.size, self.position // self.size)
