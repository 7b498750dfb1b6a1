"""Every field of a selector is alive: changed by itself on a fixture, it changes what is kept."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from selection_cases import Inputs, as_sets

from sparsify.patterns.selector import PARTS, Budget, Force, Heads, Lines, Permute, Score, Selector, Unit
from sparsify.selection import choose
from sparsify.selection.permute import key_order

HEAD = Heads("head")
LAYER_MAX = Heads("layer", "max", "token")

# The order and bookkeeping of published systems, at a toy's size.
QUEST = Selector(
    Budget("topk", 4), Unit(k=4), Score(kview="minmax", combine="upper_bound"), Heads(op="sum"), Force(local=1)
)
DELTA = Selector(
    Budget("topk", 6), Unit(k=4), Score(norm="softmax"), LAYER_MAX, Force(local=3, counted=True), phase="decode"
)
LESS_IS_MORE = Selector(
    Budget("topk", 12), score=Score(domain="middle"), heads=Heads("layer", "best_rank"), force=Force(local=4)
)
TOKEN_SELECT = Selector(
    Budget("topk", 12),
    score=Score(norm="softmax", domain="middle"),
    heads=Heads("layer", "sum", "token"),
    force=Force(sink=4, local=8),
)
MOBA = Selector(Budget("topk", 3), Unit(1, 8), Score(kview="mean"), HEAD, Force(local=1, counted=True))
XATTENTION = Selector(
    Budget("topp", 0.8), Unit(8, 8), Score(kview="strided(4)", norm="softmax"), HEAD, Force(1, 1, counted=True)
)
FLASH_PREFILL = Selector(
    Budget("relmax", 0.4), Unit(8, 8), Score(kview="mean", norm="exp_rowmax", causal="past"), HEAD, Force(1, 1)
)
FLEX_BLOCK = Selector(
    Budget("topp", 0.7, "head", 2, 9), Unit(8, 8), Score("mean", "mean", norm="softmax"), HEAD, Force(1, 1)
)
SPARGE = Selector(
    Budget("topp", 0.6), Unit(8, 4), Score("mean", "mean", norm="softmax", domain="middle"), HEAD, Force(exempt=0.2)
)
LINES = Selector(None, Unit(8, 8), Score("last(8)", norm="softmax"), HEAD, lines=Lines(6, 4, 2, 2))
SNAP = Selector(Budget("topk", 9), Unit(1, 1), Score("last(8)", norm="softmax", smooth="max(3)"), phase="decode")
FLEX = Selector(
    Budget("topp", 0.5, "head"), Unit(8, 8), Score("last(8)", norm="softmax"), HEAD,
    lines=Lines(first=1, last=1, cover=0.5, switch=0.0),
)  # fmt: skip
PEAKS = Selector(Budget("topk", 3), Unit(k=8), Score(pool="max"), HEAD)
GROUP = Selector(Budget("topk", 12), score=Score(norm="softmax"), heads=Heads("kv_group", "sum", "token"))
EDGES = Selector(Budget("topk", 4), Unit(k=4), Score(kview="mean"), HEAD, Force(3, 3))
PBS = Selector(
    Budget("topp", 0.5), Unit(4, 4), Score("mean", "mean", norm="softmax"), HEAD, Force(1, 0, "tokens"),
    permute=Permute(16, "last(8)"),
)  # fmt: skip
HEAVY = Selector(
    Budget("topk", 6), Unit(8, 1), Score("last(8)", norm="accumulated", decay=0.6), Heads("kv_group", "sum"),
    Force(local=2),
)  # fmt: skip
HOOK = Selector(Budget("topk", 3), Unit(8, 8), heads=HEAD, learned="gate")

# field -> [(a selector, the same with this field changed)]; the rows that dynamic-sparsity papers differ in have more.
ALIVE = {
    "unit.q": [(FLEX_BLOCK, {"unit": Unit(16, 8)})],
    "unit.k": [(QUEST, {"unit": Unit(k=2)})],
    "score.qview": [
        (FLEX_BLOCK, {"score": Score("last(8)", "mean", norm="softmax")}),
        (FLEX_BLOCK, {"score": Score("token", "mean", norm="softmax")}),
    ],
    "score.kview": [
        (PEAKS, {"score": Score(kview="mean", pool="max")}),
        (MOBA, {"score": Score(kview="attn_pool")}),
        (PEAKS, {"score": Score(kview="rep_search", pool="max")}),
        (XATTENTION, {"score": Score(kview="strided(2)", norm="softmax")}),
        (XATTENTION, {"score": Score(kview="token", norm="softmax")}),
    ],
    "score.combine": [(QUEST, {"score": Score(kview="mean")})],  # the bound and its view go together
    "score.norm": [
        (TOKEN_SELECT, {"score": Score(domain="middle")}),
        (FLASH_PREFILL, {"score": Score(kview="mean", norm="softmax", causal="past")}),
        (replace(HEAVY, score=Score("last(8)", norm="accumulated")), {"score": Score("last(8)", norm="softmax")}),
    ],
    "score.decay": [(HEAVY, {"score": Score("last(8)", norm="accumulated")})],
    "score.domain": [(TOKEN_SELECT, {"score": Score(norm="softmax")})],
    "score.causal": [(FLASH_PREFILL, {"score": Score(kview="mean", norm="exp_rowmax")})],
    "score.pool": [
        (DELTA, {"score": Score(norm="softmax", pool="max")}),
        (FLASH_PREFILL, {"score": Score(kview="mean", norm="exp_rowmax", causal="past", pool="mean")}),
    ],
    "score.smooth": [
        (SNAP, {"score": Score("last(8)", norm="softmax")}),
        (SNAP, {"score": Score("last(8)", norm="softmax", smooth="mean(3)")}),
    ],
    "heads.scope": [(QUEST, {"heads": Heads("layer", "sum")}), (QUEST, {"heads": HEAD})],
    "heads.op": [
        (QUEST, {"heads": Heads(op="max")}),
        (LESS_IS_MORE, {"heads": Heads("layer", "sum")}),
        (LESS_IS_MORE, {"heads": Heads("layer", "max")}),
    ],
    "heads.when": [
        (DELTA, {"heads": Heads("layer", "max", "unit")}),
        (TOKEN_SELECT, {"heads": Heads("layer", "sum", "pre")}),
        (GROUP, {"heads": Heads("kv_group", "sum", "query")}),
    ],
    "force.sink": [(QUEST, {"force": Force(1, 1)})],
    "force.local": [(QUEST, {"force": Force(local=3)})],
    "force.of": [(EDGES, {"force": Force(3, 3, "tokens")})],
    "force.last_rows": [(FLASH_PREFILL, {"force": Force(1, 1, last_rows=2)})],
    "force.exempt": [(SPARGE, {"force": Force(exempt=0.15)})],
    "force.counted": [
        (DELTA, {"force": Force(local=3)}),
        (MOBA, {"force": Force(local=1)}),
        (XATTENTION, {"force": Force(1, 1)}),
    ],
    "budget.rule": [(FLASH_PREFILL, {"budget": Budget("ratio", 0.4)})],
    "budget.value": [(QUEST, {"budget": Budget("topk", 5)}), (FLASH_PREFILL, {"budget": Budget("relmax", 0.6)})],
    "budget.per": [(FLEX_BLOCK, {"budget": Budget("topp", 0.7, "row", 2, 9)})],
    "budget.min": [(FLEX_BLOCK, {"budget": Budget("topp", 0.7, "head", 4, 9)})],
    "budget.max": [(FLEX_BLOCK, {"budget": Budget("topp", 0.7, "head", 2, 3)})],
    "lines.verticals": [(LINES, {"lines": Lines(5, 4, 2, 2)})],
    "lines.slashes": [(LINES, {"lines": Lines(6, 3, 2, 2)})],
    "lines.first": [(LINES, {"lines": Lines(6, 4, 0, 2)})],
    "lines.last": [(LINES, {"lines": Lines(6, 4, 2, 0)})],
    "lines.cover": [(FLEX, {"lines": replace(FLEX.lines, cover=0.9)})],
    "lines.least": [(FLEX, {"lines": replace(FLEX.lines, least=4)})],
    "lines.switch": [(FLEX, {"lines": replace(FLEX.lines, switch=1.0)})],
    "permute.segment": [(PBS, {"permute": Permute(12, "last(8)")})],
    "permute.qview": [(PBS, {"permute": Permute(16, "last(1)")})],
    "learned": [(HOOK, {"learned": None})],
}
TOGETHER = ({"score.kview", "score.combine"}, {"heads.scope", "heads.op"})  # one can't change without the other
NOT_OF_THE_PIPELINE = {"phase", "semantics", "score.history"}  # read by whoever decides where a selector goes


def case_of(selector: Selector) -> Inputs:
    """Heads that share something, as real ones do; one query for selectors of decode."""
    torch.manual_seed(3)
    queries, keys = 1 if selector.unit.q == 1 else 61, 61
    k = torch.randn(2, 2, keys, 8) + torch.randn(2, 1, 1, 8)
    q = torch.randn(2, 4, queries, 8) + torch.randn(2, 1, queries, 8)
    scores = torch.rand(2, 4, -(-queries // selector.unit.q), -(-keys // selector.unit.k))
    return Inputs(q, k, torch.arange(keys)[None, keys - queries :], None, True, scores=scores)


def kept(selector: Selector, given: Inputs) -> list:
    """Tokens, so that units of different sizes compare; each query's own where rows are of different sizes."""
    given = replace(given, scores=given.scores if selector.learned else None)
    heads, keys, found = given.q.shape[1], given.k.shape[2], []
    where = {"scale": given.scale, "position": given.position, "valid": given.valid}
    tokens = torch.arange(keys).expand(given.k.shape[:3])  # of the slots of each key head
    if selector.permute:
        tokens = key_order(selector, given.q, given.k, **where)
        chosen = as_sets(choose(selector, given.q, given.k, order=tokens, **where), selector, keys)
    else:
        chosen = given.sets(selector)
    for b, lists in enumerate(chosen):
        for h in range(heads):
            rows, order = lists[h * len(lists) // heads], tokens[b, h * tokens.shape[1] // heads].tolist()
            for i in range(given.q.shape[2]):
                sets = zip(rows[i // selector.unit.q], selector.units(), strict=True)
                found.append({t for units, unit in sets for u in units for t in order[u * unit : (u + 1) * unit]})
    return found


@pytest.mark.parametrize(
    ("field", "selector", "change"), [(field, *case) for field, cases in ALIVE.items() for case in cases]
)
def test_a_field_changes_what_is_kept(field, selector, change):
    other = replace(selector, **change)
    assert differing(selector, other) in ({field}, *TOGETHER)
    given = case_of(selector)
    assert kept(selector, given) != kept(other, given)


def differing(a: object, b: object, prefix: str = "") -> set[str]:
    """The names of the fields in which two selectors differ."""
    found = set()
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if is_dataclass(x) and is_dataclass(y):
            found |= differing(x, y, f"{field.name}.")
        elif x != y:
            found.add(prefix + field.name)
    return found


def test_the_table_has_every_field():
    names = {f.name for f in fields(Selector)} - set(PARTS)
    names |= {f"{part}.{f.name}" for part, kind in PARTS.items() for f in fields(kind)}
    assert set(ALIVE) | NOT_OF_THE_PIPELINE == names
