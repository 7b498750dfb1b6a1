"""Neighborhoods against NATTEN's rule restated by hand: exhaustively in one dimension, drawn in two and three."""

from __future__ import annotations

import functools
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import true_classes

from sparsify import patterns as p
from sparsify.errors import PatternError
from sparsify.expr import TRUE, Var
from sparsify.patterns.count import EMPTY, FULL, PARTIAL, tile_classes
from sparsify.patterns.neighborhood import Dimension
from sparsify.walk import evaluate

SHIFT, TRUNCATE, WRAP = "shift", "truncate", "wrap"


@functools.cache
def row(x: int, length: int, w: int, s: int, causal: bool, border: str) -> frozenset[int]:
    """The keys of query x in a dilation group of so many tokens, by the words of the published rule."""
    if causal:
        leader = (x // s) * s + s - 1
        if border == SHIFT:
            leader = min(leader, length - 1)
        return frozenset(range(max(leader - w + 1, 0), min(x + 1, length)))
    wl, wr = w // 2, w // 2 + w % 2 - 1
    leader = (x // s) * s + s // 2
    if border == SHIFT:
        leader = min(leader, length - 1)
        start = max(leader - wl, 0) + (length - wr - leader - 1 if leader + wr >= length else 0)
        return frozenset(range(start, start + w))
    whole = range(leader - wl, leader + wr + 1)
    return frozenset(k % length for k in whole) if border == WRAP else frozenset(k for k in whole if 0 <= k < length)


def by_hand(length: int, w: int, s: int = 1, d: int = 1, causal: bool = False, border: str = SHIFT) -> np.ndarray:
    """bool (length, length): one dimension."""
    mask = np.zeros((length, length), dtype=bool)
    for q in range(length):
        group = q % d
        own = length // d + (1 if group < length % d else 0)
        mask[q, [group + d * k for k in row(q // d, own, w, s, causal, border)]] = True
    return mask


def found(length: int, w: int, s: int = 1, d: int = 1, causal: bool = False, border: str = SHIFT) -> np.ndarray:
    """The same by the predicate over coordinates."""
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    keep = Dimension(length, w, s, d, causal, border).keep(Var("q"), Var("k"))
    return np.broadcast_to(evaluate(keep, {"q": q, "k": k}), (length, length))


def at_once(length: int, w: int, s: int, causal: bool) -> np.ndarray:
    """The published rule for all queries of an undilated dimension together: bool (length, length)."""
    x, k = np.arange(length)[:, None], np.arange(length)[None]
    if causal:
        leader = np.minimum((x // s) * s + s - 1, length - 1)
        return (k >= np.maximum(leader - w + 1, 0)) & (k < np.minimum(x + 1, length))
    wl, wr = w // 2, w // 2 + w % 2 - 1
    leader = np.minimum((x // s) * s + s // 2, length - 1)
    start = np.maximum(leader - wl, 0) + np.where(leader + wr >= length, length - wr - leader - 1, 0)
    return (start <= k) & (k < start + w)


@pytest.mark.parametrize("causal", [False, True])
def test_every_length_window_and_stride_below_30(causal):
    for length in range(1, 30):
        for w in range(1, length + 1):
            for s in range(1, w + 1):
                truth = at_once(length, w, s, causal)
                assert (found(length, w, s, 1, causal) == truth).all(), (length, w, s)
                assert truth.diagonal().all() and (causal or (truth.sum(axis=1) == w).all())


DIMENSIONS = [
    (length, w, s, d, causal, border)
    for length in (1, 2, 7, 12, 17, 24)
    for d in range(1, 6)
    for w in range(1, length // d + 1)
    for s in range(1, w + 1)
    for causal, border in ((False, SHIFT), (True, SHIFT), (False, TRUNCATE), (True, TRUNCATE), (False, WRAP))
]


def test_every_dilation_and_border():
    for case in DIMENSIONS:
        assert np.array_equal(found(*case), by_hand(*case)), case


@pytest.mark.slow
def test_every_dilation_and_border_below_40():
    for length in range(1, 40):
        for d in range(1, length + 1):
            for w in range(1, length // d + 1):
                for s in range(1, w + 1):
                    for rest in ((False, SHIFT), (True, SHIFT), (False, TRUNCATE), (True, TRUNCATE), (False, WRAP)):
                        case = (length, w, s, d, *rest)
                        assert np.array_equal(found(*case), by_hand(*case)), case


@st.composite
def dimensions(draw: st.DrawFn, longest: int = 9) -> tuple[int, int, int, int, bool, str]:
    length = draw(st.integers(1, longest))
    d = draw(st.integers(1, length))
    w = draw(st.integers(1, length // d))
    causal, border = draw(
        st.sampled_from([(False, SHIFT), (True, SHIFT), (False, TRUNCATE), (True, TRUNCATE), (False, WRAP)])
    )
    return length, w, draw(st.integers(1, w)), d, causal, border


grids = st.one_of(
    st.lists(dimensions(40), min_size=1, max_size=1),
    st.lists(dimensions(9), min_size=2, max_size=2),
    st.lists(dimensions(5), min_size=3, max_size=3),
)


def pattern_of(grid: list[tuple], start: int = 0) -> p.Pattern:
    shape, window, stride, dilation, causal, border = map(list, zip(*grid, strict=True))
    return p.neighborhood(shape, window, stride, dilation, causal, border, start)


def product(masks: list[np.ndarray]) -> np.ndarray:
    """The mask of the grid in row-major order: every dimension has to keep the pair."""
    return functools.reduce(np.kron, [mask.astype(np.int8) for mask in masks]).astype(bool)


@settings(max_examples=150)
@given(grids, st.integers(0, 3), st.integers(0, 3))
def test_dimensions_multiply_and_tokens_outside_keep_nothing(grid, before, after):
    pattern, truth = pattern_of(grid, before), product([by_hand(*one) for one in grid])
    n = before + len(truth) + after
    expected = np.zeros((n, n), dtype=bool)
    expected[before : before + len(truth), before : before + len(truth)] = truth
    assert np.array_equal(pattern.mask(1, n, n)[0].numpy(), expected)
    some = slice(n // 3, n // 3 + max(1, n // 2))
    part = pattern.mask(1, some.stop - some.start, n, some.start)[0].numpy()
    assert np.array_equal(part[: n - some.start], expected[some])
    assert pattern.density(1, n, n) == pytest.approx(expected.mean(), abs=1e-12)
    assert pickle.loads(pickle.dumps(pattern)) == pattern


@settings(max_examples=100)
@given(grids, st.integers(0, 3), st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([1, 4, 7])))
def test_tile_classes_are_sound(grid, before, tile):
    pattern = pattern_of(grid, before)
    n = before + math.prod(one[0] for one in grid) + 2
    truth = true_classes(pattern.mask(1, n, n)[0].numpy(), tile)
    classes = tile_classes(pattern.keep(), n, n, tile=tile)
    assert (truth[classes == FULL] == FULL).all() and (truth[classes == EMPTY] == EMPTY).all()


@settings(max_examples=60)
@given(
    dimensions(40).filter(lambda one: one[3] == 1), st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([1, 4, 7]))
)
def test_tile_classes_of_a_line_are_exact(one, tile):
    pattern, n = pattern_of([one]), one[0]
    truth = true_classes(pattern.mask(1, n, n)[0].numpy(), tile)
    assert np.array_equal(tile_classes(pattern.keep(), n, n, tile=tile), truth)


def boxes(shape: list[int], tile: list[int]) -> list[list[int]]:
    """The tokens of each box of a grid; boxes are cut at its ends."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    starts = itertools.product(*(range(0, size, step) for size, step in zip(shape, tile, strict=True)))
    cut = [tuple(slice(a, a + step) for a, step in zip(at, tile, strict=True)) for at in starts]
    return [numbers[one].ravel().tolist() for one in cut]


tiles = st.sampled_from([1, 2, 3, 4, 8])


@settings(max_examples=300)
@given(st.lists(dimensions(12).filter(lambda one: one[3] == 1), min_size=1, max_size=2), st.data())
def test_fully_block_sparse_is_that_no_box_is_partial(grid, data):
    pattern, shape = pattern_of(grid), [one[0] for one in grid]
    q_tile, k_tile = ([data.draw(tiles) for _ in grid] for _ in "qk")
    mask = pattern.mask(1, math.prod(shape), math.prod(shape))[0].numpy()
    kinds = {
        FULL if part.all() else PARTIAL if part.any() else EMPTY
        for q in boxes(shape, q_tile)
        for k in boxes(shape, k_tile)
        for part in [mask[np.ix_(q, k)]]
    }
    assert pattern.fully_block_sparse(q_tile, k_tile) == (PARTIAL not in kinds)


def natten_says(length: int, w: int, s: int, q_tile: int, k_tile: int) -> bool:
    """The published test, of one dimension that is not causal."""
    last = row(length - 1, length, w, s, False, SHIFT)
    aligned = (w // 2 - s // 2) % k_tile == 0
    two = length % k_tile == 0 and -(-length // s) == 2 and s + s // 2 >= length - w
    whole = s % q_tile == 0 and w % k_tile == 0
    return length == w or (whole and (length % s == 0 or min(last) % k_tile == 0) and (aligned or two))


def test_the_published_test_of_block_sparsity_never_finds_more():
    """Where key tiles divide query tiles: it has no condition of its own that the stride is whole key tiles."""
    agreed = 0
    for length in range(2, 33):
        for w in range(2, length + 1):
            for s in range(1, w + 1):
                for q_tile, k_tile in itertools.product((1, 2, 4, 8), repeat=2):
                    if q_tile % k_tile:
                        continue
                    ours = Dimension(length, w, s, 1, False, SHIFT).fully_block_sparse(q_tile, k_tile)
                    theirs = natten_says(length, w, s, q_tile, k_tile)
                    assert ours or not theirs, (length, w, s, q_tile, k_tile)
                    agreed += theirs
    assert agreed > 500
    video = p.neighborhood([30, 48, 80], [18, 24, 24], [16, 8, 8])
    assert video.fully_block_sparse((2, 8, 8), (2, 8, 8)) and not video.fully_block_sparse((2, 8, 8), (4, 8, 8))


def same(pattern: p.Pattern, other: p.Pattern, n: int) -> bool:
    return torch.equal(pattern.mask(1, n, n), other.mask(1, n, n))


def test_identities():
    """The oracles of the catalogue of published systems, section 23."""
    for length, w in ((24, 6), (21, 7), (8, 8), (9, 1)):
        assert same(p.neighborhood(length, w, stride=w), p.same_block(w), length)  # Swin's windows
        assert same(p.neighborhood(length, w, w, border=TRUNCATE), p.same_block(w), length)
    for d in (1, 2, 3):
        assert same(p.neighborhood(24, 24 // d, dilation=d), p.dilated(d), 24)
    assert p.neighborhood([4, 6], [4, 6]).keep_at((Var("a"), Var("b")), (Var("c"), Var("d"))) == TRUE
    assert same(p.neighborhood([4, 6], [4, 6], border=WRAP), p.dense(), 24)
    for w in (1, 4, 20):
        assert same(p.neighborhood(20, w, causal=True), p.window(w), 20)
        assert same(p.neighborhood(20, w, border=TRUNCATE), p.window(w // 2 + 1, ahead=max(w // 2 + w % 2 - 1, 0)), 20)
    ring = p.expr("(k - q + 2) % 12 < 5")
    assert same(p.neighborhood(12, 5, border=WRAP), ring, 12)


@pytest.mark.parametrize(("b", "h"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 3)])
def test_halo_windows_are_strided_neighborhoods(b, h):
    """(q // b) b - h <= k < (q // b) b + b + h: everywhere when truncated, and inside the borders when shifted."""
    n = 6 * b + 4 * h
    halo = p.expr(f"q // {b} * {b} - {h} <= k and k < q // {b} * {b} + {b + h}")
    assert same(p.neighborhood(n, b + 2 * h, b, border=TRUNCATE), halo, n)
    shifted = p.neighborhood(n, b + 2 * h, b).mask(1, n, n)[0]
    inner = slice(-(-h // b) * b, (n - h) // b * b)
    assert torch.equal(shifted[inner], halo.mask(1, n, n)[0][inner]) and (shifted.sum(1) == b + 2 * h).all()


def test_one_value_is_for_all_dimensions_and_shows_as_one():
    one = p.neighborhood([4, 6], 3, causal=[True, False])
    assert one == p.neighborhood((4, 6), (3, 3), (1, 1), [1, 1], (True, False), [SHIFT, SHIFT], 0)
    assert str(one) == "neighborhood([4, 6], window=[3, 3], causal=[True, False])"
    assert str(p.neighborhood(8, 3, start=2, border=WRAP)) == "neighborhood([8], window=[3], border='wrap', start=2)"


def test_a_grid_says_whether_it_fits():
    video, text = p.neighborhood([2, 3, 4], 2, start=5), p.global_tokens("0-4")
    assert video.too_large(29) == "" and video.fits(29) == (
        'neighborhood.shape: 2 x 3 x 4 is 24 tokens, but there are 29 keys; give the others to global_tokens: "0-4"'
    )
    assert (video | text).fits(29) == "" and (video | text).fits(31) == ""
    assert (video & p.causal()).fits(31).endswith('global_tokens: "0-4,29-30"')
    short = "neighborhood.shape: 2 x 3 x 4 is 24 tokens from position 5, but there are 28 keys"
    assert video.fits(28) == (video | text).fits(28) == (~video).fits(28) == short
    assert p.neighborhood(8, 3).fits(7) == "neighborhood.shape: 8 is 8 tokens, but there are 7 keys"
    assert p.neighborhood(8, 3).fits(8) == p.causal().fits(7) == ""


BAD = [
    (lambda: p.neighborhood([4, 6], [3, 7]), "neighborhood.window: 7 is larger than its dimension of 6"),
    (
        lambda: p.neighborhood([4, 6], 3, dilation=[1, 3]),
        "neighborhood.window: 3 times the dilation 3 is larger than its dimension of 6",
    ),
    (lambda: p.neighborhood(9, 3, stride=4), "neighborhood.stride: 4 is larger than the window of 3"),
    (
        lambda: p.neighborhood([4, 6], [3]),
        "neighborhood.window: expected one value, or one for each of 2 dimensions, found [3]",
    ),
    (lambda: p.neighborhood([4, 6], 0), "neighborhood.window: expected an integer >= 1, found 0"),
    (lambda: p.neighborhood([4, 6], [2, True]), "neighborhood.window: expected an integer >= 1, found True"),
    (lambda: p.neighborhood([4, 0], 2), "neighborhood.shape: expected positive integers, found [4, 0]"),
    (lambda: p.neighborhood("4x6", 2), "neighborhood.shape: expected positive integers, found '4x6'"),
    (lambda: p.neighborhood([2, 2, 2, 2], 2), "neighborhood.shape: expected 1 to 3 dimensions, found [2, 2, 2, 2]"),
    (lambda: p.neighborhood([2**30, 2**30], 2), "neighborhood.shape: expected at most 2**40 tokens"),
    (lambda: p.neighborhood(8, 3, causal=1), "neighborhood.causal: expected true or false, found 1"),
    (lambda: p.neighborhood(8, 3, border="wrp"), "neighborhood.border: unknown border 'wrp'; did you mean 'wrap'?"),
    (lambda: p.neighborhood(8, 3, border=3), "neighborhood.border: unknown border 3; allowed: shift, truncate, wrap"),
    (lambda: p.neighborhood(8, 3, start=-1), "neighborhood.start: expected an integer >= 0, found -1"),
    (
        lambda: p.neighborhood([8, 8], 3, causal=[True, False], border="wrap"),
        "neighborhood.border: a causal dimension can't wrap; give each its own, as in [truncate, wrap]",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_bad_values_are_told_clearly(build, message):
    with pytest.raises(PatternError) as caught:
        build()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
