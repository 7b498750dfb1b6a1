"""Launch shapes: block sizes, warps and pipeline stages for a dtype, a head size and a kind of chip."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsify.codegen.target import dtype_name
from sparsify.codegen.triton.kernels import processors
from sparsify.codegen.triton.listing import packed, packing, packs, rounds, static
from sparsify.codegen.triton.ranges import slots
from sparsify.codegen.triton.summaries import by_bits
from sparsify.codegen.triton.tuned import tuned_shape, tuned_splits
from sparsify.codegen.tuned import FEW
from sparsify.errors import InputError, PatternError
from sparsify.expr import FloorDiv, Pred
from sparsify.patterns.count import TILE, visited
from sparsify.patterns.lists import lists, tile_rows
from sparsify.patterns.tiles import BLOCK
from sparsify.program import Program
from sparsify.walk import evaluate, loads, variables

if TYPE_CHECKING:
    from sparsify.codegen.target import Launch

MANY = 4096  # queries of a prefill
L2_MIB = 24  # for the keys and values of neighbouring programs; chips have 32 MB and more
MANY_KEYS = 3072  # of a query: from there on larger tiles gain more than they lose at the borders of a pattern
MORE_KEYS = 1.2  # times as many keys at most in those larger tiles
MANY_HEADS = 128  # of a group that shares its keys without limits (multi-query attention), at most, with descriptors
TILES_AT_ONCE = 2  # that a multiprocessor runs at decode
LEAST_TILES, MOST_SPLITS = 2, 64  # key tiles of a split; splits
SLACK = 0.25  # by how much fewer splits than are wanted are enough, as a power of two


@dataclass(frozen=True)
class Shape:
    """A kernel's tile (queries by keys) and how a chip runs it.

    queries, heads: what is in the `block_m` rows where that is not one query a row: so many queries, each with so many
    heads, and rows that nothing is in.
    splits: between how many tiles a tile's keys are split, a power of two.
    described: whether keys and values are read by tensor descriptors, where their layout allows it.
    l2_mib: of keys and values that query tiles which run side by side read, about.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    queries: int = 0
    heads: int = 1
    splits: int = 1
    described: bool = False
    l2_mib: int = L2_MIB

    @property
    def rows(self) -> int:
        """How many queries a tile has."""
        return self.queries or self.block_m

    @property
    def tile(self) -> str:
        """`m64n128w4s3`: the tile, its warps and stages."""
        return f"m{self.block_m}n{self.block_n}w{self.num_warps}s{self.num_stages}"


INTERPRETED = Shape(32, 32, 4, 1)
INTERPRETED_SLOTS = Shape(64, 64, 4, 1)  # fewer tiles: each is asked for by a long predicate
# The largest padded head size of a row -> its shape: the largest of those tried with which no kernel of the catalogue
# spills, or fewest do (`sparsify doctor --kernels` shows it); only Hopper's are chosen by time.
_HALF = {
    "ampere": {64: Shape(128, 64, 8, 3), 128: Shape(64, 64, 8, 2), 256: Shape(64, 32, 8, 2)},
    "hopper": {64: Shape(64, 64, 4, 3), 128: Shape(64, 64, 4, 3), 256: Shape(64, 32, 8, 2)},
    "blackwell": {64: Shape(128, 64, 8, 2), 128: Shape(128, 32, 8, 3), 256: Shape(64, 32, 8, 1)},
    "cdna3": {64: Shape(128, 64, 4, 2), 128: Shape(128, 32, 8, 1), 256: Shape(64, 32, 8, 1)},
}
# Hopper's for many keys a query. By time on an H200, as is the row of "hopper".
_LONG = {64: Shape(64, 128, 4, 3, described=True), 128: Shape(128, 128, 8, 3, described=True)}
# Hopper's in place of 3 where loops are short (boxes) or bodies small (heads of 64 with one rule), by time, too.
FEW_STAGES = 2
# float32 multiplies in float32 ("ieee"), on NVIDIA without tensor cores.
_FLOAT = {
    "ampere": {64: Shape(32, 32, 4, 2), 128: Shape(32, 32, 8, 2), 256: Shape(16, 32, 8, 1)},
    "hopper": {64: Shape(32, 32, 8, 1), 128: Shape(32, 32, 8, 3), 256: Shape(16, 32, 8, 1)},
    "blackwell": {64: Shape(32, 32, 4, 2), 128: Shape(32, 32, 8, 3), 256: Shape(16, 32, 8, 1)},
    "cdna3": {64: Shape(64, 32, 4, 1), 128: Shape(64, 32, 4, 1), 256: Shape(32, 32, 4, 1)},
}


def chip_class(arch: int | str) -> str:
    """The row of the table for a CUDA capability (80, 90, ...) or an AMD name ("gfx942")."""
    if isinstance(arch, str):
        return "cdna3"
    return "ampere" if arch < 90 else "hopper" if arch < 100 else "blackwell"


def launch_shape(dtype: str, head_dim: int, value_dim: int, q_len: int, arch: int | str | None) -> Shape:
    """The shape to launch with; `arch` None is the interpreter. Few queries (decode) take a low tile."""
    described = dtype != "float32" and (arch is None or (isinstance(arch, int) and arch >= 90))
    if arch is None:
        shape = INTERPRETED
    else:
        table = (_FLOAT if dtype == "float32" else _HALF)[chip_class(arch)]
        shape = next(shape for limit, shape in table.items() if max(padded(head_dim), padded(value_dim)) <= limit)
    if isinstance(arch, int) and arch in (86, 89, 120):  # about 100 KB of shared memory
        shape = replace(shape, num_stages=min(shape.num_stages, 2))
    return replace(shape, block_m=16 if q_len <= FEW else shape.block_m, described=described)


def untuned(launch: Launch, arch: int | str | None) -> Shape:
    """The shape of a launch by default, before what its program asks of a tile."""
    return _shape(launch, arch, slots(launch)[0])


def _shape(launch: Launch, arch: int | str | None, q_len: int) -> Shape:
    program = launch.program
    sizes = dtype_name(launch.q.dtype), launch.q.shape[3], launch.v.shape[3]
    shape, size = launch_shape(*sizes, q_len, arch), max(map(padded, sizes[1:]))
    if rounds(program):
        return shape
    plain = program.queries is None and program.keys is None and not program.skips
    if arch == 90 and shape.described and size in _LONG and plain and q_len > FEW:
        shape = _longer(program, launch.k.shape[2], shape, _LONG[size])
    if arch == 90 and shape.described and q_len > FEW and shape.block_n == 64:
        boxes = program.queries is not None and by_bits(program)
        return replace(shape, num_stages=FEW_STAGES) if boxes or (size <= 64 and len(program.keep) == 1) else shape
    return shape


def _longer(program: Program, length: int, usual: Shape, long: Shape) -> Shape:
    """The shape for many keys a query where there are so many, and its larger tiles hold few that are not kept: those
    of a stride between blocks of 64 would be half empty."""
    keys = sum(mean_keys(program, length))
    if keys < MANY_KEYS * len(program.heads):
        return usual
    larger = sum(mean_keys(program, length, (long.block_m, long.block_n)))
    return long if larger <= MORE_KEYS * keys else usual


def clamped(program: Program, shape: Shape, arch: int | str | None) -> Shape:
    """The shape with no larger tiles than a program can have: key tiles of lists are no wider than a block of a
    summary, and rows of a box of slots lie together."""
    if program.queries is not None or program.keys is not None:
        shape = INTERPRETED_SLOTS if arch is None else shape
        return replace(shape, block_m=min(shape.block_m, BLOCK), block_n=min(shape.block_n, BLOCK))
    return replace(shape, block_n=min(shape.block_n, BLOCK)) if rounds(program) else shape


def tiled(launch: Launch, arch: int | str | None) -> tuple[Launch, Shape]:
    """The shape of a launch, and the launch as it runs so: a query tile never has queries of two lists.

    Where that leaves few queries to a tile, and at decode, the heads of a group fill it up if they keep the same keys.
    """
    program, q_len = launch.program, slots(launch)[0]
    shape = clamped(program, tuned_shape(launch, arch, untuned(launch, arch)), arch)
    if not packing(program):
        return launch, shape
    heads, queries, group = 1, tile_rows(program.keep, shape.block_m), launch.q.shape[1] // launch.k.shape[1]
    few = q_len <= FEW and program.queries is None and not program.skips  # a skip goes by the largest score so far
    splits = tuned_splits(launch, arch) if few else 1
    if min(queries, q_len) <= FEW and packs(program, group):
        most = rows_of_heads(_shape(launch, arch, MANY))
        heads = next(heads for heads in range(min(group, most), 0, -1) if group % heads == 0)
        queries = tile_rows(program.keep, min(max(1, most // heads), 1 << (q_len - 1).bit_length()))
        launch = replace(launch, program=packed(program)) if heads > 1 else launch
    _check_starts(launch, queries)
    shape = replace(shape, block_m=padded(queries * heads), queries=queries, heads=heads)
    shape = replace(shape, num_warps=max(8, shape.num_warps)) if heads > 1 and shape.block_m >= MANY_HEADS else shape
    return launch, replace(shape, splits=splits or _splits(launch, shape))


def rows_of_heads(prefill: Shape) -> int:
    """The most rows of a tile that heads of a group share, by the shape of a prefill."""
    return max(prefill.block_m, MANY_HEADS if prefill.described else 0)


def section(launch: Launch, shape: Shape) -> int:
    """How many groups of `shape.heads` heads run side by side: as many as read keys and values that fit the L2 cache
    together.

    Query tiles that run at a time are neighbours: of a window's keys they read few.
    """
    batch, heads, _, head_dim = launch.q.shape
    kv_heads, k_len = launch.k.shape[1:3]
    keys = [k_len] if rounds(launch.program) else [min(k_len, 2 * mean) for mean in mean_keys(launch.program, k_len)]
    size = 4 if dtype_name(launch.q.dtype) == "float32" else 2
    bytes_per_head = max(1, int(sum(keys) / len(keys))) * (head_dim + launch.v.shape[3]) * size
    found = min(batch * heads, max(1, (shape.l2_mib << 20) // bytes_per_head) * (heads // kv_heads))
    return max(1, found // shape.heads)


def _splits(launch: Launch, shape: Shape) -> int:
    program, k_len = launch.program, launch.k.shape[2]
    lists_of = {one for rule in program.keep for one in lists(rule)}
    listed = max((launch.loads[int(one.index.source[1:])].shape[-1] * one.unit for one in lists_of), default=0)
    keys = [min(k_len, 2 * mean + listed) for mean in mean_keys(program, k_len)]
    tiles = launch.q.shape[0] * -(-launch.q.shape[2] // shape.rows)
    return splits(keys, tiles / shape.heads, shape.block_n, processors(launch))


def splits(keys: Sequence[float], tiles: float, block_n: int, multiprocessors: int) -> int:
    """Between how many tiles the keys of few queries are split: so many that no head, the longest neither, takes much
    more than its share of the multiprocessors' time, and each split still has some key tiles: a power of two near
    TILES_AT_ONCE * multiprocessors / tiles times the longest head's part of all keys.

    keys: those of a query, for each head. tiles: query tiles for a head, a part of one where heads share it.
    """
    wanted = TILES_AT_ONCE * multiprocessors * max(keys) / max(1.0, tiles * sum(keys))
    most = min(max(keys) / (LEAST_TILES * block_n), MOST_SPLITS)
    return 1 << max(0, min(math.ceil(math.log2(max(1.0, wanted)) - SLACK), int(math.log2(max(1.0, most)))))


def mean_keys(program: Program, length: int, tile: tuple[int, int] = (TILE, TILE)) -> list[float]:
    """About how many keys are in the tiles of a query, for each head, of as many queries as keys; without those of
    lists."""
    rules = [program.rule_of(head) for head in range(len(program.heads))]
    found = {rule: _mean_keys(static(rule), 1 << max(0, length - 1).bit_length(), tile) for rule in set(rules)}
    return [found[rule] for rule in rules]


@functools.lru_cache(maxsize=1024)
def _mean_keys(rule: Pred, length: int, tile: tuple[int, int]) -> float:
    try:
        return visited(rule, length, tile, samples=16) * math.prod(tile) / length
    except PatternError:  # a size that isn't there at the rounded length: a guess must not stop a launch
        return float(length)


def _check_starts(launch: Launch, queries: int) -> None:
    """Raises InputError where a query tile would have queries of two lists: lists start with the launch's queries."""
    q_len, k_len, first = launch.q.shape[2], launch.k.shape[2], launch.q_offset
    for one in (one for keep in launch.program.keep for one in lists(keep)):
        for part in one.index.index:
            if isinstance(part, FloorDiv) and "q" in variables(part) and not loads(part):
                names = dict.fromkeys(variables(part), 0) | {"q": first, "N": k_len, "Nq": q_len}
                if evaluate(part.left, names) % queries and queries > 1:
                    raise InputError(
                        f"triton: query {first} of {q_len} is not the first of its list in {one}"
                        " (lists of several queries are counted from a launch's first query)"
                    )


def padded(size: int) -> int:
    """A head size as the kernel holds it: a power of two, 16 at least (the least that a matrix unit takes)."""
    return max(16, 1 << (size - 1).bit_length())
