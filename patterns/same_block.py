"""same_block: block-diagonal attention (LongLoRA's groups, Swin's windows in 1-D, Star Attention's context)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Pred, eq
from sparsify.patterns.pattern import K, Pattern, Q
from sparsify.sizes import Size


@dataclass(frozen=True)
class SameBlock(Pattern):
    """(q + shift) // size == (k + shift) // size."""

    size: Size
    shift: Size = Size("0")

    def keep(self) -> Pred:
        size, shift = self.size.divisor(), self.shift.expr()
        return eq((Q + shift) // size, (K + shift) // size)


def same_block(size: int | str, shift: int | str = 0) -> Pattern:
    """Queries and keys of the same block of `size` positions; `shift` moves the block borders to the left."""
    return SameBlock(Size.read(size, "same_block.size", low=1), Size.read(shift, "same_block.shift"))
