"""From counted steps to time: each query tile by a machine's rates, then handed out to its cores."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsify.cost.choosing import Work, work_of
from sparsify.cost.kept import kept_by_any, kept_pairs
from sparsify.cost.machine import Machine
from sparsify.cost.nest import Nest
from sparsify.cost.schedule import about, cpp_threads, makespan, packed, splits, step_of
from sparsify.cost.site import Site, rule_of
from sparsify.cost.spans import Array, merged
from sparsify.cost.steps import Group, group_of, listing
from sparsify.cost.tiles import Positions, tiles_of
from sparsify.expr import Pred
from sparsify.patterns.select import Choice


@dataclass(frozen=True)
class Part:
    """One query head; the fields of a `HeadCost`, times in nanoseconds."""

    pairs: float
    visited: float
    full: float
    partial: float
    empty: float
    kv_bytes: float
    select_seconds: float
    seconds: float


@dataclass(frozen=True)
class SiteCost:
    """As in an `Estimate`, times in nanoseconds."""

    time: float
    bytes: float
    heads: tuple[Part, ...]
    kv_bytes: float
    select: float
    launches: int
    permutations: int
    tile: tuple[int, int]
    items: int
    busy: float
    cores: int


@dataclass(frozen=True)
class Taken:
    """The query tiles of a launch, handed out. times: nanoseconds of each, by the group of heads that it is of."""

    times: list[Array]
    span: float
    cores: int
    read: float  # keys, with their values, from memory


def site_cost(site: Site, machine: Machine) -> SiteCost:
    """What a call of a site's attention costs."""
    nest, shape = site.nest(machine), site.shape
    groups = [list(_groups(site, nest, j)) for j in range(shape.kv_heads)]
    taken = (_on_cores if machine.target == "cpp" else _on_chip)(site, machine, nest, groups)
    row = shape.head_dim * shape.size
    moved = taken.read * 2 * row + 2 * shape.batch * shape.heads * shape.q_len * row
    choosing = _choosing(site, machine)
    time = machine.launch + sum(choosing.values()) + max(taken.span, moved / machine.memory * 1e9)
    heads = _parts(site, nest, taken, groups, choosing, time)
    work = sum(float(times.sum()) for times in taken.times) * shape.batch
    kv = [_kept_keys(site, range(j * shape.group, (j + 1) * shape.group)) for j in range(shape.kv_heads)]
    return SiteCost(
        time=time,
        bytes=moved,
        heads=heads,
        kv_bytes=sum(kv) * 2 * row * shape.batch,
        select=sum(choosing.values()),
        launches=1 + len(choosing),
        permutations=site.orders,
        tile=(nest.rows, nest.keys),
        items=sum(times.size for times in taken.times) * shape.batch,
        busy=work / (taken.span * taken.cores) if taken.span else 1.0,
        cores=taken.cores,
    )


def _groups(site: Site, nest: Nest, kv_head: int) -> Iterator[tuple[range, Group]]:
    """The heads of a key head that share query tiles, in order."""
    first = kv_head * site.shape.group
    for start in range(first, first + site.shape.group, nest.heads):
        heads = range(start, min(start + nest.heads, first + site.shape.group))
        yield heads, group_of(site, nest, heads)


Groups = list[list[tuple[range, Group]]]


def _on_cores(site: Site, machine: Machine, nest: Nest, groups: Groups) -> Taken:
    """A processor's: an item is a query tile of all heads of a key head."""
    shape, rates = site.shape, machine.rates_of(site.shape.dtype, site.shape.head_dim, (nest.rows, nest.keys))
    visited = [sum((group.visited for _, group in some), start=np.zeros(1)) for some in groups]
    everything = np.tile(np.concatenate(visited), shape.batch)
    threads = cpp_threads(everything, nest, machine.cores)
    step = step_of(everything.size, threads)
    times, read = [], 0.0
    for some, cost in zip(groups, visited, strict=True):
        packs = _packs(site, nest, some, about(cost, everything.size / threads), threads, step)
        work = sum((group.steps.times(rates, False) for _, group in some), start=np.zeros(1))
        times.append(work + packs * rates.pack + machine.item)
        read += float(packs.sum()) + sum(float(group.steps.read.sum()) for _, group in some)
    line = np.tile(np.concatenate(times), shape.batch)
    if nest.split and splits(everything, threads):
        span = float(line.sum()) / threads
    else:
        order = np.argsort(-about(everything, everything.size / threads), kind="stable")
        span = makespan(line[order], min(threads, line.size), step)
    return Taken(times, span, threads, read * shape.batch)


def _packs(site: Site, nest: Nest, some: list[tuple[range, Group]], cost: Array, cores: int, step: int) -> Array:
    """How many keys the query tiles of a key head pack."""
    if nest.direct:
        return some[0][1].visited * 0
    if nest.whole_group:
        return sum((group.visited * nest.keys for _, group in some), start=np.zeros(1))
    found = [(low, high) for _, group in some for low, high in zip(group.pieces.low, group.pieces.high, strict=True)]
    pieces = merged(found, cost.size)
    again = np.where(pieces.lengths > nest.held, len(some), 1)
    tiles = packed(pieces, pieces.lengths, cost, cores, step, nest.held) * again
    for _, group in some:
        units = -(-site.at.k_slots // nest.keys)
        fresh = max(0.0, 1 - nest.held / units)
        met = float(group.listed.sum())
        share = min(1.0, fresh + cores * min(units, nest.held) / met) if met else 0.0
        tiles = tiles + group.listed * share + group.gathered / nest.keys
    return tiles * nest.keys


def _on_chip(site: Site, machine: Machine, nest: Nest, groups: Groups) -> Taken:
    """A GPU's: an item is a query tile of some heads, and sections of heads follow each other."""
    from sparsify.codegen.triton.tuning import L2_MIB

    shape, rates = site.shape, machine.rates_of(site.shape.dtype, site.shape.head_dim, (nest.rows, nest.keys))
    flat = [group for some in groups for _, group in some]
    times, read = [], 0.0
    for group in flat:
        keys = group.steps.whole * 0 + group.visited * nest.keys
        steps = group.steps.times(rates, False)
        times.append(np.maximum(steps, keys * rates.read) + machine.item)
    for some in groups:
        found = [(p.low, p.high) for p in (group.pieces for _, group in some)]
        low, high = (np.concatenate([one[side] for one in found]) for side in (0, 1))
        there = high > low
        spread = np.where(there, high, 0).max(1) - np.where(there, low, 2**60).min(1)
        static = min(float(np.clip(spread, 0, None).sum()), -(-site.at.k_slots // nest.keys))
        lists = sum(float((group.listed + group.gathered / nest.keys).sum()) for _, group in some)
        read += min(static + lists, -(-site.at.k_slots // nest.keys)) * nest.keys
    line = np.tile(np.stack(times), (shape.batch, 1))
    per_head = site.at.k_slots * 2 * shape.head_dim * shape.size
    section = max(1, max(1, (L2_MIB << 20) // per_head) * shape.group // nest.heads)
    order = [line[start : start + section, ::-1].T.ravel() for start in range(0, len(line), section)]
    return Taken(times, makespan(np.concatenate(order), machine.cores), machine.cores, read * shape.batch)


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


def _parts(
    site: Site, nest: Nest, taken: Taken, groups: Groups, choosing: dict[str, float], time: float
) -> tuple[Part, ...]:
    shape, own = site.shape, []
    for h in range(shape.heads):
        own.append(_counted(site, nest, h))
    weights = [part.visited + 1.0 for part in own]
    whole, rest = sum(weights), time - sum(choosing.values())
    sharing = {text: sum(one.text == text for one in site.heads) for text in choosing}
    found = []
    for part, weight, head in zip(own, weights, site.heads, strict=True):
        select = choosing[head.text] / sharing[head.text] if head.text else 0.0
        fields = vars(part) | {"select_seconds": select, "seconds": rest * weight / whole + select}
        found.append(Part(**fields))
    return tuple(found)


def _counted(site: Site, nest: Nest, h: int) -> Part:
    """The tiles and pairs of one head by itself."""
    shape, head = site.shape, site.heads[h]
    visited, full, partial, run = _totals(rule_of(head.static, h), site.at, nest)
    pairs = kept_pairs(*site.pairs_rule(h), site.at)
    lists = listing(site, head, h, nest)
    if lists is not None:
        visited, full = visited + float(lists.tiles.sum()), full + float((lists.run - lists.partial).sum())
        partial, pairs = partial + float(lists.partial.sum()), pairs + lists.pairs
        run += float((lists.run * nest.rows).sum()) * nest.keys
    return Part(
        pairs=min(pairs, run) * shape.batch,
        visited=run * shape.batch,
        full=full * shape.batch,
        partial=partial * shape.batch,
        empty=(visited - full - partial) * shape.batch,
        kv_bytes=_kept_keys(site, range(h, h + 1)) * 2 * shape.head_dim * shape.size * shape.batch,
        select_seconds=0.0,
        seconds=0.0,
    )


@functools.lru_cache(maxsize=4096)
def _totals(rule: tuple[Pred, int], at: Positions, nest: Nest) -> tuple[float, float, float, float]:
    """(visited, full, partial) tiles of a static rule, and the pairs of those that run."""
    tiles = tiles_of((rule,), 1, at, nest)
    run = float(((tiles.full + tiles.partial) * tiles.rows).sum()) * nest.keys
    return float(tiles.visited.sum()), float(tiles.full.sum()), float(tiles.partial.sum()), run


def _kept_keys(site: Site, heads: range) -> float:
    """How many keys the last query of some of these heads keeps: all of them where a selection chooses anew."""
    at = site.tokens
    keeps = [site.keeps[h] for h in heads]
    if any(keep is None for keep in keeps):
        return float(at.k_slots)
    last = Positions(1, at.k_slots, at.offset + at.q_slots - 1, at.q_len, at.k_len)
    rules = tuple(dict.fromkeys(rule_of(keep, h) for keep, h in zip(keeps, heads, strict=True) if keep is not None))
    return kept_by_any(rules, last)
