"""Windows over images and videos: NATTEN, GNA, Swin, HaloNet, axial attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.errors import PatternError
from sparsify.expr import Pred, conjunction, eq
from sparsify.patterns.grid import Coordinates, Grid, per_dimension, read_shape
from sparsify.patterns.neighborhood import Neighborhood, neighborhood
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import preset, whole


@preset(
    source="Hassani et al., arXiv 2204.07143 and 2209.15001; SHI-Labs/NATTEN",
    phase="both",
    semantics="native",
    cost="as many keys for each query as the window has tokens",
    example={"shape": [24, 24]},
)
def natten(
    shape: int | Sequence[int],
    window: int | Sequence[int] = 7,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Pattern:
    """The nearest `window` tokens in each dimension, moved inward at borders; dilated: of the query's own group."""
    return _near("natten", shape, window, 1, dilation, causal)


@preset(
    source="Hassani et al., arXiv 2504.16922; SHI-Labs/NATTEN",
    phase="both",
    semantics="approx",
    cost="as many keys for each query as the window has tokens",
    example={"shape": [24, 24], "window": 8, "stride": 4},
)
def gna(
    shape: int | Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Pattern:
    """Groups of `stride` queries share the window of their leader; stride 1 is NATTEN, stride = window is blocked."""
    return _near("gna", shape, window, stride, dilation, causal)


def _near(name: str, *given: Any) -> Pattern:
    try:
        return neighborhood(*given)
    except PatternError as error:
        raise PatternError(str(error).replace("neighborhood", name, 1)) from None


@dataclass(frozen=True)
class Windows(Grid):
    """(x + offset) // window is equal for q and k in every dimension."""

    shape: tuple[int, ...]
    window: tuple[int, ...]
    offset: tuple[int, ...]
    start: int = 0

    def keep_at(self, q: Coordinates, k: Coordinates) -> Pred:
        sides = zip(q, k, self.window, self.offset, strict=True)
        return conjunction(eq((a + off) // size, (b + off) // size) for a, b, size, off in sides)


@preset(
    source="Liu et al., arXiv 2103.14030; microsoft/Swin-Transformer",
    phase="both",
    semantics="native",
    cost="as many keys for each query as the window has tokens, fewer at borders if shifted",
    omits="the table of relative positions (the model's own bias)",
    example={"shape": [28, 28], "shift": 3},
)
def swin(shape: int | Sequence[int], window: int | Sequence[int] = 7, shift: int | Sequence[int] = 0) -> Pattern:
    """(x + M - shift) // M is equal for q and k in each dimension, with M = window: W-MSA, or SW-MSA if shifted.

    A dimension that is not larger than the window has one window and no shift.
    """
    sizes = read_shape(shape, "swin.shape")
    windows = per_dimension(window, "swin.window", len(sizes))
    shifts = per_dimension(shift, "swin.shift", len(sizes), lambda value, field: whole(value, field, low=0))
    for size, wide, by in zip(sizes, windows, shifts, strict=True):
        if by >= wide:
            raise PatternError(f"swin.shift: expected less than the window of {wide}, found {by}")
        if size > wide and size % wide:
            raise PatternError(f"swin.shape: expected multiples of the window of {wide}, found {size}")
    off = [0 if size <= wide or not by else wide - by for size, wide, by in zip(sizes, windows, shifts, strict=True)]
    return Windows(sizes, windows, tuple(off))


@preset(
    source="Vaswani et al., arXiv 2103.12731",
    phase="both",
    semantics="native",
    cost="(block + 2 halo) keys in each dimension for each query, fewer at borders",
    omits="the zero keys beyond the border, which take part in the published softmax unless masked (here they are)",
    example={"shape": [32, 32]},
)
def halo_net(shape: int | Sequence[int], block: int | Sequence[int] = 8, halo: int | Sequence[int] = 3) -> Pattern:
    """(q // block) block - halo <= k < (q // block) block + block + halo in each dimension."""
    sizes = read_shape(shape, "halo_net.shape")
    count = len(sizes)
    blocks = per_dimension(block, "halo_net.block", count)
    halos = per_dimension(halo, "halo_net.halo", count, lambda value, field: whole(value, field, low=0))
    for size, wide in zip(sizes, blocks, strict=True):
        if wide > size:
            raise PatternError(f"halo_net.block: {wide} is larger than its dimension of {size}")
    windows = tuple(wide + 2 * beside for wide, beside in zip(blocks, halos, strict=True))
    return Neighborhood(sizes, windows, blocks, (1,) * count, (False,) * count, ("truncate",) * count)


@preset(
    source="Ho et al., arXiv 1912.12180",
    phase="both",
    semantics="native",
    cost="one line of the grid for each query",
    omits="which layers or heads attend along which axis (give each its own)",
    example={"shape": [16, 16], "axis": 0},
    length=256,
)
def axial(shape: Sequence[int], axis: int = -1) -> Pattern:
    """All coordinates but that of `axis` are equal: 0 attends along a column of a 2-D grid, 1 (or -1) along a row."""
    sizes = read_shape(shape, "axial.shape")
    if isinstance(axis, bool) or not isinstance(axis, int) or not -len(sizes) <= axis < len(sizes):
        raise PatternError(f"axial.axis: expected an integer from {-len(sizes)} to {len(sizes) - 1}, found {axis!r}")
    window = [size if place == axis % len(sizes) else 1 for place, size in enumerate(sizes)]
    return neighborhood(sizes, window)
