"""The C++ target against the float64 oracle, on every instruction set that this machine runs."""

import itertools

import pytest
import torch
from cpp_checks import (
    BEST,
    BEST_ALONE,
    CPP,
    DRAWN,
    DTYPES,
    FEW,
    ISAS,
    OTHERS_ALONE,
    SHAPES,
    bf16_pairs,
    check,
    isa,
    launch,
    poisoned,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import BIASES, SINKS, term

from sparsify import patterns as P
from sparsify.bias import Term, parse_load
from sparsify.codegen.cpp.source import fill
from sparsify.codegen.oracle import kept
from sparsify.errors import InputError
from sparsify.expr import FALSE, Test
from sparsify.patterns.presets import big_bird
from sparsify.program import Program
from sparsify.runtime import toolchain as tools
from sparsify.text import parse_pred

__all__ = ["bf16_pairs", "isa", "poisoned"]  # fixtures
pytestmark = pytest.mark.skipif(CPP.unavailable() is not None, reason=str(CPP.unavailable()))

# One kernel holds all rules of a site, so a mixture over heads tests many at the price of one build.
BANDS = [
    P.causal(),
    (P.sinks(3) | P.window(37)) & P.causal(),
    P.window("N/8 + 5", ahead=9),
    P.block_window(16, 2) & P.causal(),
    P.dense(),
    ~P.dense() | (P.window(5) & P.causal()),
]
STRIDED = [
    P.column_stride(7, block=3, offset="head") & P.causal(),
    P.dilated(5) & P.window(60) & P.causal(),
    P.same_block(24, shift=5) | P.global_tokens([0, 1, 40]),
    P.expr("(q - k) % 7 < 2 and k <= q or (q*k) % 11 == 3"),
    P.expr("abs(q - k) < (9 if h % 2 == 0 else 30) and max(q, k) % 3 != 1"),
    P.expr("k // 5 + q // 3 < 20 and 3*k >= q - 4 and 2*q - 5*k > 0 - 90"),
]
GRIDS = [
    P.neighborhood([5, 4, 6], [3, 2, 5], [2, 1, 3], start=3) | P.global_tokens("0-2"),
    P.neighborhood([9, 13], [3, 4], dilation=[1, 3], causal=[True, False], border=["shift", "wrap"]),
    P.neighborhood(60, 8, 4, border="truncate", start=7),
    big_bird(block=8),
]
PATTERNS = Program.of([*(p.keep() for p in (*BANDS, *STRIDED, P.window(1) & P.causal())), FALSE])
MIXED = [p.keep() for p in (*BANDS[:3], STRIDED[1])]
PAIR = MIXED[1:3]  # one by sinks and a window, one whose bounds follow the length: builds take time by the rule


@pytest.mark.parametrize("shape", [(1, 1, 130, 130), (2, 2, 9, 200)], ids=str)
def test_grids(shape):
    check(launch(Program.of([pattern.keep() for pattern in GRIDS]), shape, torch.float32))


# All rules run in float32 on each instruction set; half precision runs for the head sizes, here and elsewhere.
BY_ISA = [
    pytest.param(isa, dtype, marks=pytest.mark.slow if dtype != torch.float32 else ())
    for isa, dtype in itertools.product(ISAS, DTYPES)
]


@pytest.mark.parametrize(("isa", "dtype"), BY_ISA, ids=str, indirect=["isa"])
@DRAWN
@given(shape=SHAPES, offset=st.one_of(st.none(), st.integers(0, 500)), seed=st.integers(0, 99))
def test_patterns(isa, dtype, shape, offset, seed):
    check(launch(PATTERNS, shape, dtype, offset=offset, seed=seed))


HEADS = [(1, 1), (3, 7), (17, 130), (64, 64), (80, 33), (127, 65), (256, 256)]
SIZES = [  # one element, sizes above and below whole vectors in both half precisions, and the largest tile
    pytest.param(head, dtype, marks=pytest.mark.slow if head in ((3, 7), (64, 64), (127, 65)) else ())
    for head, dtype in zip(HEADS, itertools.cycle(DTYPES), strict=False)
]


@pytest.mark.parametrize(("head", "dtype"), SIZES, ids=str)
@DRAWN
@given(shape=SHAPES, seed=st.integers(0, 99), scale=st.sampled_from([None, 0.0, -0.7]))
def test_head_sizes(head, dtype, shape, seed, scale):
    check(launch(Program.of(MIXED[:2]), shape, dtype, head, seed=seed, scale=scale))


@pytest.mark.parametrize("isa", OTHERS_ALONE, indirect=True)
def test_head_sizes_elsewhere(isa):
    for dtype in (torch.bfloat16, torch.float16):
        check(launch(Program.of(MIXED[:2]), (1, 1, 150, 170), dtype, (45, 83)))


@pytest.mark.slow  # lists and few queries have them, too
def test_bf16_products(bf16_pairs):
    call = launch(Program.of(PAIR), (1, 2, 150, 170), torch.bfloat16, (45, 83))
    assert "#define PACKED_BF16 1" in CPP.source(call.program, torch.bfloat16, 45, 83)
    check(call)


def test_bf16_without_bf16_products(monkeypatch):
    plain = tools.ISAS["avx512"]
    if not plain.needs <= tools.cpu_features():
        pytest.skip("this machine doesn't run avx512")
    monkeypatch.setattr(tools, "cpu_features", lambda: plain.needs)
    call = launch(Program.of(MIXED), (1, 2, 150, 170), torch.bfloat16, (45, 83))
    assert "#define PACKED_BF16 0" in CPP.source(call.program, torch.bfloat16, 45, 83)
    check(call)


MASK_SHAPES = st.sampled_from(["bhqk", "11qk", "b11k", "1h1k", "qk", "k", "bhq1", ""])


def mask_of(kind, letters, shape, heads, dtype, generator):
    """A mask tensor whose dimensions are named by letters (1 is broadcast), with whole rows dropped here and there."""
    size = {"b": shape[0], "h": heads, "q": shape[2], "k": shape[3], "1": 1}
    drawn = torch.rand([size[letter] for letter in letters], generator=generator)
    if kind == "bool":
        return drawn < 0.7
    mask = (drawn * 8 - 4).to(dtype)
    lowest = torch.finfo(dtype).min
    mask = torch.where(drawn < 0.3, torch.full_like(mask, -torch.inf), mask)
    return torch.where((drawn > 0.4) & (drawn < 0.6), torch.full_like(mask, lowest), mask)


# Elsewhere, what is loaded and added is test_biases_and_sinks_elsewhere's.
KINDS = [
    pytest.param(isa, kind, dtype, marks=pytest.mark.slow if isa != BEST else ())
    for isa, (kind, dtype) in itertools.product(ISAS, [("bool", torch.bfloat16), ("add", torch.float32)])
]


@pytest.mark.parametrize(("isa", "kind", "dtype"), KINDS, ids=str, indirect=["isa"])
@DRAWN
@given(
    shape=SHAPES, letters=MASK_SHAPES, seed=st.integers(0, 99), own=st.booleans(),
    other=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_masks(isa, dtype, kind, shape, letters, seed, own, other):
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(kind, letters, shape, len(MIXED), dtype if own else other, generator)
    mask = mask.expand(shape[0], len(MIXED), *shape[2:])  # one program, so one build, for all shapes
    load = parse_load("_0[b, h, q - N + Nq, k]")
    if kind == "bool":
        program = Program.of([keep & Test(load) for keep in MIXED], loads=1)
    else:
        program = Program.of(MIXED, loads=1, bias=(Term(loads=(load,)),))
    check(launch(program, shape, dtype, loads=[mask], seed=seed))


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, torch.finfo(torch.float64).min])
def test_rows_at_a_dtypes_lowest_value_are_uniform(low):
    mask = torch.full((70,), low, dtype=torch.float64 if low < -1e39 else torch.float32)
    program = Program.of([P.dense().keep()], loads=1, bias=(term(loads="_0[k]"),) * 2)
    call = launch(program, (1, 1, 5, 70), torch.float32, loads=[mask])
    assert torch.allclose(CPP.run(call), call.v.mean(2, keepdim=True).expand(1, 1, 5, 16), atol=1e-6)


LOADS = [
    "_0[b, k] and k <= q",
    "_1[b, q] == _1[b, k] and k <= q",
    "k < _2[b]",
    "_3[b, q, k] or q == k",
    "not _0[b, k] or _1[0, q] < _1[0, k]",
    "_0[b, max(k - 3, 0)] and _1[b, q] >= _1[b, k]",
    "_3[b, k, q] and _3[0, q, N - 1 - k] and k <= _1[b, q] * 40",
    "_1[b, min(_1[b, q], N - 1)] == _1[b, k // 2] or h == 2 and _0[b, k]",
]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@DRAWN
@given(
    batch=st.integers(1, 2), q_len=st.integers(1, 200), more=st.integers(0, 100),
    kind=st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
def test_loads(dtype, batch, q_len, more, kind):
    k_len, generator = q_len + more, torch.Generator().manual_seed(q_len)
    draw = lambda high, *size: torch.randint(high, size, generator=generator)  # noqa: E731
    documents = draw(4, k_len, batch).sort(0).values.T.to(kind)
    lengths, pairs = draw(k_len + 9, batch).to(kind), draw(2, batch, k_len, k_len).bool().mT
    loads = [draw(3, batch, k_len) > 0, documents, lengths, pairs]
    program = Program.of([parse_pred(text) for text in LOADS], loads=4)
    check(launch(program, (batch, 1, q_len, k_len), dtype, loads=loads))


OTHERS = {
    "steps": (term(loads="_3[b,0,q//2,k//2]"), term(integer="q * k % 7")),
    "reversed": (term(0.5, "_1[h,q+N-1-k]"), term(loads="_2[b,max(k-1,0)]", where="k <= q")),
    "lookup": (term(loads="_2[b,_4[q,k]]"), term(-2.0, "_4[0,k] _0[h]")),
}


def bias_loads(shape, heads, dtype, generator):
    """The loads of BIASES and OTHERS: `_4` holds key positions; -inf here and there in `_2` and `_3`."""
    batch, _, q_len, k_len = shape
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    key, whole = draw(batch, k_len), draw(batch, heads, q_len, k_len + 3).to(dtype)[..., 1:-2]
    key[torch.rand(key.shape, generator=generator) < 0.1] = -torch.inf
    whole[torch.rand(whole.shape, generator=generator) < 0.1] = -torch.inf
    whole[:, :, ::5] = torch.finfo(dtype).min
    numbers = torch.randint(k_len, (q_len, k_len), generator=generator)
    floats = [draw(heads), draw(q_len + k_len, heads).T, key, whole]
    return [*(load.to(dtype) for load in floats), numbers]


def check_bias(terms, sink, dtype, shape, seed, loads, cap=None):
    program = Program.of(PAIR, bias=terms, sink=sink, loads=len(loads), softcap=cap)
    check(launch(program, shape, dtype, loads=loads, offset=0, seed=seed))


ALL_BIASES = list(zip({**BIASES, **OTHERS}, itertools.cycle(SINKS), itertools.cycle(DTYPES), strict=False))
LOAD_DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


# A build each: the others wait for `make test-slow`; test_biases_and_sinks_elsewhere has "sum" and "key in part".
SOON = ("alibi", "relative", "steps", "lookup")


@pytest.mark.parametrize(
    ("name", "sink", "dtype"),
    [pytest.param(*one, marks=() if one[0] in SOON else pytest.mark.slow) for one in ALL_BIASES],
)
@FEW
@given(shape=SHAPES, seed=st.integers(0, 99), other=LOAD_DTYPES)
def test_biases(name, sink, dtype, shape, seed, other):
    loads = bias_loads(shape, len(PAIR), other, torch.Generator().manual_seed(seed))
    if name == "product":
        loads[2] = loads[2].clamp(min=-5)  # 0 times -inf is nothing to test
    check_bias((BIASES | OTHERS)[name], SINKS[sink], dtype, shape, seed, loads)


@FEW
@given(shape=SHAPES, seed=st.integers(0, 99), size=st.sampled_from([1.0, 30.0, torch.inf]))
def test_biases_and_sinks_elsewhere(isa, shape, seed, size):
    loads = bias_loads(shape, len(PAIR), torch.float32, torch.Generator().manual_seed(seed))
    loads[0] = torch.full_like(loads[0], -size) if size == torch.inf else loads[0] * size
    terms = (*BIASES["sum"], *BIASES["key in part"])
    check_bias(terms, SINKS["by head"], torch.float32, shape, seed, loads, cap=5.0)


@pytest.mark.parametrize("isa", BEST_ALONE, indirect=True)
@DRAWN
@given(shape=SHAPES, seed=st.integers(0, 99), cap=st.sampled_from([0.7, 5.0, 50.0]))
def test_softcap(isa, shape, seed, cap):
    check(launch(Program.of(PAIR, softcap=cap), shape, torch.float32, seed=seed, scale=1.5))


@pytest.mark.slow  # test_cpp_decode.py has another
def test_decode_reads_only_what_is_kept():
    """Keys and values outside the window are NaN: reading one would show in the output."""
    program = Program.of([(P.window(100) & P.causal()).keep()] * 8)
    call = launch(program, (2, 4, 1, 5000), torch.float32)
    call.k[:, :, : 5000 - 192] = torch.nan
    call.v[:, :, : 5000 - 192] = torch.nan
    assert not CPP.run(call).isnan().any()


def test_what_data_rules_out_is_not_read():
    """The keys that padding drops, and those of the documents before, are NaN: reading one would show."""
    documents = torch.arange(600).div(200, rounding_mode="floor").expand(2, 600)
    padding = torch.arange(600) >= torch.tensor([[300], [0]])
    program = Program.of([parse_pred("_0[b, k] and k <= q"), parse_pred("_1[b, q] == _1[b, k]")] * 2, loads=2)
    call = launch(program, (2, 1, 600, 600), torch.float32, loads=[padding, documents])
    call.k[0, ::2, :256], call.v[0, ::2, :256], call.k[:, 1::2, :192] = torch.nan, torch.nan, torch.nan
    found = CPP.run(call)
    assert not found[0, ::2].isnan().any() and (found[0, ::2, :300] == 0).all()
    assert found[1, 1, :192].isnan().all() and not found[:, 1::2, 288:].isnan().any()


def test_far_sizes_do_not_overflow():
    far = 2**40
    rules = [P.block_window(far, far), P.window(far, ahead=far), P.column_stride(far, block=far), P.dilated(far)]
    check(launch(Program.of([p.keep() for p in rules]), (1, 2, 100, 130), torch.float32))


def test_empty_sizes():
    program = Program.of([P.causal().keep()] * 2)
    for shape in [(0, 1, 5, 5), (1, 1, 0, 5), (1, 2, 4, 0), (2, 2, 0, 0)]:
        check(launch(program, shape, torch.float32))


def test_a_rule_that_keeps_nothing_gives_zeros():
    assert (CPP.run(launch(PATTERNS, (1, 1, 100, 100), torch.float32))[:, -1] == 0).all()


@pytest.mark.parametrize(("q_len", "head"), [(1, (33, 41)), (200, (33, 41)), (200, (64, 64))], ids=str)
def test_what_all_queries_drop_may_be_nan_beside_a_kept_key(bf16_pairs, q_len, head):
    """Values are multiplied in pairs, of which one key may be dropped by all: 0 times NaN would show."""
    keep = ((P.sinks(4) | P.window(22)) & P.causal() & P.expr("k >= 1")).keep()
    call = launch(Program.of([keep]), (1, 1, q_len, 301), torch.bfloat16, head)
    clean, dropped = CPP.run(call), ~kept(call).any(-2)[0, 0]
    assert dropped[0] and not dropped[1]  # a pair
    call.k[:, :, dropped], call.v[:, :, dropped] = torch.nan, torch.nan
    assert torch.equal(CPP.run(call), clean)


def test_nan_stays_visible():
    call = launch(Program.of([P.causal().keep()]), (1, 1, 150, 150), torch.float32)
    call.k[0, 0, 70] = torch.nan
    found = CPP.run(call)
    assert not found[0, 0, :64].isnan().any() and found[0, 0, 70:].isnan().all()


def test_one_thread_gives_the_same():
    call = launch(PATTERNS, (1, 1, 500, 500), torch.float32)
    many, threads = CPP.run(call), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(CPP.run(call), many)
    finally:
        torch.set_num_threads(threads)


def test_the_skeleton_refuses_missing_and_unused_holes():
    with pytest.raises(Exception, match="is undefined"):
        fill("kernel.cpp.jinja", name="x")
    with pytest.raises(ValueError, match="no hole for nonsense"):
        fill("kernel.cpp.jinja", nonsense=1)


def test_refusals():
    program = Program.of([P.causal().keep()])
    assert "float64" in str(CPP.refuse(program, torch.float64, 16, 16))
    assert str(CPP.refuse(program, torch.float32, 513, 16)) == "head size 513 is outside the C++ target's 1 to 512"
    assert CPP.refuse(program, torch.float32, 256, 1) is None
    with pytest.raises(InputError, match=r"no kernels for torch\.float64"):
        CPP.run(launch(program, (1, 1, 2, 2), torch.float64))
