"""Who wins a race: by the ratios of times in turns, and beyond their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WORTH = 0.99  # a challenger's time, at most, of the incumbent's


def spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile)."""
    ordered = sorted(ratios)
    quarter = len(ordered) // 4
    return ordered[quarter], statistics.median(ordered), ordered[-1 - quarter]


def wins(ratios: Sequence[float]) -> bool:
    """Whether a challenger is faster by what is worth it, and in three quarters of the rounds at least."""
    _, middle, high = spread(ratios)
    return middle <= WORTH and high < 1


def hopeless(ratios: Sequence[float]) -> bool:
    """Whether a challenger is slower beyond the spread, so that more rounds would tell nothing."""
    return spread(ratios)[0] > 1
