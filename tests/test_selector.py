"""Selectors as values: texts, equality, errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from selection_cases import line_selectors, unit_selectors

from sparsify.errors import PatternError
from sparsify.patterns.head_rules import Online
from sparsify.patterns.selector import Budget, Force, Heads, Lines, Permute, Score, Selector, Unit

SOFTMAX = Score(norm="softmax")
LAST = Score("last(8)", norm="softmax")


@settings(max_examples=100)
@given(selector=unit_selectors() | line_selectors())
def test_a_text_is_read_back(selector):
    again = Selector.parse(selector.text())
    assert again == selector and hash(again) == hash(selector) and again.text() == selector.text()


def test_a_text_is_canonical():
    selector = Selector(Budget("relmax", 1), Unit(q=64, k=64), Score("mean", "mean", norm="softmax"), Heads("head"))
    assert selector.text() == (
        '{"budget":{"rule":"relmax","value":1.0},"heads":{"scope":"head"},'
        '"score":{"kview":"mean","norm":"softmax","qview":"mean"},"unit":{"k":64,"q":64}}'
    )
    spaced = json.dumps(json.loads(selector.text()), indent=1)
    assert Selector.parse(spaced) == selector == Selector.parse(spaced.replace("1.0", "1"))


def test_units_and_lists():
    pages = Selector(Budget("topk", 3), Unit(k=16))
    assert pages.units() == (16,)
    assert Selector(unit=Unit(64, 64), score=LAST, lines=Lines(30, 50)).units() == (64, 1)
    scopes = {scope: Selector(Budget("topk", 3), heads=Heads(scope)).lists(32, 8) for scope in ("head", "kv_group")}
    assert scopes == {"head": 32, "kv_group": 8}
    assert Selector(Budget("topk", 3), heads=Heads("layer", "sum")).lists(32, 8) == 1


def test_selectors_need_no_torch():
    code = "import sys, sparsify.patterns.selector; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


WRONG = {
    "budget: nothing says how much to keep, so give a budget or lines": lambda: Selector(),
    "budget: lines say how much to keep; only heads that lines.switch takes out have a budget": lambda: Selector(
        Budget("topk", 1), score=LAST, lines=Lines(1, 1)
    ),
    "budget: expected a Budget, found 3": lambda: Selector(3),
    "budget.rule: 'topq' is not known (did you mean 'topp'?)": lambda: Budget("topq", 1),
    "budget.value: expected an integer >= 1, found 0": lambda: Budget("topk", 0),
    "budget.value: expected an integer >= 1, found 2.5": lambda: Budget("topk", 2.5),
    "budget.value: expected a number above 0 and at most 1, found 0": lambda: Budget("topp", 0),
    "budget.value: expected a number above 0 and at most 1, found 1.5": lambda: Budget("ratio", 1.5),
    "budget.value: expected a number, found nan": lambda: Budget("threshold", float("nan")),
    "budget.value: 3 units can't hold the 4 that are forced and counted": lambda: Selector(
        Budget("topk", 3), force=Force(sink=2, local=2, counted=True)
    ),
    "budget.min: topk is a number of units already, so leave min and max out": lambda: Budget("topk", 3, min=1),
    "budget.max: expected at least budget.min = 3, found 2": lambda: Budget("ratio", 0.5, min=3, max=2),
    "budget.per: threshold is a row's, found 'head' (ratio, topp and relmax have it)": lambda: Budget(
        "threshold", 0.1, "head"
    ),
    "unit.k: expected an integer >= 1, found 0": lambda: Unit(k=0),
    "unit.q: expected an integer >= 1, found True": lambda: Unit(q=True),
    "unit.q: expected a multiple of the stride 16, found 24": lambda: Selector(
        Budget("topk", 1), Unit(24, 32), Score(kview="strided(16)")
    ),
    "score.qview: 'last' is not known (did you mean 'last(n)'?)": lambda: Score("last"),
    "score.qview: 'last(0)' is not known (did you mean 'last(n)'?)": lambda: Score("last(0)"),
    "score.kview: 'minmux' is not known (did you mean 'minmax'?)": lambda: Score(kview="minmux"),
    "score.combine: minmax and upper_bound go together, found kview minmax with dot": lambda: Score(kview="minmax"),
    "score.combine: minmax and upper_bound go together, found kview mean with upper_bound": lambda: Score(
        kview="mean", combine="upper_bound"
    ),
    "score.qview: strided(8) groups the queries itself, found 'mean' beside it": lambda: Score("mean", "strided(8)"),
    "unit.k: rep_search halves a unit down to one key, so a power of two, found 24": lambda: Selector(
        Budget("topk", 1), Unit(1, 24), Score(kview="rep_search")
    ),
    "heads.when: with rep_search each head finds keys of its own, so 'query' or 'unit', found 'pre'": lambda: Selector(
        Budget("topk", 1), score=Score(kview="rep_search"), heads=Heads(when="pre")
    ),
    "score.smooth: a width must be odd, found 4": lambda: Score(smooth="max(4)"),
    "score.norm: topp needs scores >= 0, so softmax, exp_rowmax or accumulated, found 'none'": lambda: Selector(
        Budget("topp", 0.9)
    ),
    "score.decay: expected a number above 0 and at most 1, found 0": lambda: Score(norm="accumulated", decay=0),
    "score.decay: goes with the norm accumulated, found 'softmax'": lambda: Score(norm="softmax", decay=0.9),
    "score.history: expected an integer >= 1, found 0": lambda: Score(norm="accumulated", history=0),
    "score.history: goes with the norm accumulated, found 'none'": lambda: Score(history=9),
    "score.history: at decode accumulated sums are kept for the most keys there can be; give it": lambda: Selector(
        Budget("topk", 1), score=Score(norm="accumulated"), phase="decode"
    ),
    "score.norm: accumulated sums are of keys in their own order, and permute sorts them": lambda: Selector(
        Budget("topk", 1), score=Score(norm="accumulated"), permute=Permute(4)
    ),
    "score.domain: 'middle' is what lies between forced units, and nothing is forced": lambda: Selector(
        Budget("topk", 1), score=Score(domain="middle")
    ),
    "score.domain: 'middle' differs from row to row, and last(4) is the same for all": lambda: Selector(
        Budget("topk", 1), score=Score("last(4)", domain="middle"), force=Force(sink=1)
    ),
    "score: the hook 'gate' gives unit scores, so of score only domain and causal apply": lambda: Selector(
        Budget("topk", 1), score=SOFTMAX, learned="gate"
    ),
    "learned: expected a hook's name of letters, digits, '_', '.' and '-', found 'a b'": lambda: Selector(
        Budget("topk", 1), learned="a b"
    ),
    "heads.scope: 'group' is not known (did you mean 'kv_group'?)": lambda: Heads("group"),
    "heads.op: with scope head nothing is joined, so leave it out, found 'max'": lambda: Heads("head", "max"),
    "heads.when: best_rank ranks units, so it must be 'unit', found 'token'": lambda: Heads(
        "layer", "best_rank", "token"
    ),
    "heads.op: best_rank gives an order, which serves topk and ratio, found 'topp'": lambda: Selector(
        Budget("topp", 0.5), score=SOFTMAX, heads=Heads("layer", "best_rank")
    ),
    "heads.op: queries are joined by sum or mean, found 'max'": lambda: Heads("kv_group", "max", "query"),
    "heads.scope: only queries of one kv_group can be joined, found 'layer'": lambda: Heads("layer", "sum", "query"),
    "heads.when: a hook's scores are a unit's, so it must be 'unit', found 'pre'": lambda: Selector(
        Budget("topk", 1), heads=Heads(when="pre"), learned="gate"
    ),
    "force.sink: expected an integer >= 0, found -1": lambda: Force(sink=-1),
    "force.of: nothing is forced that could be counted in tokens": lambda: Force(of="tokens"),
    "force.counted: nothing is forced that could count (sink, local or exempt)": lambda: Force(counted=True),
    "force.counted: expected true or false, found 1": lambda: Force(sink=1, counted=1),
    "force.counted: relmax has no number or sum that forced units could use up": lambda: Selector(
        Budget("relmax", 0.5), score=SOFTMAX, force=Force(sink=1, counted=True)
    ),
    "force.counted: forced units outside the domain 'middle' have no share of topp to count": lambda: Selector(
        Budget("topp", 0.5), score=Score(norm="softmax", domain="middle"), force=Force(sink=1, counted=True)
    ),
    "force.counted: exempt units have no number known beforehand, so they can't count": lambda: Selector(
        Budget("topk", 5), heads=Heads("head"), force=Force(exempt=0.5, counted=True)
    ),
    "force.exempt: expected a number >= -1 and at most 1, found 2": lambda: Force(exempt=2),
    "force.exempt: a head's own, so heads.scope must be 'head', found 'kv_group'": lambda: Selector(
        Budget("topk", 5), force=Force(exempt=0.5)
    ),
    "force: lines have forced ones of their own (lines.first and lines.last)": lambda: Selector(
        score=LAST, lines=Lines(1, 1), force=Force(sink=1)
    ),
    "lines.first: expected at most lines.verticals = 10, found 30": lambda: Lines(10, 50, first=30),
    "lines.verticals: expected an integer >= 1, found None": lambda: Lines(),
    "lines.least: goes with lines.cover, and there is none": lambda: Lines(3, 3, least=2),
    "lines.cover: gives the number of lines, so leave verticals and slashes out": lambda: Lines(3, 3, cover=0.5),
    "lines.cover: expected a number above 0 and at most 1, found 2": lambda: Lines(cover=2),
    "lines.switch: expected a number >= 0 and at most 1, found -1": lambda: Lines(cover=0.5, switch=-1),
    "unit.q: diagonals of whole units need unit.k = 8, found 4": lambda: Selector(
        unit=Unit(4, 8), score=LAST, heads=Heads("head"), lines=Lines(cover=0.5)
    ),
    "heads.scope: lines.cover is a head's own, so it must be 'head', found 'kv_group'": lambda: Selector(
        unit=Unit(8, 8), score=LAST, lines=Lines(cover=0.5)
    ),
    "budget.rule: heads that lines.switch takes out have topp, found 'topk'": lambda: Selector(
        Budget("topk", 1), Unit(8, 8), LAST, Heads("head"), lines=Lines(cover=0.5, switch=0.1)
    ),
    "lines: the hook 'gate' scores units, and lines have none": lambda: Selector(lines=Lines(1, 1), learned="gate"),
    "score.qview: lines are scored by the last queries, so last(n), found 'token'": lambda: Selector(lines=Lines(1, 1)),
    "score.norm: lines need 'softmax', found 'none'": lambda: Selector(score=Score("last(8)"), lines=Lines(1, 1)),
    "phase: 'prefil' is not known (did you mean 'prefill'?)": lambda: Selector(Budget("topk", 1), phase="prefil"),
    "semantics: 'exact' is not known (allowed: approx, native)": lambda: Selector(Budget("topk", 1), semantics="exact"),
    "online.share: expected a number above 0 and at most 1, found 1000": lambda: Online(1000),
    "online.share: expected a number above 0, found 0": lambda: Online(0, by_length=True),
    "selector: '{' is not JSON": lambda: Selector.parse("{"),
    "selector: expected a JSON object, found []": lambda: Selector.parse("[]"),
    "selector.budgets: no such field (did you mean 'budget'?)": lambda: Selector.parse('{"budgets":1}'),
    "budget.rule: must be given": lambda: Selector.parse('{"budget":{"value":1}}'),
    "unit: expected fields in braces, found 16": lambda: Selector.parse('{"unit":16}'),
    "unit.v: no such field (allowed: k, q)": lambda: Selector.parse('{"unit":{"v":16}}'),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_field(message):
    with pytest.raises(PatternError) as error:
        WRONG[message]()
    assert str(error.value) == message
