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
        q = np.minimum(self.q0[:, None] + np.arange(self.rows), self.q1[:, None])
        k = np.minimum(self.k0[:, None] + np.arange(self.columns), self.k1[:, None])
        match told_by(part):
            case "query":
                here, shape = {"q": q}, q.shape
            case "key":
                here, shape = {"k": k}, k.shape
            case "apart":
                apart = (self.q0 - self.k0)[:, None] + np.arange(1 - self.columns, self.rows)
                here, shape = {"q": apart, "k": 0}, apart.shape
            case _:
                here, shape = {"q": q[:, :, None], "k": k[:, None]}, (*q.shape, self.columns)
        return np.broadcast_to(np.asarray(evaluate(part, {**env, **here}), bool), shape)

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


def _leaves(pred: Pred) -> dict[Pred, None]:
    if not isinstance(pred, And | Or):
        return {pred: None}
    return {leaf: None for part in pred.parts for leaf in _leaves(part)}


def of_tiles(pred: Pred, env: Mapping[str, Any], keys: int, nest: Nest, tile: Array, key: Array) -> Array:
    """A predicate over corners at (query tile, key tile) pairs. env: its variables, q0 and q1 of all query tiles in
    their order. keys: how many slots of keys there are."""
    k0 = np.arange(0, keys, nest.keys)
    k1 = np.minimum(k0 + nest.keys, keys) - 1
    cut = (env["q1"] - env["q0"] != nest.rows - 1)[tile] | (k1 - k0 != nest.keys - 1)[key]

    def asked(part: Pred, some: Any = slice(None)) -> Array:
        corners = {"q0": env["q0"][tile[some]], "q1": env["q1"][tile[some]], "k0": k0[key[some]], "k1": k1[key[some]]}
        return evaluate(part, {**env, **corners})

    def value(part: Pred) -> Array:
        match told_by(part):
            case "query":
                found = np.asarray(evaluate(part, env))
                return found[tile] if found.ndim else found
            case "key":
                found = np.asarray(evaluate(part, {**env, "k0": k0, "k1": k1}))
                return found[key] if found.ndim else found
            case "apart":
                found = _apart(part, env, nest, tile, key)
                found[cut] = asked(part, cut)
                return found
        return asked(part)

    return by_parts(pred, value)


def _apart(part: Pred, env: Mapping[str, Any], nest: Nest, tile: Array, key: Array) -> Array:
    """A part that is told by how far apart uncut tiles are."""
    step = math.gcd(nest.rows, nest.keys)
    place = tile * (nest.rows // step) - key * (nest.keys // step)
    least = int(place.min(initial=0))
    q0 = (np.arange(least, int(place.max(initial=0)) + 1)) * step + int(env["q0"][0])
    found = evaluate(part, {**env, "q0": q0, "q1": q0 + nest.rows - 1, "k0": 0, "k1": nest.keys - 1})
    return np.broadcast_to(np.asarray(found, bool), q0.shape)[place - least]
