"""Launch shapes: block sizes, warps and pipeline stages for a dtype, a head size and a kind of chip."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A kernel's tile (queries by keys) and how a chip runs it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = Shape(32, 32, 4, 1)
# The largest padded head size of a row -> its shape: the largest of those tried with which no kernel of the catalogue
# spills, or fewest do (`sparsify doctor --kernels` shows it). Not yet tuned by time on any of these chips.
_HALF = {
    "ampere": {64: Shape(128, 64, 8, 3), 128: Shape(64, 64, 8, 2), 256: Shape(64, 32, 8, 2)},
    "hopper": {64: Shape(128, 64, 8, 3), 128: Shape(128, 64, 8, 2), 256: Shape(64, 32, 8, 2)},
    "blackwell": {64: Shape(128, 64, 8, 2), 128: Shape(128, 32, 8, 3), 256: Shape(64, 32, 8, 1)},
    "cdna3": {64: Shape(128, 64, 4, 2), 128: Shape(128, 32, 8, 1), 256: Shape(64, 32, 8, 1)},
}
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
    if arch is None:
        return replace(INTERPRETED, block_m=16) if q_len <= 16 else INTERPRETED
    table = (_FLOAT if dtype == "float32" else _HALF)[chip_class(arch)]
    shape = next(shape for limit, shape in table.items() if max(padded(head_dim), padded(value_dim)) <= limit)
    if isinstance(arch, int) and arch in (86, 89, 120):  # about 100 KB of shared memory
        shape = replace(shape, num_stages=min(shape.num_stages, 2))
    return replace(shape, block_m=16) if q_len <= 16 else shape


def padded(size: int) -> int:
    """A head size as the kernel holds it: a power of two, 16 at least (the least that a matrix unit takes)."""
    return max(16, 1 << (size - 1).bit_length())
