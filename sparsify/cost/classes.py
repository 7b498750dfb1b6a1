"""The class of key tiles, and of the blocks of rows and panels of keys in partial ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsify.cost.nest import Nest
from sparsify.cost.parts import Cells, KeyTiles
from sparsify.cost.positions import Positions, bands_of, spread
from sparsify.expr import Pred
from sparsify.patterns.interior import interiors
from sparsify.patterns.spans import Array
from sparsify.patterns.tiles import TileRule
from sparsify.walk import evaluate

CELLS = 512  # blocks of rows by panels of keys of which pairs are looked at
LOOKED_INTO = 256  # partial tiles whose blocks are counted; of more, so many spread evenly

Env = dict[str, Any]
Rules = list[tuple[TileRule, Env]]  # each with the corners of its query tiles


@dataclass(frozen=True)
class Inside:
    """Of the pairs of partial tiles the shares that are in blocks without a mask, in those with one, and in those of
    their panels that run."""

    whole: float = 0.0
    masked: float = 1.0
    live: float = 1.0


def classes(rules: Rules, at: Positions, nest: Nest, tile: Array, key: Array) -> tuple[Array, Array]:
    """Which key tiles, given as (query tile, key tile) pairs, are full, and which are partial; rules: of the heads that
    share them."""
    none, every = np.ones(tile.size, bool), (key + 1) * nest.keys <= at.k_slots
    for rule, env in rules:
        tiles = KeyTiles(env, at.k_slots, nest, tile, key)
        none, every = none & tiles.holds(rule.empty), every & tiles.holds(rule.full)
    return every & ~none, ~every & ~none


def sample(count: int) -> Array:
    """Those of so many partial tiles that are looked into."""
    return np.arange(count) if count <= LOOKED_INTO else spread(count, LOOKED_INTO)


@dataclass(frozen=True)
class SubTiles:
    """Blocks of rows by panels of keys of some tiles. here: their corners, which broadcast to (tiles, blocks, panels),
    cut where queries and keys end. there: which of them have a pair; uncut: whose panel is a whole one. blocks: how
    many blocks of rows there are in all tiles. block, panel: their sizes."""

    here: Env
    there: Array
    uncut: Array
    blocks: int
    block: int
    panel: int

    @classmethod
    def of(cls, tile: Array, key: Array, env: Env, at: Positions, nest: Nest) -> SubTiles:
        """Those of (query tile, key tile) pairs. env: the corners of all query tiles."""
        first = np.arange(0, nest.rows, min(nest.block, nest.rows))[:, None]
        panel = np.arange(0, nest.keys, nest.panel)
        start, last = (env[name][tile][:, None, None] for name in ("q0", "q1"))
        q0, k0 = start + first, (key * nest.keys)[:, None, None] + panel
        here = env | {"q0": np.minimum(q0, last), "q1": np.minimum(q0 + nest.block - 1, last)}
        here |= {"k0": np.minimum(k0, at.k_slots - 1), "k1": np.minimum(k0 + nest.panel, at.k_slots) - 1}
        there = (q0 <= last) & (k0 < at.k_slots)
        return cls(here, there, k0 + nest.panel <= at.k_slots, int((q0 <= last).sum()), nest.block, nest.panel)

    def inside(self, asked: Callable[[Env], tuple[Any, Any]], keep: Pred | None = None) -> Inside:
        """What is in them. asked: (not EMPTY, FULL) of boxes with these corners. keep: of a rule with holes."""
        some, full = asked(self.here)
        live, every = self.there & some, self.there & full & self.uncut
        whole, panels = every.all(-1), live.shape[-1]
        masked = live.any(-1) & ~whole
        running = live & masked[..., None]
        share = float(running.sum() / (self.blocks * panels))
        if keep is not None:
            share *= (1 + self._kept_of(running, keep)) / 2
        return Inside(float(whole.sum() / self.blocks), float(masked.sum() / self.blocks), share)

    def _kept_of(self, live: Array, keep: Pred) -> float:
        """Of the keys in panels that run, the share that some row of the block keeps: the others have no part in the
        second product. Panels of a rule without holes are all kept, but for those at its borders."""
        cells = np.argwhere(live)
        if not len(cells):
            return 1.0
        cells = cells[spread(len(cells), min(len(cells), CELLS))]
        sides = (np.broadcast_to(self.here[name], live.shape)[tuple(cells.T)] for name in ("q0", "q1", "k0", "k1"))
        _, count, kept = Cells(*sides, self.block, self.panel).pairs(keep, self.here)
        return float(kept.any(1).sum(1) @ count) / (len(cells) * self.panel)


def asked_of(rule: TileRule) -> Callable[[Env], tuple[Any, Any]]:
    """(not EMPTY, FULL) by what was analysed of a rule."""
    return lambda here: (~np.asarray(evaluate(rule.empty, here)), evaluate(rule.full, here))


def closed_form(keep: Pred) -> Callable[[Env], tuple[Any, Any]]:
    """(not EMPTY, FULL) of a closed rule: the same by its bands and interiors."""
    return lambda here: (_meets(keep, here), _holds(keep, here))


def _meets(keep: Pred, here: Env) -> Any:
    found: Any = np.False_
    for band in bands_of(keep):
        found = found | (~np.asarray(evaluate(band.unless, here)) & _within(band.low, "k1", here, band.high, "k0"))
    return found


def _holds(keep: Pred, here: Env) -> Any:
    found: Any = np.False_
    for one in interiors(keep):
        found = found | (np.asarray(evaluate(one.when, here)) & _within(one.low, "k0", here, one.high, "k1"))
    return found


def _within(low: Any, over: str, here: Mapping[str, Any], high: Any, under: str) -> Any:
    """Whether one corner is at `low` or over it, and another under `high`; None is no limit."""
    above = np.True_ if low is None else here[over] >= evaluate(low, here)
    return above if high is None else above & (here[under] < evaluate(high, here))
