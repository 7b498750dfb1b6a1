"""Counting without asking: closed forms and parts of predicates, beside the predicate asked of every tile and pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import composed, shapes

from sparsify.cost.classes import SubTiles, asked_of, classes, closed_form
from sparsify.cost.nest import Nest
from sparsify.cost.parts import Cells, told_by
from sparsify.cost.positions import Positions, closed, corners, tile_rule
from sparsify.patterns.count import executed, visited
from sparsify.patterns.pattern import H, K, Q
from sparsify.patterns.spans import Pieces, listed, picked
from sparsify.walk import evaluate

HEAD = 3
NESTS = st.sampled_from([Nest(4, 1, 8, 2, 4), Nest(16, 1, 16, 16, 16), Nest(6, 1, 5, 6, 5), Nest(24, 1, 16, 6, 8)])


def _drawn(drawn, shape):
    q_len, k_len, offset = shape
    at = Positions(q_len, k_len, k_len - q_len if offset is None else offset, q_len, k_len)
    return drawn[0].keep(), at


def _tiles(at, nest):
    """All of them: (query tile, key tile)."""
    grid = np.indices((-(-at.q_slots // nest.rows), -(-at.k_slots // nest.keys)))
    return grid.reshape(2, -1)


@settings(max_examples=60, deadline=None)
@given(composed(), shapes, NESTS)
def test_parts_of_tile_rules_are_those_of_each_tile(drawn, shape, nest):
    keep, at = _drawn(drawn, shape)
    tile, key = _tiles(at, nest)
    env, rule = corners(keep, HEAD, at, nest.rows), tile_rule(keep)
    every, some = classes([(rule, env)], at, nest, tile, key)
    k0 = key * nest.keys
    here = env | {"q0": env["q0"][tile], "q1": env["q1"][tile], "k0": k0}
    here |= {"k1": np.minimum(k0 + nest.keys, at.k_slots) - 1}
    whole = np.asarray(evaluate(rule.full, here)) & (k0 + nest.keys <= at.k_slots)
    met = ~np.asarray(evaluate(rule.empty, here))
    assert np.array_equal(every, np.broadcast_to(whole & met, tile.shape))
    assert np.array_equal(some, np.broadcast_to(~whole & met, tile.shape))


@settings(max_examples=60, deadline=None)
@given(composed(), shapes, NESTS)
def test_kinds_of_cells_keep_what_each_cell_keeps(drawn, shape, nest):
    keep, at = _drawn(drawn, shape)
    tile, key = _tiles(at, nest)
    env, k0 = corners(keep, HEAD, at, nest.rows), key * nest.keys
    k1 = np.minimum(k0 + nest.keys, at.k_slots) - 1
    cells = Cells(env["q0"][tile], env["q1"][tile], k0, k1, nest.rows, nest.keys)
    first, count, kept = cells.pairs(keep, env)
    inside = np.arange(nest.keys) <= (k1 - k0)[first, None]
    mask = drawn[0].mask(HEAD + 1, at.q_len, at.k_len, at.offset)[HEAD].numpy()
    assert count.sum() == tile.size
    assert int((kept & inside[:, None]).sum((1, 2)) @ count) == mask.sum()
    for place, found in zip(first, kept, strict=True):
        row, low, high = env["q0"][tile[place]] - at.offset, k0[place], k1[place] + 1
        wanted = mask[row : row + nest.rows, low:high]
        assert np.array_equal(found[: len(wanted), : high - low], wanted)


@settings(max_examples=60, deadline=None)
@given(composed(), shapes, NESTS)
def test_closed_forms_class_blocks_as_their_analysis_does(drawn, shape, nest):
    keep, at = _drawn(drawn, shape)
    if closed(keep):
        boxes = SubTiles.of(*_tiles(at, nest), corners(keep, HEAD, at, nest.rows), at, nest)
        assert boxes.inside(closed_form(keep)) == boxes.inside(asked_of(tile_rule(keep)))


@settings(max_examples=60, deadline=None)
@given(composed(), st.integers(1, 300), st.sampled_from([(4, 8), (16, 5), (64, 64)]))
def test_visited_tiles_are_those_that_are_not_empty(drawn, length, tile):
    keep = drawn[0].keep()
    assert visited(keep, length, tile, samples=5) == executed(keep, length, 0, tile, samples=5)[0]


@pytest.mark.parametrize(
    ("part", "by"),
    [
        (Q >= 4, "query"),
        (H >= 4, "query"),
        (K // 64 % 3 >= 1, "key"),
        (Q >= K, "apart"),
        ((Q - K) % 5 >= 1, "apart"),
        (Q // 8 >= K // 8, "both"),
    ],
    ids=str,
)
def test_what_tells_a_part(part, by):
    assert told_by(part) == by


def test_picked_units_are_those_of_the_list():
    pieces = Pieces(np.array([[0, 3, 5], [9, 9, 9]]), np.array([[2, 3, 9], [11, 10, 9]]))
    tile, unit = listed(pieces)
    places = np.array([0, 3, 6, 8])
    assert np.array_equal(np.stack(picked(pieces, places)), np.stack([tile[places], unit[places]]))
    assert unit.tolist() == [0, 1, 5, 6, 7, 8, 9, 10, 9]
