"""Sets of head or layer numbers, as people write them: `5`, `"0-3"`, `"0-3,7"`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

LIMIT = 100_000  # more heads or layers than this is a slip of the keyboard

Ranges = tuple[tuple[int, int], ...]  # first and last, both included; sorted, disjoint, not touching

_PART = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")


def read_ranges(value: object) -> Ranges:
    """The ranges that an integer, a text or a list of those means. Raises ValueError saying what is wrong."""
    parts = value if isinstance(value, list | tuple) else [value]
    found = sorted(pair for part in parts for pair in _pairs(part))
    if not found:
        raise ValueError("names nothing")
    for (_, last), (first, _) in itertools.pairwise(found):
        if first <= last:
            raise ValueError(f"names {first} twice")
    return joined(found)


def _pairs(part: object) -> list[tuple[int, int]]:
    if isinstance(part, bool) or not isinstance(part, int | str):
        raise ValueError('expected numbers such as 5, "0-3" or "0-3,7"')
    found = []
    for piece in str(part).split(","):
        match = _PART.fullmatch(piece)
        if match is None:
            raise ValueError('expected numbers such as 5, "0-3" or "0-3,7"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {first}-{last} runs backwards")
        if last >= LIMIT:
            raise ValueError(f"{last} is beyond any model (below {LIMIT} is allowed)")
        found.append((first, last))
    return found


def joined(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted disjoint ranges with those that touch made one."""
    runs: list[tuple[int, int]] = []
    for first, last in pairs:
        if runs and runs[-1][1] + 1 == first:
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    return tuple(runs)


def contains(ranges: Ranges, number: int) -> bool:
    """Whether a number is in the ranges."""
    return any(first <= number <= last for first, last in ranges)


def of_numbers(numbers: Iterable[int]) -> Ranges:
    """The ranges of single numbers."""
    return joined((n, n) for n in sorted(set(numbers)))


def text_of(ranges: Ranges) -> str:
    """`0-3,7`: what `read_ranges` reads back."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
