"""Presets that choose by data, each against its system's rule restated by hand on drawn inputs."""

from __future__ import annotations

import numpy as np
import preset_rules as rules
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import sparsify
from sparsify import patterns as p
from sparsify.errors import PatternError
from sparsify.expr import TRUE
from sparsify.patterns import presets as pre
from sparsify.patterns.dense_mask import dense_mask
from sparsify.patterns.head_rules import Online
from sparsify.patterns.lists import choices, with_choices
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Selector
from sparsify.selection import choose
from sparsify.selection.example import mask_of

SCALE = 0.35


def kept(pattern: p.Pattern, q: np.ndarray, k: np.ndarray, scores: np.ndarray | None = None) -> np.ndarray:
    """What a pattern keeps (H, N, M) of q (H, N, D) and k (J, M, D)."""
    heads, n, m = len(q), q.shape[1], k.shape[1]
    (chosen,) = choices(pattern.keep())
    rest = dense_mask(with_choices(pattern.keep(), {chosen: TRUE}), heads, n, m).numpy()
    selector = Choice.parse(chosen.text).selector
    lists = choose(
        selector, *(torch.from_numpy(x).float()[None] for x in (q, k)), scale=SCALE,
        position=torch.arange(m - n, m)[None], causal=n == 1 or not np.triu(rest[0], m - n + 1).any(),
        scores=None if scores is None else torch.from_numpy(scores).float()[None],
    )  # fmt: skip
    mask = mask_of(lists, selector, n, m)[0].numpy()
    return rest & np.repeat(mask, heads // len(mask), 0)


def rule_of(pattern: p.Pattern) -> str:
    """The text of a pattern's choice."""
    (chosen,) = choices(pattern.keep())
    return chosen.text


def choice_of(pattern: p.Pattern) -> Choice:
    return Choice.parse(rule_of(pattern))


# name -> (preset, rule by hand, arguments of the rule after scale, one query at a time)
CASES = {
    "quest": (pre.quest(40, 8), rules.quest, (40, 8, False), True),
    "quest by group": (pre.quest(40, 8, "kv_group"), rules.quest, (40, 8, True), True),
    "quest, three pages at least": (pre.quest(4, 8), rules.quest, (4, 8, False), True),
    "kinetics": (pre.kinetics(3, 8), rules.kinetics, (3, 8), True),
    "delta": (pre.delta(6, 2, 8), rules.delta, (6, 2, 8), True),
    "tidal_decode": (pre.tidal_decode(12), rules.tidal_decode, (12,), True),
    "less_is_more": (pre.less_is_more(24), rules.less_is_more, (24, 0.25), True),
    "less_is_more, half": (pre.less_is_more(13, 0.5), rules.less_is_more, (13, 0.5), True),
    "token_select": (pre.token_select(9, 3, 5, 16), rules.token_select, (9, 3, 5, 16), False),
    "token_select decodes": (pre.token_select(9, 3, 5), rules.token_select, (9, 3, 5, 512), True),
    "long_heads": (pre.long_heads(40, 8), rules.long_heads, (40, 8), False),
    "hip": (pre.hip(24, 8, 16, 5, 9), rules.hip, (24, 8, 16, 5, 9), False),
    "hip decodes": (pre.hip(12, 4, sinks=0, local=1), rules.hip, (12, 4, 64, 0, 1), True),
    "minference_lines": (
        pre.minference_lines(30, 50, 16, first=4, last_slashes=9), rules.minference_lines, (30, 50, 16, 4, 9), False,
    ),
    "minference_blocks": (pre.minference_blocks(4, 8), rules.minference_blocks, (4, 8), False),
    "flex_prefill by lines": (pre.flex_prefill(0.5, 0.0, 8, 8), rules.flex_prefill, (0.5, 0.0, 8, 8), False),
    "flex_prefill by blocks": (pre.flex_prefill(0.5, 1.0, 16, 8), rules.flex_prefill, (0.5, 1.0, 16, 8), False),
    "flex_prefill": (pre.flex_prefill(0.7, 0.35, 8, 8), rules.flex_prefill, (0.7, 0.35, 8, 8), False),
    "x_attention": (pre.x_attention(0.7, 4, 16), rules.x_attention, (0.7, 4, 16), False),
    "flash_prefill": (
        pre.flash_prefill(0.4, 8, sinks=1, local=2, last_rows=1), rules.flash_prefill, (0.4, 8, 1, 2, 1, 0), False,
    ),
    "flash_prefill, three at least": (
        pre.flash_prefill(0.9, 8, 0, 1, 0, 3), rules.flash_prefill, (0.9, 8, 0, 1, 0, 3), False,
    ),
    "dhsa": (pre.dhsa(0.4, 16, 4), rules.dhsa, (0.4, 16, 4), False),
    "sparge_attention": (pre.sparge_attention(0.6, 0.2, 16, 8), rules.sparge_attention, (0.6, 0.2, 16, 8), False),
    "moba": (pre.moba(3, 8), rules.moba, (3, 8), False),
    "nsa_selection": (pre.nsa_selection(5, 8), rules.nsa_selection, (5, 8), False),
    "vsa": (pre.vsa(0.7, 8), rules.vsa, (0.7, 8), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, phases=(Phase.generate,))
@given(seed=st.integers(0, 10**6), length=st.integers(20, 150), group=st.integers(1, 3), kv_heads=st.integers(1, 2))
def test_a_preset_chooses_as_its_system_does(name, seed, length, group, kv_heads):
    pattern, rule, arguments, decodes = CASES[name]
    drawn = np.random.default_rng(seed)
    drift = drawn.normal(size=(1, length, 8)).cumsum(1) / 8
    q = drawn.normal(size=(kv_heads * group, length, 8)) + drift
    k = drawn.normal(size=(kv_heads, length, 8)) + drift
    if decodes:
        q = q[:, -1:]
    expected = rule(q, k, SCALE, *arguments)
    assert (kept(pattern, q, k) == expected).all()


@pytest.mark.parametrize("name", [name for name in CASES if not choice_of(CASES[name][0]).reuse.layers])
def test_attention_runs_what_a_preset_chose(name, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    pattern, _, _, decodes = CASES[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8) for heads, n in ((4, 1 if decodes else 75), (2, 75), (2, 75)))
    mask = torch.from_numpy(kept(pattern, q[0].numpy(), k[0].numpy()))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(sparsify.attention(q, k, v, pattern, scale=SCALE), expected, atol=1e-5, rtol=1e-5)


def test_flex_prefill_has_heads_of_both_kinds():
    """The case above with tau between is between the others: some heads take lines, some take blocks."""
    drawn = np.random.default_rng(5)
    q, k = drawn.normal(size=(8, 96, 8)), drawn.normal(size=(8, 96, 8))
    q[:4] *= 4
    lines, blocks, both = (kept(pre.flex_prefill(0.5, tau, 8, 8), q, k) for tau in (0.0, 1.0, 0.2))
    same = [[(both[h] == other[h]).all() for other in (lines, blocks)] for h in range(8)]
    assert [True, False] in same and [False, True] in same and all(map(any, same))


@pytest.mark.parametrize("name", ["seer_attention", "seer_attention_decode"])
def test_gates_choose_by_their_scores(name):
    drawn = np.random.default_rng(1)
    decodes = name.endswith("decode")
    q, k = drawn.normal(size=(4, 1 if decodes else 60, 8)), drawn.normal(size=(2, 60, 8))
    if decodes:
        gates = drawn.random((2, 1, 8))
        sets = [{0, 7, *(u + 1 for u in rules.top(row[0, 1:7], 3))} for row in gates]
        expected = np.stack([rules.page_mask(sets[h // 2], 8, 60)[None] for h in range(4)])
        assert (kept(pre.seer_attention_decode(24, 8), q, k, gates) == expected).all()
        return
    gates = drawn.random((4, 8, 8))
    blocks = gates >= 0.6
    blocks[:, -1] = True
    expected = np.stack([rules.expand(blocks[h], 8, 8, 60, 60) for h in range(4)]) & rules.causal(60, 60)
    assert (kept(pre.seer_attention(0.6, 8), q, k, gates) == expected).all()


def test_blasst_is_the_kernels_own_budget():
    assert choice_of(pre.blasst(500)).selector == Online(500.0, by_length=True)


def test_layers_that_choose_for_others():
    tidal = choice_of(pre.tidal_decode(reselect=9, layers=16))
    assert tidal.dense_layers == ((0, 1),) and tidal.reuse.source == "dense"
    assert tidal.reuse.layers == ((2, ((3, 8),)), (9, ((10, 15),)))
    assert choice_of(pre.less_is_more(reselect=9, layers=16)).reuse == tidal.reuse
    planners = choice_of(pre.delta(planners=(1, 4, 5), layers=9))
    assert planners.dense_layers == ((0, 0),) and planners.reuse.layers == ((1, ((2, 3),)), (5, ((6, 8),)))
    assert choice_of(pre.quest()).dense_layers == ((0, 1),) and choice_of(pre.kinetics()).dense_layers == ((0, 0),)
    assert choice_of(pre.hip()).dense_layers == ((0, 3),) and not choice_of(pre.hip(dense_layers=None)).dense_layers
    assert choice_of(pre.token_select(cosine=0.9)).reuse.cosine == 0.9


def test_phases_and_semantics_reach_the_selector():
    for constructor in p.PRESETS:
        about = constructor.about
        found = choices(constructor(**dict(about.example)).keep())
        if not found:
            continue
        selector = Choice.parse(found[0].text).selector
        if isinstance(selector, Selector):
            assert selector.phase == ("both" if about.phase == "train" else about.phase)
            assert selector.semantics == about.semantics


BAD = [
    (lambda: pre.quest(0), "quest.budget: expected an integer >= 1, found 0"),
    (lambda: pre.quest(scope="layer"), "quest.scope: unknown value 'layer'; allowed: head, kv_group"),
    (lambda: pre.kinetics(page=2), "kinetics.page: expected an integer >= 4, found 2"),
    (lambda: pre.delta(4, 5), "delta.local: expected at most the 4 pages, found 5"),
    (
        lambda: pre.delta(planners=[3, 2]),
        "delta.planners: expected ascending layers below delta.layers = 48, found [3, 2]",
    ),
    (lambda: pre.long_heads(512, 256), "long_heads.tokens: expected at least 3 chunks of 256, found 512"),
    (lambda: pre.hip(chunk=12), "hip: unit.k: rep_search halves a unit down to one key, so a power of two, found 12"),
    (lambda: pre.hip(7), "hip.tokens: expected at least one chunk of 8, found 7"),
    (lambda: pre.tidal_decode(reselect=31), "tidal_decode.reselect: expected a layer before the last, 31, found 31"),
    (
        lambda: pre.less_is_more(8, 0.01),
        "less_is_more.recent: 0.01 of 8 tokens leaves nothing for one of the two parts",
    ),
    (lambda: pre.token_select(smooth=4), "token_select.smooth: expected an odd width, found 4"),
    (lambda: pre.flex_prefill(1.5), "flex_prefill.gamma: expected a number above 0 and at most 1, found 1.5"),
    (lambda: pre.flex_prefill(tau=-1), "flex_prefill.tau: expected a number from 0 to 1, found -1"),
    (lambda: pre.x_attention(stride=48), "x_attention: unit.q: expected a multiple of the stride 48, found 128"),
    (lambda: pre.flash_prefill(0), "flash_prefill.alpha: expected a number above 0 and at most 1, found 0"),
    (
        lambda: pre.sparge_attention(similarity=2),
        "sparge_attention.similarity: expected a number from -1 to 1, found 2",
    ),
    (lambda: pre.vsa(1), "vsa.sparsity: expected a number below 1, found 1"),
    (lambda: pre.blasst(0), "blasst.scale: expected a number above 0, found 0"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message for _, message in BAD])
def test_errors_name_the_field(build, message):
    with pytest.raises(PatternError) as error:
        build()
    assert str(error.value) == message
