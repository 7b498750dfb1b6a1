"""Logarithmic axes from one power of a base to another."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_TICKS = 9

Ends = tuple[float, float]


def powers(values: Sequence[float], base: float = 2.0) -> Ends:
    """The powers of the base that enclose some positive values; they differ."""
    low = math.floor(math.log(min(values), base) + 1e-9)
    high = math.ceil(math.log(max(values), base) - 1e-9)
    return base ** min(low, high - 1), base**high


def ticks(low: float, high: float, base: float = 2.0) -> list[float]:
    """The powers of the base from one to another, every second one where there are many."""
    found = list(range(round(math.log(low, base)), round(math.log(high, base)) + 1))
    return [base**power for power in found if len(found) <= MOST_TICKS or power % 2 == 0]


def along(value: float, ends: Ends) -> float:
    """Where a value lies between the ends of an axis, 0 to 1."""
    low, high = map(math.log2, ends)
    return (math.log2(value) - low) / (high - low)
