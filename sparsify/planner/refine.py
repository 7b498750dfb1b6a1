"""Refine: heads' errors are neither equal in effect nor independent, so what was chosen is looked at again.

From mild budgets to tight ones: the influence of candidates is profiled again where the model is by now, the knapsack
is solved on it, and what the sketch says of all heads together is searched from there. What decides between the two is
always the model itself, on the samples of the search.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.errors import InputError
from sparsify.patterns import Pattern
from sparsify.planner.exchange import exchanged
from sparsify.planner.plan import Candidate
from sparsify.planner.profiles import Profile
from sparsify.planner.profiles.influence import influence
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.solve import Problem, Solution, within_cost
from sparsify.planner.state import State

if TYPE_CHECKING:
    from sparsify.planner.make import Planner

TRIES, SLACK = 4, 1e-6
OWN = (1.0, 0.3)  # what heads' own errors weigh beside the sketch of all together, which has few rows


@dataclass
class Measure:
    """The distance from the dense output on some samples, each thing asked once."""

    rig: Rig
    samples: Sequence[Sample]
    state: State

    def __call__(self, chosen: np.ndarray) -> float:
        """Of the candidates of all heads."""
        patterns = [self.rig.patterns[one] for one in chosen]
        return self._of(("chosen", chosen.tolist()), patterns)

    def uniform(self, one: Candidate) -> float:
        """Of one candidate for all heads."""
        return self._of(("uniform", one.form), [one.pattern()] * len(self.rig.heads))

    def _of(self, what: Any, patterns: Sequence[Pattern | None]) -> float:
        assigned = self.rig.heads.assignment(patterns)
        key = "distance", what, [sample.digest() for sample in self.samples]

        def make() -> dict[str, np.ndarray]:
            return {"value": np.array([self.rig.distance(sample, assigned) for sample in self.samples])}

        return float(self.state.of(key, make)["value"].mean())


def refined(
    planner: Planner, profile: Profile, budgets: Sequence[float]
) -> Iterator[tuple[float, np.ndarray, Solution, Profile]]:
    """For each budget that can be met, the mildest first: it, the candidate of every head, the knapsack's solution (its
    value and bound are those of the losses alone) and the profile that it is of."""
    again = _marks(len(budgets), planner.settings.rounds) if profile.current is not None else set()
    chosen = np.full(len(planner.rig.heads), planner.rig.dense)
    for number, budget in enumerate(budgets):
        if number in again and number:
            profile = _again(planner, profile, chosen)
        try:
            chosen, found = chosen_at(planner, profile, budget)
        except InputError:
            if budget == planner.settings.least_met:
                raise
            continue
        yield budget, chosen, found, profile


def chosen_at(planner: Planner, profile: Profile, budget: float) -> tuple[np.ndarray, Solution]:
    """The candidate of every head at a budget, by a profile: the best, as measured, of the knapsack's, of those that
    are searched from it, and of those in which heads of retrieval keep everything; and the knapsack's solution.

    Heads of a site may cost more together than each by itself: then less is spent on them. Raises InputError for a
    budget that can't be met.
    """
    planner.progress.tell(f"choosing at {budget:.3g} of the cost")
    problem, spend, over = planner.problem(profile.losses), budget, 0.0
    for _ in range(TRIES):
        try:
            found = within_cost(problem, spend)
        except InputError:
            if over:
                said = f"heads that come to {budget:.4g} one by one cost {over * budget:.4g} of dense together"
                raise InputError(f"plan: budget: {said}; take a larger one") from None
            raise
        options = [found.chosen]
        if profile.current is not None and not problem.sources:
            options += [exchanged(problem, spend, planner.units, profile.current, found.chosen, own) for own in OWN]
        options += _retrieving(planner, profile, problem, spend)
        chosen = min((option[planner.units] for option in options), key=planner.measure)
        over = planner.cost(chosen) / budget
        if over <= 1 + SLACK:
            break
        spend *= 0.995 / over
    return chosen, found


def _retrieving(planner: Planner, profile: Profile, problem: Problem, budget: float) -> Iterator[np.ndarray]:
    """The candidates of all units where the heads that look far back, or the first half of them, keep everything.

    What a model copies with confidence shows in no curvature of its output, and one such head often stands in for
    another, so that no profile of single heads tells what all of them are for.
    """
    named = profile.far()
    for count in dict.fromkeys((len(named), (len(named) + 1) // 2)):
        units = planner.units[named[:count]]
        losses = problem.losses.copy()
        losses[np.ix_(units, np.arange(losses.shape[1]) != planner.rig.dense)] = np.inf
        with contextlib.suppress(InputError):
            if units.size:
                yield within_cost(replace(problem, losses=losses), budget).chosen


def _marks(count: int, rounds: int) -> set[int]:
    """The budgets before which the profile is made again: `rounds` of them, the tightest ones included."""
    return {count - 1 - number * max(1, count // (rounds + 1)) for number in range(rounds)} if rounds else set()


def _again(planner: Planner, profile: Profile, chosen: np.ndarray) -> Profile:
    samples, settings = planner.readings.profile, planner.settings
    found = influence(planner.rig, samples, settings, planner.state, planner.progress, chosen)
    return found if profile.scores is None else found.scored(profile.scores)
