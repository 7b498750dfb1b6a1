"""Expressions: canonical forms keep their value, text round-trips, evaluation agrees between ints and arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import PatternError
from sparsify.expr import Load, Test, Var
from sparsify.sizes import Size
from sparsify.text import parse_expr, parse_pred, to_text
from sparsify.walk import evaluate, loads, substitute, variables

NAMES = ("q", "k", "h", "N")
small = st.integers(-9, 9)


def texts() -> st.SearchStrategy[str]:
    """Integer expressions as Python text; divisors are positive."""
    leaf = st.one_of(st.sampled_from(NAMES), small.map(str))

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        binary = st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        divided = st.tuples(inner, st.sampled_from(["//", "%"]), st.integers(1, 7)).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        )
        extreme = st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
        choice = st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} <= {t[2]} else {t[1]})")
        return st.one_of(binary, divided, extreme, choice)

    return st.recursive(leaf, extend, max_leaves=8)


conditions = st.tuples(texts(), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), texts()).map(" ".join)
predicates = st.recursive(
    conditions,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda t: f"({t[0]}) and ({t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"({t[0]}) or ({t[1]})"),
        inner.map(lambda t: f"not ({t})"),
    ),
    max_leaves=4,
)
values = st.fixed_dictionaries(dict.fromkeys(NAMES, st.integers(-12, 12)))


@settings(max_examples=300)
@given(texts(), values)
def test_canonical_expressions_keep_their_value(text, env):
    expr = parse_expr(text)
    assert evaluate(expr, env) == eval(text, {}, env)
    assert parse_expr(to_text(expr)) == expr


@settings(max_examples=300)
@given(predicates, values)
def test_canonical_predicates_keep_their_value(text, env):
    pred = parse_pred(text)
    truth = bool(eval(text, {}, env))
    assert evaluate(pred, env) == truth
    assert evaluate(~pred, env) == (not truth)
    assert parse_pred(to_text(pred)) == pred
    assert (pred & ~pred) == parse_pred("False") or evaluate(pred & ~pred, env) is False


@settings(max_examples=60)
@given(predicates, st.sampled_from(["numpy", "torch"]))
def test_arrays_agree_with_integers(text, library):
    pred = parse_pred(text)
    q, k = np.arange(-5, 6)[:, None], np.arange(-3, 9)[None, :]
    arrays = (torch.from_numpy(q), torch.from_numpy(k)) if library == "torch" else (q, k)
    found = evaluate(pred, {"q": arrays[0], "k": arrays[1], "h": 2, "N": 7})
    table = np.broadcast_to(np.asarray(found), (11, 12))
    for i in range(11):
        for j in range(12):
            assert table[i, j] == evaluate(pred, {"q": int(q[i, 0]), "k": int(k[0, j]), "h": 2, "N": 7})


def test_substitution_folds():
    pred = parse_pred("q - k < N // 8 and k <= q + h")
    assert substitute(pred, {"N": 64, "h": 0}) == parse_pred("q - k < 8 and k <= q")
    assert variables(pred) == {"q", "k", "N", "h"}


def test_loads_read_tensors():
    pad = Test(Load("_0", (Var("b"), Var("k"))))
    pred = pad & parse_pred("k <= q")
    assert to_text(pred) in ("(_0[b, k] and (q - k >= 0))", "((q - k >= 0) and _0[b, k])")
    assert parse_pred(to_text(pred)) == pred
    assert loads(pred) == [Load("_0", (Var("b"), Var("k")))]
    table = torch.tensor([[True, False, True]])
    env = {"b": torch.zeros(1, 1, dtype=torch.long), "q": torch.arange(3)[:, None], "k": torch.arange(3), "_0": table}
    assert evaluate(pred, env).int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]


def test_sizes_are_exact_and_rounded_down():
    assert Size.read("N/8 + 512").at(4100) == 1024
    assert Size.read("0.1 * N").at(30) == 3  # decimal, not binary, tenths
    assert Size.read("min(N // 3, 100) + ceil(N / 7)").at(70) == 33
    assert Size.read("-1024 + N").at(1000) == -24
    assert Size.read("3 * 4") == Size.read(12)


def test_a_predicate_has_no_truth_value():
    with pytest.raises(TypeError, match=r"use &, \|, ~"):
        bool(parse_pred("k <= q"))


def test_a_hostile_expression_is_refused_quickly():
    for text in (
        "(" * 5000 + "k" + ")" * 5000,
        "k" + " + k" * 60_000,
        "9**9**9**9 > k",
        "[k for k in q] == 1",
        "lambda: 0",
    ):
        with pytest.raises(PatternError):
            parse_pred(text)
