"""Who wins a race: by the ratios of times in turns, and beyond their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WORTH = 0.99  # a challenger's time, at most, of the incumbent's
SURE = 1.96  # standard deviations: the interval holds the median 19 times of 20


@dataclass(frozen=True)
class Race:
    """Two candidates timed in turns: for each round, the seconds of both, summed over the launches."""

    challenger: tuple[float, ...]
    incumbent: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """The challenger's seconds over the incumbent's, round by round: below 1 it is faster."""
        return tuple(a / b for a, b in zip(self.challenger, self.incumbent, strict=True))

    @property
    def medians(self) -> tuple[float, float]:
        """Of the challenger's seconds and of the incumbent's."""
        return statistics.median(self.challenger), statistics.median(self.incumbent)


def spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(low, median, high): the median, and the interval that it lies in for sure, by order statistics.

    Whatever else a machine does makes some rounds slow; the interval is the narrower the more rounds there are.
    """
    ordered, rounds = sorted(ratios), len(ratios)
    out = max(0, math.floor((rounds - SURE * math.sqrt(rounds)) / 2))
    return ordered[out], statistics.median(ordered), ordered[-1 - out]


def wins(ratios: Sequence[float]) -> bool:
    """Whether a challenger is faster by what is worth it, and for sure."""
    _, middle, high = spread(ratios)
    return middle <= WORTH and high < 1


def hopeless(ratios: Sequence[float]) -> bool:
    """Whether a challenger is for sure not faster by what is worth it, so that more rounds would tell nothing."""
    return spread(ratios)[0] > WORTH
