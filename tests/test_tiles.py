"""Tile analysis: sound for everything, exact for the closed forms, and the bands cover all that is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import composed, shapes

from sparsify import patterns as p
from sparsify.codegen.null import key_tiles
from sparsify.expr import Load, Var, conjunction
from sparsify.patterns.count import EMPTY, FULL, PARTIAL, tile_classes
from sparsify.patterns.tiles import analyse
from sparsify.sizes import size_values
from sparsify.text import parse_pred
from sparsify.walk import data_bounds, evaluate, variables

tiles = st.tuples(st.sampled_from([1, 3, 8, 16]), st.sampled_from([1, 4, 7, 16]))


def true_classes(mask: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    rows, columns = (-(-size // step) for size, step in zip(mask.shape, tile, strict=True))
    out = np.empty((rows, columns), dtype=np.int8)
    for i in range(rows):
        for j in range(columns):
            part = mask[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            out[i, j] = FULL if part.all() else PARTIAL if part.any() else EMPTY
    return out


@settings(max_examples=100)
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


@settings(max_examples=100)
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


# Over a mask `_0` (B, Nk), ascending documents `_1` (B, Nk), lengths `_2` (B,) and drawn numbers `_3` (B, Nq), of rows.
BY_DATA = [  # FULL and EMPTY are exact
    "_0[b, k]",
    "not _0[b, k]",
    "_1[b, q] >= _1[b, k]",
    "k < _2[b]",
    "k <= _3[b, q - O]",
    "_1[b, k // 3] != 1",
]
FULL_BY_DATA = ["_1[b, q] == _1[b, k]", "_0[b, k] and k < _2[b]"]  # FULL is exact
SOUND = [
    "_0[b, k + 1 - 1] or q - k < _3[b, q - O]",
    "_0[b, max(k - q, 0 - N)] and k <= q",
    "_1[b, max(k - 2, 0 - N)] == 1",
    "_1[b, min(k + 3, N - 1)] > _3[b, q - O] or _0[b, q]",
    "_1[b, _3[b, q - O]] == _1[b, k]",
    "(_1[b, k] if k <= q else _3[b, q - O]) > 1",
    "_1[b, k] % 2 == _1[b, q] // 2 and not k == _3[b, q - O]",
]
ALL_DATA = BY_DATA + FULL_BY_DATA + SOUND


def data_env(q_len: int, k_len: int, offset: int, seed: int) -> dict[str, object]:
    """Drawn loads of two batches; long equal runs, so that tiles are full and empty, too."""
    draw = np.random.default_rng(seed)
    mask = np.repeat(draw.random((2, k_len)) < 0.5, 9, axis=1)[:, :k_len]
    documents = np.sort(draw.integers(0, 5, (2, k_len)), axis=1)
    loads = {"_0": mask, "_1": documents, "_2": draw.integers(0, k_len + 5, 2)}
    return loads | {"_3": draw.integers(0, k_len, (2, q_len)), "O": offset, "N": k_len, "Nq": q_len, "h": 0}


@settings(max_examples=100)
@given(st.sampled_from(ALL_DATA), st.integers(1, 40), st.integers(0, 40), tiles, st.integers(0, 99))
def test_classes_and_bands_by_data(text, q_len, more, tile, seed):
    offset, k_len = seed % (more + 1), q_len + more
    keep = parse_pred(text.replace("O", str(offset)))
    rule, env = analyse(keep), data_env(q_len, k_len, offset, seed)
    q, k = np.arange(q_len)[:, None] + offset, np.arange(k_len)[None]
    for b in range(2):
        truth = true_classes(np.broadcast_to(evaluate(keep, env | {"b": b, "q": q, "k": k}), (q_len, k_len)), tile)
        for (i, j), kind in np.ndenumerate(truth):
            rows, columns = range(q_len)[i * tile[0] :][: tile[0]], range(k_len)[j * tile[1] :][: tile[1]]
            at = {"b": b, "q0": rows[0] + offset, "q1": rows[-1] + offset, "k0": columns[0], "k1": columns[-1]}
            full, empty = evaluate(rule.full, env | at), evaluate(rule.empty, env | at)
            assert (not full or kind == FULL) and (not empty or kind == EMPTY)
            assert full or kind != FULL or text not in BY_DATA + FULL_BY_DATA
            assert empty or kind != EMPTY or text not in BY_DATA
            if kind != EMPTY:
                assert any(
                    low <= columns[-1] and columns[0] < high for low, high in key_tiles(rule, env | at, k_len, 1)
                )


@pytest.mark.parametrize("text", ALL_DATA)
def test_rules_without_data_are_sound_and_free_of_it(text):
    offset, q_len, k_len, tile = 7, 23, 40, (4, 5)
    keep = parse_pred(text.replace("O", str(offset)))
    found, env = analyse(keep).without_data(), data_env(q_len, k_len, offset, 1)
    parts = [found.full, found.empty, *(part for band in found.bands for part in (band.low, band.high, band.unless))]
    assert not any(data_bounds(part) for part in parts if part is not None)
    whole = analyse(keep)
    for q0 in range(offset, q_len + offset, tile[0]):
        at = env | {"b": 1, "q0": q0, "q1": min(q0 + tile[0], q_len + offset) - 1}
        visited = {low for low, _ in key_tiles(found, at, k_len, tile[1])}
        assert visited >= {low for low, _ in key_tiles(whole, at, k_len, tile[1])}
        for k0 in range(0, k_len, tile[1]):
            at |= {"k0": k0, "k1": min(k0 + tile[1], k_len) - 1}
            assert evaluate(whole.full, at) or not evaluate(found.full, at)
            assert evaluate(whole.empty, at) or not evaluate(found.empty, at)


@pytest.mark.parametrize(
    "text", ["k < 3 + b * 9 and k < 30", "q - k >= 0 and (q - k < 8 or k < b)", "not (b == 1 and k < 12)"]
)
def test_tiles_that_depend_on_the_batch_are_partial(text):
    keep, length, tile = parse_pred(text), 40, (4, 5)
    found = tile_classes(keep, length, length, tile=tile)
    for b in range(4):
        truth = evaluate(keep, {"b": b, "q": np.arange(length)[:, None], "k": np.arange(length)[None, :]})
        kept = np.broadcast_to(truth, (length, length)).reshape(10, 4, 8, 5)
        assert not kept.any((1, 3))[found == EMPTY].any() and kept.all((1, 3))[found == FULL].all()
    assert len(np.unique(found)) > 1


def test_data_closes_bands():
    """A tensor of row limits bounds the key loop, as positions do."""
    (band,) = analyse(parse_pred("k <= q and k < _0[b, q] and k >= _1[b]")).bands
    env = {"b": 0, "q0": 8, "q1": 11, "_0": np.array([[9] * 10 + [5, 10, 30]]), "_1": np.array([4])}
    assert (evaluate(band.low, env), evaluate(band.high, env)) == (4, 10)


def test_a_condition_on_data_of_heads_alone_is_partial():
    """One element for each head, as in a mask of shape (1, H, 1, 1): who counts tiles has no tensors."""
    keep = conjunction([p.window(24).keep(), Load("_0", (Var("h"),)) > 0])
    found, open_ = tile_classes(keep, 300, 300), tile_classes(p.window(24).keep(), 300, 300)
    assert np.array_equal(found, np.where(open_ == EMPTY, EMPTY, PARTIAL)) and (open_ == FULL).sum() == 0
    assert (tile_classes(keep, 300, 300, tile=(4, 4)) != FULL).all()
