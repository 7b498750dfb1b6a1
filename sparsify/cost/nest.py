"""The loop nest that a target makes of a launch: how many queries, heads and keys are in its tiles.

The sizes are the targets' own (`codegen.cpp`, `codegen.triton.tuning`), so a kernel that is tiled otherwise is counted
otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from sparsify.codegen.cpp.source import SLOTS
from sparsify.codegen.cpp.tuning import Tuning
from sparsify.runtime.toolchain import ISAS

# As in codegen/cpp/parts.h and driver.h (a test reads them there).
TOTAL_CACHE_BYTES = 64 << 20
MANY_ITEMS = 32
WORTH_A_SPLIT = 8


@dataclass(frozen=True)
class Shape:
    """One attention: q of (batch, heads, q_len, head_dim), k and v of (batch, kv_heads, k_len, head_dim)."""

    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    dtype: str = "float32"
    batch: int = 1

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Nest:
    """rows: queries of a query tile. heads: how many heads' rows are in it. keys: of a key tile. block, panel: so many
    rows, and of these so many keys, run or are left out of a partial tile together.

    whole_group: a query tile is all queries of its heads, and these are all of a key head's, as in decoding. direct:
    keys are read where they lie, row by row. held: how many packed key tiles a core keeps; 0 where none are packed.
    split: whether the key tiles of one query tile may be shared out between cores.
    """

    rows: int
    heads: int
    keys: int
    block: int
    panel: int
    whole_group: bool = False
    direct: bool = False
    held: int = 0
    split: bool = False


def cpp_nest(
    shape: Shape, arch: str, cores: int, list_rows: int = 0, slots: int = 0, tuned: tuple[tuple[str, int], ...] = ()
) -> Nest:
    """That of the C++ target. list_rows: how many queries share a list, 0 without lists. slots: those of a layout of
    queries, 0 where there is none. tuned: what a kernel has else than by default (`codegen.cpp.tuning`)."""
    isa = ISAS[arch]
    how = Tuning.of(isa, dict(tuned))
    q_slots, tallest = slots or shape.q_len, SLOTS if slots else how.rows
    rows = min(dividing(list_rows, tallest) if list_rows else tallest, q_slots)
    heads = max(1, min(shape.group, how.rows // rows))
    whole = rows == q_slots and heads == shape.group
    panel_bytes = how.block_vectors * isa.vector_bytes
    reads = shape.head_dim * shape.size % isa.vector_bytes == 0 and shape.head_dim * 4 % panel_bytes == 0
    direct = reads and whole and rows * heads <= how.direct_rows
    tile_bytes = 4 * how.keys * 2 * shape.head_dim
    held = 1 if whole else max(1, min(how.cache_kib << 10, TOTAL_CACHE_BYTES // cores) // tile_bytes)
    return Nest(rows, heads, how.keys, how.block_rows, min(how.keys, panel_bytes // 4), whole, direct, held, whole)


def triton_nest(
    shape: Shape, arch: str, list_rows: int = 0, slots: int = 0, tuned: tuple[tuple[str, int], ...] = ()
) -> Nest:
    """That of the Triton target, on a chip by its capability ("90") or name ("gfx942"); the rest as in `cpp_nest`."""
    from sparsify.codegen.triton.tuning import launch_shape, listed_shape, padded
    from sparsify.patterns.tiles import BLOCK

    chip = int(arch) if arch.isdigit() else arch
    choose = listed_shape if list_rows else launch_shape
    sizes = shape.dtype, shape.head_dim, shape.head_dim
    found = replace(choose(*sizes, slots or shape.q_len, chip), **dict(tuned))
    if list_rows:
        found = replace(found, block_n=min(found.block_n, BLOCK))
    if slots:
        found = replace(found, block_m=min(found.block_m, BLOCK), block_n=min(found.block_n, BLOCK))
    if not list_rows:
        rows, heads = found.block_m, 1
    else:
        rows, heads = dividing(list_rows, found.block_m), 1
        if min(rows, shape.q_len) <= 16:
            heads = next(heads for heads in range(min(shape.group, 64), 0, -1) if shape.group % heads == 0)
            rows = min(dividing(list_rows, max(1, 64 // heads)), 1 << (shape.q_len - 1).bit_length())
    used = padded(rows * heads) if list_rows else rows
    whole = heads == shape.group and rows >= shape.q_len
    return Nest(rows, heads, found.block_n, used, found.block_n, whole)


@functools.lru_cache(maxsize=256)
def dividing(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(rows for rows in range(min(most, number), 0, -1) if number % rows == 0)
