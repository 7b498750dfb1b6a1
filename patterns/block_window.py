"""block_window: the most recent blocks of keys (MoA's runtime rule, S2-Attention's local part, BigBird)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Pred
from sparsify.patterns.pattern import K, Pattern, Q
from sparsify.sizes import Size


@dataclass(frozen=True)
class BlockWindow(Pattern):
    """0 <= q // block - k // block < blocks."""

    block: Size
    blocks: Size

    def keep(self) -> Pred:
        gap = Q // self.block.divisor() - K // self.block.divisor()
        return (gap >= 0) & (gap < self.blocks.expr())


def block_window(block: int | str, blocks: int | str) -> Pattern:
    """The query's own block of `block` keys and the `blocks` - 1 before it.

    The own block is kept whole, keys after the query included: compose with `& causal()` for a causal model.
    """
    return BlockWindow(Size.read(block, "block_window.block", low=1), Size.read(blocks, "block_window.blocks", low=1))
