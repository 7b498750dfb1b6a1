"""Layouts by residues for the heads of a launch: each key head has its own, or none, and all are in one program."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from sparsify import bias as biases
from sparsify.bias import Bias
from sparsify.expr import (
    TRUE,
    And,
    Expr,
    Load,
    Mod,
    Or,
    Pred,
    Var,
    conjunction,
    constant,
    disjunction,
    maximum,
    minimum,
    select,
)
from sparsify.patterns.count import executed
from sparsify.patterns.layouts.best import WORTH, tile_cost
from sparsify.patterns.layouts.boxes import TILE
from sparsify.patterns.layouts.residues import Residues
from sparsify.patterns.lists import choices, lists
from sparsify.program import Layout
from sparsify.ranges import of_numbers
from sparsify.sizes import size_values
from sparsify.walk import evaluate, rewrite, substitute, variables

H, N = Var("h"), Var("N")
LONG = 8192  # tokens at which layouts are compared: few patterns change places beyond
MOST = 4  # strides that are tried for one key head


@dataclass(frozen=True)
class ByHead:
    """kinds: how the tokens of each key head lie, None for in their order. group: query heads of a key head."""

    kinds: tuple[Residues | None, ...]
    group: int

    @functools.cached_property
    def slots(self) -> Expr:
        """As many as the head with most of them has; to the others the last ones are empty."""
        return functools.reduce(maximum, (kind.slots for kind in self._distinct if kind is not None))

    def keep(self, rule: Pred, head: int) -> Pred:
        """A query head's rule over slots."""
        kind = self.kinds[head // self.group]
        if kind is not None:
            return kind.keep(rule, among=kind.slots != self.slots)
        return _in_order(rule, any(one is not None and one.queries for one in self.kinds))

    def layout(self, name: str) -> Layout | None:
        """That of queries, q, or of keys, k; None where all lie in their order."""
        slot = Var(name)
        if not any(map(functools.partial(_lays, name), self.kinds)):
            return None
        token: Expr | None = None
        filled = []
        for kind in self._distinct:
            here = kind.token(slot) if kind is not None and _lays(name, kind) else slot
            mine = [self._has(kind), here < N]
            if kind is not None and _lays(name, kind) and kind.slots != self.slots:
                mine.append(slot < kind.slots)
            filled.append(conjunction(mine))
            token = here if token is None else select(self._has(kind), here, token)
        assert token is not None
        return Layout(self.slots, token, disjunction(filled))

    def bias(self, bias: Bias) -> Bias:
        """A bias, or a sink's, over slots. Of what is empty it may say anything, but reads inside its tensors."""
        if not bias:
            return bias
        layouts = {name: self.layout(name) for name in "qk"}
        tokens = {name: minimum(one.token, N - 1) for name, one in layouts.items() if one is not None}

        def leaf(node: Expr) -> Expr | None:
            return tokens.get(node.name) if isinstance(node, Var) else None

        return biases.rewrite(bias, leaf)

    @functools.cached_property
    def _distinct(self) -> tuple[Residues | None, ...]:
        return tuple(dict.fromkeys(self.kinds))

    def _has(self, kind: Residues | None) -> Pred:
        """Whether a head's tokens lie like that."""
        mine = of_numbers(number for number, one in enumerate(self.kinds) if one == kind)
        if mine == ((0, len(self.kinds) - 1),):
            return TRUE
        group = self.group
        return disjunction((first * group <= H) & ((last + 1) * group > H) for first, last in mine)


@functools.lru_cache(maxsize=4096)
def _in_order(rule: Pred, queries: bool) -> Pred:
    """A rule where slots are tokens up to N, of keys and maybe of queries."""
    return conjunction([rule, Var("k") < N, *([Var("q") < N] if queries else [])])


def _lays(name: str, kind: Residues | None) -> bool:
    return kind is not None and (name == "k" or kind.queries)


@dataclass(frozen=True)
class BestByHead:
    """Layouts that pay from `least` tokens on, and the share of `LONG` ** 2 pairs that kernels execute with and without
    them, heads on average."""

    laid: ByHead
    least: int
    share: float
    plain: float

    def __str__(self) -> str:
        kinds = self.laid.kinds
        found = {one: kinds.count(one) for one in dict.fromkeys(kinds) if one is not None}
        told = [
            f"{'tokens' if one.queries else 'keys'} {one.every} apart together"
            + (f" for {count} of {len(kinds)} key heads" if count < len(kinds) else "")
            for one, count in found.items()
        ]
        return f"{', '.join(told)}: {self.share:.1%} of the pairs of {LONG} executed, {self.plain:.1%} without"


NEVER = sys.maxsize


@functools.lru_cache(maxsize=256)
def best_by_head(heads: tuple[Pred, ...], kv_heads: int) -> BestByHead | None:
    """The layouts for heads with these rules over tokens, all of which are queries and keys; None where their own order
    is as good, and where a head has a list of keys, which counts tokens in it."""
    if any(lists(rule) or choices(rule) for rule in heads):
        return None
    group = len(heads) // max(1, kv_heads)
    sites = [list(enumerate(heads))[at : at + group] for at in range(0, len(heads), max(1, group))]
    tried = [_kinds(mine) for mine in sites]
    if all(len(kinds) == 1 for kinds in tried):
        return None
    kinds = tuple(
        min(mine, key=lambda kind: _cost(site, kind, LONG)[0]) for site, mine in zip(sites, tried, strict=True)
    )
    if not any(kinds):
        return None
    laid, least = ByHead(kinds, group), NEVER

    def costs(length: int, chosen: Sequence[Residues | None]) -> tuple[float, float]:
        found = [_cost(mine, kind, length) for mine, kind in zip(sites, chosen, strict=True)]
        return sum(cost for cost, _ in found), sum(share for _, share in found) / len(heads)

    length = LONG
    while length > TILE and costs(length, kinds)[0] < WORTH * costs(length, [None] * len(sites))[0]:
        least, length = length, length // 2
    shares = (costs(LONG, chosen)[1] for chosen in (kinds, [None] * len(sites)))
    return None if least == NEVER else BestByHead(laid, least, *shares)


def layouts_at(heads: tuple[Pred, ...], kv_heads: int, length: int) -> BestByHead | None:
    """Those of `best_by_head` where there are enough tokens for them; of a symbolic length that is a guard."""
    found = best_by_head(heads, kv_heads)
    return found if found is not None and length >= found.least else None


def _kinds(mine: Sequence[tuple[int, Pred]]) -> list[Residues | None]:
    """How the tokens of a key head may lie: in their order first, then by the strides in its heads' rules."""
    strides = dict.fromkeys(stride for _, rule in mine for stride in _strides(rule))
    tried = (Residues(stride, queries) for stride in list(strides)[:MOST] for queries in (False, True))
    return [None, *(one for one in tried if any(_divided(one, rule) for _, rule in mine))]


@functools.lru_cache(maxsize=4096)
def _strides(pred: Pred) -> tuple[int, ...]:
    """The strides by which a rule takes keys."""
    sizes = (constant(atom.right) for atom in _mods(pred) if "k" in variables(atom))
    return tuple(size for size in sizes if size is not None and 1 < size <= LONG // 2)


def _mods(node: Pred) -> list[Mod]:
    found: list[Mod] = []

    def leaf(atom: Expr) -> Expr | None:
        if isinstance(atom, Mod):
            found.append(atom)
        return atom if isinstance(atom, Load) else None

    rewrite(node, leaf)
    return found


@functools.lru_cache(maxsize=4096)
def _divided(kind: Residues, rule: Pred) -> bool:
    """Whether a layout makes whole tiles of a condition anywhere in a rule."""
    if isinstance(rule, And | Or):
        return any(_divided(kind, part) for part in rule.parts)
    return kind.divides(rule)


def _cost(mine: Sequence[tuple[int, Pred]], kind: Residues | None, length: int) -> tuple[float, float]:
    """(cost, share of the executed pairs) of heads with that layout, as parts of all pairs of one."""
    found = [_head_cost(rule, head if "h" in variables(rule) else 0, kind, length) for head, rule in mine]
    return sum(cost for cost, _ in found), sum(share for _, share in found)


@functools.lru_cache(maxsize=4096)
def _head_cost(rule: Pred, head: int, kind: Residues | None, length: int) -> tuple[float, float]:
    keep = rule if kind is None else kind.keep(rule)
    known = {"N": length, "Nq": length} | size_values(variables(keep), length)
    slots = length if kind is None else int(evaluate(kind.slots, known))
    visited, whole = executed(substitute(keep, known), slots, head)
    pairs = (length / TILE) ** 2
    return tile_cost(visited, whole) / pairs, visited / pairs
