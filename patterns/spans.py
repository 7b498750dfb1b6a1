"""The key tiles of all query tiles at once, as arrays of intervals: no tile is looked at one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparsify.expr import Pred
from sparsify.patterns.interior import interiors
from sparsify.patterns.tiles import Band
from sparsify.walk import evaluate

Array = np.ndarray


class Pieces(NamedTuple):
    """Disjoint intervals [low, high) in ascending order for each query tile: int64 arrays (pieces, query tiles)."""

    low: Array
    high: Array

    @property
    def lengths(self) -> Array:
        """How much the intervals hold together, for each query tile."""
        return (self.high - self.low).sum(0)


Bands = tuple[Band, ...]


def band_pieces(rules: list[tuple[Bands, dict[str, Any]]], count: int, end: int, width: int = 1) -> Pieces:
    """What the bands of rules touch in units of `width` keys; each with the corners of its `count` query tiles."""
    found = []
    for bands, env in rules:
        for band in bands:
            low = _limit(band.low, env, count, 0)
            high = np.minimum(_limit(band.high, env, count, end), end)
            low = np.maximum(low, 0)
            nothing = np.broadcast_to(evaluate(band.unless, env), (count,)) | (low >= high)
            found.append((np.where(nothing, 0, low // width), np.where(nothing, 0, -(-high // width))))
    return merged(found, count)


def interior_pieces(keep: Pred, env: dict[str, Any], count: int, end: int, width: int = 1) -> Pieces:
    """The whole units of `width` keys that every query of a tile keeps, as far as closed forms say."""
    found = []
    for one in interiors(keep):
        if one.data_bounds():
            continue
        low = -(-np.maximum(_limit(one.low, env, count, 0), 0) // width)
        high = np.minimum(_limit(one.high, env, count, end), end) // width
        there = np.broadcast_to(evaluate(one.when, env), (count,)) & (low < high)
        found.append((np.where(there, low, 0), np.where(there, high, 0)))
    return merged(found, count)


def _limit(limit: Any, env: dict[str, Any], count: int, otherwise: int) -> Array:
    value = otherwise if limit is None else evaluate(limit, env)
    return np.broadcast_to(np.asarray(value, dtype=np.int64), (count,))


def merged(found: list[tuple[Array, Array]], count: int) -> Pieces:
    """Intervals that may overlap, an empty one being [0, 0), as disjoint ones."""
    if not found:
        return Pieces(np.zeros((1, count), np.int64), np.zeros((1, count), np.int64))
    low, high = (np.stack([one[side] for one in found]) for side in (0, 1))
    if len(found) == 2:  # as below, and sooner
        first = low[0] <= low[1]
        low, high = (np.stack([np.where(first, *side), np.where(first, *side[::-1])]) for side in (low, high))
        low[1] = np.maximum(low[1], high[0])
    elif len(found) > 2:
        order = np.argsort(low, axis=0, kind="stable")
        low, high = np.take_along_axis(low, order, 0), np.take_along_axis(high, order, 0)
        before = np.maximum.accumulate(high, axis=0)[:-1]
        low[1:] = np.maximum(low[1:], before)
    return Pieces(low, np.maximum(high, low))


def without(pieces: Pieces, others: Pieces) -> Pieces:
    """What is in the pieces and in none of the others."""
    low, high = [], []
    for first, last in zip(pieces.low, pieces.high, strict=True):
        at = first
        for start, stop in zip(others.low, others.high, strict=True):
            end = np.where(start < stop, np.clip(start, at, last), at)
            low.append(at)
            high.append(end)
            at = np.where(start < stop, np.maximum(at, np.minimum(stop, last)), at)
        low.append(at)
        high.append(np.maximum(last, at))
    return Pieces(np.stack(low), np.stack(high))


def listed(pieces: Pieces) -> tuple[Array, Array]:
    """Each unit in the pieces by itself, piece after piece: (query tile, unit)."""
    tile, lengths, ahead = _flat(pieces)
    return np.repeat(tile, lengths), np.repeat(ahead, lengths) + np.arange(int(lengths.sum()))


def picked(pieces: Pieces, places: Array) -> tuple[Array, Array]:
    """Those units of `listed` that have these places in it: no others are made."""
    tile, lengths, ahead = _flat(pieces)
    which = np.searchsorted(np.cumsum(lengths), places, side="right")
    return tile[which], ahead[which] + places


def _flat(pieces: Pieces) -> tuple[Array, Array, Array]:
    """Of each interval in turn: its query tile, its length, and its first unit less the place which that has."""
    lengths = (pieces.high - pieces.low).ravel()
    tile = np.tile(np.arange(pieces.low.shape[1]), pieces.low.shape[0])
    return tile, lengths, pieces.low.ravel() - (np.cumsum(lengths) - lengths)
