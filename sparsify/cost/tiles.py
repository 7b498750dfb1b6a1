"""What the query tiles of a head go through: its key tiles by class, and the blocks of these that run."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from sparsify.cost.classes import Env, Inside, Rules, SubTiles, asked_of, classes, closed_form, sample
from sparsify.cost.nest import Nest
from sparsify.cost.positions import Positions, bands_of, closed, corners, spread, tile_rule
from sparsify.expr import Pred
from sparsify.patterns.interior import by_intervals
from sparsify.patterns.spans import Array, Pieces, band_pieces, interior_pieces, listed, picked, without

MANY = 2**16  # key tiles that are asked for their class one by one; of more, those of some query tiles


@dataclass(frozen=True)
class Tiles:
    """float64, one value for each query tile of one head, or of the heads that share it.

    rows: of all its heads. key_tiles: that its loop comes to; full, partial: those of them without and with a
    mask (the others are empty). whole, masked, live: pairs of a query and a key, of whole blocks of rows: those that
    run without a mask, those that run with one, and of these those in panels of keys that aren't left out. pieces: the
    key tiles that the loop comes to.
    """

    rows: Array
    key_tiles: Array
    full: Array
    partial: Array
    whole: Array
    masked: Array
    live: Array
    pieces: Pieces

    @property
    def run(self) -> Array:
        """The key tiles that aren't empty."""
        return self.full + self.partial


@functools.lru_cache(maxsize=4096)
def tiles_of(rules: tuple[tuple[Pred, int], ...], heads: int, at: Positions, nest: Nest) -> Tiles:
    """Those of `heads` heads that share their query tiles; rules: their distinct predicates, each with a head."""
    envs = [corners(keep, head, at, nest.rows) for keep, head in rules]
    q0, q1 = envs[0]["q0"], envs[0]["q1"]
    spans = band_pieces(
        [(bands_of(keep), env) for (keep, _), env in zip(rules, envs, strict=True)], q0.size, at.k_slots, nest.keys
    )
    sure = Pieces(np.zeros_like(spans.low[:1]), np.zeros_like(spans.low[:1]))
    if len(rules) == 1:
        sure = interior_pieces(rules[0][0], envs[0], q0.size, at.k_slots, nest.keys)
    rest = without(spans, sure)
    if len(rules) == 1 and closed(rules[0][0]):
        more, partial, inside = 0.0, rest.lengths.astype(float), _closed_inside(rules[0][0], envs[0], rest, at, nest)
    else:
        more, partial, inside = _asked([(tile_rule(keep), env) for (keep, _), env in zip(rules, envs, strict=True)],
                                       rest, at, nest)  # fmt: skip
    rows, full = (q1 - q0 + 1) * heads, (spans.lengths - rest.lengths).astype(float) + more
    blocks = -(-rows // nest.block) * nest.block * nest.keys
    whole = full * blocks + partial * blocks * inside.whole
    masked, live = partial * blocks * inside.masked, partial * blocks * inside.live
    return Tiles(rows, spans.lengths.astype(float), full, partial, whole, masked, live, spans)


def _closed_inside(keep: Pred, env: Env, rest: Pieces, at: Positions, nest: Nest) -> Inside:
    """Of a rule whose tiles are in its bands by closed forms, and whole in its interiors: all others are partial."""
    total = int(rest.lengths.sum())
    if not total:
        return Inside()
    some = picked(rest, sample(total))
    return SubTiles.of(*some, env, at, nest).inside(closed_form(keep))


def _asked(rules: Rules, rest: Pieces, at: Positions, nest: Nest) -> tuple[Array, Array, Inside]:
    """(full, partial) tiles of each query tile, and what is in partial ones: each is asked for its class."""
    looked, share = some_of(rest)
    tile, key = listed(looked)
    every, some = classes(rules, at, nest, tile, key)
    count = rest.low.shape[1]
    more, partial = (np.bincount(tile[found], minlength=count) * share for found in (every, some))
    if share != 1:
        more, partial = _spread(more, rest, looked, share), _spread(partial, rest, looked, share)
    which = np.flatnonzero(some)
    if len(rules) > 1 or not which.size:
        return more, partial, Inside()
    which = which[sample(which.size)]
    rule, env = rules[0]
    boxes = SubTiles.of(tile[which], key[which], env, at, nest)
    kept = None if by_intervals(rule.keep) else rule.keep
    return more, partial, boxes.inside(asked_of(rule), kept)


def some_of(rest: Pieces) -> tuple[Pieces, float]:
    """The pieces, or where they hold too many tiles those of some query tiles, evenly spread; and by how many times."""
    total, count = int(rest.lengths.sum()), rest.low.shape[1]
    if total <= MANY:
        return rest, 1.0
    chosen = spread(count, min(count, max(16, count * MANY // total)))
    high = rest.low.copy()
    high[:, chosen] = rest.high[:, chosen]
    looked = Pieces(rest.low, high)
    return looked, total / max(1, int(looked.lengths.sum()))


def _spread(values: Array, rest: Pieces, looked: Pieces, share: float) -> Array:
    """What some query tiles have, as all have it in proportion to how many tiles they come to."""
    seen = looked.lengths > 0
    known = np.flatnonzero(seen)
    rates = values[known] / share / looked.lengths[known]
    return rest.lengths * np.interp(np.arange(seen.size), known, rates)
