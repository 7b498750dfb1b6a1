"""Solve: which candidate each head gets, at the least loss under a budget.

A multiple-choice knapsack with one budget a profiled length. Without a limit on distinct rules it goes to HiGHS as it
stands. With one, a layer is chosen as a whole: columns (what all units of a layer get) are made by their reduced cost
until none is left that helps (Dantzig and Wolfe), which gives the bound, and HiGHS chooses among the columns. MoA's
limit of two rules a layer makes its sets enumerable, which `pricing` goes through.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from sparsify.errors import InputError
from sparsify.planner.pricing import best_few

MOST_SETS = 40_000  # sets of rules that are looked at in one layer; beyond, its rules are limited by HiGHS itself
ROUNDS = 60  # of columns
LAST = 4  # sets of a layer that the next one is looked for from
GAP = 1e-4


@dataclass(frozen=True)
class Problem:
    """What is to be chosen. A unit is a head, or the heads of a KV group that have one rule.

    losses: (units, candidates), inf where a unit can't have a candidate. costs: (lengths, units, candidates), shares of
    the whole dense cost at that length. layers: the layer (or site) of each unit, from 0, in order. most: how many
    distinct rules a layer may have, None for any number. sources: (layer, source, candidate), ...: a unit of the layer
    may have the candidate only where one of the source has it, whose choice it takes.
    """

    losses: np.ndarray
    costs: np.ndarray
    layers: np.ndarray
    most: int | None = None
    sources: tuple[tuple[int, int, int], ...] = ()

    def cost(self, chosen: np.ndarray) -> float:
        """The share of the dense cost at the length where it is greatest."""
        return float(self.costs[:, np.arange(len(chosen)), chosen].sum(1).max())

    def loss(self, chosen: np.ndarray) -> float:
        """The losses of all units, added."""
        return float(self.losses[np.arange(len(chosen)), chosen].sum())


@dataclass(frozen=True)
class Solution:
    """chosen: the candidate of each unit. value: its loss; bound: no choice has less; gap: (value - bound) / value."""

    chosen: np.ndarray
    value: float
    bound: float

    @property
    def gap(self) -> float:
        return max(0.0, (self.value - self.bound) / self.value) if self.value > 0 else 0.0


def within_cost(problem: Problem, budget: float) -> Solution:
    """The least loss at a share `budget` of the dense cost, at every length. Raises InputError where none is so cheap,
    with the least that is."""
    limits, allowed = np.full(len(problem.costs), budget), np.isfinite(problem.losses)
    values, rows = np.where(allowed, problem.losses, 0.0), np.where(allowed, problem.costs, 0.0)
    blocks = [np.flatnonzero(problem.layers == layer) for layer in range(int(problem.layers.max()) + 1)]
    few = problem.most is None or min(values.shape[1], max(map(len, blocks))) <= problem.most
    if problem.sources or few:
        found = _knapsack(values, rows, limits, allowed, problem)
    elif math.comb(values.shape[1], problem.most) <= MOST_SETS:
        found = _Columns(values, rows, limits, allowed, blocks, problem.most).solve()
    else:
        found = _limited(values, rows, limits, allowed, problem.layers, problem.most)
    if found is None:
        least = _upwards(_least(problem, rows, allowed, blocks))
        said = f"no choice comes to {budget:.4g} of the dense cost; the nearest that is met is {least}"
        raise InputError(f"plan: budget: {said}")
    return found


def _least(problem: Problem, rows: np.ndarray, allowed: np.ndarray, blocks: list) -> float:
    """The least that the limits could be, all of them moved alike; with a limit on rules, one that can be met."""
    worst = np.where(allowed, rows.max(0), np.inf)
    candidates = worst.shape[1]
    most = problem.most if problem.most is not None and problem.most < candidates else len(worst)
    if len(rows) > 1 and all(len(block) <= most for block in blocks):
        return _least_of_all(rows, allowed)
    total = 0.0
    for block in blocks:
        if len(block) <= most:
            total += worst[block].min(1).sum()
        else:
            total += worst[block][:, best_few(worst[block], min(most, 3))].min(1).sum()
    return float(total)


def _least_of_all(rows: np.ndarray, allowed: np.ndarray) -> float:
    """The least greatest sum of several rows: one more variable, which none may exceed."""
    pairs = np.argwhere(allowed)
    count, spent = len(pairs), rows[:, pairs[:, 0], pairs[:, 1]]
    one = sparse.csr_matrix((np.ones(count), (pairs[:, 0], np.arange(count))), (len(allowed), count + 1))
    below = sparse.csr_matrix(np.concatenate([spent, -np.ones((len(rows), 1))], 1))
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(below, -np.inf, 0)]
    cost, upper = np.zeros(count + 1), np.ones(count + 1)
    cost[-1], upper[-1] = 1, np.inf
    whole = np.concatenate([np.ones(count), [0]])
    with _without_remarks():
        found = milp(cost, constraints=constraints, integrality=whole, bounds=Bounds(0, upper))
    return float(found.fun)


def _upwards(number: float) -> str:
    """With four digits, none of which makes it less."""
    digits = 3 - math.floor(math.log10(number)) if number > 0 else 4
    return f"{math.ceil(number * 10**digits - 1e-9) / 10**digits:.4g}"


def _knapsack(
    values: np.ndarray, rows: np.ndarray, limits: np.ndarray, allowed: np.ndarray, problem: Problem
) -> Solution | None:
    """Without a limit on rules. What another candidate beats in everything is left out first, unless it is shared."""
    beaten = _beaten(values, rows, allowed)
    beaten[:, [candidate for _, _, candidate in problem.sources]] = False
    units, pairs = values.shape[0], np.argwhere(allowed & ~beaten)
    one = sparse.csr_matrix((np.ones(len(pairs)), (pairs[:, 0], np.arange(len(pairs)))), (units, len(pairs)))
    cost = values[pairs[:, 0], pairs[:, 1]]
    spent = sparse.csr_matrix(rows[:, pairs[:, 0], pairs[:, 1]])
    found = _integers(cost, one, spent, limits, _taken(problem, pairs))
    if found is None:
        return None
    x, bound = found
    chosen = np.empty(units, dtype=np.int64)
    taken = pairs[x > 0.5]
    chosen[taken[:, 0]] = taken[:, 1]
    return Solution(chosen, float(values[np.arange(units), chosen].sum()), bound)


def _taken(problem: Problem, pairs: np.ndarray) -> list[LinearConstraint]:
    """That choices are taken only where they are made; pairs: the (unit, candidate) of each variable."""
    links = []
    for layer, source, candidate in problem.sources:
        mine = pairs[:, 1] == candidate
        makers = mine & (problem.layers[pairs[:, 0]] == source)
        for taker in np.flatnonzero(mine & (problem.layers[pairs[:, 0]] == layer)):
            row = -makers.astype(float)
            row[taker] += 1
            links.append(row)
    return [LinearConstraint(sparse.csr_matrix(np.array(links)), -np.inf, 0)] if links else []


def _beaten(values: np.ndarray, rows: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(units, candidates): whether another candidate of the unit is as good in all; the first of equals is left."""
    all_of = np.concatenate([values[None], rows])
    all_of = np.where(allowed, all_of, np.inf)
    beaten = np.zeros(values.shape, dtype=bool)
    for other in range(values.shape[1]):
        least = (all_of[:, :, other, None] <= all_of).all(0)
        better = (all_of[:, :, other, None] < all_of).any(0)
        first = other < np.arange(values.shape[1])
        beaten |= least & (better | first) & (np.arange(values.shape[1]) != other)
    return beaten


def _integers(
    cost: np.ndarray, one: sparse.csr_matrix, spent: sparse.csr_matrix, limits: np.ndarray,
    more: Sequence[LinearConstraint] = (),
) -> tuple[np.ndarray, float] | None:  # fmt: skip
    """The 0 or 1 of each variable and the bound; None where nothing is allowed. Values are scaled to about 1."""
    scale = float(np.abs(cost).max()) or 1.0
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(spent, -np.inf, limits + 1e-12), *more]
    options = {"mip_rel_gap": GAP, "time_limit": 60.0}
    with _without_remarks():
        found = milp(
            cost / scale, constraints=constraints, integrality=np.ones(len(cost)), bounds=Bounds(0, 1), options=options
        )
    if found.x is None:
        return None
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
    return found.x, float(min(bound, found.fun)) * scale


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """HiGHS prints a remark of its own on stdout now and then, whatever it is asked to."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _limited(
    values: np.ndarray, rows: np.ndarray, limits: np.ndarray, allowed: np.ndarray, layers: np.ndarray, most: int
) -> Solution | None:
    """At most so many rules a layer, by one more variable a layer and rule: for limits with too many sets."""
    (units, candidates), count = values.shape, int(layers.max()) + 1
    size = units * candidates
    one = sparse.kron(sparse.eye(units), np.ones((1, candidates)))
    one = sparse.hstack([one, sparse.csr_matrix((units, count * candidates))]).tocsr()
    spent = sparse.hstack([sparse.csr_matrix(rows.reshape(len(rows), size)),
                           sparse.csr_matrix((len(rows), count * candidates))]).tocsr()  # fmt: skip
    used = np.repeat(layers, candidates) * candidates + np.tile(np.arange(candidates), units)
    links = sparse.hstack([sparse.eye(size), -sparse.csr_matrix((np.ones(size), (np.arange(size), used)),
                                                               (size, count * candidates))])  # fmt: skip
    rules = sparse.hstack([sparse.csr_matrix((count, size)), sparse.kron(sparse.eye(count), np.ones((1, candidates)))])
    closed = sparse.hstack(
        [sparse.csr_matrix(~allowed.reshape(1, -1) * 1.0), sparse.csr_matrix((1, count * candidates))]
    )
    more = [LinearConstraint(links.tocsr(), -np.inf, 0), LinearConstraint(rules.tocsr(), 0, most),
            LinearConstraint(closed.tocsr(), 0, 0)]  # fmt: skip
    cost = np.concatenate([values.reshape(-1), np.zeros(count * candidates)])
    found = _integers(cost, one, spent, limits, more)
    if found is None:
        return None
    chosen = found[0][:size].reshape(units, candidates).argmax(1)
    return Solution(chosen, float(values[np.arange(units), chosen].sum()), found[1])


class _Columns:
    """Layers with at most `most` rules each, as columns."""

    def __init__(
        self, values: np.ndarray, rows: np.ndarray, limits: np.ndarray, allowed: np.ndarray, blocks: list, most: int
    ) -> None:
        self.values, self.rows, self.limits, self.blocks = values, rows, limits, blocks
        self.closed = np.where(allowed, 0.0, np.inf)
        self.most = most
        self.last: list[list[np.ndarray]] = [[] for _ in blocks]  # the sets of each layer's latest columns
        self.columns: list[tuple[int, np.ndarray]] = []
        self.seen: set[tuple[int, bytes]] = set()

    def solve(self) -> Solution | None:
        """Columns until none has a reduced cost below 0, then the best of them."""
        penalty = np.zeros(len(self.limits))
        for weight in (0.0, *np.geomspace(1e-3, 1e4, 15)):
            penalty[:] = weight * self._unit_price()
            self._extend(penalty)
        self._extend(np.full(len(self.limits), np.inf))
        bound = -np.inf
        for _ in range(ROUNDS):
            master = self._master()
            if master is None:
                return None
            prices, _ = master
            reached, fresh = self._extend(prices)
            bound = max(bound, reached - float(prices @ self.limits))
            if not fresh:
                break
        return self._chosen(bound)

    def _unit_price(self) -> float:
        """About what a share of the cost is worth."""
        spread = float(np.ptp(self.values)) or 1.0
        return spread * len(self.values) / max(float(self.limits.max()), 1e-9) / 1e2

    def _extend(self, prices: np.ndarray) -> tuple[float, bool]:
        """One column a layer, the best at these prices of the constraints: their sum, and whether any is new."""
        if np.isinf(prices).any():
            weighed = self.rows.max(0) + self.closed
        else:
            weighed = self.values + np.tensordot(prices, self.rows, 1) + self.closed
        total, fresh = 0.0, False
        for layer, block in enumerate(self.blocks):
            found = best_few(weighed[block], self.most, self.last[layer])
            self.last[layer] = [*self.last[layer], found][-LAST:]
            column = found[weighed[block][:, found].argmin(1)]
            total += float(weighed[block, column].sum())
            key = layer, column.tobytes()
            if key not in self.seen:
                self.seen.add(key)
                self.columns.append((layer, column))
                fresh = True
        return total, fresh

    def _matrices(self) -> tuple[np.ndarray, sparse.csr_matrix, np.ndarray]:
        cost = np.array([self.values[self.blocks[layer], column].sum() for layer, column in self.columns])
        spent = np.array([self.rows[:, self.blocks[layer], column].sum(1) for layer, column in self.columns]).T
        layers = np.array([layer for layer, _ in self.columns])
        one = sparse.csr_matrix((np.ones(len(cost)), (layers, np.arange(len(cost)))), (len(self.blocks), len(cost)))
        return cost, one, spent

    def _master(self) -> tuple[np.ndarray, float] | None:
        """The prices of the constraints, from the relaxed choice among the columns that there are."""
        cost, one, spent = self._matrices()
        scale = float(np.abs(cost).max()) or 1.0
        found = linprog(
            cost / scale, A_ub=spent, b_ub=self.limits, A_eq=one, b_eq=np.ones(len(self.blocks)), method="highs"
        )
        return None if found.x is None else (-found.ineqlin.marginals * scale, float(found.fun) * scale)

    def _chosen(self, bound: float) -> Solution | None:
        cost, one, spent = self._matrices()
        found = _integers(cost, one, sparse.csr_matrix(spent), self.limits)
        if found is None:
            return None
        chosen = np.empty(len(self.values), dtype=np.int64)
        for number in np.flatnonzero(found[0] > 0.5):
            layer, column = self.columns[number]
            chosen[self.blocks[layer]] = column
        value = float(self.values[np.arange(len(chosen)), chosen].sum())
        return Solution(chosen, value, min(bound, value))
