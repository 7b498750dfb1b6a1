"""Grids in boxes: slots hold each token once, predicates over slots keep the same, and tiles are told exactly."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import patterns as p
from sparsify.bias import Term
from sparsify.expr import Load, Var
from sparsify.patterns import presets
from sparsify.patterns.count import EMPTY, FULL, PARTIAL, executed, tile_classes
from sparsify.patterns.grid import grids
from sparsify.patterns.layouts.best import best_layout
from sparsify.patterns.layouts.boxes import TILE, Boxes
from sparsify.patterns.layouts.placed import Placed
from sparsify.patterns.tiles import analyse
from sparsify.walk import evaluate


def boxes_of(shape, box, start=0, after=0, dilation=None) -> Boxes:
    return Boxes(tuple(shape), start, start + math.prod(shape) + after, tuple(box), dilation or (1,) * len(shape))


def placed(boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """(token, filled) of each slot."""
    env = {"q": np.arange(boxes.slots)}
    layout = boxes.layout("q")
    assert evaluate(layout.slots, {}) == boxes.slots and boxes.slots % TILE == 0
    return tuple(np.broadcast_to(evaluate(part, env), boxes.slots) for part in (layout.token, layout.filled))


def over_slots(pred, boxes: Boxes) -> np.ndarray:
    at = np.arange(boxes.slots)
    env = {"q": at[:, None], "k": at[None], "h": 0, "N": boxes.total, "Nq": boxes.total}
    return np.broadcast_to(evaluate(pred, env), (boxes.slots, boxes.slots))


def visited(pred, boxes: Boxes) -> np.ndarray:
    """The key tiles that the bands of each query tile meet: bool (tiles, tiles)."""
    count = boxes.slots // TILE
    found = np.zeros((count, count), dtype=bool)
    for tile in range(count):
        env = {"q0": tile * TILE, "q1": tile * TILE + TILE - 1, "h": 0, "N": boxes.total, "Nq": boxes.total}
        for band in analyse(pred).bands:
            low = 0 if band.low is None else max(0, evaluate(band.low, env))
            high = boxes.slots if band.high is None else min(boxes.slots, evaluate(band.high, env))
            if low < high and not evaluate(band.unless, env):
                found[tile, low // TILE : -(-high // TILE)] = True
    return found


def checked(pattern, boxes: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(classes by interval arithmetic, classes by looking, tiles that bands meet), after all that must hold.

    A query's slot that is empty may keep anything, so it counts neither way.
    """
    token, filled = placed(boxes)
    assert sorted(token[filled]) == list(range(boxes.total)), "each token has one slot"
    assert token.min() >= 0 and token.max() < boxes.total, "an empty slot's token can be read, too"
    pred = Placed(boxes).keep(pattern.keep())
    truth = pattern.mask(1, boxes.total, boxes.total)[0].numpy()[token[:, None], token[None]] & filled
    assert np.array_equal(over_slots(pred, boxes)[filled], truth[filled])
    tiles = (truth & filled[:, None]).reshape(-1, TILE, boxes.slots // TILE, TILE)
    whole = (tiles | ~filled.reshape(-1, TILE, 1, 1)).all((1, 3))
    some = tiles.any((1, 3))
    classes, meets = tile_classes(pred, boxes.slots, boxes.slots), visited(pred, boxes)
    assert not (some & (classes == EMPTY)).any() and not (~whole & (classes == FULL)).any(), "sound"
    assert not (some & ~meets).any(), "bands leave nothing out"
    return classes, np.where(some, np.where(whole, FULL, PARTIAL), EMPTY), meets


E = p.neighborhood
EXACT = [
    (E([32, 32], 7), boxes_of([32, 32], [8, 8])),
    (E([29, 35], [7, 10], [3, 4]), boxes_of([29, 35], [8, 8])),
    (E([24, 24], [6, 8], [2, 8]), boxes_of([24, 24], [4, 16])),
    (E([32, 24], 5, dilation=[2, 1]), boxes_of([32, 24], [8, 8], dilation=(2, 1))),
    (E([31, 33], 5, dilation=[2, 3]), boxes_of([31, 33], [8, 8], dilation=(2, 3))),
    (E([8, 12, 16], [3, 5, 7]), boxes_of([8, 12, 16], [4, 4, 4])),
    (E([7, 9, 10], [3, 5, 7], [1, 2, 3]), boxes_of([7, 9, 10], [2, 4, 8])),
    (E([12, 16, 16], [4, 8, 8], [4, 4, 4]), boxes_of([12, 16, 16], [4, 4, 4])),
    (E(700, 51), boxes_of([700], [64])),
    (E(1000, 31, dilation=3), boxes_of([1000], [64], dilation=(3,))),
    (E([32, 32], 7, border="truncate"), boxes_of([32, 32], [8, 8])),
    (E([6, 16, 16], 5, causal=[True, False, False]), boxes_of([6, 16, 16], [2, 4, 8])),
    (presets.swin([28, 28], 7), boxes_of([28, 28], [7, 7])),
    (presets.swin([28, 28], 7, shift=3), boxes_of([28, 28], [7, 9])),
    (presets.axial([40, 40], 0), boxes_of([40, 40], [40, 1])),
]


@pytest.mark.parametrize(("pattern", "boxes"), EXACT, ids=[f"{pattern} {b.box}" for pattern, b in EXACT])
def test_tiles_of_grids_are_told_exactly(pattern, boxes):
    """No tile is visited that keeps nothing, and none that keeps everything gets a mask."""
    classes, truth, meets = checked(pattern, boxes)
    assert np.array_equal(classes, truth)
    rows = np.arange(boxes.slots // TILE) * TILE // boxes.row_slots
    needed = np.zeros((rows[-1] + 1, rows[-1] + 1), dtype=bool)
    np.logical_or.at(needed, tuple(np.meshgrid(rows, rows, indexing="ij")), truth != EMPTY)
    lows = needed.argmax(1)[rows][:, None]
    highs = (needed.shape[1] - 1 - needed[:, ::-1].argmax(1))[rows][:, None]
    assert np.array_equal(meets, (rows >= lows) & (rows <= highs)), "bands are rows of boxes, no more than it takes"


SOUND = [
    (E([24, 24], 7, start=5) | p.global_tokens("0-4"), boxes_of([24, 24], [8, 8], 5)),
    (E([24, 24], 7, start=70) | p.global_tokens("0-69,646-655"), boxes_of([24, 24], [8, 8], 70, 10)),
    (E([31, 23], 5, dilation=[2, 3], start=3) | p.global_tokens([0, "1-2"]), boxes_of([31, 23], [8, 8], 3, 0, (2, 3))),
    (E([24, 20], 7) | p.global_tokens("480-484"), boxes_of([24, 20], [8, 8], 0, 5)),
    (E([16, 16], 5, border="wrap"), boxes_of([16, 16], [8, 8])),
    (E([4, 8, 8], 3, border="wrap"), boxes_of([4, 8, 8], [4, 4, 4])),
    (E([24, 24], 9) & p.causal(), boxes_of([24, 24], [8, 8])),
    (E([24, 24], 9) & p.window(100, ahead=50), boxes_of([24, 24], [8, 8])),
    (~E([24, 24], 9, start=5), boxes_of([24, 24], [8, 8], 5)),
    (E([24, 24], 5), boxes_of([24, 24], [6, 10], dilation=(2, 2))),
    (p.dense(), boxes_of([23, 24], [8, 8], 5, 9)),
    (p.causal(), boxes_of([23, 24], [8, 8], 5, 9)),
    (p.sinks("N/100") | p.window(40), boxes_of([24, 24], [8, 8])),
    (p.same_block(50, 7), boxes_of([24, 24], [8, 8], 70)),
    (p.column_stride(4, 8), boxes_of([24, 24], [8, 8], 3, 3)),
]


@pytest.mark.parametrize(("pattern", "boxes"), SOUND, ids=[f"{pattern} {b.box}" for pattern, b in SOUND])
def test_other_patterns_work_in_boxes(pattern, boxes):
    checked(pattern, boxes)


def test_global_tokens_have_tiles_of_their_own():
    classes, truth, meets = checked(*SOUND[1])
    assert np.array_equal(classes != EMPTY, truth != EMPTY)
    near = np.pad(np.array([abs(a // 3 - b // 3) < 2 and abs(a % 3 - b % 3) < 2 for a, b in np.ndindex(9, 9)])
                  .reshape(9, 9), ((2, 1), (2, 1)))  # fmt: skip
    outside = np.isin(np.arange(12), (0, 1, 11))
    assert np.array_equal(truth != EMPTY, near | outside | outside[:, None])
    assert meets.sum() < meets.size


@st.composite
def cases(draw):
    dimensions = draw(st.integers(1, 3))
    most = {1: 200, 2: 12, 3: 6}[dimensions]
    shape, window, stride, dilation, causal, border, box, apart = ([] for _ in range(8))
    room, dilated = TILE, draw(st.integers(0, dimensions - 1))
    for axis in range(dimensions):
        length = draw(st.integers(1, most))
        d = draw(st.integers(1, min(3, length))) if axis == dilated else 1
        wide = draw(st.integers(1, length // d))
        edge = draw(st.sampled_from(["shift", "truncate", "wrap"]))
        values = (length, wide, draw(st.integers(1, wide)), d, draw(st.booleans()) and edge != "wrap", edge)
        for to, value in zip((shape, window, stride, dilation, causal, border), values, strict=True):
            to.append(value)
        apart.append(draw(st.sampled_from([1, d])))
        longest = min(room, -(-length // apart[-1]))
        box.append(draw(st.integers(-(-longest // 2), longest)))
        room //= box[-1]
    start, after = draw(st.integers(0, 70)), draw(st.integers(0, 5))
    pattern = E(shape, window, stride, dilation, causal, border, start)
    boxes = boxes_of(shape, box, start, after, tuple(apart))
    other = draw(st.sampled_from([None, p.causal(), p.window(9, ahead=3), p.global_tokens([0, boxes.total - 1])]))
    join = draw(st.sampled_from([operator.and_, operator.or_]))
    return (pattern if other is None else join(pattern, other)), boxes


@settings(max_examples=25)
@given(cases())
def test_drawn_grids(case):
    checked(*case)


def test_biases_speak_of_slots():
    boxes = boxes_of([10, 13], [8, 8], 5, 3)
    q, k = Var("q"), Var("k")
    bias = (Term(0.5, (Load("_0", (k - q + boxes.total,)),)), Term(integer=q // 3, where=k % 2 >= 1))
    token, filled = placed(boxes)
    at = np.arange(boxes.slots)
    table = np.arange(2 * boxes.total + 1)
    for before, after in zip(bias, Placed(boxes).bias(bias), strict=True):
        for field in ("integer", "where"):
            by_token = evaluate(getattr(before, field), {"q": token[:, None], "k": token[None]})
            by_slot = evaluate(getattr(after, field), {"q": at[:, None], "k": at[None]})
            shape = (boxes.slots, boxes.slots)
            both = np.broadcast_to(by_token == by_slot, shape)
            assert both[filled][:, filled].all()
        for one, other in zip(before.loads, after.loads, strict=True):
            by_token = evaluate(one, {"q": token[:, None], "k": token[None], "_0": table})
            assert (by_token == evaluate(other, {"q": at[:, None], "k": at[None], "_0": table})).all()


def chosen(pattern, total, heads=4):
    return best_layout((pattern.keep(),) * heads, grids(pattern) * heads, total)


@pytest.mark.parametrize(
    ("pattern", "box"),
    [
        (E([64, 64], 13), (8, 8)),
        (presets.swin([64, 64], 8), (8, 8)),
        (presets.swin([56, 56], 7), (7, 7)),
        (presets.axial([64, 64], 0), (64, 1)),
        (E([8, 24, 40], [4, 12, 12], 4), (4, 4, 4)),
        (E([30, 48, 80], [18, 24, 24], [16, 8, 8]), (1, 8, 8)),
    ],
    ids=str,
)
def test_boxes_that_divide_windows_and_strides_are_chosen(pattern, box):
    found = chosen(pattern, grids(pattern)[0].tokens)
    assert found.boxes.box == box and found.share < 0.7 * found.plain
    grid = grids(pattern)[0]
    if isinstance(grid, type(E(4, 2))) and grid.fully_block_sparse(box, box):
        assert math.prod(box) == TILE
        visits, whole = executed(Placed(found.boxes).keep(pattern.keep()), found.boxes.slots)
        assert visits == whole, "no tile needs a mask"


def test_fully_block_sparse_cases_visit_what_they_keep():
    pattern = E([8, 24, 40], [4, 12, 12], 4)
    found = chosen(pattern, 7680)
    assert found.share == pytest.approx(pattern.density(1, 7680, 7680))
    assert str(found) == ("boxes of 4x4x4: 7680 slots (0 empty), 7.5% of the pairs executed, 27.3% without")


@pytest.mark.parametrize("dilation", [2, 3, 4])
def test_dilated_groups_lie_together(dilation):
    pattern = E(4096, 129, dilation=dilation)
    found = chosen(pattern, 4096)
    assert found.boxes.dilation == (dilation,) and found.share < 0.7 * found.plain
    groups = [set(group) for group in np.split(placed(found.boxes)[0] % dilation, dilation)] if dilation != 3 else []
    assert all(len(group) == 1 for group in groups)


def test_a_layout_has_to_save_something():
    assert chosen(E(4096, 129), 4096) is None, "one dimension is its own order"
    assert chosen(E([4, 8], 3), 32) is None, "one tile"
    assert chosen(presets.axial([64, 64], 1), 4096) is None, "rows lie together as they are"
    near = E([64, 64], 13)
    assert best_layout((near.keep(), *[p.window(100).keep()] * 7), grids(near), 4096) is None, "the others lose more"
    assert chosen(p.causal(), 64) is None


def test_counts_from_samples_are_near():
    pattern = E([64, 64], 13)
    boxes = boxes_of([64, 64], [8, 8])
    keep = Placed(boxes).keep(pattern.keep())
    classes = tile_classes(keep, 4096, 4096)
    assert executed(keep, 4096, samples=64)[0] == (classes != EMPTY).sum()
    assert executed(keep, 4096, samples=16)[0] == pytest.approx((classes != EMPTY).sum(), rel=0.1)


def test_grids_are_found_in_compositions():
    one, other = E([4, 4], 3), E(16, 5)
    assert grids((one | p.window(3)) & ~other) == (one, other)
    assert grids(presets.natten([8, 8], 3)) and grids(p.causal()) == ()


def test_boxes_change_no_mask():
    """The mask of a grid does not depend on the box that its tokens lie in."""
    pattern = E([6, 7, 8], [3, 5, 4], [1, 2, 2])
    for box in ((2, 4, 8), (6, 5, 2), (3, 3, 7)):
        checked(pattern, boxes_of([6, 7, 8], box))
