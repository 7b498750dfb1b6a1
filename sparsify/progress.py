"""Progress at a terminal: what is going on, and of known steps how many are done and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn


def progress(*columns: ProgressColumn) -> Progress:
    """Progress on stderr that goes away when done, and that says nothing where nobody looks."""
    terminal = Console(stderr=True)
    usual = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*(columns or usual), console=terminal, transient=True, disable=not terminal.is_terminal)


class Bar:
    """A bar on stderr, at a terminal only; `weights` says about how long each step takes, in any unit."""

    def __init__(
        self, weights: Sequence[float] = (), what: str = "", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.weights, self.clock, self.done = list(weights), clock, 0
        count, left = TextColumn("{task.fields[count]}"), TextColumn("{task.fields[left]}")
        said = TextColumn("{task.description}")
        self.bar = progress(SpinnerColumn(), count, said, BarColumn(bar_width=16), TimeElapsedColumn(), left)
        self.task = self.bar.add_task(what, total=sum(weights) or None, count=self.count, left="")

    def __enter__(self) -> Bar:
        self.start = self.clock()
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def expect(self, weights: Sequence[float]) -> None:
        """More steps are to come."""
        self.weights += weights
        self.bar.update(self.task, total=sum(self.weights), count=self.count)

    @property
    def count(self) -> str:
        """`3/40`: the step that is going on, of all that are known."""
        if not self.weights:
            return ""
        return f"{min(self.done + 1, len(self.weights))}/{len(self.weights)}"

    @property
    def left(self) -> str:
        """About how long the rest takes, judged by what is done; nothing before the first step is, or where all are."""
        passed, whole = sum(self.weights[: self.done]), sum(self.weights)
        if not passed or passed == whole:
            return ""
        return f"about {duration((self.clock() - self.start) / passed * (whole - passed))} left"

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
