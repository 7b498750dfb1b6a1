"""`block: B` beside sinks, window and column_stride: the same rule at the granularity of whole blocks (MoA, S2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsify.errors import PatternError
from sparsify.patterns import Pattern, block_window, column_stride, sinks
from sparsify.patterns.column_stride import ColumnStride
from sparsify.patterns.sinks import Sinks
from sparsify.patterns.window import Window
from sparsify.sizes import Size

BLOCKED = ("sinks", "window", "column_stride")


def at_block(pattern: Pattern, block: int, fields: Mapping[str, Any]) -> Pattern:
    """The pattern in blocks of `block` keys; `fields` are those that were written.

    A window becomes the blocks that it needs (rounded up), the query's own included; sinks are rounded up to whole
    blocks; a column stride takes the block as its own. Raises PatternError where the two don't go together.
    """
    match pattern:
        case Sinks(n):
            return sinks(_rounded(n, block, times=block))
        case Window(size, _):
            if "ahead" in fields:
                raise PatternError("window.ahead: is not allowed beside 'block' (a block window looks back only)")
            return block_window(block, _rounded(size, block))
        case ColumnStride(every, _, _):
            if "block" in fields:
                raise PatternError("column_stride.block: is given twice, here and by the 'block' beside it")
            return column_stride(every.text, block, fields.get("offset", 0))
    raise TypeError(f"not a pattern that has blocks: {pattern}")


def _rounded(size: Size, block: int, times: int = 1) -> int | str:
    """ceil(size / block) * times."""
    if "N" not in size.text:
        return -(-int(size.text) // block) * times
    blocks = f"ceil(({size.text}) / {block})"
    return blocks if times == 1 else f"{times} * {blocks}"
