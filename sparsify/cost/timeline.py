"""A launch: the query tiles that its cores take, with the steps of each, and when the last one is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sparsify.cost.machine import Machine, Rates
from sparsify.cost.nest import Nest
from sparsify.cost.schedule import about, cpp_threads, makespan, packed, splits, step_of
from sparsify.cost.site import Site
from sparsify.cost.steps import STEPS, Group, group_of, rates_vector
from sparsify.patterns.spans import Array, merged
from sparsify.ranges import joined

PACK, ITEM, READ = (STEPS.index(name) for name in ("pack", "item", "read"))


@dataclass(frozen=True)
class Timeline:
    """steps: (STEPS,), how often all query tiles together do each. times: nanoseconds of each query tile, in the order
    in which cores take them, one batch after the other or mixed. span: until the last is done. cores: that take part.
    keys: that are read from memory, each with its value."""

    steps: Array
    times: Array
    span: float
    cores: int
    keys: float


def timeline_of(site: Site, machine: Machine, nest: Nest) -> Timeline:
    """That of a site on a machine, whose target has this nest for it."""
    groups = [list(_groups(site, nest, kv_head)) for kv_head in range(site.shape.kv_heads)]
    return (_on_cores if machine.target == "cpp" else _on_chip)(site, machine, nest, groups)


def _groups(site: Site, nest: Nest, kv_head: int) -> Iterator[Group]:
    """The heads of a key head that share query tiles, in order."""
    first = kv_head * site.shape.group
    for start in range(first, first + site.shape.group, nest.heads):
        yield group_of(site, nest, range(start, min(start + nest.heads, first + site.shape.group)))


def _on_cores(site: Site, machine: Machine, nest: Nest, groups: list[list[Group]]) -> Timeline:
    """A processor's: an item is a query tile of all heads of a key head."""
    shape, rates = site.shape, machine.rates_of(site.shape.dtype, site.shape.head_dim, (nest.rows, nest.keys))
    key_tiles = [sum((group.key_tiles for group in some), start=np.zeros(1)) for some in groups]
    costs = np.tile(np.concatenate(key_tiles), shape.batch)
    threads = cpp_threads(costs, nest, machine.cores)
    if not any(group.listed.any() for some in groups for group in some):  # as driver.h has it
        nest = replace(nest, held=min(nest.held, 2 * int(costs.max(initial=0)) + 1))
    step, order = step_of(costs.size, threads, nest.step), about(costs, costs.size / threads)
    found = []
    for some, cost in zip(groups, key_tiles, strict=True):
        done = sum((group.steps for group in some), start=np.zeros((len(STEPS), 1)))
        done[PACK] += _packs(site, nest, some, about(cost, costs.size / threads), threads, step)
        done[ITEM] += 1
        found.append(done)
    times = np.tile(rates_vector(rates) @ np.concatenate(found, axis=1), shape.batch)
    if nest.whole_group and splits(costs, threads):
        span = float(times.sum()) / threads
    else:
        times = times[np.argsort(-order, kind="stable")]
        span = makespan(times, min(threads, times.size), step)
    total = sum((done.sum(1) for done in found), start=np.zeros(len(STEPS))) * shape.batch
    return Timeline(total, times, span, threads, float(total[PACK] + total[READ]))


def _packs(site: Site, nest: Nest, some: list[Group], cost: Array, cores: int, step: int) -> Array:
    """How many keys the query tiles of a key head pack."""
    if nest.direct:
        return some[0].key_tiles * 0
    if nest.whole_group:
        return sum((group.key_tiles * nest.keys for group in some), start=np.zeros(1))
    found = [(low, high) for group in some for low, high in zip(group.pieces.low, group.pieces.high, strict=True)]
    pieces = merged(found, cost.size)
    again = np.where(pieces.lengths > nest.held, len(some), 1)
    tiles = packed(pieces, pieces.lengths, cost, cores, step, nest.held) * again
    units = -(-site.at.k_slots // nest.keys)
    for group in some:
        met = float(group.listed.sum())
        fresh = max(0.0, 1 - nest.held / units)
        share = min(1.0, fresh + cores * min(units, nest.held) / met) if met else 0.0
        tiles = tiles + group.listed * share + group.gathered / nest.keys
    return tiles * nest.keys


def _on_chip(site: Site, machine: Machine, nest: Nest, groups: list[list[Group]]) -> Timeline:
    """A GPU's: an item is a query tile of some heads, and sections of heads follow each other. While the products of
    one key tile are made, the next one is read."""
    rates = machine.rates_of(site.shape.dtype, site.shape.head_dim, (nest.rows, nest.keys))
    flat = [group for some in groups for group in some] * site.shape.batch
    found = {group: _chip_items(group, nest, rates) for group in dict.fromkeys(flat)}
    times = np.stack([found[group][1] for group in flat])
    times = times[:, ::-1] if nest.descending else times  # the longest first, as attention.py.jinja has it
    heads = [times[start : start + nest.section] for start in range(0, len(times), nest.section)]
    times = np.concatenate([some.T.ravel() for some in heads])
    steps = sum((found[group][0] for group in flat), start=np.zeros(len(STEPS)))
    keys = sum(_touched(site, nest, some) for some in groups) * site.shape.batch
    return Timeline(steps, times, makespan(times, machine.cores), machine.cores, keys)


def _chip_items(group: Group, nest: Nest, rates: Rates) -> tuple[Array, Array]:
    """(steps, times) of the items of a group on a GPU: all their steps, and what each item takes."""
    done = group.steps.copy()
    done[READ], done[ITEM] = group.key_tiles * nest.keys, nest.splits
    reading = done[READ] * rates.read
    each = np.maximum(rates_vector(rates) @ done - reading, reading) / nest.splits
    return done.sum(1), np.repeat(each, nest.splits)


def _touched(site: Site, nest: Nest, some: list[Group]) -> float:
    """How many keys some query tile of a key head meets, about: they come from memory once, whoever reads them."""
    low, high = (np.concatenate([getattr(group.pieces, side) for group in some]) for side in ("low", "high"))
    there = high > low
    first, last = np.where(there, low, 2**60).min(1).tolist(), (np.where(there, high, 0).max(1) - 1).tolist()
    extents = joined(sorted(ends for ends in zip(first, last, strict=True) if ends[0] <= ends[1]))
    met = sum(last - first + 1 for first, last in extents)
    lists = sum(float((group.listed + group.gathered / nest.keys).sum()) for group in some)
    units = -(-site.at.k_slots // nest.keys)
    return min(met + lists, units) * nest.keys
