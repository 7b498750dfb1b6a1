"""Tile analysis: sound for everything, exact for the closed forms, and the bands cover all that is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import composed, shapes

from sparsify import patterns as p
from sparsify.codegen.null import key_tiles
from sparsify.patterns.count import EMPTY, FULL, PARTIAL, tile_classes
from sparsify.patterns.tiles import analyse
from sparsify.sizes import size_values
from sparsify.walk import variables

tiles = st.tuples(st.sampled_from([1, 3, 8, 16]), st.sampled_from([1, 4, 7, 16]))


def true_classes(mask: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    rows, columns = (-(-size // step) for size, step in zip(mask.shape, tile, strict=True))
    out = np.empty((rows, columns), dtype=np.int8)
    for i in range(rows):
        for j in range(columns):
            part = mask[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            out[i, j] = FULL if part.all() else PARTIAL if part.any() else EMPTY
    return out


@settings(max_examples=150)
@given(composed(), shapes, tiles, st.integers(0, 3))
def test_classes_are_sound(drawn, shape, tile, head):
    pattern = drawn[0]
    truth = true_classes(pattern.mask(4, *shape)[head].numpy(), tile)
    found = tile_classes(pattern.keep(), *shape, head=head, tile=tile)
    assert (truth[found == FULL] == FULL).all()
    assert (truth[found == EMPTY] == EMPTY).all()


EXACT = [
    p.dense(),
    p.causal(),
    p.window(9),
    p.window(3, ahead=5),
    p.window("N/4 + 1"),
    p.sinks(6),
    p.same_block(8),
    p.same_block(5, shift=3),
    p.block_window(8, 2),
    p.block_window(5, 3) & p.causal(),
    p.column_stride(3),
    p.column_stride(2, block=8, offset="head"),
    p.dilated(4),
    p.global_tokens([0, 1, 2]),
]


@pytest.mark.parametrize("pattern", EXACT, ids=str)
@pytest.mark.parametrize("tile", [(8, 8), (16, 4), (1, 16), (3, 7)], ids=str)
@pytest.mark.parametrize("shape", [(40, 40, None), (1, 33, None), (17, 50, 9), (37, 21, None)], ids=str)
def test_classes_of_the_closed_forms_are_exact(pattern, tile, shape):
    truth = true_classes(pattern.mask(2, *shape)[1].numpy(), tile)
    assert np.array_equal(tile_classes(pattern.keep(), *shape, head=1, tile=tile), truth)


@settings(max_examples=150)
@given(composed(), shapes, st.sampled_from([1, 5, 16]), st.sampled_from([1, 4, 16]))
def test_the_bands_visit_every_kept_key_once(drawn, shape, height, width):
    pattern, (q_len, k_len, q_offset) = drawn[0], shape
    offset = k_len - q_len if q_offset is None else q_offset
    mask, rule = pattern.mask(1, *shape)[0], analyse(pattern.keep())
    sizes = size_values(variables(rule.keep), k_len)
    for start in range(0, q_len, height):
        stop = min(start + height, q_len)
        env = {"b": 0, "h": 0, "N": k_len, "q0": start + offset, "q1": stop - 1 + offset} | sizes
        visited = key_tiles(rule, env, k_len, width)
        starts = [low for low, _ in visited]
        assert starts == sorted(set(starts))
        seen = np.zeros(k_len, dtype=bool)
        for low, high in visited:
            seen[low:high] = True
        assert not mask[start:stop].numpy()[:, ~seen].any()


CLOSED = [
    ((p.sinks(4) | p.window(64)) & p.causal(), 3),
    (p.block_window(64, 4) & p.causal(), 4),
    (p.same_block(256) & p.causal(), 4),
    (p.window(512), 9),
]


@pytest.mark.parametrize(("pattern", "at_most"), CLOSED, ids=str)
def test_the_loop_bounds_are_closed_forms(pattern, at_most):
    """The last query tile of a long sequence visits only the tiles that it needs: no scan over N."""
    n, rule = 1 << 20, analyse(pattern.keep())
    visited = key_tiles(rule, {"b": 0, "h": 0, "N": n, "q0": n - 64, "q1": n - 1}, n, 64)
    assert len(visited) <= at_most
