"""Where queries and keys stand, what rules say of them in closed form, and samples of many of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsify.expr import Pred
from sparsify.patterns.count import GOLDEN
from sparsify.patterns.interior import by_intervals
from sparsify.patterns.spans import Array, Bands
from sparsify.patterns.tiles import TileRule, analyse, bands
from sparsify.sizes import size_values
from sparsify.walk import loads, variables


@dataclass(frozen=True)
class Positions:
    """Where the queries and keys of a launch stand. q_slots, k_slots: how many slots each have. offset: the position of
    the first query. q_len, k_len: the variables Nq and N of predicates."""

    q_slots: int
    k_slots: int
    offset: int
    q_len: int
    k_len: int


def corners(keep: Pred, head: int, at: Positions, rows: int, some: Array | None = None) -> dict[str, Any]:
    """The variables of tile rules for all query tiles of a head, or for `some` of them."""
    q0 = np.arange(0, at.q_slots, rows, dtype=np.int64) if some is None else some * rows
    env: dict[str, Any] = {"b": 0, "h": head, "N": at.k_len, "Nq": at.q_len}
    env |= {"q0": q0 + at.offset, "q1": np.minimum(q0 + rows, at.q_slots) - 1 + at.offset}
    return env | size_values(variables(keep), at.k_len)


@functools.lru_cache(maxsize=4096)
def tile_rule(keep: Pred) -> TileRule:
    """What a predicate does on tiles, as far as that is known without data."""
    return analyse(keep).without_data()


@functools.lru_cache(maxsize=4096)
def closed(keep: Pred) -> bool:
    """Whether bands and interiors say all of a rule: no tile in a band is EMPTY, none is FULL but in an interior."""
    return by_intervals(keep) and not loads(keep)


@functools.lru_cache(maxsize=4096)
def bands_of(keep: Pred) -> Bands:
    """The bands of a rule as far as they are known without data; a closed one needs no more of its analysis."""
    return tuple(dict.fromkeys(bands(keep))) if closed(keep) else tile_rule(keep).bands


def spread(count: int, wanted: int) -> Array:
    """So many numbers below `count`, one from each of as many equal parts, none in step with another's place."""
    places = np.arange(wanted)
    return ((places + places * GOLDEN % 1) * count / wanted).astype(np.int64)
