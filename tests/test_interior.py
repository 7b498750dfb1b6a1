"""The closed forms that split a key loop: sound on every drawn pattern, exact on the ones that kernels live by."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import composed, shapes

from sparsify import patterns as p
from sparsify.patterns.interior import has_gaps, interiors
from sparsify.patterns.tiles import analyse
from sparsify.sizes import size_values
from sparsify.walk import evaluate, variables

HEAD = 1


def _env(keep, q_len, k_len, offset, start, stop):
    found = {"b": 0, "h": HEAD, "N": k_len, "Nq": q_len, "q0": start + offset, "q1": stop - 1 + offset}
    return found | size_values(variables(keep), k_len)


def _interval(one, env, k_len):
    low = 0 if one.low is None else max(0, evaluate(one.low, env))
    high = k_len if one.high is None else min(k_len, evaluate(one.high, env))
    return range(low, high)


@settings(max_examples=60)
@given(composed(), shapes, st.sampled_from([4, 16]))
def test_inside_an_interior_every_pair_is_kept(drawn, shape, tile):
    keep = drawn[0].keep()
    q_len, k_len, offset = shape
    offset = k_len - q_len if offset is None else offset
    mask = drawn[0].mask(HEAD + 1, q_len, k_len, offset)[HEAD]
    for start in range(0, q_len, tile):
        stop = min(start + tile, q_len)
        env = _env(keep, q_len, k_len, offset, start, stop)
        for one in interiors(keep):
            if evaluate(one.when, env):
                inside = _interval(one, env, k_len)
                assert mask[start:stop, inside.start : max(inside.start, inside.stop)].all(), (start, one)


def test_a_conjunct_with_too_many_alternatives_leaves_no_interior():
    keep = (p.global_tokens(range(0, 100, 3)) & p.causal()).keep()
    assert interiors(keep) == () and has_gaps(keep)


@pytest.mark.parametrize(
    "pattern",
    [
        p.dense(),
        p.causal(),
        p.window(64, ahead=9),
        (p.sinks(8) | p.window(64)) & p.causal(),
        p.same_block(200),
        p.same_block(30, shift=4),
        p.block_window(50, 2) & p.causal(),
    ],
    ids=str,
)
def test_exact_for_the_closed_forms(pattern):
    keep = pattern.keep()
    env = _env(keep, 400, 400, 0, 100, 138)
    kept_by_all = pattern.mask(1, 400, 400)[0, 100:138].all(0).nonzero().flatten().tolist()
    found = {k for one in interiors(keep) if evaluate(one.when, env) for k in _interval(one, env, 400)}
    assert found == set(kept_by_all)


@pytest.mark.parametrize(
    ("pattern", "gaps"),
    [
        (p.causal(), False),
        ((p.sinks(4) | p.window(20)) & p.causal(), False),
        (p.same_block(64, shift=3), False),
        (p.block_window(64, 2) & p.causal(), False),
        (p.column_stride(8, block=64), True),
        (p.dilated(3), True),
    ],
)
def test_only_rules_with_holes_are_tested_tile_by_tile(pattern, gaps):
    assert has_gaps(pattern.keep()) is gaps
    assert analyse(pattern.keep()).bands
