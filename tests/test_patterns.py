"""Patterns: the mask against each rule restated by hand, the algebra, the errors."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from strategies import composed, shapes

from sparsify import patterns as p
from sparsify.errors import PatternError
from sparsify.expr import disjunction, select
from sparsify.patterns.pattern import K, Q
from sparsify.text import parse_pred, to_text


def by_hand(rule, heads: int, q_len: int, k_len: int, q_offset: int | None) -> torch.Tensor:
    offset = k_len - q_len if q_offset is None else q_offset
    cells = [[[rule(h, i + offset, k, k_len) for k in range(k_len)] for i in range(q_len)] for h in range(heads)]
    return torch.tensor(cells, dtype=torch.bool)


@settings(max_examples=80)
@given(composed(), shapes)
def test_the_mask_is_the_rule_by_hand(drawn, shape):
    pattern, rule = drawn
    expected = by_hand(rule, 2, *shape)
    assert torch.equal(pattern.mask(2, *shape), expected)
    assert pattern.density(2, *shape) == pytest.approx(expected.double().mean().item(), abs=1e-12)


@settings(max_examples=100)
@given(composed())
def test_a_predicate_survives_its_text(drawn):
    keep = drawn[0].keep()
    assert parse_pred(to_text(keep)) == keep


@settings(max_examples=50)
@given(composed())
def test_patterns_are_values(drawn):
    pattern = drawn[0]
    copy = pickle.loads(pickle.dumps(pattern))
    assert copy == pattern and hash(copy) == hash(pattern) and str(copy) == str(pattern)
    with pytest.raises(TypeError, match=r"write `a & b`"):
        bool(pattern)


def test_the_window_counts_the_query_itself():
    assert p.window(3).mask(1, 5, 5)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert p.window(1, ahead=1).mask(1, 3, 3)[0].int().tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]


def test_identities():
    """The oracles of the catalogue of published systems, section 23."""
    causal = p.causal().mask(1, 50, 50)
    for pattern in (
        p.window(50),
        (p.sinks(4) | p.window(50)) & p.causal(),
        p.column_stride(1) & p.causal(),
        p.window("N") & p.causal(),
        p.block_window(7, 8) & p.causal(),
        p.dilated(1) & p.causal(),
    ):
        assert torch.equal(pattern.mask(1, 50, 50), causal), pattern
    star = (p.same_block(10) | p.sinks(0)) & p.causal()
    assert torch.equal(star.mask(1, 50, 50), (p.same_block(10) & p.causal()).mask(1, 50, 50))


def test_global_tokens_are_numbers_and_ranges():
    for positions in ([0, 1, 2, 3, 9], "0-3,9", ["0-1", "1-3", 9, 2], ["9,0-3"]):
        assert p.global_tokens(positions) == p.global_tokens((0, 3, 2, 1, 9))
    assert str(p.global_tokens("9,0-3")) == "global_tokens(['0-3', 9])"
    assert p.global_tokens(7) == p.global_tokens([7]) and p.global_tokens([]).keep() == (~p.dense()).keep()
    assert p.global_tokens("0-115199").keep() == p.global_tokens(range(115_200)).keep()


def test_canonical_forms_meet():
    assert p.expr("k <= q").keep() == p.causal().keep()
    assert p.expr("q - k < 8 and not q < k").keep() == p.window(8).keep()
    assert (p.window(8) & p.causal()).keep() == p.window(8).keep()
    assert (p.causal() | p.window(8)).keep() == p.causal().keep()
    assert (p.sinks(4) & ~p.sinks(4)).keep() == (~p.dense()).keep()
    assert (p.causal() | ~p.causal()).keep() == p.dense().keep()


def test_counting_a_long_sequence_needs_no_dense_mask():
    pattern = (p.sinks(4) | p.window(1024)) & p.causal()
    n = 131072
    kept = 1024 * 1025 // 2 + (n - 1024) * 1024  # the window alone
    kept += sum(min(4, max(0, q - 1023)) for q in range(1024, 1028)) + (n - 1028) * 4  # sinks outside the window
    assert pattern.density(32, n, n) == pytest.approx(kept / n**2, rel=1e-12)


POSITIONS = "global_tokens.positions: expected non-negative integers, or ranges such as '0-76'"
BAD = [
    (lambda: p.window(0), "window.size: expected an integer >= 1, found 0"),
    (lambda: p.window(True), "window.size: expected an integer or an expression in N, found True"),
    (lambda: p.window(2.5), "window.size: expected an integer or an expression in N, found 2.5"),
    (lambda: p.window(4, ahead=-1), "window.ahead: expected an integer >= 0, found -1"),
    (lambda: p.window("N +"), "window.size: 'N +' is not an arithmetic expression in N"),
    (lambda: p.window("M/2"), "window.size: 'M' is not allowed in 'M/2' (only N, numbers, + - * / // %, min, max)"),
    (lambda: p.window("__import__('os').getcwd()"), "is not allowed in"),
    (lambda: p.window("N ** 9"), "is not allowed in 'N ** 9'"),
    (lambda: p.window(2**50), "window.size: expected an integer <= 2**40"),
    (lambda: p.window("N * N * N"), "window.size: 'N * N * N' is beyond 2**40 at N = 2**20"),
    (lambda: p.window("N / 0"), "window.size: size 'N / 0' divides by zero"),
    (lambda: p.window("min(N)"), "window.size: 'min(N)' is not allowed"),
    (lambda: p.window("max + 1"), "window.size: 'max' is not a number"),
    (lambda: p.window("9" * 900), "is not allowed in"),
    (lambda: p.window("-" * 900 + "N"), "is nested too deeply"),
    (lambda: p.sinks("3 - 5"), "sinks.n: expected an integer >= 0, found -2"),
    (lambda: p.dilated(0), "dilated.every: expected an integer >= 1, found 0"),
    (lambda: p.column_stride(8, offset="haed"), "column_stride.offset: 'haed' is not allowed"),
    (
        lambda: p.global_tokens([1, -2]),
        "global_tokens.positions: expected non-negative integers, or ranges such as '0-76', found [1, -2]",
    ),
    (
        lambda: p.global_tokens("x"),
        "global_tokens.positions: expected non-negative integers, or ranges such as '0-76', found 'x'",
    ),
    (lambda: p.global_tokens(range(0, 1000, 2)), "global_tokens.positions: expected at most 64 runs of neighbours"),
    (lambda: p.expr("kk <= q"), "expression 'kk <= q': unknown name 'kk'; did you mean 'k'?"),
    (lambda: p.expr("k + q"), "expected a condition such as 'k <= q', found a number"),
    (lambda: p.expr("b == 0"), "a pattern can't depend on b"),
    (lambda: p.expr("q.__class__"), "'q.__class__' is not allowed (only arithmetic and comparisons of h, q, k, N)"),
    (lambda: p.expr("xyz < 3"), "expression 'xyz < 3': unknown name 'xyz'; allowed: N, h, k, q"),
    (lambda: p.expr("eval('1')"), "call of 'eval' is not allowed"),
    (lambda: p.expr("k <= q <"), "'k <= q <': not an expression"),
    (lambda: p.expr("q[0] > k"), "a pattern can't index a tensor"),
    (lambda: p.expr("k / 2 < q"), "is not allowed (use + - * // %)"),
    (lambda: p.expr("k % 0 == 1"), "a divisor must be positive, found 0"),
    (lambda: p.expr("k % h == 1"), "the divisor 'h' may be 0 or less; write max(h, 1)"),
    (lambda: p.expr("abs(" * 20 + "q" + ")" * 20 + " < k"), "nested too deeply"),
    (lambda: p.expr("not " * 500 + "q < k"), "nested too deeply"),
    (lambda: p.expr("q" + " + q" * 2000 + " < k"), "an expression of 8005 characters is longer than the 4000 allowed"),
    (lambda: p.expr(f"q < {2**41}"), "2199023255552 is beyond 2**40"),
    (lambda: p.expr("k < 1.5"), "1.5 is not allowed (only integers)"),
    (lambda: p.expr("k and q"), "'k' is a number where a condition is needed"),
    (lambda: p.causal() & 3, "a pattern can be combined by & with another pattern only, found 3"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_values_are_told_clearly(build, message):
    with pytest.raises(PatternError) as caught:
        build()
    assert message in str(caught.value) and "\n" not in str(caught.value)


EQUALITY = "write eq(a, b) for a == b and ~eq(a, b) for a != b"
FOUND_FALSE = f"Own.keep(): expected a predicate such as K <= Q, found False; {EQUALITY}"
FOUND_TRUE = FOUND_FALSE.replace("False", "True")
OWN = [
    (lambda self: (K <= Q) & (K % 2 == 0), FOUND_FALSE),
    (lambda self: (K <= Q) | (K % 2 == 0), FOUND_FALSE),
    (lambda self: (K % 2 == 0) & (K <= Q), FOUND_FALSE),
    (lambda self: (K % 2 == 0) | (K <= Q), FOUND_FALSE),
    (lambda self: disjunction([K == Q, K <= Q]), FOUND_FALSE),
    (lambda self: select(K == Q, K, Q) > 3, FOUND_FALSE),
    (lambda self: K != Q, FOUND_TRUE),
    (lambda self: K == Q, FOUND_FALSE),
    (lambda self: (K <= Q) & Q, "Own.keep(): expected a predicate such as K <= Q, found Var(name='q')"),
    (lambda self: None, "Own.keep(): expected a predicate such as K <= Q, found None"),
    (lambda self: 0 <= K <= Q, "Own.keep(): a predicate has no truth value of its own; use &, |, ~"),
    (p.Pattern.keep, "Own has no keep(): give it one that returns a predicate of H, Q, K, N, such as K <= Q"),
]


@pytest.mark.parametrize(("keep", "message"), OWN)
def test_what_is_wrong_in_a_pattern_of_ones_own_is_told_clearly(keep, message):
    kind = dataclass(frozen=True)(type("Own", (p.Pattern,), {"keep": keep}))
    with pytest.raises(PatternError) as caught:
        kind()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_size_that_divides_by_zero_names_the_length():
    with pytest.raises(PatternError, match=r"divides by zero at N = 8"):
        p.window("64 / (N - 8)").mask(1, 8, 8)


def test_the_list_of_patterns_is_the_folder():
    """Each constructor is listed, and each file that defines one is a file of the list."""
    folder = Path(p.__file__).parent
    helpers = {
        "__init__",
        "pattern",
        "grid",
        "tiles",
        "interior",
        "count",
        "dense_mask",
        "lists",
        "spans",
    }
    helpers |= {"reuse", "selector", "selector_checks", "selector_text", "head_choices", "head_rules"}
    presets = {constructor.__name__ for constructor in p.PRESETS}
    homes = {"expr": "expression"} | {constructor.__name__: "select" for constructor in p.SELECTIONS}
    assert {path.stem for path in folder.glob("*.py")} - helpers == {
        homes.get(name, name) for name in p.PATTERNS if name not in presets
    }


def test_importing_sparsify_pulls_in_neither_torch_nor_triton():
    code = "import sys, sparsify.patterns as p; p.window(4) & p.causal(); print({'torch', 'triton'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
