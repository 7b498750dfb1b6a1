"""Expressions inside a key tile: what they are there, and the bits of rows that are looked up in printed tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import patterns as p
from sparsify.codegen.cpp.inside import KEYS, inside, values
from sparsify.codegen.cpp.rules import Names, steps
from sparsify.expr import Ge, Var
from sparsify.patterns.layouts.boxes import Boxes
from sparsify.patterns.layouts.placed import Placed
from sparsify.program import Program
from sparsify.text import parse_expr, parse_pred
from sparsify.walk import evaluate, substitute, variables

TEXTS = [
    ("k // 512 - q >= 0", "k0 // 512 - q >= 0"),
    ("k // N >= q", "k // N - q >= 0"),
    ("k // (64 * N) >= q", "k0 // (64 * N) - q >= 0"),
    ("k % (64 * N) >= q", "k - k0 + k0 % (64 * N) - q >= 0"),
    ("k % 64 >= q", "k - k0 - q >= 0"),
    ("k % 64 // 8 >= q", "(k - k0) // 8 - q >= 0"),
    ("k % 16 >= q", "(k - k0) % 16 - q >= 0"),
    ("k // 16 >= q", "(k - k0) // 16 + k0 // 16 - q >= 0"),
    ("(k - 128) // 64 >= q", "k0 // 64 - q >= 2"),
    ("(k + 3) // 64 >= q", "(k + 3) // 64 - q >= 0"),
    ("k % 24 >= q", "k % 24 - q >= 0"),
    ("(k + q) % 8 >= 3", "(q + k) % 8 >= 3"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_quotients_and_remainders_of_a_tiles_keys(text, expected):
    wanted = substitute(parse_pred(expected.replace("k0", "_first")), {"_first": Var("k0")})
    assert inside(parse_pred(text)) == wanted


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(["//", "%"]), st.sampled_from([2, 3, 8, 24, 64, 128, 192, 512])),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([0, 64, -128, 5]),
    st.integers(0, 20),
)
def test_what_is_true_of_keys_stays_true(steps_of_k, shift, tile):
    text = f"k + {shift}"
    for sign, size in steps_of_k:
        text = f"({text}) {sign} {size}"
    pred = parse_pred(f"{text} >= q")
    k = np.arange(KEYS) + tile * KEYS
    found = inside(pred)
    for q in (-1, 0, 3, 7, 40):
        env = {"k": k, "k0": tile * KEYS, "q": q}
        assert np.array_equal(*(np.broadcast_to(evaluate(one, env), KEYS) for one in (found, pred)))
    split = values(found.expr) if isinstance(found, Ge) else None
    if split is not None:
        each, rest = split
        assert "k" not in variables(rest)
        env = {"k": k, "k0": tile * KEYS, "q": 5}
        assert np.array_equal(np.array(each) + evaluate(rest, env), np.broadcast_to(evaluate(found.expr, env), KEYS))


def test_values_need_the_place_in_the_tile_alone():
    assert values(parse_expr("k % 3 - q")) is None
    assert values(parse_expr("_0[k % 8] - q")) is None
    assert values(parse_expr("20 * k - q")) is None, "a table of more than its span"


def test_rows_of_boxes_are_looked_up():
    """A neighborhood's rows are products of digits: no loop over keys is printed."""
    boxes = Boxes((64, 64), 0, 4096, (8, 8), (1, 1))
    program = Program.of([Placed(boxes).keep(p.neighborhood([64, 64], 13).keep())])
    rows, kept = steps(program)[0].rows(Names(program))
    text = rows.loop(f"keep[n] = {kept};")
    assert "static const uint64_t table" in text and "for (int j" not in text and "Bytes" not in text
