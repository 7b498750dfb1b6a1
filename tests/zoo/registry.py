"""Every entry of the zoo, in two tuples."""

from __future__ import annotations

from importlib.util import find_spec

from tests.zoo import (
    diffusers_rows,
    held_out_decoders,
    held_out_encoders,
    held_out_others,
    held_out_senses,
    torch_rows,
    transformers_rows,
)
from tests.zoo.entry import Entry

SURVEYED: tuple[Entry, ...] = (*transformers_rows.ROWS, *diffusers_rows.ROWS, *torch_rows.ROWS)
HELD_OUT: tuple[Entry, ...] = (
    *held_out_decoders.ROWS,
    *held_out_encoders.ROWS,
    *held_out_senses.ROWS,
    *held_out_others.ROWS,
)


def available(entry: Entry) -> bool:
    """Whether the package of an entry is installed here."""
    return find_spec(entry.package) is not None
