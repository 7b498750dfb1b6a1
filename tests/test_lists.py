"""Lists, layouts and skips: the interpreter against the oracle, and the split of predicates into passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from list_cases import CASES, ListCase, boxes, skipping, sorted_keys

from sparsify.codegen import Launch, target
from sparsify.codegen.oracle import environment, kept, oracle, oracle_lse
from sparsify.expr import FALSE, TRUE
from sparsify.patterns.lists import lists, passes, row_unit, tile_rows
from sparsify.program import Program
from sparsify.text import parse_pred, to_text
from sparsify.walk import evaluate

LIST = "listed(_0[b, h//2, (q - N + Nq)//64, 0], _1[b, h//2, (q - N + Nq)//64], k//16)"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_interpreter_agrees_with_the_oracle(case: ListCase) -> None:
    launch = with_lse(case.launch("null"))
    out, (expected, lse) = target("null").run(launch), oracle_lse(launch)
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}[case.dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(launch.lse.double(), lse, atol=1e-6, rtol=1e-6)


def with_lse(launch: Launch) -> Launch:
    return replace(launch, lse=torch.full(launch.q.shape[:3], torch.nan))


@pytest.mark.parametrize("make", [boxes, sorted_keys])
def test_layouts_agree_with_the_oracle(make) -> None:
    launch = with_lse(make("null"))
    out, (expected, lse) = target("null").run(launch), oracle_lse(launch)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(launch.lse.double(), lse, atol=1e-6, rtol=1e-6)


def test_a_layout_changes_nothing_but_where_rows_lie() -> None:
    """The neighborhood of `boxes`, by hand, over tokens."""
    launch = boxes("null")
    token = torch.arange(223)
    y, x = (token - 3).div(20, rounding_mode="floor"), (token - 3) % 20
    near = ((y[:, None] - y).abs() < 5) & ((x[:, None] - x).abs() < 5)
    keep = (token < 3) | (token < 3)[:, None] | near
    k, v = (t.repeat_interleave(2, 1).double() for t in (launch.k, launch.v))
    expected = torch.nn.functional.scaled_dot_product_attention(launch.q.double(), k, v, attn_mask=keep)
    torch.testing.assert_close(oracle(launch), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_passes_cover_each_kept_pair_once(case: ListCase) -> None:
    """The static part and the lists' parts, each evaluated everywhere, are disjoint and make up the predicate."""
    launch = case.launch("null")
    keep, env = kept(launch), environment(launch)
    for h, number in enumerate(launch.program.heads):
        found = passes(launch.program.keep[number])
        parts = [found.static, *(parse_pred(to_text(step.keep)) & step.listed for step in found.lists)]
        times = sum(torch.as_tensor(evaluate(part, env)).expand_as(keep).int() for part in parts)
        assert torch.equal(times[:, h], keep[:, h].int())


def test_what_is_split() -> None:
    found = passes(parse_pred(f"({LIST} or k < 4) and k <= q"))
    assert found.static == parse_pred("k < 4 and k <= q")
    assert found.lists[0].keep == parse_pred("k <= q and k >= 4")
    assert passes(parse_pred(LIST)).static == FALSE and passes(parse_pred(LIST)).lists[0].keep == TRUE
    assert passes(parse_pred("k <= q")).lists == ()


def test_rows_of_lists_bound_query_tiles() -> None:
    found = parse_pred(f"{LIST} and k <= q")
    assert row_unit(lists(found)[0]) == 64
    assert tile_rows((found,), 96) == 64 and tile_rows((found,), 48) == 32
    assert tile_rows((parse_pred("k <= q"),), 96) == 96


def test_programs_with_lists_and_layouts_are_text() -> None:
    for launch in (CASES[0].launch("null"), boxes("null"), skipping(sorted_keys("null"), 0.01)):
        program = launch.program
        assert Program.parse(program.text()) == program
        assert parse_pred(to_text(program.keep[0])) == program.keep[0]


@pytest.mark.parametrize("share", [1e-3, 1e-1, 1.0])
def test_a_skip_leaves_out_little(share: float) -> None:
    """Each key left out weighs less than `share` of the row's largest, so all of them at most `share` times N."""
    launch = CASES[1].launch("null")
    exact, out = oracle(launch), target("null").run(skipping(launch, share)).double()
    lost = share * launch.k.shape[2]
    bound = 2 * lost / (1 + lost) * float(launch.v.abs().max())
    assert float((out - exact).abs().max()) <= bound + 1e-6
    if share == 1.0:
        assert not torch.allclose(out, exact), "nothing was skipped"
