"""How often the query tiles of some heads do each step of a kernel: counted tiles, in the words of `Rates`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsify.cost.choosing import Head, kept_units, rows_of
from sparsify.cost.kept import kept_by_any, kept_pairs
from sparsify.cost.machine import Rates
from sparsify.cost.nest import Nest
from sparsify.cost.positions import Positions
from sparsify.cost.site import Site, rule_of
from sparsify.cost.tiles import Tiles, tiles_of
from sparsify.expr import TRUE, Pred
from sparsify.patterns.pattern import K, Q
from sparsify.patterns.spans import Array, Pieces

# The fields of `Rates`, and what query tiles are counted in.
STEPS = ("full", "masked", "live", "partial", "visit", "empty", "pack", "row", "item", "read", "direct")
LIVE = 0.6  # of a tile at the diagonal: the share of its panels that some row keeps something of


def steps(count: int, **given: Array) -> Array:
    """Those of `count` query tiles: float64 (STEPS, query tiles), 0 for what is not given."""
    found = np.zeros((len(STEPS), count))
    for name, values in given.items():
        found[STEPS.index(name)] = values
    return found


def rates_vector(rates: Rates) -> Array:
    """The nanoseconds of each step, in the order of STEPS."""
    return np.array([getattr(rates, name) for name in STEPS])


class Listing(NamedTuple):
    """What a head's lists give its query tiles: key tiles, those that run, those of them with a mask, keys of lists
    that are gathered, and pairs that the head keeps."""

    tiles: Array
    run: Array
    partial: Array
    gathered: Array
    pairs: float


def listing(site: Site, head: Head, number: int, nest: Nest) -> Listing | None:
    """That of one head, or None without a selection."""
    selector, at = head.selector, site.at
    if selector is None:
        return None
    sees = head.looks_back(at.q_len)
    rows, share = rows_of(selector, at, sees), _share(head, number, site, sees)
    row, queries = np.arange(0, at.q_len, nest.rows) // selector.unit.q, rows.last - rows.first + 1
    tiles, gathered, pairs = np.zeros(row.size), np.zeros(row.size), 0.0
    for unit, kept in kept_units(selector, rows):
        keys = np.minimum(kept * unit, at.k_len)
        cut = (unit - 1) / 2 if sees and at.q_len > 1 else 0  # of the unit that the query stands in
        pairs += float((np.clip(np.minimum(keys, rows.last + 1) - cut, 0, None) * queries).sum()) * share
        tiles += np.ceil(keys / nest.keys)[row]
        gathered += keys[row] if unit % nest.keys else 0
    run = tiles * share
    return Listing(tiles, run, np.minimum(run, 1.0) if sees else run * 0, gathered, pairs)


def _share(head: Head, number: int, site: Site, sees: bool) -> float:
    """Of the pairs that a selection can choose, those that the rest of the pattern keeps: as if it chose evenly."""
    base: Pred = Q >= K if sees else TRUE
    whole = kept_pairs(base, 0, site.at)
    return min(1.0, kept_pairs(*rule_of(head.listed, number), site.at) / whole) if whole else 0.0


@dataclass(frozen=True, eq=False)
class Group:
    """The heads that share query tiles; arrays have one value for each of these. steps: float64 (STEPS, query tiles).
    key_tiles: that each comes to, those of lists included. pieces: those of the static rules. gathered: keys of
    lists that are packed for one query tile alone. listed: key tiles of lists that may be found among packed ones."""

    steps: Array
    key_tiles: Array
    pieces: Pieces
    gathered: Array
    listed: Array

    @functools.cached_property
    def total(self) -> Array:
        """(STEPS,), how often all query tiles together do each."""
        return self.steps.sum(1)


@functools.lru_cache(maxsize=4096)
def _static(rules: tuple[tuple[Pred, int], ...], heads: int, at: Positions, nest: Nest) -> Group:
    tiles = tiles_of(rules, heads, at, nest)
    zero = tiles.key_tiles * 0
    found = _direct(rules, at, tiles) if nest.direct else _blocks(tiles)
    return Group(found, tiles.key_tiles, tiles.pieces, zero, zero)


def group_of(site: Site, nest: Nest, heads: range) -> Group:
    """Those of query heads that are in the same query tiles."""
    static = _static(site.rules(heads), len(heads), site.at, nest.tile)
    if not any(site.heads[h].selector for h in heads):
        return static
    done, key_tiles, gathered, listed = static.steps, static.key_tiles, static.gathered, static.listed
    for h, sharing in _lists(site, heads).items():
        found = listing(site, site.heads[h], h, nest)
        assert found is not None
        rows = static.steps[STEPS.index("row")] * sharing / len(heads)
        done = done + _list_steps(found, rows, nest)
        key_tiles = key_tiles + found.tiles
        gathered = gathered + found.gathered
        listed = listed + np.maximum(found.tiles - found.gathered / nest.keys, 0)
    return Group(done, key_tiles, static.pieces, gathered, listed)


def _lists(site: Site, heads: range) -> dict[int, int]:
    """A head for each list among heads that share query tiles, and how many have it."""
    found: dict[tuple[str, int], list[int]] = {}
    for h in heads:
        selector = site.heads[h].selector
        if selector is not None:
            own = h if selector.heads.scope == "head" else -1
            found.setdefault((site.heads[h].text, own), []).append(h)
    return {hs[0]: len(hs) for hs in found.values()}


def _blocks(tiles: Tiles) -> Array:
    return steps(
        tiles.rows.size, full=tiles.whole, masked=tiles.masked, live=tiles.live, partial=tiles.partial * tiles.rows,
        visit=tiles.run, empty=tiles.key_tiles - tiles.run, row=tiles.rows,
    )  # fmt: skip


def _direct(rules: tuple[tuple[Pred, int], ...], at: Positions, tiles: Tiles) -> Array:
    """Of the one query tile of a group whose keys are read where they lie."""
    keys = kept_by_any(rules, at)
    return steps(
        tiles.rows.size, partial=tiles.partial * tiles.rows, visit=tiles.run, empty=tiles.key_tiles - tiles.run,
        row=tiles.rows, read=keys, direct=keys * tiles.rows,
    )  # fmt: skip


def _list_steps(found: Listing, rows: Array, nest: Nest) -> Array:
    if nest.direct:
        keys = found.run * nest.keys
        return steps(
            rows.size, partial=found.partial * rows, visit=found.run, empty=found.tiles - found.run, read=keys,
            direct=keys * rows,
        )  # fmt: skip
    pairs = np.ceil(rows / nest.block) * nest.block * nest.keys
    masked = found.partial * pairs
    return steps(
        rows.size, full=(found.run - found.partial) * pairs, masked=masked, live=masked * LIVE,
        partial=found.partial * rows, visit=found.run, empty=found.tiles - found.run,
    )  # fmt: skip
