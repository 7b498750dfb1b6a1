"""Query tiles handed out to the cores or multiprocessors of a machine, in the order in which the kernels take them."""

from __future__ import annotations

import heapq

import numpy as np

from sparsify.cost.nest import MANY_ITEMS, WORTH_A_SPLIT, Nest
from sparsify.patterns.spans import Array, Pieces

SIMULATED = 2048  # items that are handed out one by one, the last ones; before them all cores are busy

# Work that a thread is worth, as in codegen/cpp/driver.h (a test reads it there).
WORTH_A_THREAD, DIRECT_WORK, TILE_WORK = 64, 12, 4


def about(cost: Array, items_per_core: float) -> Array:
    """Costs by their leading bits, as the C++ driver sorts by them."""
    limit = 1 if items_per_core >= MANY_ITEMS else 7
    whole = np.maximum(cost.astype(np.int64), 0)
    bits = np.frexp(np.maximum(whole, 1).astype(float))[1]
    shift = np.maximum(bits - limit.bit_length(), 0)
    return whole >> shift << shift


def step_of(count: int, cores: int, most: int) -> int:
    """How many items a core takes at once, `most` at most."""
    return max(1, min(most, count // (cores * 8)))


def makespan(times: Array, cores: int, step: int = 1) -> float:
    """When the last of the cores is done that take items in this order, `step` at a time, whenever they are free."""
    if cores == 1 or times.size == 0:
        return float(times.sum())
    if step > 1:
        times = np.add.reduceat(times, np.arange(0, times.size, step))
    early = times[:-SIMULATED] if times.size > SIMULATED else times[:0]
    busy = [float(early.sum()) / cores] * cores
    for time in times[early.size :].tolist():
        heapq.heappush(busy, heapq.heappop(busy) + time)
    return max(busy)


def cpp_threads(key_tiles: Array, nest: Nest, cores: int) -> int:
    """How many threads take part in a launch with so many key tiles in each item."""
    blocks = DIRECT_WORK if nest.direct else TILE_WORK + -(-nest.rows * nest.heads // nest.block)
    return max(1, min(cores, int(key_tiles.sum()) * blocks // WORTH_A_THREAD))


def splits(key_tiles: Array, threads: int) -> bool:
    """Whether a launch like decoding shares the key tiles of one item out."""
    return threads > 1 and float(key_tiles.max(initial=0)) * threads * WORTH_A_SPLIT > float(key_tiles.sum())


def packed(pieces: Pieces, key_tiles: Array, order: Array, cores: int, step: int, held: int) -> Array:
    """How many key tiles each query tile packs that finds none of an earlier one's.

    A core keeps `held` tiles. It takes runs of `step` query tiles in `order` (classes of one cost, each in its own
    order), and every other run is another core's.
    """
    found = np.zeros(key_tiles.shape)
    for cost in np.unique(order):
        some = np.flatnonzero(order == cost)
        starts = np.arange(0, some.size, step)
        low, high = _extents(pieces.low[:, some], pieces.high[:, some], starts)
        new = high - low
        if starts.size > cores:
            common = np.minimum(high[:, cores:], high[:, :-cores]) - np.maximum(low[:, cores:], low[:, :-cores])
            keeps = (high - low).sum(0)[:-cores] <= held
            new[:, cores:] -= np.where(keeps, np.maximum(common, 0), 0)
        met = np.add.reduceat(key_tiles[some], starts)
        beyond = np.add.reduceat(np.clip(2 * (key_tiles[some] - held), 0, key_tiles[some]), starts)
        run = np.minimum(np.maximum(new.sum(0), beyond), met)
        found[some] = np.repeat(run / np.maximum(met, 1), np.diff(np.append(starts, some.size))) * key_tiles[some]
    return found


def _extents(low: Array, high: Array, starts: Array) -> tuple[Array, Array]:
    """From where to where the intervals of runs of query tiles reach, each piece by itself; low == high where a run has
    none. low, high: (pieces, query tiles). starts: the first query tile of each run."""
    there = high > low
    first = np.minimum.reduceat(np.where(there, low, 2**60), starts, axis=1)
    last = np.maximum.reduceat(np.where(there, high, 0), starts, axis=1)
    return np.minimum(first, last), last
