"""The loop nest that a target makes of a launch: how many queries, heads and keys are in its tiles.

The sizes are the targets' own (`codegen.cpp`, `codegen.triton.tuning`), so a kernel that is tiled otherwise is counted
otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsify.codegen.cpp.source import SLOTS
from sparsify.codegen.cpp.tuning import Tuning, reads_in_place
from sparsify.program import Program
from sparsify.runtime.toolchain import ISAS

# As in codegen/cpp/parts.h and driver.h (a test reads them there).
TOTAL_CACHE_BYTES = 64 << 20
MANY_ITEMS = 32
WORTH_A_SPLIT = 8

Tuned = tuple[tuple[str, int], ...]  # what a kernel has else than by default, by the names of its target's tuning


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
    step: query tiles that a core takes at a time, at most. splits: between how many query tiles the keys of one are
    split. section: how many groups of `heads` heads run side by side, on a GPU. descending: whether the last query
    tiles come first there.
    """

    rows: int
    heads: int
    keys: int
    block: int
    panel: int
    whole_group: bool = False
    direct: bool = False
    held: int = 0
    step: int = 1
    splits: int = 1
    section: int = 1
    descending: bool = False

    @functools.cached_property
    def tile(self) -> Nest:
        """What tiles are counted by: without how they are shared out, which the other heads of a site decide, too."""
        return replace(self, whole_group=False, held=0, step=1, splits=1, section=1, descending=False)


def cpp_nest(shape: Shape, arch: str, cores: int, list_rows: int = 0, slots: int = 0, tuned: Tuned = ()) -> Nest:
    """That of the C++ target. list_rows: how many queries share a list, 0 without lists. slots: those of a layout of
    queries, 0 where there is none. tuned: what a kernel has else than by default (`codegen.cpp.tuning`)."""
    isa = ISAS[arch]
    how = Tuning.of(isa, dict(tuned), boxes=slots > 0)
    keys = how.keys
    q_slots, tallest = slots or shape.q_len, SLOTS if slots else how.rows
    rows = min(dividing(list_rows, tallest) if list_rows else tallest, q_slots)
    heads = max(1, min(shape.group, how.rows // rows))
    whole = rows == q_slots and heads == shape.group
    panel_bytes = how.block_vectors * isa.vector_bytes
    reads = reads_in_place(shape.head_dim, shape.head_dim, shape.size, how, isa)
    direct = reads and whole and rows * heads <= how.direct_rows
    tile_bytes = 4 * keys * 2 * shape.head_dim
    held = 1 if whole else max(1, min(how.cache_kib << 10, TOTAL_CACHE_BYTES // cores) // tile_bytes)
    return Nest(rows, heads, keys, how.block_rows, min(keys, panel_bytes // 4), whole, direct, held, how.items)


def triton_nest(
    shape: Shape, program: Program, arch: str, cores: int, capacities: Sequence[int] = (), tuned: Tuned = ()
) -> Nest:
    """That of the Triton target, on a chip by its capability ("90") or name ("gfx942") with so many multiprocessors.

    program: that runs. capacities: of its lists, the longest of which each index and count in turn is a load.
    """
    from sparsify.codegen.target import Launch
    from sparsify.codegen.triton.printer import longest_last
    from sparsify.codegen.triton.tuning import section, tiled
    from sparsify.runtime import tuned as store

    q, k = (_Described((shape.batch, heads, length, shape.head_dim), shape.dtype, cores)
            for heads, length in ((shape.heads, shape.q_len), (shape.kv_heads, shape.k_len)))  # fmt: skip
    loads = tuple(_Described((1, 1, 1, room), "int32", cores) for room in capacities for _ in range(2))
    launch = Launch(program, q, k, k, loads, shape.k_len - shape.q_len, 1.0)  # type: ignore[arg-type]
    with store.forced(dict(tuned)):
        launch, found = tiled(launch, int(arch) if arch.isdigit() else arch)
    whole = found.heads == shape.group and found.rows >= shape.q_len
    sizes = found.rows, found.heads, found.block_n, found.block_m, found.block_n, whole
    return Nest(*sizes, splits=found.splits, section=section(launch, found), descending=longest_last(launch.program))


@dataclass(frozen=True)
class _Described:
    """What stands for a tensor on a GPU with so many multiprocessors: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: str
    processors: int
    is_cuda: bool = False


@functools.lru_cache(maxsize=256)
def dividing(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(rows for rows in range(min(most, number), 0, -1) if number % rows == 0)
