"""What the query tiles of a head go through: its key tiles by class, blocks that run, pairs that are kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsify.cost.nest import Nest
from sparsify.cost.spans import Array, Pieces, band_pieces, interior_pieces, listed, without
from sparsify.expr import Pred
from sparsify.patterns.interior import by_intervals
from sparsify.patterns.tiles import TileRule, analyse
from sparsify.sizes import size_values
from sparsify.walk import evaluate, variables

MANY = 2**18  # key tiles that are asked for their class one by one; of more, those of some query tiles
CELLS = 512  # blocks of rows by panels of keys of which pairs are looked at
LOOKED_INTO = 256  # partial tiles whose blocks are counted; of more, so many spread evenly
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Positions:
    """Where the queries and keys of a launch stand: how many slots each have, the first query, N and Nq."""

    q_slots: int
    k_slots: int
    offset: int
    q_len: int
    k_len: int


@dataclass(frozen=True)
class Tiles:
    """One value for each query tile of one head, or of the heads that share it.

    rows: of all its heads. visited: key tiles that its loop comes to; full, partial: those of them without and with a
    mask (the others are empty). whole: pairs of blocks of rows that run without a mask. masked: of those with one;
    live: of their panels of keys that run. pieces: the key tiles that the loop comes to.
    """

    rows: Array
    visited: Array
    full: Array
    partial: Array
    whole: Array
    masked: Array
    live: Array
    pieces: Pieces


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


def spread(count: int, wanted: int) -> Array:
    """So many numbers below `count`, one from each of as many equal parts, none in step with another's place."""
    places = np.arange(wanted)
    return ((places + places * GOLDEN % 1) * count / wanted).astype(np.int64)


@functools.lru_cache(maxsize=4096)
def tiles_of(rules: tuple[tuple[Pred, int], ...], heads: int, at: Positions, nest: Nest) -> Tiles:
    """Those of `heads` heads that share their query tiles; rules: their distinct predicates, each with a head."""
    pairs = [(tile_rule(keep), corners(keep, head, at, nest.rows)) for keep, head in rules]
    q0, q1 = pairs[0][1]["q0"], pairs[0][1]["q1"]
    spans = band_pieces(pairs, q0.size, at.k_slots, nest.keys)
    sure = Pieces(np.zeros_like(spans.low[:1]), np.zeros_like(spans.low[:1]))
    if len(pairs) == 1:
        sure = interior_pieces(*pairs[0], q0.size, at.k_slots, nest.keys)
    rest = without(spans, sure)
    visited, full = spans.lengths.astype(float), (spans.lengths - rest.lengths).astype(float)
    rows = (q1 - q0 + 1) * heads
    looked, share = _some(rest)
    tile, key = listed(looked)
    classes = _Classes(pairs, at, nest, tile, key)
    more = np.bincount(tile, classes.full, q0.size) * share
    partial = np.bincount(tile, classes.partial, q0.size) * share
    if share != 1:
        more, partial = _spread(more, rest, looked, share), _spread(partial, rest, looked, share)
    blocks = -(-rows // nest.block) * nest.block * nest.keys
    inside = classes.inside_partial()
    full = full + more
    whole = full * blocks + partial * blocks * inside[0]
    return Tiles(rows, visited, full, partial, whole, partial * blocks * inside[1], partial * blocks * inside[2], spans)


def _some(rest: Pieces) -> tuple[Pieces, float]:
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


class _Classes:
    """The class of key tiles, given as (query tile, key tile) pairs."""

    def __init__(
        self, rules: list[tuple[TileRule, dict[str, Any]]], at: Positions, nest: Nest, tile: Array, key: Array
    ) -> None:
        self.rules, self.at, self.nest, self.tile, self.key = rules, at, nest, tile, key
        k0 = key * nest.keys
        k1 = np.minimum(k0 + nest.keys, at.k_slots) - 1
        none, every = np.ones(tile.size, bool), k0 + nest.keys <= at.k_slots
        for rule, env in rules:
            here = env | {"q0": env["q0"][tile], "q1": env["q1"][tile], "k0": k0, "k1": k1}
            none = none & evaluate(rule.empty, here)
            every = every & evaluate(rule.full, here)
        self.full, self.partial = every & ~none, ~every & ~none

    def inside_partial(self) -> tuple[float, float, float]:
        """Of the pairs of partial tiles the shares that are in blocks without a mask, in those with one, and in those
        of their panels that run."""
        at, nest = self.at, self.nest
        which = np.flatnonzero(self.partial)
        if which.size > LOOKED_INTO:
            which = which[spread(which.size, LOOKED_INTO)]
        if not which.size or len(self.rules) > 1:
            return 0.0, 1.0, 1.0
        rule, env = self.rules[0]
        first = np.arange(0, nest.rows, min(nest.block, nest.rows))[:, None]
        panel = np.arange(0, nest.keys, nest.panel)
        start, last = (env[name][self.tile[which]][:, None, None] for name in ("q0", "q1"))
        k0 = (self.key[which] * nest.keys)[:, None, None] + panel
        here = env | {"q0": start + first, "k0": k0}
        there = (here["q0"] <= last) & (k0 < at.k_slots)
        here |= {"q1": np.minimum(here["q0"] + nest.block - 1, last)}
        here |= {"k1": np.minimum(k0 + nest.panel, at.k_slots) - 1}
        here |= {"q0": np.minimum(here["q0"], last), "k0": np.minimum(k0, at.k_slots - 1)}
        live = there & ~np.broadcast_to(evaluate(rule.empty, here), there.shape)
        every = there & np.broadcast_to(evaluate(rule.full, here), there.shape) & (k0 + nest.panel <= at.k_slots)
        blocks = int((start + first <= last).sum())
        whole, some = every.all(-1), live.any(-1)
        masked = some & ~whole
        running = float((live & masked[..., None]).sum() / (blocks * panel.size))
        if not by_intervals(rule.keep):
            running *= (1 + self._kept_of_live(here, live & masked[..., None])) / 2
        return float(whole.sum() / blocks), float(masked.sum() / blocks), running

    def _kept_of_live(self, here: dict[str, Any], live: Array) -> float:
        """Of the keys in panels that run, the share that some row of the block keeps: the others have no part in the
        second product. Panels of a rule without holes are all kept, but for those at its borders."""
        cells = np.argwhere(live)
        if not len(cells):
            return 1.0
        cells = cells[spread(len(cells), min(len(cells), CELLS))]
        at = [
            np.broadcast_to(here[name], live.shape)[tuple(cells.T)][:, None, None] for name in ("q0", "q1", "k0", "k1")
        ]
        q = np.minimum(at[0] + np.arange(self.nest.block)[:, None], at[1])
        k = np.minimum(at[2] + np.arange(self.nest.panel), at[3])
        names = {name: value for name, value in here.items() if name not in ("q0", "q1", "k0", "k1")}
        found = np.broadcast_to(evaluate(self.rules[0][0].keep, names | {"q": q, "k": k}), np.broadcast(q, k).shape)
        return float(found.any(1).mean())
