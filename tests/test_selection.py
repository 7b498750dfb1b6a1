"""`choose` against the pipeline in plain numpy, and what must hold of any choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from selection_cases import CLEAR, Inputs, inputs, line_selectors, unit_selectors

from sparsify.errors import InputError
from sparsify.patterns.selector import Budget, Force, Heads, Lines, Score, Selector, Unit
from sparsify.selection import choose

MEANS = Score("mean", "mean", norm="softmax")
BOUND = Score(kview="minmax", combine="upper_bound")
HEAD = Heads("head")
NO_SHRINKING = (Phase.explicit, Phase.generate)  # a smaller selector is another selector, and takes minutes to find


def causal_case(keys: int, *, heads: int = 4, kv_heads: int = 2, queries: int | None = None, seed: int = 0) -> Inputs:
    """The last queries of causal attention."""
    torch.manual_seed(seed)
    position = torch.arange(keys)[None, keys - (queries or keys) :]
    q, k = torch.randn(2, heads, position.shape[1], 8), torch.randn(2, kv_heads, keys, 8)
    return Inputs(q, k, position, None, True)


def each(sets: list) -> list[tuple[tuple[int, int, int], set[int]]]:
    return [
        ((b, h, r), row[0])
        for b, lists in enumerate(sets)
        for h, rows in enumerate(lists)
        for r, row in enumerate(rows)
    ]


@settings(max_examples=100, phases=NO_SHRINKING)
@given(data=st.data())
def test_kept_sets_are_the_reference_s(data):
    selector = data.draw(unit_selectors())
    case = data.draw(inputs(selector))
    expected, gap = case.reference(selector)
    assume(gap > CLEAR)
    assert case.sets(selector) == expected


@settings(max_examples=60, phases=NO_SHRINKING)
@given(data=st.data())
def test_lines_are_the_reference_s(data):
    selector = data.draw(line_selectors())
    case = data.draw(inputs(selector))
    expected, gap = case.reference(selector)
    assume(gap > CLEAR)
    assert case.sets(selector) == expected


TIES = [
    Selector(Budget("topk", 3), Unit(1, 4), Score(pool="max"), HEAD),
    Selector(Budget("topk", 5), Unit(4, 2), heads=Heads("layer", "max"), force=Force(local=1, last_rows=1)),
    Selector(Budget("ratio", 0.5), Unit(4, 1), heads=Heads("kv_group", "sum", "pre")),
    Selector(Budget("ratio", 0.3, "head"), Unit(4, 2), heads=HEAD, force=Force(sink=1)),
    Selector(Budget("threshold", 1, max=2), heads=Heads("layer", "sum")),
    Selector(Budget("topk", 4), heads=Heads("layer", "best_rank")),
]


@settings(max_examples=30)
@given(data=st.data(), selector=st.sampled_from(TIES))
def test_equal_scores_go_to_the_lowest_unit(data, selector):
    """Small integers make exact ties, and sums that are exact in any order."""
    case = data.draw(inputs(selector))
    case.scale, case.q, case.k = 1.0, case.q.sign(), case.k.sign() * (case.k.abs() > 1)
    assert case.sets(selector) == case.reference(selector)[0]


@settings(max_examples=60, phases=NO_SHRINKING)
@given(data=st.data())
def test_forced_units_are_kept_and_nothing_lies_beyond_the_diagonal(data):
    selector = data.draw(unit_selectors().filter(lambda s: s.force.sink + s.force.local and s.force.of == "units"))
    case = data.draw(inputs(selector, whole=True))
    case.causal = True
    size, units = selector.unit.k, -(-case.k.shape[2] // selector.unit.k)
    for (_, _, r), kept in each(case.sets(selector)):
        row = case.position[0, r * selector.unit.q : (r + 1) * selector.unit.q].tolist()
        row = [p for p in row if p >= 0]
        if not row:
            assert not kept
            continue
        last = min(max(row) // size, units - 1)
        assert all(u <= last for u in kept)
        assert set(range(min(selector.force.sink, last + 1))) <= kept
        if selector.force.local and max(row) // size < units:
            assert max(row) // size in kept


@settings(max_examples=30)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.2, 0.5, 0.8, 0.95]))
def test_topp_keeps_its_share_of_the_mass_and_not_a_unit_more(seed, share):
    case = causal_case(37, seed=seed)
    probability = torch.softmax(case.q @ case.k.repeat_interleave(2, 1).mT * case.scale + _ahead(37), -1)
    for (b, h, r), kept in each(case.sets(Selector(Budget("topp", share), score=Score(norm="softmax"), heads=HEAD))):
        mass = probability[b, h, r, sorted(kept)]
        assert mass.sum() >= share - 1e-5
        assert mass.sum() - mass.min() < share + 1e-5


def _ahead(keys: int) -> torch.Tensor:
    return torch.full((keys, keys), -torch.inf).triu(1)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), rule=st.sampled_from(["topk", "ratio", "topp", "relmax", "threshold"]))
def test_a_greater_budget_keeps_more(seed, rule):
    case = causal_case(41, seed=seed)
    values = {"topk": (2, 5), "relmax": (0.8, 0.3), "threshold": (0.5, 0.1)}.get(rule, (0.3, 0.7))
    unit = Unit(4, 4)
    few, many = (case.sets(Selector(Budget(rule, value), unit, MEANS, HEAD)) for value in values)
    assert all(a <= b for (_, a), (_, b) in zip(each(few), each(many), strict=True))
    assert few != many


@settings(max_examples=20)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.1, 0.9, 1.0]))
def test_relmax_keeps_the_best_unit(seed, share):
    case = causal_case(33, seed=seed)
    kept = each(case.sets(Selector(Budget("relmax", share), Unit(4, 4), MEANS, HEAD)))
    best = each(case.sets(Selector(Budget("topk", 1), Unit(4, 4), MEANS, HEAD)))
    assert all(top <= some for (_, some), (_, top) in zip(kept, best, strict=True))


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_the_bound_of_a_page_is_above_every_score_in_it(seed):
    """A page that is kept by a threshold on true scores is kept by the same threshold on bounds."""
    case = causal_case(45, seed=seed, queries=1)
    for bar in (0.2, 1.0, 2.0):
        true = Selector(Budget("threshold", bar), Unit(k=4), Score(pool="max"), HEAD)
        bound = Selector(Budget("threshold", bar), Unit(k=4), BOUND, HEAD)
        for (_, a), (_, b) in zip(each(case.sets(true)), each(case.sets(bound)), strict=True):
            assert a <= b


@pytest.mark.parametrize("when", ["query", "pre", "token", "unit"])
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_a_group_of_one_head_chooses_as_the_head(when, op):
    case = causal_case(50, heads=3, kv_heads=3, queries=7)
    alone = Selector(Budget("topk", 3), Unit(2, 4), replace(MEANS, norm="softmax"), HEAD)
    assert case.sets(alone) == case.sets(replace(alone, heads=Heads("kv_group", op, when)))


@settings(max_examples=30)
@given(seed=st.integers(0, 999), number=st.integers(1, 12))
def test_best_rank_is_a_round_robin(seed, number):
    case = causal_case(30, seed=seed, queries=1)
    selector = Selector(Budget("topk", number), heads=Heads("layer", "best_rank"))
    logits = (case.q @ case.k.repeat_interleave(2, 1).mT).squeeze(2).numpy()
    for b in range(2):
        rankings, merged = [list(np.argsort(-x, kind="stable")) for x in logits[b]], []
        while len(merged) < number:
            for ranking in rankings:
                best = ranking.pop(0)
                merged += [best] if best not in merged and len(merged) < number else []
        assert case.sets(selector)[b][0][0][0] == set(merged)


def test_a_budget_beyond_all_units_keeps_all():
    case = causal_case(21, queries=1)
    ((index, count),) = case.choose(Selector(Budget("topk", 100), Unit(k=4), BOUND, HEAD))
    assert index.shape[-1] == 6 and bool((count == 6).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_and_no_gradient(dtype):
    case = causal_case(40, queries=3)
    case.q, case.k = case.q.to(dtype).requires_grad_(), case.k.to(dtype)
    exact = replace_dtype(case)
    selector = Selector(Budget("topk", 3), Unit(1, 4), BOUND)
    assert case.sets(selector) == exact.sets(selector)
    assert not any(x.requires_grad for pair in case.choose(selector) for x in pair)


def replace_dtype(case: Inputs) -> Inputs:
    return replace(case, q=case.q.detach().float(), k=case.k.float())


def test_unfilled_keys_are_never_looked_at():
    """A static cache: NaN beyond the filled part changes nothing."""
    case = causal_case(24, queries=1)
    k = torch.cat([case.k, torch.full((2, 2, 17, 8), torch.nan)], 2)
    valid = torch.arange(41)[None] < 24
    for score in (BOUND, Score(), replace(MEANS, qview="token"), Score(kview="strided(1)", norm="softmax")):
        selector = Selector(Budget("topk", 3), Unit(k=4), score, force=Force(sink=1, local=1, counted=True))
        assert replace(case, k=k, valid=valid).sets(selector) == case.sets(selector)


def test_padding_moves_what_is_chosen_and_changes_nothing_else():
    """Eight tokens of padding in front are two units: the same units, two further on."""
    case = causal_case(31)
    padded = replace(
        case,
        q=torch.cat([torch.randn(2, 4, 8, 8), case.q], 2),
        k=torch.cat([torch.randn(2, 2, 8, 8), case.k], 2),
        position=torch.arange(39)[None],
        valid=torch.arange(39)[None] >= 8,
    )
    for force in (Force(sink=1, local=1), Force(sink=3, of="tokens"), Force(last_rows=2)):
        selector = Selector(Budget("topp", 0.6), Unit(4, 4), MEANS, HEAD, force)
        moved = {(b, h, r + 2): {u + 2 for u in kept} for (b, h, r), kept in each(case.sets(selector))}
        for row, kept in each(padded.sets(selector)):
            assert kept == moved.get(row, set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 5, 8)}, "q: 3 query heads are no multiple of the 2 key heads"),
        ({"position": torch.zeros(2, 4).long()}, "position: expected (batch or 1, 5), found (2, 4)"),
        ({"valid": torch.ones(1, 3).bool()}, "valid: expected bool of (batch or 1, 9), found torch.bool of (1, 3)"),
        ({"scores": torch.ones(1)}, "scores: the selector's hook is None, found Tensor"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    given = {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 9, 8), "position": torch.arange(5)[None], **change}
    with pytest.raises(InputError) as error:
        choose(Selector(Budget("topk", 1)), given.pop("q"), given.pop("k"), scale=1.0, **given)
    assert str(error.value) == message


def test_lines_are_causal_and_hooks_have_scores():
    case = causal_case(9)
    lines = Selector(unit=Unit(4, 4), score=Score("last(2)", norm="softmax"), lines=Lines(2, 2))
    with pytest.raises(InputError, match=r"^causal: lines are diagonals behind the query"):
        replace(case, causal=False).choose(lines)
    hook = Selector(Budget("topk", 1), learned="gate")
    with pytest.raises(InputError, match=r"^scores: the selector's hook is 'gate', found NoneType$"):
        case.choose(hook)
    with pytest.raises(InputError, match=r"^scores: expected \(batch, 1, 2 or 4, rows, units\), found \(2, 3, 9, 9\)$"):
        replace(case, scores=torch.zeros(2, 3, 9, 9)).choose(hook)
