"""Boxes: the tokens of a grid laid out so that a tile of slots is a box of space.

Rows of a 2-D or 3-D neighborhood are far apart in the sequence. Where 64 slots hold a box of the grid instead, a query
tile's keys are a few boxes. Nothing is moved in memory: kernels read row `token(slot)` while they pack a tile, so
there is no permutation to pay for, or to share between sites that follow each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from sparsify.expr import Expr, Pred, Var, as_expr, conjunction, disjunction, minimum, select
from sparsify.program import Layout

TILE = 64


@dataclass(frozen=True)
class Boxes:
    """A grid's slots, box by box in row-major order, and those of the tokens before and after it, in their own order.

    shape, start: the grid, in row-major order from position `start`. total: how many tokens there are. box: the sides
    of a box, at most 64 tokens. dilation: of each dimension; the tokens of a dilation group, which have one remainder
    by it, lie together, and a box is one of the group's grid.

    Slots come in tiles of 64: the tokens before the grid, each group's boxes, the tokens after it; what a tile has
    too many is empty. So is what hangs over the grid's border of a box. Of an empty slot, coordinates and token are
    those of a token near by, so that tiles at borders reach no further and every read is inside its tensor.
    """

    shape: tuple[int, ...]
    start: int
    total: int
    box: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """The position after the grid's last token."""
        return self.start + self.tokens

    @property
    def first(self) -> int:
        """The first slot of the grid."""
        return -(-self.start // TILE) * TILE

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many boxes a dilation group has in each dimension."""
        sizes = zip(self.shape, self.dilation, self.box, strict=True)
        return tuple(-(-length // (apart * side)) for length, apart, side in sizes)

    @property
    def group_slots(self) -> int:
        """Of a dilation group."""
        return math.prod(self.counts) * TILE

    @property
    def end(self) -> int:
        """The slot after the grid's last box."""
        return self.first + math.prod(self.dilation) * self.group_slots

    @property
    def slots(self) -> int:
        """All of them."""
        return self.end + -(-(self.total - self.stop) // TILE) * TILE

    @property
    def row_slots(self) -> int:
        """Of one row of boxes, those with one place along the slowest dimension."""
        return self.group_slots // self.counts[0]

    def group(self, slot: Expr) -> Expr:
        """The number of a slot's dilation group."""
        return as_expr(0) if math.prod(self.dilation) == 1 else (slot - self.first) // self.group_slots

    def groups(self, slot: Expr) -> tuple[Expr, ...]:
        """A slot's dilation group in each dimension: the remainder of its coordinate."""
        return _digits(slot - self.first, self.group_slots, self.dilation)

    def places(self, slot: Expr) -> tuple[Expr, ...]:
        """The coordinates of a slot in the grid of its dilation group; of the nearest inside it, if it is empty."""
        found = zip(self._reach(slot), self._lengths(slot), strict=True)
        return tuple(place if last is None else minimum(place, last - 1) for place, last in found)

    def token(self, slot: Expr) -> Expr:
        """The token of a slot anywhere."""
        grid = self.grid_token(self.coordinates(slot))
        if self.stop < self.total:
            grid = select(slot < self.end, grid, minimum(slot - (self.end - self.stop), self.total - 1))
        return select(slot < self.first, minimum(slot, self.start - 1), grid) if self.start else grid

    def coordinates(self, slot: Expr) -> tuple[Expr, ...]:
        """Those of a slot of the grid."""
        parts = zip(self.places(slot), self.dilation, self.groups(slot), strict=True)
        return tuple(place * apart + group for place, apart, group in parts)

    def grid_token(self, coordinates: tuple[Expr, ...]) -> Expr:
        """The token at these coordinates of the grid."""
        below = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return sum((x * size for x, size in zip(coordinates, below, strict=True)), start=as_expr(self.start))

    def inside(self, slot: Expr) -> list[Pred]:
        """What holds of a slot of the grid's boxes if it is filled."""
        found = zip(self._reach(slot), self._lengths(slot), strict=True)
        short = [slot % TILE < math.prod(self.box)] if math.prod(self.box) < TILE else []
        return [place < last for place, last in found if last is not None] + short

    def filled(self, slot: Expr) -> Pred:
        """Whether a slot anywhere holds a token."""
        outside = [slot < self.first] if self.start else []
        outside += [slot >= self.end] if self.stop < self.total else []
        parts = [disjunction([*outside, rule]) for rule in self.inside(slot)]
        if self.start % TILE:
            parts.append((slot < self.start) | (slot >= self.first))
        return conjunction([*parts, slot < self.end + self.total - self.stop])

    def layout(self, name: str) -> Layout:
        """The layout over the slot's variable, q or k."""
        slot = Var(name)
        return Layout(as_expr(self.slots), self.token(slot), self.filled(slot))

    def _reach(self, slot: Expr) -> tuple[Expr, ...]:
        """The places of a slot, those that hang over the border as well."""
        boxes = _digits(slot - self.first, TILE, self.counts, wraps=math.prod(self.dilation) > 1)
        used = math.prod(self.box)
        inside = slot % TILE if used == TILE else minimum(slot % TILE, used - 1)
        return tuple(b * side + i for b, side, i in zip(boxes, self.box, _digits(inside, 1, self.box), strict=True))

    def _lengths(self, slot: Expr) -> list[Expr | None]:
        """The length of a slot's dilation group in each dimension, None where the boxes end with it."""
        found: list[Expr | None] = []
        for length, apart, side, count, group in zip(
            self.shape, self.dilation, self.box, self.counts, self.groups(slot), strict=True
        ):
            least, more = divmod(length, apart)
            fits = count * side == least and not more
            found.append(None if fits else select(more > group, least + 1, least) if more else as_expr(least))
        return found


def _digits(number: Expr, unit: int, sizes: tuple[int, ...], wraps: bool = True) -> tuple[Expr, ...]:
    """The digits of number // unit in a mixed radix, the slowest first; without `wraps` the first has no limit."""
    below = [unit * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return tuple(
        as_expr(0) if size == 1 else number // under if axis == 0 and not wraps else number // under % size
        for axis, (under, size) in enumerate(zip(below, sizes, strict=True))
    )
