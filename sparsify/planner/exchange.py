"""Exchange: moves of single heads, and of pairs that pay for each other, by the sketch of all heads together."""

from __future__ import annotations

import numpy as np

from sparsify.planner.influence import Sketch
from sparsify.planner.solve import Problem


def exchanged(
    problem: Problem, budget: float, units: np.ndarray, current: Sketch, start: np.ndarray, own: float
) -> np.ndarray:
    """The candidates of all units (units,) that a sketch makes nearest to the dense output under a budget.

    From `start`, units are moved and exchanged one pair at a time while the sketch's distance of all together, with
    `own` times the heads' own errors, goes down: a search on numbers, no model is run. units: that of each head.
    """
    return _Exchange(problem, budget, units, current, start, own).run()


EPSILON = 1e-12


class _Exchange:
    """A search among assignments by the sketch."""

    MOST_STEPS, MOST_UPS = 200, 48

    def __init__(
        self, problem: Problem, budget: float, units: np.ndarray, current: Sketch, start: np.ndarray, own: float
    ) -> None:
        count, candidates = problem.losses.shape
        shape = current.effects.shape[0], count, candidates
        self.effects = np.zeros(shape)
        np.add.at(self.effects, (slice(None), units), current.effects)
        errors = np.zeros(shape)
        np.add.at(errors, (slice(None), units), current.errors())
        self.square = 0.5 * np.square(self.effects).mean(0)
        self.own = own * 0.5 * np.square(errors).mean(0)
        self.own[~np.isfinite(problem.losses)] = np.inf
        self.costs, self.budget, self.units, self.problem = problem.costs, budget, units, problem
        self.chosen = start.copy()  # of units
        self.total = current.residual + self.effects[:, np.arange(count), self.chosen].sum(1)

    def run(self) -> np.ndarray:
        for _ in range(self.MOST_STEPS):
            if not self._step():
                break
        return self.chosen

    def _step(self) -> bool:
        """The best move of one unit, or the best pair of a dearer and a cheaper one; whether there was any."""
        gains, room, extra = self._gains(), self._room(), self._extra()
        allowed = self._allowed()
        fits = (extra <= room[:, None, None] + 1e-12).all(0) & allowed
        best, moves = self._best(np.where(fits, gains, np.inf))
        if best > -EPSILON:
            best, moves = self._pair(np.where(allowed, gains, np.inf), room, extra)
        if best > -EPSILON:
            return False
        for unit, candidate in moves:
            self.total = self.total + self._change(unit)[:, candidate]
            self.chosen[unit] = candidate
        return True

    def _best(self, gains: np.ndarray) -> tuple[float, list[tuple[int, int]]]:
        unit, candidate = np.unravel_index(gains.argmin(), gains.shape)
        return float(gains[unit, candidate]), [(int(unit), int(candidate))]

    def _pair(self, gains: np.ndarray, room: np.ndarray, extra: np.ndarray) -> tuple[float, list[tuple[int, int]]]:
        """A move that is too dear with the one that pays for it."""
        order = np.argsort(gains, axis=None)[: self.MOST_UPS]
        ups = [(int(u), int(c)) for u, c in zip(*np.unravel_index(order, gains.shape), strict=True) if gains[u, c] < 0]
        if not ups:
            return np.inf, []
        changes = np.stack([self._change(unit)[:, candidate] for unit, candidate in ups])
        now = self.effects[:, np.arange(len(self.chosen)), self.chosen]
        flat = self.effects.reshape(len(self.total), -1)
        meets = (changes @ flat / len(self.total)).reshape(len(ups), *gains.shape)
        meets -= (changes @ now / len(self.total))[:, :, None]  # how a second move adds to what the first one changes
        best, moves = np.inf, []
        for number, (unit, candidate) in enumerate(ups):
            left = room - extra[:, unit, candidate]
            fits = (extra <= left[:, None, None] + 1e-12).all(0) & self._allowed(unit, candidate)
            fits[unit] = False
            value, second = self._best(np.where(fits, gains + meets[number], np.inf))
            if gains[unit, candidate] + value < best:
                best, moves = gains[unit, candidate] + value, [(unit, candidate), *second]
        return best, moves

    def _gains(self) -> np.ndarray:
        """(units, candidates): what one move does to the distance."""
        rows, units = len(self.total), np.arange(len(self.chosen))
        now = self.effects[:, units, self.chosen]
        flat = self.effects.reshape(rows, -1)
        cross = (self.total @ flat / rows).reshape(self.square.shape)
        cross -= np.einsum("ru,ruc->uc", now, self.effects, optimize=True) / rows
        value = cross + self.square + self.own
        return value - value[units, self.chosen][:, None]

    def _change(self, unit: int) -> np.ndarray:
        return self.effects[:, unit] - self.effects[:, unit, self.chosen[unit], None]

    def _extra(self) -> np.ndarray:
        """(lengths, units, candidates): what a move costs more."""
        now = self.costs[:, np.arange(len(self.chosen)), self.chosen]
        return self.costs - now[:, :, None]

    def _room(self) -> np.ndarray:
        """(lengths,): what is left of the budget."""
        return self.budget - self.costs[:, np.arange(len(self.chosen)), self.chosen].sum(1)

    def _allowed(self, unit: int | None = None, candidate: int | None = None) -> np.ndarray:
        """(units, candidates): moves that leave no layer with too many rules, after a first one."""
        allowed = np.isfinite(self.problem.losses)
        if self.problem.most is None:
            return allowed
        after = self.chosen.copy()
        if unit is not None:
            after[unit] = candidate
        for layer in range(int(self.problem.layers.max()) + 1):
            block = np.flatnonzero(self.problem.layers == layer)
            for one in block:
                others = set(after[block[block != one]].tolist())
                if len(others) >= self.problem.most:
                    closed = np.ones(allowed.shape[1], dtype=bool)
                    closed[list(others)] = len(others) > self.problem.most
                    allowed[one] &= ~closed
        return allowed
