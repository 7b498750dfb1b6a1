"""Predicates over many boxes at once, part by part: each part is evaluated at as few positions as it tells apart.

Most parts of a predicate depend on the query alone, on the key alone, or on how far they are apart. So of thousands of
boxes of pairs few differ, and over all pairs of a query tile and a key tile a part has few values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sparsify.cost.nest import Nest
from sparsify.expr import And, Or, Pred, Var
from sparsify.patterns.spans import Array
from sparsify.walk import evaluate, loads, substitute, variables

QUERY, KEY, APART, BOTH = "query", "key", "apart", "both"
SHIFT = Var("shift")


@functools.lru_cache(maxsize=4096)
def told_by(part: Pred) -> str:
    """What a part of a predicate depends on, over pairs or over corners of tiles: QUERY, KEY, how far they are APART,
    or BOTH."""
    names = variables(part)
    if not names & {"k", "k0", "k1"}:
        return QUERY
    if not names & {"q", "q0", "q1"}:
        return KEY
    moved = {name: Var(name) + SHIFT for name in ("q", "q0", "q1", "k", "k0", "k1")}
    return APART if not loads(part) and substitute(part, moved) == part else BOTH


def by_parts(pred: Pred, value: Callable[[Pred], Array]) -> Array:
    """A predicate from the values of its parts, bool arrays that broadcast."""
    match pred:
        case And(parts):
            return functools.reduce(np.logical_and, (by_parts(part, value) for part in parts), np.True_)
        case Or(parts):
            return functools.reduce(np.logical_or, (by_parts(part, value) for part in parts), np.False_)
    return value(pred)


class Cells(NamedTuple):
    """Boxes of at most `rows` queries by `columns` keys: int64 arrays (cells,) of their corners, ends included."""

    q0: Array
    q1: Array
    k0: Array
    k1: Array
    rows: int
    columns: int

    def pairs(self, keep: Pred, env: Mapping[str, Any]) -> tuple[Array, Array, Array]:
        """(first, count, kept) of cells that differ in what they keep or in how they are cut: one of each kind, how
        many are of it, and bool (kinds, rows, columns), false in queries beyond q1; keys beyond k1 are as k1's is."""
        values = {part: self._value(part, env) for part in _leaves(keep)}
        first, count = self._kinds(values)
        row = self.q0[first, None] + np.arange(self.rows) <= self.q1[first, None]
        kept = by_parts(keep, lambda part: self._spread(part, values[part][first])) & row[:, :, None]
        kept = np.broadcast_to(kept, (first.size, self.rows, self.columns))
        width = (self.k1 - self.k0)[first]
        if (width < self.columns - 1).any():
            kept = np.take_along_axis(kept, np.minimum(np.arange(self.columns), width[:, None])[:, None], 2)
        return first, count, kept

    def _value(self, part: Pred, env: Mapping[str, Any]) -> Array:
        """A part in all cells, (cells, what tells it): queries, keys, distances from the least on, or pairs."""
        kind = told_by(part)
        if kind == APART:
            apart = (self.q0 - self.k0)[:, None] + np.arange(1 - self.columns, self.rows)
            return _bools(evaluate(part, {**env, "q": apart, "k": 0}), apart.shape)
        q = np.minimum(self.q0[:, None] + np.arange(self.rows), self.q1[:, None])
        if kind == QUERY:
            return _bools(evaluate(part, {**env, "q": q}), q.shape)
        k = np.minimum(self.k0[:, None] + np.arange(self.columns), self.k1[:, None])
        if kind == KEY:
            return _bools(evaluate(part, {**env, "k": k}), k.shape)
        return _bools(evaluate(part, {**env, "q": q[:, :, None], "k": k[:, None]}), (*q.shape, self.columns))

    def _spread(self, part: Pred, value: Array) -> Array:
        """The values of a part in some cells as (cells, rows, columns), or what broadcasts to it."""
        match told_by(part):
            case "query":
                return value[:, :, None]
            case "key":
                return value[:, None]
            case "apart":
                return np.lib.stride_tricks.sliding_window_view(value, self.columns, 1)[:, :, ::-1]
        return value

    def _kinds(self, values: Mapping[Pred, Array]) -> tuple[Array, Array]:
        """The first cell of each kind, and how many are of it."""
        if any(told_by(part) == BOTH for part in values):
            return np.arange(self.q0.size), np.ones(self.q0.size, np.int64)
        cut = np.stack([self.q1 - self.q0, self.k1 - self.k0], 1).view(np.uint8)
        text = np.concatenate([cut, *(np.packbits(value, axis=1) for value in values.values())], 1)
        rows = np.ascontiguousarray(text).view(np.dtype((np.void, text.shape[1])))[:, 0]
        _, first, count = np.unique(rows, return_index=True, return_counts=True)
        return first, count


def _bools(values: Any, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.asarray(values, bool), shape)


def _leaves(pred: Pred) -> dict[Pred, None]:
    if not isinstance(pred, And | Or):
        return {pred: None}
    return {leaf: None for part in pred.parts for leaf in _leaves(part)}


class KeyTiles:
    """(query tile, key tile) pairs of one head, at which predicates over corners are asked.

    env: their variables, q0 and q1 of all query tiles in their order. keys: how many slots of keys there are.
    """

    def __init__(self, env: Mapping[str, Any], keys: int, nest: Nest, tile: Array, key: Array) -> None:
        self.env, self.nest, self.tile, self.key = env, nest, tile, key
        self.k0 = np.arange(0, keys, nest.keys)
        self.k1 = np.minimum(self.k0 + nest.keys, keys) - 1
        self.step = math.gcd(nest.rows, nest.keys)

    @functools.cached_property
    def cut(self) -> Array:
        """The places of pairs whose tile of queries or of keys ends early."""
        rows, keys = self.env["q1"] - self.env["q0"] != self.nest.rows - 1, self.k1 - self.k0 != self.nest.keys - 1
        if not rows.any() and not keys.any():
            return np.zeros(0, np.int64)
        return np.flatnonzero(rows[self.tile] | keys[self.key])

    @functools.cached_property
    def apart(self) -> tuple[Array, int, int]:
        """How far each pair's first query and key are apart, in steps beyond the least; that; how many there are."""
        found = self.tile * (self.nest.rows // self.step) - self.key * (self.nest.keys // self.step)
        least = int(found.min(initial=0))
        found -= least
        return found, least, int(found.max(initial=0)) + 1

    def holds(self, pred: Pred) -> Array:
        """A predicate at each pair, or what broadcasts to it."""
        return by_parts(pred, self._part)

    def _part(self, part: Pred) -> Array:
        match told_by(part):
            case "query":
                return _taken(evaluate(part, self.env), self.tile)
            case "key":
                return _taken(evaluate(part, {**self.env, "k0": self.k0, "k1": self.k1}), self.key)
            case "apart":
                return self._apart(part)
        return np.asarray(self._asked(part, slice(None)))

    def _apart(self, part: Pred) -> Array:
        """A part that is told by how far uncut tiles are apart."""
        places, least, count = self.apart
        q0 = (np.arange(count) + least) * self.step + int(self.env["q0"][0])
        corners = {"q0": q0, "q1": q0 + self.nest.rows - 1, "k0": 0, "k1": self.nest.keys - 1}
        found = _taken(np.broadcast_to(evaluate(part, {**self.env, **corners}), q0.shape), places)
        if self.cut.size:
            found[self.cut] = self._asked(part, self.cut)
        return found

    def _asked(self, part: Pred, some: Any) -> Any:
        """A part at some pairs, each by itself."""
        tile, key = self.tile[some], self.key[some]
        corners = {"q0": self.env["q0"][tile], "q1": self.env["q1"][tile], "k0": self.k0[key], "k1": self.k1[key]}
        return evaluate(part, {**self.env, **corners})


def _taken(values: Any, places: Array) -> Array:
    """Those at places of an array; one value for all as it is."""
    found = np.asarray(values)
    return found[places] if found.ndim else found
