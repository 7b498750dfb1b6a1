"""Residues: the tokens with one remainder lie together, so that dilated patterns have dense tiles.

A query of `dilated(8)` keeps every eighth key: none of the tiles of 64 neighbours is empty, and none is full. Where 64
slots hold tokens that are 8 apart instead, a query tile's keys are its own residue's tiles, kept or dropped as a whole
("dilation moves to batch"); so are the columns of a stride ("strides transpose"). Nothing is moved in memory: kernels
read row `token(slot)` while they pack a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsify.expr import (
    And,
    Eq,
    Expr,
    Ge,
    Load,
    Mod,
    Or,
    Pred,
    Sum,
    Var,
    as_expr,
    conjunction,
    constant,
    disjunction,
    eq,
    floordiv,
    minimum,
    mod,
)
from sparsify.patterns.layouts.boxes import TILE
from sparsify.walk import rewrite, variables

Q, K, N = Var("q"), Var("k"), Var("N")
Leaf = Callable[[Expr], Expr | None]


@dataclass(frozen=True)
class Residues:
    """The slots of N tokens: those with remainder 0 by `every`, filled up to whole tiles, those with remainder 1, ...

    It holds for any N: how many slots a residue has is an expression. queries: whether queries lie like that, too;
    else only keys do. Of an empty slot the token is N or more; what is read of one from tensors is that of token N - 1.
    """

    every: int
    queries: bool = True

    @functools.cached_property
    def each(self) -> Expr:
        """How many slots a residue has."""
        span = TILE * self.every
        return (N + (span - 1)) // span * TILE

    @functools.cached_property
    def slots(self) -> Expr:
        """All of them."""
        return self.each * self.every

    def residue(self, slot: Expr) -> Expr:
        """The remainder of a slot's token."""
        return slot // self.each

    def token(self, slot: Expr) -> Expr:
        """The token of a slot."""
        return slot % self.each * self.every + self.residue(slot)

    def keep(self, rule: Pred, among: bool = False) -> Pred:
        """A rule over tokens as one over slots; it drops the keys of empty ones.

        among: there may be slots beyond these, which are empty as well.
        """
        return _kept(self, rule, among)

    def divides(self, part: Pred) -> bool:
        """Whether tiles of this layout tell what a condition keeps: it is that the key has one remainder a tile."""
        found = self._remainder(part)
        return found is not None and (self.queries or "q" not in variables(found))

    def _walk(self, rule: Pred, among: bool) -> Pred:
        if isinstance(rule, Or):
            return disjunction(self._walk(part, among) for part in rule.parts)
        parts = rule.parts if isinstance(rule, And) else (rule,)
        for part in parts:
            others = [other for other in parts if other is not part]
            if self.divides(part):
                return self._inside(self._remainder(part), others)
            if isinstance(part, Or) and any(self.divides(one) for branch in part.parts for one in _parts(branch)):
                return self._walk(disjunction(conjunction([branch, *others]) for branch in part.parts), among)
        leaf = self._leaf({"k": self.token(K)} | ({"q": self.token(Q)} if self.queries else {}))
        rest = [self.slots > K] if among else []
        rest += [] if _causal(parts) else [self.token(K) < N]
        return conjunction([*(rewrite(part, leaf) for part in parts), *rest])

    def _inside(self, residue: Expr | None, parts: Sequence[Pred]) -> Pred:
        """The parts for the keys of one residue: what is linear in tokens is so in slots, too."""
        assert residue is not None
        start = self.each * residue
        found = {"k": (K - start) * self.every + residue}
        if self.queries:
            found["q"] = (Q - start) * self.every + residue if residue == self.residue(Q) else self.token(Q)
        leaf = self._leaf(found)
        rest = [] if _causal(parts) else [found["k"] < N]
        placed = [rewrite(part, leaf) for part in parts]
        return conjunction([eq(self.residue(K), residue), *map(_solved, [*placed, *rest])])

    def _remainder(self, part: Pred) -> Expr | None:
        """The remainder that a key must have, over q and h, where that is what a condition says; else None."""
        expr = part.expr if isinstance(part, Eq) else None
        terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
        with_k = [(c, atom) for c, atom in terms if isinstance(atom, Mod) and "k" in variables(atom)]
        if expr is None or len(with_k) != 1 or abs(with_k[0][0]) != 1:
            return None
        sign, atom = with_k[0]
        value = (expr - atom * sign) * -sign
        inner = atom.left
        own = next((c for c, one in (inner.terms if isinstance(inner, Sum) else ((1, inner),)) if one == K), 0)
        rest = inner - K * own
        if constant(atom.right) != self.every or abs(own) != 1 or "k" in variables(rest) | variables(value):
            return None
        if not self._below(value):
            return None
        leaf = self._leaf({"q": self.token(Q)} if self.queries else {})
        return leaf(Mod((value - rest) * own, as_expr(self.every)))

    def _below(self, value: Expr) -> bool:
        """Whether a value is a remainder by `every`."""
        known = constant(value)
        if known is not None:
            return 0 <= known < self.every
        return isinstance(value, Mod) and (constant(value.right) or self.every + 1) <= self.every

    def _leaf(self, tokens: dict[str, Expr]) -> Leaf:
        """Puts tokens in place of q and k, and residues in place of their remainders."""
        safe = {name: minimum(self.token(Var(name)), N - 1) for name in tokens}
        own = {mod(self.residue(Var(name)), self.every): self.residue(Var(name)) for name in tokens}

        def read(node: Expr) -> Expr | None:
            return safe.get(node.name) if isinstance(node, Var) else None

        def leaf(node: Expr) -> Expr | None:
            if isinstance(node, Var):
                return tokens.get(node.name)
            if isinstance(node, Load):
                return Load(node.source, tuple(rewrite(part, read) for part in node.index))
            if isinstance(node, Mod) and constant(node.right) == self.every:
                found = mod(rewrite(node.left, leaf), self.every)
                return own.get(found, found)
            return None

        return leaf


@functools.lru_cache(maxsize=4096)
def _kept(kind: Residues, rule: Pred, among: bool) -> Pred:
    placed = kind._walk(rule, among)
    return placed & (kind.slots > Q) if among and kind.queries else placed


def _parts(pred: Pred) -> tuple[Pred, ...]:
    return pred.parts if isinstance(pred, And) else (pred,)


def _causal(parts: Sequence[Pred]) -> bool:
    """Whether one of the conditions is that a key is not after the query: then it is of a token if the query is."""
    gaps = (constant(part.expr - (Q - K)) for part in parts if isinstance(part, Ge))
    return any(gap is not None and gap <= 0 for gap in gaps)


def _solved(part: Pred) -> Pred:
    """A bound on a multiple of k as the same bound on k, which loops know how to stop at."""
    if isinstance(part, And | Or):
        return (conjunction if isinstance(part, And) else disjunction)(map(_solved, part.parts))
    if not isinstance(part, Ge) or not isinstance(part.expr, Sum):
        return part
    factor = next((c for c, atom in part.expr.terms if atom == K), 0)
    rest = part.expr - K * factor
    if abs(factor) < 2 or "k" in variables(rest):
        return part
    return floordiv(rest, abs(factor)) + (K if factor > 0 else -K) >= 0
