"""Addresses of sites as people read them: many that differ in numbers only, as one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsify.ranges import of_numbers, text_of

NUMBER = re.compile(r"(\d+)")


def shape_of(address: str) -> str:
    """The address with its numbers left out: equal for the layers of one stack."""
    return NUMBER.sub("#", address)


def folded(addresses: Sequence[str]) -> str:
    """`model.layers.0-5.self_attn` for addresses of one shape."""
    split = [NUMBER.split(address) for address in addresses]
    columns = [text_of(of_numbers(int(parts[i]) for parts in split)) for i in range(1, len(split[0]), 2)]
    return "".join(columns[i // 2] if i % 2 else part for i, part in enumerate(split[0]))
