"""Progress through cases: how many are done, what is going on, and about how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """A bar on stderr, at a terminal only; `weights` says about how long each step takes, in any unit."""

    def __init__(self, weights: Sequence[float], clock: Callable[[], float] = time.perf_counter) -> None:
        self.weights, self.clock, self.done = weights, clock, 0
        terminal = Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.bar = Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)
        self.task = self.bar.add_task("", total=sum(weights), count=self.count, left="")

    def __enter__(self) -> Steps:
        self.start = self.clock()
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    @property
    def count(self) -> str:
        """`3/40`: the step that is going on, of all."""
        return f"{min(self.done + 1, len(self.weights))}/{len(self.weights)}"

    @property
    def left(self) -> str:
        """About how long the rest takes, judged by what is done; nothing before the first step is."""
        passed = sum(self.weights[: self.done])
        if not passed:
            return ""
        return f"about {duration((self.clock() - self.start) / passed * (sum(self.weights) - passed))} left"

    def tell(self, what: str) -> None:
        """Says what is going on."""
        self.bar.update(self.task, description=what, count=self.count, left=self.left)

    def advance(self) -> None:
        """A step is done."""
        self.done += 1
        self.bar.update(self.task, completed=sum(self.weights[: self.done]), count=self.count, left=self.left)


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `2 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
