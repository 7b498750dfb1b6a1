"""The search for one kernel: candidates race against the best so far, group by group; last, the best the default."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.runtime.tunings import Key
from sparsify.tuner.children import Child, Failed, Lost
from sparsify.tuner.judge import Race, spread, wins
from sparsify.tuner.targets import Values
from sparsify.tuner.trials import RIGHT, Journal, Trial


@dataclass(frozen=True)
class Limits:
    """How long things may take. seconds: of a race. rounds: of a race at most. build, run: a child's patience."""

    seconds: float = 3.0
    rounds: int = 60
    build: float = 120.0
    run: float = 60.0


@dataclass
class Search:
    """Of one kernel.

    default: all fields as they are by default. groups: what to try. first: whole sets of values to try before these:
    what was best for other kernels. children: the first one times, all of them build. deadline: by `clock`.
    order: which of a group, and in which order, given the best so far. pruned: values that are not tried.
    best: what differs from the default in the best so far. usual: seconds that the default takes.
    """

    key: Key
    default: Values
    groups: Sequence[Sequence[Values]]
    first: Sequence[Values]
    children: Sequence[Child]
    journal: Journal
    deadline: float
    order: Callable[[Sequence[Values], Values], Sequence[Values]] = lambda group, best: group
    pruned: Collection[Values] = ()
    limits: Limits = field(default_factory=Limits)
    tell: Callable[[str], None] = lambda text: None
    clock: Callable[[], float] = time.perf_counter
    best: dict[str, int] = field(default_factory=dict)
    usual: float = 0.0
    trials: list[Trial] = field(default_factory=list)

    def run(self, path: Path) -> Trial | None:
        """Searches until all is tried or the time is over, and races the best against the default: what that gave, or
        None where the best is lost. Goes on where the journal says that an earlier run was.

        Raises Failed or Lost where the kernel doesn't even run by default.
        """
        for child in self.children:
            child.open(path)
        for trial in self.journal.of(self.key):
            self._take(trial)
        seen = len(self.trials)
        self.usual = self.children[0].ask("seconds", {}, seconds=10 * self.limits.run)
        groups = ([(step, False) for step in self.order(some, self.best)] for some in self.groups)
        for group in itertools.chain([[(values, True) for values in self.first]], groups):
            if not self._try(group):
                break
        known = [trial for trial in self.trials[:seen] if trial.last and trial.values == self.best]
        if known and not any(trial.won for trial in self.trials[seen:]):
            return known[-1]
        return self._last()

    def _try(self, group: Sequence[tuple[Values, bool]]) -> bool:
        """Tries a group's candidates, as many at a time as there are children to build them. Whether there was time."""
        left = list(self._untried(group))
        while left:
            if self.clock() > self.deadline:
                return False
            some, left = left[: len(self.children)], left[len(self.children) :]
            for (step, whole), problem in zip(some, self._build(some), strict=True):
                self._note(problem or self._trial(step, self._values(step, whole)))
            left = list(self._untried(left))
        return True

    def _count(self) -> str:
        """`3 of 24`: the candidate that is next, of all there are at most."""
        tried = sum(not trial.last for trial in self.trials)
        return f"{tried + 1} of {max(tried + 1, len(self.first) + sum(map(len, self.groups)))}"

    def _untried(self, group: Sequence[tuple[Values, bool]]) -> Iterator[tuple[Values, bool]]:
        tried = {_text(trial.step) for trial in self.trials if not trial.last}
        for step, whole in group:
            values = self._values(step, whole)
            if _text(step) not in tried and values != self.best and values not in self.pruned:
                yield step, whole

    def _values(self, step: Values, whole: bool) -> dict[str, int]:
        """What differs from the default when a step is taken: the best so far with the step, or the step alone."""
        values = {**({} if whole else self.best), **step}
        return {name: value for name, value in values.items() if value != self.default[name]}

    def _build(self, some: Sequence[tuple[Values, bool]]) -> list[Trial | None]:
        """Builds side by side, each in a child of its own; what went wrong is a trial."""
        self.tell(f"{self._count()}: building")
        with ThreadPoolExecutor(len(self.children)) as pool:
            return list(pool.map(self._built, some, self.children))

    def _built(self, candidate: tuple[Values, bool], child: Child) -> Trial | None:
        step, values = candidate[0], self._values(*candidate)
        try:
            child.ask("build", values, seconds=self.limits.build)
        except (Failed, Lost) as error:
            return self._problem(step, values, error)
        return None

    def _trial(self, step: Values, values: Values) -> Trial:
        """Checks a candidate's numbers, and then times it against the best so far; who wins has to win twice."""
        self.tell(f"{self._count()}: {describe(step)}")
        try:
            error, bound = self.children[0].ask("check", values, seconds=self.patience)
            if not error <= bound:
                return Trial(self.key, step, values, "wrong", f"the error is {error:.1e}, the bound {bound:.1e}")
            race = self._race(values, self.best, 1)
            won = wins(race.ratios)
            if won:
                race = self._race(values, self.best, 2)
                won = wins(race.ratios)
        except (Failed, Lost) as error:
            return self._problem(step, values, error)
        low, middle, high = spread(race.ratios)
        return Trial(self.key, step, values, RIGHT, ratio=middle, low=low, high=high, won=won)

    def _race(self, values: Values, against: Values, times: int) -> Race:
        limits = self.limits
        given = (values, against, limits.rounds * times, limits.seconds * times)
        return self.children[0].ask("race", *given, seconds=self.patience + limits.seconds * times)

    @property
    def patience(self) -> float:
        """Seconds after which a candidate hangs: many times as many as the default takes."""
        return self.limits.run + 40 * self.usual

    def _problem(self, step: Values, values: Values, error: Exception) -> Trial:
        return Trial(self.key, step, values, "lost" if isinstance(error, Lost) else "failed", str(error))

    def _last(self) -> Trial | None:
        """Races the best against the default, by fresh numbers: those that chose it are too good. If it doesn't win
        these, the default stays."""
        self.tell("the best against the default")
        best = dict(self.best)
        try:
            race = self._race(best, {}, 2 if best else 1)
        except (Failed, Lost) as error:
            self._note(self._problem({}, best, error))
            return None
        (seconds, default), (low, middle, high) = race.medians, spread(race.ratios)
        if not best or not wins(race.ratios):
            best, seconds, low, middle, high = {}, default, 1.0, 1.0, 1.0
        trial = Trial(self.key, {}, best, RIGHT, "", middle, low, high, bool(best), True, seconds, default)
        self._note(trial)
        return trial

    def _note(self, trial: Trial) -> None:
        self.journal.add(trial)
        self._take(trial)

    def _take(self, trial: Trial) -> None:
        self.trials.append(trial)
        if trial.won or trial.last:
            self.best = dict(trial.values)


def describe(values: Values) -> str:
    """`block_rows 4, blocks 12`."""
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "the default"


def _text(values: Values) -> str:
    return json.dumps(dict(sorted(values.items())))
