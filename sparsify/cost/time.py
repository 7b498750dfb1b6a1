"""From counted steps to time: each query tile by a machine's rates, then handed out to its cores."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from sparsify.cost.choosing import Work, work_of
from sparsify.cost.kept import kept_by_any
from sparsify.cost.machine import Machine
from sparsify.cost.nest import Nest
from sparsify.cost.positions import Positions
from sparsify.cost.result import Estimate, HeadCost
from sparsify.cost.site import Site, rule_of
from sparsify.cost.steps import group_of, listing, rates_vector
from sparsify.cost.tiles import tiles_of
from sparsify.cost.timeline import timeline_of
from sparsify.errors import InputError
from sparsify.expr import Pred
from sparsify.patterns.select import Choice

MOST_TILES = 2**22  # query tiles of a launch, each of which takes about 500 bytes here
NANO = 1e-9  # rates are in nanoseconds


def site_cost(site: Site, machine: Machine) -> Estimate:
    """What a call of a site's attention costs."""
    nest, shape = site.nest(machine), site.shape
    _check_size(site, nest)
    timeline = timeline_of(site, machine, nest)
    row = shape.head_dim * shape.size
    moved = timeline.keys * 2 * row + 2 * shape.batch * shape.heads * shape.q_len * row
    choosing = _choosing(site, machine)
    time = (
        machine.launch_of(shape.q_len, timeline.cores) * (2 if nest.splits > 1 else 1)
        + sum(choosing.values())
        + max(timeline.span, moved / machine.memory * 1e9)
    )
    heads = _parts(site, nest, machine, choosing, time)
    kv = [_kept_keys(site, range(j * shape.group, (j + 1) * shape.group)) for j in range(shape.kv_heads)]
    return Estimate(
        seconds=time * NANO,
        bytes=moved,
        heads=heads,
        kv_bytes=sum(kv) * 2 * row * shape.batch,
        select_seconds=sum(choosing.values()) * NANO,
        launches=(2 if nest.splits > 1 else 1) + len(choosing),
        permutations=site.orders,
        tile=(nest.rows, nest.keys),
        items=timeline.times.size,
        waves=timeline.times.size / timeline.cores,
        busy=float(timeline.times.sum()) / (timeline.span * timeline.cores) if timeline.span else 1.0,
        cores=timeline.cores,
        machine=machine.name,
    )


def _check_size(site: Site, nest: Nest) -> None:
    """Raises InputError for more query tiles than there is memory for."""
    shape = site.shape
    tiles = -(-site.at.q_slots // nest.rows) * shape.heads * shape.batch
    if tiles > MOST_TILES:
        what = f"{shape.q_len} queries of {shape.heads} heads in a batch of {shape.batch} are {tiles} query tiles"
        raise InputError(f"cost: length: {what}, and at most {MOST_TILES} are counted; give fewer")


def _choosing(site: Site, machine: Machine) -> dict[str, float]:
    """Nanoseconds of each distinct choice; one that holds for several steps by its share."""
    found = {}
    for one in site.heads:
        if one.selector is not None and one.text not in found:
            every = Choice.parse(one.text).reuse.every if site.shape.q_len == 1 else 1
            found[one.text] = _work_time(work_of(one.selector, site.shape), machine) / every
    return found


def _work_time(work: Work, machine: Machine) -> float:
    rates = machine.selection.model_dump()
    return sum(amount * rates[name] for name, amount in vars(work).items())


def _parts(site: Site, nest: Nest, machine: Machine, choosing: dict[str, float], time: float) -> tuple[HeadCost, ...]:
    """The heads, each with its share of the time by what it would take alone."""
    vector = rates_vector(machine.rates_of(site.shape.dtype, site.shape.head_dim, (nest.rows, nest.keys)))
    own = [_counted(site, nest, h) for h in range(site.shape.heads)]
    weights = [float(vector @ group_of(site, nest, range(h, h + 1)).total) for h in range(site.shape.heads)]
    whole, rest = sum(weights), time - sum(choosing.values())
    sharing = {text: sum(one.text == text for one in site.heads) for text in choosing}
    found = []
    for part, weight, head in zip(own, weights, site.heads, strict=True):
        select = choosing[head.text] / sharing[head.text] if head.text else 0.0
        seconds = (rest * weight / whole + select) * NANO
        found.append(replace(part, select_seconds=select * NANO, seconds=seconds))
    return tuple(found)


def _counted(site: Site, nest: Nest, h: int) -> HeadCost:
    """The tiles and pairs of one head by itself, without its time."""
    shape, head = site.shape, site.heads[h]
    key_tiles, full, partial, run = _totals(rule_of(head.static, h), site.at, nest.tile)
    pairs = site.pairs(h)
    lists = listing(site, head, h, nest)
    if lists is not None:
        key_tiles, full = key_tiles + float(lists.tiles.sum()), full + float((lists.run - lists.partial).sum())
        partial, pairs = partial + float(lists.partial.sum()), pairs + lists.pairs
        first = np.arange(0, site.at.q_slots, nest.rows)
        run += float(lists.run @ np.minimum(nest.rows, site.at.q_slots - first)) * nest.keys
    return HeadCost(
        pairs=min(pairs, run) * shape.batch,
        visited=run * shape.batch,
        full=full * shape.batch,
        partial=partial * shape.batch,
        empty=(key_tiles - full - partial) * shape.batch,
        kv_bytes=_kept_keys(site, range(h, h + 1)) * 2 * shape.head_dim * shape.size * shape.batch,
        select_seconds=0.0,
        seconds=0.0,
    )


@functools.lru_cache(maxsize=4096)
def _totals(rule: tuple[Pred, int], at: Positions, nest: Nest) -> tuple[float, float, float, float]:
    """Key tiles that a static rule's loops come to, those that are full and partial, and the pairs of these."""
    tiles = tiles_of((rule,), 1, at, nest)
    run = float((tiles.run * tiles.rows).sum()) * nest.keys
    return float(tiles.key_tiles.sum()), float(tiles.full.sum()), float(tiles.partial.sum()), run


def _kept_keys(site: Site, heads: range) -> float:
    """How many keys the last query of some of these heads keeps: all of them where a selection chooses anew."""
    at = site.tokens
    keeps = [site.keeps[h] for h in heads]
    if any(keep is None for keep in keeps):
        return float(at.k_slots)
    last = Positions(1, at.k_slots, at.offset + at.q_slots - 1, at.q_len, at.k_len)
    rules = tuple(dict.fromkeys(rule_of(keep, h) for keep, h in zip(keeps, heads, strict=True) if keep is not None))
    return kept_by_any(rules, last)
