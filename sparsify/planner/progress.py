"""Progress of a plan: what is going on, how much is done, about how long the rest takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Progress(Protocol):
    """Who is told. `sparsify.progress.Bar` is a bar at a terminal."""

    def expect(self, weights: Sequence[float]) -> None:
        """More steps are to come, that take about so long, in any unit."""

    def tell(self, what: str) -> None:
        """What is going on."""

    def advance(self) -> None:
        """A step is done."""


class Silent:
    """Nobody is told."""

    def expect(self, weights: Sequence[float]) -> None:
        pass

    def tell(self, what: str) -> None:
        pass

    def advance(self) -> None:
        pass


silent = Silent()
