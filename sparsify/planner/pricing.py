"""Pricing: the few candidates that are best for all units of a layer together, by branch and bound.

Each unit takes the least of the few that it may choose from, so what one more candidate takes off the sum only gets
smaller the more there are already (it is submodular). What a set can still come to is therefore bounded by what each
candidate takes off the set's members alone, which is one table of pairs; few sets are left to look at.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

CHUNK = 1 << 20  # numbers that are compared at once


def best_few(prices: np.ndarray, most: int, known: Iterable[np.ndarray] = ()) -> np.ndarray:
    """The candidates, `most` at most, in order, whose least price for each unit, summed over the units, is least.

    prices: (units, candidates), inf where a unit can't have a candidate. known: sets to begin with; a good one saves
    work. What has no price for some unit is taken only if every set is so.
    """
    columns = np.ascontiguousarray(_finite(prices).T)
    most = min(most, len(columns))
    gains = columns.sum(1)[:, None] - _sums(columns, columns)
    best = min((_greedy(columns, most), *known), key=lambda chosen: _sum(columns, chosen))
    least = _sum(columns, best)
    sets = np.arange(len(columns))[:, None]
    for size in range(1, most):
        now = columns[sets].min(1)
        off = gains[sets].min(1)  # (sets, candidates): at most so much does each candidate take off
        reached = now.sum(1) - np.partition(off, size - most, 1)[:, size - most :].sum(1)
        left = np.flatnonzero(reached < least)
        left = left[np.argsort(reached[left], kind="stable")]
        if size < most - 1:
            which, candidate = np.nonzero(np.arange(len(columns)) > sets[left, -1:])
            sets = np.column_stack([sets[left[which]], candidate])
            continue
        step = max(1, CHUNK // columns.size)
        for start in range(0, len(left), step):
            some = left[start : start + step]
            if reached[some[0]] >= least:
                break
            sums = _sums(now[some], columns)
            at, candidate = np.unravel_index(sums.argmin(), sums.shape)
            if sums[at, candidate] < least:
                least, best = sums[at, candidate], np.append(sets[some[at]], candidate)
    return np.unique(best)


def _finite(prices: np.ndarray) -> np.ndarray:
    """With a number in the place of inf that no sum without one comes to."""
    known = prices[np.isfinite(prices)]
    if known.size == prices.size:
        return prices
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    return np.where(np.isfinite(prices), prices, high + (high - low + 1) * len(prices))


def _sums(some: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(some, candidates): the least of each of `some` (some, units) and of each candidate, summed over the units."""
    return np.minimum(some[:, None], columns).sum(2)


def _sum(columns: np.ndarray, chosen: np.ndarray) -> float:
    return float(columns[chosen].min(0).sum())


def _greedy(columns: np.ndarray, most: int) -> np.ndarray:
    """One candidate after the other, and then each exchanged for a better one while there is one."""
    chosen = [int(columns.sum(1).argmin())]
    while len(chosen) < most:
        chosen.append(int(_sums(columns[chosen].min(0)[None], columns).argmin()))
    better = most > 1
    while better:
        better = False
        for place in range(most):
            rest = [one for number, one in enumerate(chosen) if number != place]
            sums = _sums(columns[rest].min(0)[None], columns)[0]
            if sums.min() < sums[chosen[place]] - 1e-12 * abs(sums[chosen[place]]):
                chosen[place], better = int(sums.argmin()), True
    return np.array(chosen)
