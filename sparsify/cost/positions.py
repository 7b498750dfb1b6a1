"""What rules say of tiles without data and in closed form, where queries stand, and samples of many of them."""

from __future__ import annotations

import functools

import numpy as np

from sparsify.expr import Pred
from sparsify.patterns.count import GOLDEN, Positions, corners
from sparsify.patterns.interior import by_intervals
from sparsify.patterns.spans import Array, Bands
from sparsify.patterns.tiles import TileRule, analyse, bands
from sparsify.walk import loads

__all__ = ["Positions", "bands_of", "closed", "corners", "spread", "tile_rule"]


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
