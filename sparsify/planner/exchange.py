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


class _Exchange:
    """A search among assignments by the sketch."""

    MOST_STEPS, MOST_UPS = 400, 48

    def __init__(
        self, problem: Problem, budget: float, units: np.ndarray, current: Sketch, start: np.ndarray, own: float
    ) -> None:
        count, candidates = problem.losses.shape
        shape = current.effects.shape[0], count, candidates
        self.effects = np.zeros(shape)
        np.add.at(self.effects, (slice(None), units), current.effects)
        errors = np.zeros(shape)
        np.add.at(errors, (slice(None), units), current.errors())
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
        gains, room = self._gains(self.total), self._room()
        fits = (self._extra() <= room[:, None, None] + 1e-12).all(0) & self._allowed()
        unit, candidate = np.unravel_index(np.where(fits, gains, np.inf).argmin(), gains.shape)
        best, moves = gains[unit, candidate] if fits[unit, candidate] else np.inf, [(unit, candidate)]
        if best > -1e-12:
            best, moves = self._pair(gains, room)
        if best > -1e-12:
            return False
        for unit, candidate in moves:
            self.total = self.total + self._change(unit)[:, candidate]
            self.chosen[unit] = candidate
        return True

    def _pair(self, gains: np.ndarray, room: np.ndarray) -> tuple[float, list]:
        """A move that is too dear with the one that pays for it."""
        best, moves = np.inf, []
        ups = [(u, c) for u, c in np.argwhere((gains < 0) & self._allowed())]
        for unit, candidate in sorted(ups, key=lambda up: gains[up[0], up[1]])[: self.MOST_UPS]:
            change, extra = self._change(unit)[:, candidate], self._extra()
            left = room - extra[:, unit, candidate]
            fits = (extra <= left[:, None, None] + 1e-12).all(0) & self._allowed(unit, candidate)
            fits[unit] = False
            second = np.where(fits, self._gains(self.total + change), np.inf)
            other = np.unravel_index(second.argmin(), second.shape)
            if gains[unit, candidate] + second[other] < best:
                best, moves = gains[unit, candidate] + second[other], [(unit, candidate), other]
        return best, moves

    def _gains(self, total: np.ndarray) -> np.ndarray:
        """(units, candidates): what one move does to the distance."""
        now = self.effects[:, np.arange(len(self.chosen)), self.chosen]
        base, rows = total[:, None] - now, len(total)
        cross = np.einsum("ru,ruc->uc", base, self.effects, optimize=True) / rows
        square = 0.5 * np.square(self.effects).mean(0)
        value = cross + square + self.own
        return value - value[np.arange(len(self.chosen)), self.chosen][:, None]

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
