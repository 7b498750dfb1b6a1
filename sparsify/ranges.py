"""Sets of numbers, of heads or layers mostly, as people write them: `5`, `"0-3"`, `"0-3,7"`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

LIMIT = 100_000  # more heads or layers than this is a slip of the keyboard

Ranges = tuple[tuple[int, int], ...]  # first and last, both included; sorted, disjoint, not touching

_PART = re.compile(r"\s*(-?\d{1,9})\s*(?:-\s*(-?\d{1,9})\s*)?")


def read_ranges(value: object, from_end: bool = False) -> Ranges:
    """The ranges that an integer, a text or a list of those means. Raises ValueError saying what is wrong.

    from_end: negative numbers count from the end, -1 being the last; ranges with one come last (see `counted`).
    """
    parts = value if isinstance(value, list | tuple) else [value]
    pairs = [pair for part in parts for pair in read_pairs(part, from_end)]
    if not pairs:
        raise ValueError("names nothing")
    signs: tuple[list[tuple[int, int]], ...] = ([], [], [])  # both from the start, both from the end, one of each
    for first, last in sorted(pairs):
        signs[0 if first >= 0 <= last else 1 if first < 0 > last else 2].append((first, last))
    for found in signs[:2]:
        for (_, last), (first, _) in itertools.pairwise(found):
            if first <= last:
                raise ValueError(f"names {first} twice")
    return (*joined(signs[0]), *joined(signs[1]), *signs[2])


def counted(ranges: Ranges, total: int | None) -> Ranges:
    """The ranges with numbers from the end made plain; without a total those name nothing."""
    if total is None:
        return tuple((first, last) for first, last in ranges if first >= 0 <= last)
    return tuple((first + total * (first < 0), last + total * (last < 0)) for first, last in ranges)


def read_pairs(part: object, from_end: bool = False, limit: int = LIMIT) -> list[tuple[int, int]]:
    """The (first, last) pairs that an integer or a text names, as written. Raises ValueError saying what is wrong."""
    expected = f'expected numbers such as 5, "0-3" or "0-3,7"{", or -1 from the end" if from_end else ""}'
    if isinstance(part, bool) or not isinstance(part, int | str):
        raise ValueError(expected)
    found = []
    for piece in str(part).split(","):
        match = _PART.fullmatch(piece)
        if match is None or (not from_end and "-" in (match[1] + (match[2] or "0"))):
            raise ValueError(expected)
        first, last = int(match[1]), int(match[2] or match[1])
        if (last < first and not first >= 0 > last) or first < 0 <= last:
            raise ValueError(f"the range {first}-{last} runs backwards")
        if last >= limit:
            raise ValueError(f"{last} is beyond any model (below {limit} is allowed)")
        found.append((first, last))
    return found


def joined(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted ranges with those that touch or overlap made one."""
    runs: list[tuple[int, int]] = []
    for first, last in pairs:
        if runs and first <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
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
