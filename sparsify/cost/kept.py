"""How many pairs a head keeps, and how many keys its last query: by closed forms where the rule has them."""

from __future__ import annotations

import functools

import numpy as np

from sparsify.cost.classes import Env, classes
from sparsify.cost.nest import Nest
from sparsify.cost.parts import Cells
from sparsify.cost.positions import Positions, bands_of, corners, spread, tile_rule
from sparsify.cost.tiles import some_of
from sparsify.expr import Pred
from sparsify.patterns.interior import by_intervals
from sparsify.patterns.spans import Array, band_pieces, interior_pieces, listed, without
from sparsify.ranges import Ranges, joined
from sparsify.walk import evaluate

ROWS = 2**14  # queries that are asked one by one; of more, a quarter as many spread evenly
PAIRS = 2**21  # pairs in partial tiles that are asked one by one; of more, so many spread evenly
TILE = 64
TILES = Nest(TILE, 1, TILE, TILE, TILE)


@functools.lru_cache(maxsize=4096)
def kept_pairs(keep: Pred, head: int, at: Positions) -> float:
    """Exact up to the sizes above, and beyond them an estimate from as many as they say."""
    if not at.q_slots or not at.k_slots:
        return 0.0
    return _by_rows(keep, head, at) if by_intervals(keep) else _by_tiles(keep, head, at)


def _by_rows(keep: Pred, head: int, at: Positions) -> float:
    rows = spread(at.q_slots, ROWS // 4) if at.q_slots > ROWS else None
    env, share = corners(keep, head, at, 1, rows), 1.0 if rows is None else at.q_slots / rows.size
    found = band_pieces([(bands_of(keep), env)], env["q0"].size, at.k_slots)
    return float(found.lengths.sum()) * share


def _by_tiles(keep: Pred, head: int, at: Positions) -> float:
    """Whole tiles by their class, and the others pair by pair."""
    env = corners(keep, head, at, TILE)
    count = env["q0"].size
    spans = band_pieces([(bands_of(keep), env)], count, at.k_slots, TILE)
    sure = interior_pieces(keep, env, count, at.k_slots, TILE)
    rest, rows = without(spans, sure), env["q1"] - env["q0"] + 1
    looked, share = some_of(rest)
    tile, key = listed(looked)
    every, some = classes([(tile_rule(keep), env)], at, TILES, tile, key)
    total = float((rows * TILE * (spans.lengths - rest.lengths)).sum()) + float(rows[tile[every]].sum()) * TILE * share
    which, most = np.flatnonzero(some), max(1, PAIRS // TILE**2)
    if which.size > most:
        share, which = share * which.size / most, which[spread(which.size, most)]
    return total + _in_partial(keep, env, at, tile[which], key[which]) * share


def _in_partial(keep: Pred, env: Env, at: Positions, tile: Array, key: Array) -> float:
    """Pairs that are kept in some tiles, given as (query tile, key tile) pairs."""
    kept, ends = 0.0, np.minimum((key + 1) * TILE, at.k_slots) - 1
    for start in range(0, tile.size, 512):
        part = slice(start, start + 512)
        corner = env["q0"][tile[part]], env["q1"][tile[part]], key[part] * TILE, ends[part]
        cells = Cells(*corner, TILE, TILE)
        first, count, found = cells.pairs(keep, env)
        there = np.arange(TILE) <= (cells.k1 - cells.k0)[first, None]
        kept += float((found & there[:, None]).sum((1, 2)) @ count)
    return kept


@functools.lru_cache(maxsize=4096)
def _last(keep: Pred, head: int, at: Positions) -> Ranges:
    """What the only query keeps by intervals."""
    found = band_pieces([(bands_of(keep), corners(keep, head, at, 1))], 1, at.k_slots)
    ends = zip(found.low[:, 0].tolist(), found.high[:, 0].tolist(), strict=True)
    return tuple((low, high - 1) for low, high in ends if low < high)


@functools.lru_cache(maxsize=1024)
def kept_by_any(rules: tuple[tuple[Pred, int], ...], at: Positions) -> float:
    """Keys of which some query of some head keeps a pair: what is read where few queries share their keys."""
    if at.q_slots == 1 and all(by_intervals(keep) for keep, _ in rules):
        return float(
            sum(last - first + 1 for first, last in joined(sorted(one for rule in rules for one in _last(*rule, at))))
        )
    found = functools.reduce(np.bitwise_or, (_any(keep, head, at) for keep, head in rules))
    return float(np.count_nonzero(np.unpackbits(found, count=at.k_slots)))


@functools.lru_cache(maxsize=64)
def _any(keep: Pred, head: int, at: Positions) -> np.ndarray:
    """The keys that some query keeps, a bit each."""
    env = corners(keep, head, at, 1)
    held = {name: value for name, value in env.items() if name not in ("q0", "q1")}
    found = evaluate(keep, held | {"q": env["q0"][:, None], "k": np.arange(at.k_slots)})
    return np.packbits(np.broadcast_to(found, (at.q_slots, at.k_slots)).any(0))
