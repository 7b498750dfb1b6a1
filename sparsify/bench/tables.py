"""What the tables of `sparsify bench` look like."""

from __future__ import annotations

from rich import box
from rich.table import Table

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def new_table(title: str, *columns: str, first: str = "case", gap: int = 2) -> Table:
    """A table with a title and a column for each name, the first at the left, without lines beside them."""
    found = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    found.title_justify = found.caption_justify = "left"
    found.add_column(first, no_wrap=True)
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    return found


def short(value: float) -> str:
    """Three digits that count: 0.123, 1.23, 12.3, 123, 1234."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
