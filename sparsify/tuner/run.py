"""A run of the tuner: job after job while there is time, each result into the store at once."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sparsify.progress import Bar
from sparsify.runtime import tuned
from sparsify.runtime.tunings import Tuned
from sparsify.tuner.children import Child, Failed, Lost
from sparsify.tuner.jobs import Job
from sparsify.tuner.order import Order, machine_for
from sparsify.tuner.runner import Runner
from sparsify.tuner.search import Limits, Search
from sparsify.tuner.targets import Values, tunable
from sparsify.tuner.trials import PRUNED, RIGHT, Journal, Trial

BUILDERS = 4  # child processes, at most
LEAST = 15.0  # seconds of a kernel: where there is no time for all, some are tuned and not all a little
OTHERS = 3  # of other kernels' best values that are tried first


@dataclass(frozen=True)
class Outcome:
    """What became of a job. trials: all of its candidates. last: the best against the default; None where `why` says
    that there is none."""

    job: Job
    trials: tuple[Trial, ...]
    last: Trial | None
    why: str = ""

    @property
    def tried(self) -> int:
        """How many candidates there were, without the races that end searches."""
        return sum(not trial.last for trial in self.trials)


@dataclass
class Run:
    """Jobs, and how they are tuned.

    budget: seconds. resume: whether to go on where an earlier run was interrupted, else its trials are forgotten.
    """

    jobs: Sequence[Job]
    budget: float
    resume: bool
    limits: Limits
    make: Callable[[], Runner] = Runner
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.interrupted = False

    def run(self) -> list[Outcome]:
        """Tunes what there is time for; an interruption from the keyboard ends it with what is done."""
        journal, end = Journal.here(), self.clock() + self.budget
        if not self.resume:
            journal.forget(job.key for job in self.jobs)
        children = [Child(self.make) for _ in range(min(BUILDERS, os.cpu_count() or 1))]
        try:
            with tempfile.TemporaryDirectory(prefix="sparsify-tune-") as folder, Bar([1.0] * len(self.jobs)) as steps:
                for number, job in enumerate(self.jobs):
                    if self.clock() > end and number:
                        break
                    share = (end - self.clock()) / (len(self.jobs) - number)
                    path = job.write(Path(folder), number)
                    self._tune(job, path, children, journal, self.clock() + max(share, LEAST), steps)
                    path.unlink()
                    steps.advance()
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            for child in children:
                child.end()
        return self.outcomes

    def _tune(
        self, job: Job, path: Path, children: Sequence[Child], journal: Journal, deadline: float, steps: Bar
    ) -> None:
        home, launch = tunable(job.key[2]), job.launches[0]
        tell = partial(_tell, steps, job.name)
        tell("starting")
        given = (home.default(launch), home.groups(launch), self._others(job), children, journal, deadline)
        pruned = [trial.values for trial in journal.of(home.ahead_key(launch)) if trial.state == PRUNED]
        search = Search(job.key, *given, Order(launch, machine_for(launch)), pruned, self.limits, tell, self.clock)
        try:
            last, why = search.run(path), ""
        except (Failed, Lost) as error:
            last, why = None, str(error)
        if last is not None and any(trial.state == RIGHT and not trial.last for trial in search.trials):
            tuned.keep([_entry(last)])  # of what no candidate was raced for, nothing new is known
        self.outcomes.append(Outcome(job, tuple(search.trials), last, why))

    def _others(self, job: Job) -> list[Values]:
        """What was best for this kernel, at another length maybe, and for others of the target that are tuned like it:
        the latest first."""
        alike = (one.last for one in reversed(self.outcomes) if _kind(one.job) == _kind(job) and one.last)
        known = [tuned.lookup(job.key), *(last.values for last in alike)]
        found = {tuple(sorted(values.items())): values for values in known if values}
        return list(found.values())[:OTHERS]


def _kind(job: Job) -> tuple[str, bool, bool]:
    """The target, whether queries are few, and whether they are laid out: what decides a kernel's default."""
    return job.key[2], "__few__" in job.key[3], job.launches[0].program.queries is not None


def _tell(steps: Bar, name: str, text: str) -> None:
    steps.tell(f"{name}: {text}")


def _entry(last: Trial) -> Tuned:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Tuned(*last.key, dict(last.values), last.seconds, last.default, last.ratio, last.low, last.high, now)
