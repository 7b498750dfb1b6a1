"""Tokens laid out by their remainder: each has one slot, rules over slots keep the same, tiles are told exactly."""

from __future__ import annotations

import multiprocessing
import operator
import re
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from cpp_checks import check
from hypothesis import given, settings
from hypothesis import strategies as st
from test_boxes import TILE
from torch._dynamo.testing import CompileCounter

import sparsify
from sparsify import patterns as p
from sparsify.bias import Term
from sparsify.codegen import Launch, target
from sparsify.codegen.oracle import oracle
from sparsify.expr import Load, Test, Var
from sparsify.functional_plan import least_tokens, plan
from sparsify.patterns.count import EMPTY, FULL, PARTIAL, tile_classes
from sparsify.patterns.grid import grids
from sparsify.patterns.layouts.by_head import BestByHead, ByHead, best_by_head
from sparsify.patterns.layouts.lay_out import lay_out
from sparsify.patterns.layouts.residues import Residues
from sparsify.patterns.tiles import analyse
from sparsify.program import Program
from sparsify.sizes import size_values
from sparsify.walk import evaluate, substitute, variables

C = p.causal()
Q, K = Var("q"), Var("k")


def tokens(laid: ByHead, name: str, head: int, n: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(token, filled) of each slot; those of the tokens themselves where they lie in their order."""
    at, layout = np.arange(slots), laid.layout(name)
    if layout is None:
        return at, at < n
    env = {name: at, "h": head, "N": n}
    return tuple(np.broadcast_to(evaluate(part, env), slots) for part in (layout.token, layout.filled))


def checked(pattern: p.Pattern, laid: ByHead, head: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(classes by interval arithmetic, classes by looking, tiles that bands meet), after all that must hold."""
    slots = int(evaluate(laid.slots, {"N": n}))
    assert slots % TILE == 0
    (qs, q_there), (ks, k_there) = (tokens(laid, name, head, n, slots) for name in "qk")
    for token, filled in ((qs, q_there), (ks, k_there)):
        assert sorted(token[filled]) == list(range(n)), "each token has one slot"
    rule = laid.keep(pattern.keep(), head)
    rule = substitute(rule, {"N": n, "Nq": n} | size_values(variables(rule), n))
    env = {"q": np.arange(slots)[:, None], "k": np.arange(slots)[None], "h": head}
    found = np.broadcast_to(evaluate(rule, env), (slots, slots))
    rows, columns = (np.where(filled, token, 0) for token, filled in ((qs, q_there), (ks, k_there)))
    truth = pattern.mask(head + 1, n, n)[head].numpy()[rows[:, None], columns[None]] & k_there
    assert np.array_equal(found[q_there], truth[q_there])
    if laid.layout("q") is None:
        found, truth, slots = found[:n], truth[:n], slots
    q_tiles = -(-len(found) // TILE)
    kept = np.zeros((q_tiles * TILE, slots), dtype=bool)
    kept[: len(found)] = truth & q_there[: len(found), None]
    tiles = kept.reshape(q_tiles, TILE, -1, TILE)
    real = np.zeros(q_tiles * TILE, dtype=bool)
    real[: len(found)] = q_there[: len(found)]
    whole, some = (tiles | ~real.reshape(-1, TILE, 1, 1)).all((1, 3)), tiles.any((1, 3))
    classes, meets = tile_classes(rule, len(found), slots, 0, head), visited(rule, head, q_tiles, slots)
    assert not (some & (classes == EMPTY)).any() and not (~whole & (classes == FULL)).any(), "sound"
    assert not (some & ~meets).any(), "bands leave nothing out"
    return classes, np.where(some, np.where(whole, FULL, PARTIAL), EMPTY), meets


def visited(rule, head: int, q_tiles: int, slots: int) -> np.ndarray:
    found = np.zeros((q_tiles, slots // TILE), dtype=bool)
    for tile in range(q_tiles):
        env = {"q0": tile * TILE, "q1": tile * TILE + TILE - 1, "h": head}
        for band in analyse(rule).bands:
            low = 0 if band.low is None else max(0, evaluate(band.low, env))
            high = slots if band.high is None else min(slots, evaluate(band.high, env))
            if low < high and not evaluate(band.unless, env):
                found[tile, low // TILE : -(-high // TILE)] = True
    return found


def alike(every: int, queries: bool = True, heads: int = 1) -> ByHead:
    return ByHead((Residues(every, queries),) * heads, 1)


EXACT = [
    (p.dilated(8) & C, alike(8)),
    (p.dilated(5), alike(5)),
    (p.dilated(3) & p.window(200), alike(3)),
    (p.dilated(4) & p.window(300, ahead=90), alike(4)),
    (p.expr("q % 6 == k % 6 and q - k < 500"), alike(6)),
    (p.column_stride(8) & C, alike(8, False)),
    (p.column_stride(5, offset=3), alike(5, False)),
    (p.column_stride(4, offset="head") & p.window(400), alike(4, False, 4)),
]


@pytest.mark.parametrize("n", [1024, 999])
@pytest.mark.parametrize(("pattern", "laid"), EXACT, ids=lambda one: str(one) if isinstance(one, p.Pattern) else "")
def test_tiles_of_strides_are_told_exactly_and_bands_end_with_them(pattern, laid, n):
    for head in range(0, len(laid.kinds), 3):
        classes, truth, meets = checked(pattern, laid, head, n)
        assert np.array_equal(classes != EMPTY, truth != EMPTY)
        assert np.array_equal(meets, truth != EMPTY)
        whole = (truth == FULL)[classes != FULL]
        assert whole.sum() <= (0 if n == 1024 else 2 * laid.kinds[0].every)


@st.composite
def cases(draw):
    every, n = draw(st.integers(2, 9)), draw(st.integers(1, 700))
    shift = draw(st.integers(-3, 3))
    stride = draw(
        st.sampled_from(
            [
                p.dilated(every),
                p.column_stride(every, offset=shift),
                p.column_stride(every, offset="head"),
                p.expr(f"(q - k + {abs(shift)}) % {every} == 0"),
                p.expr(f"(k - 2 * q) % {every} == 0"),
                p.dilated(2 * every),
                p.column_stride(every, block=3),
            ]
        )
    )
    others = [C, p.window(40), p.window(30, ahead=9), p.sinks("N/9"), p.dilated(every), p.same_block(50), ~p.dilated(3)]
    pattern = stride
    for _ in range(draw(st.integers(0, 2))):
        pattern = draw(st.sampled_from([operator.and_, operator.or_]))(pattern, draw(st.sampled_from(others)))
    kinds = [Residues(every), Residues(every, False), Residues(draw(st.integers(2, 12))), None]
    chosen = (draw(st.sampled_from(kinds[:3])), *draw(st.lists(st.sampled_from(kinds), max_size=2)))
    return pattern, ByHead(chosen, draw(st.integers(1, 2))), n


@settings(max_examples=40)
@given(cases(), st.data())
def test_drawn_rules_in_drawn_layouts(case, data):
    pattern, laid, n = case
    checked(pattern, laid, data.draw(st.integers(0, len(laid.kinds) * laid.group - 1)), n)


def rules_of(*patterns: p.Pattern) -> tuple:
    return tuple(pattern.keep() for pattern in patterns)


@pytest.mark.parametrize(
    ("patterns", "kv_heads", "kinds"),
    [
        ((p.dilated(8) & C,) * 4, 2, (Residues(8),) * 2),
        ((p.dilated(8) & C, p.dilated(4) & C, C, p.window(512)), 4, (Residues(8), Residues(4), None, None)),
        ((C, C, p.dilated(8) & C, p.dilated(8) & C), 2, (None, Residues(8))),
        ((C, p.window(99), p.dilated(8) & C, p.dilated(8) & C), 1, (Residues(8),)),
        ((p.column_stride(8) & C,) * 2, 1, (Residues(8, False),)),
        (((p.window(128) | p.dilated(16)) & C,) * 2, 2, (Residues(16),) * 2),
    ],
)
def test_each_key_head_has_the_layout_that_its_heads_gain_from(patterns, kv_heads, kinds):
    found = best_by_head(rules_of(*patterns), kv_heads)
    assert found.laid.kinds == kinds and found.share < 0.7 * found.plain


@pytest.mark.parametrize(
    "pattern",
    [
        C,
        p.window(512),
        (p.window(2048) | p.dilated(32)) & C,
        p.column_stride(4, block=64) & C,
        p.dilated("N/4"),
        p.dilated(5000),
        p.topk(4, unit=64) & p.dilated(8) & C,
    ],
    ids=str,
)
def test_others_stay_as_they_are(pattern):
    assert best_by_head(rules_of(pattern), 1) is None


def test_few_tokens_stay_as_they_are():
    assert best_by_head(rules_of(p.dilated(8) & C), 1).least == 256
    assert best_by_head(rules_of(p.dilated(64) & C), 1).least == 1024
    assert least_tokens((C.rule,), 1) > 2**40


def drawn(n: int, heads: int, kv_heads: int, size: int = 16, nq: int | None = None) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(2, h, m, size, generator=g) for h, m in ((heads, nq or n), (kv_heads, n), (kv_heads, n))]


def truth_of(q, k, v, patterns, mask=None, offset=None) -> torch.Tensor:
    heads, (nq, n) = q.shape[1], (q.shape[2], k.shape[2])
    keep = torch.stack([one.mask(heads, nq, n, offset)[h] for h, one in enumerate(patterns)])[None]
    k, v = (t.double().repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        keep, scores = (keep & mask, scores) if mask.dtype == torch.bool else (keep, scores + mask)
    return torch.softmax(scores.masked_fill(~keep, -torch.inf), -1).nan_to_num(0) @ v


MIXED = (p.dilated(3), C, (p.dilated(5) | p.sinks(4)) & C, p.column_stride(4, offset="head") & C)
GROUPED = (C, p.window(60), p.dilated(4) & C, p.dilated(4) & p.window(99))
LAID = [(GROUPED, 2, 511), (MIXED, 4, 1030)]


def forced(patterns, kv_heads: int) -> BestByHead:
    return best_by_head(rules_of(*patterns), kv_heads)


MASKED = [(*LAID[0], None), (*LAID[0], "keep"), (*LAID[1], "add")]
MASKED += [
    pytest.param(*laid, kind, marks=pytest.mark.slow)
    for laid, kind in ((LAID[0], "add"), (LAID[1], None), (LAID[1], "keep"))
]


@pytest.mark.parametrize(("patterns", "kv_heads", "n", "kind"), MASKED)
def test_kernels_read_tokens_where_they_are(patterns, kv_heads, n, kind, monkeypatch):
    """Masks of bool and of numbers over all pairs, one for padding, and none."""
    monkeypatch.setenv("SPARSIFY_TARGET", "cpp")
    q, k, v = drawn(n, 4, kv_heads)
    g = torch.Generator().manual_seed(1)
    mask = {
        None: None,
        "keep": torch.rand(2, 1, 1, n, generator=g) > 0.3,
        "add": torch.randn(4, n, n, generator=g),
    }[kind]
    assert n >= least_tokens(tuple(one.rule for one in patterns), kv_heads)
    found = sparsify.attention(q, k, v, patterns, mask=mask)
    torch.testing.assert_close(found.double(), truth_of(q, k, v, patterns, mask), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_kernels_keep_the_oracles_bound(dtype):
    n, (patterns, kv_heads, _) = 700, LAID[1]
    program = laid_program(patterns, kv_heads, "cpp")
    q, k, v = (t.to(dtype) for t in drawn(n, 4, kv_heads))
    check(Launch(program, q, k, v, (), 0, 0.25))


def laid_program(patterns, kv_heads: int, name: str, bias=(), sink=None, where=()) -> Program:
    keeps = [keep & test for keep, test in zip(rules_of(*patterns), where or [p.dense().keep()] * 4, strict=False)]
    laid = lay_out(keeps, (), 0, bias, sink, forced(patterns, kv_heads))
    assert laid.keys is not None
    loads = (1 if where else 0) + len(bias) + (sink is not None)
    return Program.of(laid.keeps, **laid.fields(), loads=loads, target=name)


# Loads: padding of keys, ALiBi's slopes, a sink for each head and query.
WHERE = (Test(Load("_0", (Var("b"), K))),) * 4
ALIBI = (Term(loads=(Load("_1", (Var("h"),)),), integer=K - Q),)
SINK = (Term(loads=(Load("_2", (Var("h"), Q)),)),)


def full_launch(patterns, kv_heads: int, n: int, name: str) -> Launch:
    g = torch.Generator().manual_seed(3)
    q, k, v = drawn(n, 4, kv_heads)
    loads = torch.rand(2, n, generator=g) > 0.3, torch.rand(4, generator=g), torch.randn(4, n, generator=g)
    return Launch(laid_program(patterns, kv_heads, name, ALIBI, SINK, WHERE), q, k, v, loads, 0, 0.3)


def over_tokens(call: Launch, patterns) -> Launch:
    """The same without a layout."""
    keeps = [keep & test for keep, test in zip(rules_of(*patterns), WHERE, strict=True)]
    plain = Program.of(keeps, bias=ALIBI, sink=SINK, loads=3, target="null")
    return Launch(plain, call.q, call.k, call.v, call.loads, 0, call.scale)


@pytest.mark.parametrize("name", ["cpp", "null"])
def test_padding_biases_and_sinks_are_of_tokens(name):
    patterns, kv_heads, n = LAID[0]
    call = full_launch(patterns, kv_heads, n, name)
    found, expected = target(name).run(call), oracle(over_tokens(call, patterns))
    torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(oracle(call), expected)


def _in_triton(n: int) -> float:
    """The largest error of the interpreted kernel."""
    patterns, kv_heads, _ = LAID[0]
    call = full_launch(patterns, kv_heads, n, "triton")
    call = Launch(call.program, *(t[:1] for t in (call.q, call.k, call.v)), call.loads, 0, call.scale)
    expected = oracle(over_tokens(call, patterns))
    return (target("triton").run(call).double() - expected).abs().max().item()


@pytest.mark.slow
def test_triton_reads_tokens_where_they_are(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for a process of its own: Triton decides when it is imported
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_in_triton, 300).result() < 3e-6


@pytest.mark.parametrize(("nq", "offset"), [(1, None), (9, 40), (300, 0), (70, None)])
def test_chunks_and_decoding_go_by_tokens(nq, offset, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "cpp")
    patterns, kv_heads, n = LAID[0]
    q, k, v = drawn(n, 4, kv_heads, nq=nq)
    found = sparsify.attention(q, k, v, patterns, q_offset=offset)
    expected = truth_of(q, k, v, patterns, offset=offset)
    torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=3e-6)


def test_one_program_serves_every_length():
    """Eagerly by the text, and compiled with a dynamic length: a longer sequence compiles nothing anew."""
    torch._dynamo.reset()
    rules = tuple(one.rule for one in GROUPED)
    text = plan(rules, (0, None, None, "q - N + Nq"), ((), 0), 4, 2, False, "cpu", True)[0]
    assert Program.parse(text).keys is not None and re.search(r"[^q]\bN\b", text)
    counter = CompileCounter()
    run = torch.compile(
        lambda q, k, v: sparsify.attention(q, k, v, GROUPED), backend=counter, dynamic=True, fullgraph=True
    )
    for n in (500, 501, 733):
        q, k, v = drawn(n, 4, 2)
        torch.testing.assert_close(run(q, k, v).double(), truth_of(q, k, v, GROUPED), atol=3e-6, rtol=3e-6)
    assert counter.frame_count == 1


class Model(torch.nn.Module):
    """Causal self-attention over (B, N, 64), with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 192)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        mask = (at <= at[:, None]) & kept[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(*self.split(x), attn_mask=mask)


SPEC = {
    "version": 1,
    "sites": [{"match": "*", "heads": {"0-1": {"dilated": 4}, "2": "dense", "3": {"column_stride": {"every": 8}}}}],
}


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_spec_on_a_model(dynamic):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, patterns = Model(), (p.dilated(4) & C, p.dilated(4) & C, C, p.column_stride(8) & C)
    options = {"spec": SPEC, "target": "cpp", "inner": "eager", "strict": True}
    run = torch.compile(model, backend="sparsify", fullgraph=True, dynamic=dynamic, options=options)
    for n in (600, 601) if dynamic else (600,):
        x, kept = torch.randn(2, n, 64), torch.rand(2, n) > 0.2
        expected = truth_of(*model.split(x), patterns, kept[:, None, None])
        torch.testing.assert_close(run(x, kept).double(), expected, atol=3e-6, rtol=3e-6)
    site = sparsify.explain(model, x, kept, spec=SPEC).sites[0]
    assert site.layout.startswith("tokens 4 apart together for 2 of 4 key heads, keys 8 apart together for 1 of 4 ")
    short = sparsify.explain(model, x[:, :100], kept[:, :100], spec=SPEC).sites[0]
    assert short.layout == ""


def test_grids_come_first():
    near = p.neighborhood([64, 64], 13)
    heads = (near, p.dilated(8) & C)
    laid = lay_out(rules_of(*heads), grids(near) * 8, 4096, by_head=forced(heads, 2))
    assert isinstance(laid.chosen, BestByHead) == (str(laid.chosen)[:5] != "boxes")
