"""Which layout the heads of a site share, if any: the one with which their kernels visit the fewest tiles."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sparsify.expr import And, Pred, Var, conjunction
from sparsify.patterns.count import executed
from sparsify.patterns.grid import Grid
from sparsify.patterns.layouts.boxes import TILE, Boxes
from sparsify.patterns.layouts.placed import Placed
from sparsify.patterns.pattern import K, Q
from sparsify.walk import substitute, variables

TRIED = 2  # boxes whose tiles are counted for all heads, those that promise most for the grids alone
WORTH = 0.95  # of the tiles that are visited without a layout: it has to save some to pay for rows read here and there
PARTIAL = 0.25  # what a tile's mask costs, as a part of the tile


@dataclass(frozen=True)
class BestLayout:
    """A layout, and the share of all pairs of tokens, heads on average, that kernels execute with it and without."""

    boxes: Boxes
    share: float
    plain: float

    def __str__(self) -> str:
        boxes = self.boxes
        sides, empty = "x".join(map(str, boxes.box)), boxes.slots - boxes.total
        groups = math.prod(boxes.dilation)
        apart = f" in {groups} dilation groups" if groups > 1 else ""
        return (
            f"boxes of {sides}{apart}: {boxes.slots} slots ({empty} empty), "
            f"{self.share:.1%} of the pairs executed, {self.plain:.1%} without"
        )


@functools.lru_cache(maxsize=256)
def best_layout(heads: tuple[Pred, ...], found: tuple[Grid, ...], total: int) -> BestLayout | None:
    """The layout for heads with these predicates over tokens, or None where their own order is as good.

    found: the grids in the heads' patterns, one for each time it occurs. total: how many queries there are, and keys.
    """
    counted = Counter(found)
    tried = [boxes for _, boxes in sorted(_candidates(counted, total), key=lambda one: one[0])[:TRIED]]
    if not tried:
        return None
    plain = _pairs(heads, total)
    best = min(tried, key=lambda boxes: _laid(heads, boxes)[0])
    cost, share = _laid(heads, best)
    return BestLayout(best, share, plain[1]) if cost < WORTH * plain[0] else None


def _laid(heads: tuple[Pred, ...], boxes: Boxes) -> tuple[float, float]:
    return _pairs(over_slots(heads, boxes), boxes.slots, boxes.total)


def over_slots(heads: tuple[Pred, ...], boxes: Boxes) -> tuple[Pred, ...]:
    """The heads' predicates over slots."""
    found = {head: _placed(boxes, head) for head in dict.fromkeys(heads)}
    return tuple(found[head] for head in heads)


@functools.lru_cache(maxsize=256)
def _placed(boxes: Boxes, keep: Pred) -> Pred:
    return Placed(boxes).keep(keep)


@functools.lru_cache(maxsize=1024)
def _pairs(heads: tuple[Pred, ...], length: int, total: int = 0) -> tuple[float, float]:
    """(cost, share) of the tiles that heads visit, as parts of all pairs of tokens, the heads on average."""
    cost = share = 0.0
    pairs = len(heads) * (total or length) ** 2 / TILE**2
    for rule, count in Counter(
        (rule, head if "h" in variables(rule) else 0) for head, rule in enumerate(heads)
    ).items():
        visited, whole = executed(rule[0], length, rule[1])
        share += count * visited / pairs
        cost += count * tile_cost(visited, whole) / pairs
    return cost, share


def tile_cost(visited: float, whole: float) -> float:
    """What the tiles that a head visits cost, in whole ones: the others have a mask to make."""
    return visited + PARTIAL * (visited - whole)


def _candidates(found: Mapping[Grid, int], total: int) -> Iterator[tuple[float, Boxes]]:
    """Layouts, each with what the grids alone would cost with it; smaller is better."""
    for shape, start in dict.fromkeys((grid.shape, grid.start) for grid in found):
        mine = {grid: count for grid, count in found.items() if (grid.shape, grid.start) == (shape, start)}
        for dilation in dict.fromkeys([(1,) * len(shape), *(grid.dilations for grid in mine)]):
            lengths = [-(-size // apart) for size, apart in zip(shape, dilation, strict=True)]
            if len(shape) == 1 and dilation == (1,):
                continue  # that is the tokens' own order
            for box in _boxes(tuple(lengths)):
                cost = sum(count * _promise(grid, dilation, box) for grid, count in mine.items())
                yield cost, Boxes(shape, start, total, box, dilation)


def _boxes(lengths: tuple[int, ...], most: int = TILE) -> Iterator[tuple[int, ...]]:
    """Boxes of at most so many tokens that are at least half as long as they can be in their last dimension."""
    first, *rest = lengths
    if not rest:
        longest = min(first, most)
        yield from ((side,) for side in range(longest, longest // 2, -1))
        return
    for side in range(1, min(first, most) + 1):
        for others in _boxes(tuple(rest), most // side):
            yield side, *others


def _promise(grid: Grid, dilation: tuple[int, ...], box: tuple[int, ...]) -> float:
    """What a grid's pattern costs in boxes, in tiles: exact where its dimensions keep a pair each by itself.

    Then a tile is visited if it is in every dimension. Else boxes that are more like cubes are better.
    """
    rules = _by_dimension(grid)
    if rules is None:
        return float(sum(box))
    visited = whole = float(math.prod(dilation))
    for rule, size, apart, side in zip(rules, grid.shape, dilation, box, strict=True):
        some, full = _along(rule, -(-size // apart), apart, side)
        visited, whole = visited * some, whole * full
    return tile_cost(visited, whole)


@functools.lru_cache(maxsize=256)
def _by_dimension(grid: Grid) -> tuple[Pred, ...] | None:
    """A predicate over q and k for each dimension, that all have to hold; None if the grid's has no such form."""
    axes = range(len(grid.shape))
    q, k = (tuple(Var(f"{side}_{axis}") for axis in axes) for side in "qk")
    keep = grid.keep_at(q, k)
    found: list[list[Pred]] = [[] for _ in axes]
    for part in keep.parts if isinstance(keep, And) else (keep,):
        own = {int(name[2:]) for name in variables(part)}
        if len(own) > 1:
            return None
        found[min(own, default=0)].append(part)
    return tuple(substitute(conjunction(parts), {f"q_{axis}": Q, f"k_{axis}": K}) for axis, parts in enumerate(found))


@functools.lru_cache(maxsize=4096)
def _along(rule: Pred, length: int, apart: int, side: int) -> tuple[float, float]:
    """(visited, whole) tiles of one dimension of the first dilation group, in boxes with this side."""
    return executed(substitute(rule, {"q": Q * apart, "k": K * apart}), length, tile=(side, side))
