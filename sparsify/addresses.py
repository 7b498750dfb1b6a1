"""Addresses of sites as people read them: many that differ in numbers only, as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"(\d+)")


def shape_of(address: str) -> str:
    """The address with its numbers left out: equal for the layers of one stack."""
    return NUMBER.sub("#", address)


def folded(addresses: Sequence[str]) -> str:
    """`model.layers.0-5.self_attn` for addresses of one shape."""
    split = [NUMBER.split(address) for address in addresses]
    columns = [runs({int(parts[i]) for parts in split}) for i in range(1, len(split[0]), 2)]
    return "".join(columns[i // 2] if i % 2 else part for i, part in enumerate(split[0]))


def runs(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as `0-2,5`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
