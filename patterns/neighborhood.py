"""neighborhood: the nearest tokens of a grid in one to three dimensions (NATTEN and its generalized form)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsify.errors import PatternError, nearest
from sparsify.expr import (
    TRUE,
    Expr,
    Pred,
    as_expr,
    conjunction,
    constant,
    disjunction,
    eq,
    maximum,
    minimum,
    select,
)
from sparsify.patterns.grid import Coordinates, Grid, called, flag, per_dimension, read_shape, shared, whole
from sparsify.patterns.pattern import Pattern

Border = Literal["shift", "truncate", "wrap"]
BORDERS = ("shift", "truncate", "wrap")
DEFAULTS = {"stride": 1, "dilation": 1, "causal": False, "border": "shift", "start": 0}


@dataclass(frozen=True)
class Dimension:
    """One dimension of a neighborhood: its length and its rule. `keep` says which keys a query has."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool
    border: str

    @property
    def left(self) -> int:
        """Keys of the window before the leader; of an even window one more than after it."""
        return self.window - 1 if self.causal else self.window // 2

    @property
    def lead(self) -> int:
        """The leader's place in its group of `stride` queries."""
        return self.stride - 1 if self.causal else self.stride // 2

    def keep(self, q: Expr, k: Expr) -> Pred:
        """The predicate for a query and a key at these coordinates."""
        d = self.dilation
        if d == 1:
            return self._inside(q, k, as_expr(self.length))
        return eq(q % d, k % d) & self._inside(q // d, k // d, self._group(q))

    def _group(self, q: Expr) -> Expr:
        """How many tokens the query's dilation group has: the first `length mod dilation` groups have one more."""
        least, more = divmod(self.length, self.dilation)
        return select(more > q % self.dilation, least + 1, least) if more else as_expr(least)

    def _inside(self, q: Expr, k: Expr, length: Expr) -> Pred:
        """The rule inside a dilation group of so many tokens."""
        if length == as_expr(self.window) and self.border != "truncate":
            return k <= q if self.causal else TRUE
        start = (q // self.stride) * self.stride + (self.lead - self.left)
        if self.border == "shift":
            start = self._shifted(start, length)
        if self.window == 1:
            return eq(k, start)
        stop = q + 1 if self.causal else start + self.window
        moved = [as_expr(0), length, -length] if self.border == "wrap" else [as_expr(0)]
        return disjunction((k >= start + by) & (k < stop + by) for by in moved)

    def _shifted(self, start: Expr, length: Expr) -> Expr:
        """The start moved to where the window is inside; a causal window starts at 0 at the earliest by itself."""
        if self.lead < self.left and not self.causal:
            start = maximum(start, 0)
        size = constant(length)
        furthest = None if size is None else (size - 1) // self.stride * self.stride + self.lead - self.left
        if size is None or furthest is None or furthest > size - self.window:
            start = minimum(start, length - self.window)
        return start

    def fully_block_sparse(self, q_tile: int, k_tile: int) -> bool:
        """Whether all queries of a tile keep the same keys, and these are whole tiles, in every dilation group."""
        least, more = divmod(self.length, self.dilation)
        lengths = {least, least + 1} if more else {least}
        return all(self._aligned(length, q_tile, k_tile) for length in lengths)

    def _aligned(self, length: int, q_tile: int, k_tile: int) -> bool:
        for first in range(0, length, q_tile):
            spans = {self.span(q, length) for q in range(first, min(first + q_tile, length))}
            if len(spans) > 1 or any(cut % k_tile and cut != length for cut in spans.pop()):
                return False
        return True

    def span(self, q: int, length: int) -> tuple[int, int]:
        """The first key of a query in a group of so many tokens, and the one after the last (where it wraps, less)."""
        if length == self.window and self.border != "truncate":
            return 0, q + 1 if self.causal else length
        start = q // self.stride * self.stride + self.lead - self.left
        if self.border == "shift":
            start = min(max(start, 0), length - self.window)
        stop = q + 1 if self.causal else start + self.window
        if self.border == "wrap":
            return start % length, (stop - 1) % length + 1
        return max(start, 0), min(stop, length)


@dataclass(frozen=True)
class Neighborhood(Grid):
    """In every dimension, k is in the window of q's leader and in q's dilation group."""

    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    border: tuple[str, ...]
    start: int = 0

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Each dimension by itself, the slowest first."""
        columns = self.shape, self.window, self.stride, self.dilation, self.causal, self.border
        return tuple(Dimension(*values) for values in zip(*columns, strict=True))

    @property
    def dilations(self) -> tuple[int, ...]:
        return self.dilation

    def keep_at(self, q: Coordinates, k: Coordinates) -> Pred:
        return conjunction(one.keep(a, b) for one, a, b in zip(self.dimensions, q, k, strict=True))

    def arguments(self) -> dict[str, object]:
        given = super().arguments()
        return given | {name: shared(given[name]) for name in ("stride", "dilation", "causal", "border")}

    def __str__(self) -> str:
        return called("neighborhood", self.arguments(), DEFAULTS)

    def fully_block_sparse(self, q_tile: Sequence[int], k_tile: Sequence[int]) -> bool:
        """Whether no tile of boxes of these shapes is partial: each is kept as a whole or not at all.

        Boxes are cut at the ends of the grid. Source: the test of Generalized Neighborhood Attention's kernels.
        """
        sides = zip(self.dimensions, q_tile, k_tile, strict=True)
        return all(one.fully_block_sparse(q, k) for one, q, k in sides)


def neighborhood(
    shape: int | Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    border: Border | Sequence[Border] = "shift",
    start: int = 0,
) -> Pattern:
    """The `window` nearest tokens of a grid in each of its 1 to 3 dimensions, one value for all or one for each.

    Tokens lie in row-major order from position `start`; those outside the grid keep nothing (see `global_tokens`).
    Groups of `stride` queries share the window of their leader, the middle one; an even window reaches one further to
    the left. `dilation` d keeps every d-th token. A causal dimension keeps the `window` tokens up to the query's own.
    At borders the window is moved inward ("shift", always `window` keys), cut ("truncate") or goes around ("wrap").
    Source: NATTEN and Generalized Neighborhood Attention (arXiv 2504.16922). Raises PatternError.
    """
    name, sizes = "neighborhood", read_shape(shape, "neighborhood.shape")
    count = len(sizes)
    windows, strides, dilations = (
        per_dimension(value, f"{name}.{field}", count)
        for field, value in (("window", window), ("stride", stride), ("dilation", dilation))
    )
    causals = per_dimension(causal, f"{name}.causal", count, flag)
    borders = per_dimension(border, f"{name}.border", count, _border)
    for size, reach, step, apart in zip(sizes, windows, strides, dilations, strict=True):
        if reach * apart > size:
            times = f" times the dilation {apart}" if apart > 1 else ""
            raise PatternError(f"{name}.window: {reach}{times} is larger than its dimension of {size}")
        if step > reach:
            raise PatternError(f"{name}.stride: {step} is larger than the window of {reach}")
    if any(one and edge == "wrap" for one, edge in zip(causals, borders, strict=True)):
        raise PatternError(f"{name}.border: a causal dimension can't wrap; give each its own, as in [truncate, wrap]")
    return Neighborhood(sizes, windows, strides, dilations, causals, borders, whole(start, f"{name}.start", low=0))


def _border(value: Any, field: str) -> str:
    if not isinstance(value, str) or value not in BORDERS:
        hint = nearest(value, BORDERS) if isinstance(value, str) else f"allowed: {', '.join(BORDERS)}"
        raise PatternError(f"{field}: unknown border {value!r}; {hint}")
    return value
