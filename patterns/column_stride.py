"""column_stride: every V-th block of key columns, fixed in absolute position (S2-Attention, Sparse Transformer)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Pred, eq
from sparsify.patterns.pattern import H, K, Pattern
from sparsify.sizes import Size

HEAD = "head"


@dataclass(frozen=True)
class ColumnStride(Pattern):
    """(k // block + offset) mod every == 0; the offset is a number or the query head's own index."""

    every: Size
    block: Size = Size("1")
    offset: Size | str = Size("0")

    def keep(self) -> Pred:
        offset = H if self.offset == HEAD else self.offset.expr()
        return eq((K // self.block.divisor() + offset) % self.every.divisor(), 0)


def column_stride(every: int | str, block: int | str = 1, offset: int | str = 0) -> Pattern:
    """One block of `block` key columns in `every`; `offset="head"` shifts the choice by one from head to head."""
    return ColumnStride(
        Size.read(every, "column_stride.every", low=1),
        Size.read(block, "column_stride.block", low=1),
        offset if offset == HEAD else Size.read(offset, "column_stride.offset"),
    )
