"""Few queries over many keys in the C++ target: split evenly between threads, and keys read where they lie."""

from dataclasses import replace

import pytest
import torch
from cpp_checks import CPP, DRAWN, FEW, bf16_pairs, check, isa, poisoned
from cpp_checks import launch as drawn_launch
from hypothesis import given
from hypothesis import strategies as st
from list_cases import drawn_lists
from strategies import term
from test_cpp_lists import BIAS, GROUP, KEYS, QUERIES, SCATTERED, SHARES, SKIPS, skipped
from test_cpp_lists import listed as drawn_lists_of

from sparsify import patterns as P
from sparsify.codegen.cpp import launch as launching
from sparsify.codegen.cpp.source import render
from sparsify.codegen.oracle import kept, oracle
from sparsify.expr import FALSE
from sparsify.program import Program
from sparsify.text import parse_pred

__all__ = ["bf16_pairs", "isa", "poisoned"]  # fixtures
pytestmark = pytest.mark.skipif(CPP.unavailable() is not None, reason=str(CPP.unavailable()))

# One long head among short ones, and one that keeps nothing.
MIXTURE = (
    P.causal(),
    (P.sinks(3) | P.window(37)) & P.causal(),
    P.dilated(9) & P.window(150, ahead=9),
    ~P.dense(),
)
KEEPS = [p.keep() if p != ~P.dense() else FALSE for p in MIXTURE]
# (rule, lists) by head: units that are gathered, single keys, units of a tile and of two, and two lists.
ROWS = (
    ("({} or k < 5) and k <= q", (16, 64, 1)),
    ("{}", (1, 128, 4)),
    ("({} or {} or k < 4) and k <= q", (64, 64, 1), (1, 64, 2)),
    ("({} or q - k < 37) and k <= q", (128, 192, 2)),
)
ADDED_TO = (("({} or k < 5) and k <= q", (16, 64, 1)), ("k <= q and q - k < 270", None))
SINK = (term(0.4, integer="h"),)
DECODE = st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 8),
    st.one_of(st.integers(1, 9), st.integers(60, 900)),
)
LISTED = st.tuples(st.integers(1, 2), st.just(GROUP), st.integers(1, 8), st.integers(1, 900))
THREADS = st.sampled_from([1, 2, 3, 5, 8])
HEAD = (64, 64)  # whose keys and values every instruction set reads where they lie


def launch(program, shape, dtype, head=HEAD, **given):
    return drawn_launch(program, shape, dtype, head, **given)


def listed(rules, shape, dtype, share, seed, head=HEAD, **fields):
    return drawn_lists_of(rules, shape, dtype, share, seed, head, **fields)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Sets torch's threads, of which even the smallest launch takes as many as it has tiles of keys."""

    def eager(program, shape, isa):
        name, source = render(program, shape, isa)
        small = source.replace("WORTH_A_THREAD = 64;", "WORTH_A_THREAD = 1;")
        assert small != source
        return name, small

    monkeypatch.setattr(launching, "render", eager)
    monkeypatch.setattr(launching, "_BUILT", {})
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@DRAWN
@given(shape=DECODE, count=THREADS, seed=st.integers(0, 99))
def test_mixtures(isa, threads, shape, count, seed):
    threads(count)
    check(launch(Program.of(KEEPS), shape, torch.float32, seed=seed))


HALVES = [(torch.bfloat16, (32, 64)), (torch.float16, (33, 48))]  # read where they lie, and packed


@pytest.mark.parametrize(("dtype", "head"), HALVES, ids=str)
@DRAWN
@given(shape=DECODE, count=THREADS, seed=st.integers(0, 99), scale=st.sampled_from([None, 0.0, -0.7]))
def test_half_precision(threads, dtype, head, shape, count, seed, scale):
    threads(count)
    check(launch(Program.of(KEEPS), shape, dtype, head, seed=seed, scale=scale))


@pytest.mark.parametrize("head", [(32, 192), (64, 96)], ids=str)  # with columns beyond what sums are made of at once
@FEW
@given(shape=DECODE, count=THREADS, seed=st.integers(0, 99))
def test_uneven_values(threads, head, shape, count, seed):
    threads(count)
    check(launch(Program.of(KEEPS), shape, torch.float32, head, seed=seed))


@pytest.mark.parametrize("head", [(96, 64), (64, 32)], ids=str)  # read where they lie, and packed
@FEW
@given(shape=DECODE, count=THREADS, seed=st.integers(0, 99))
def test_bf16_in_pairs(bf16_pairs, threads, head, shape, count, seed):
    threads(count)
    check(launch(Program.of(KEEPS[1:3] * 2), shape, torch.bfloat16, head, seed=seed))


@DRAWN
@given(shape=LISTED, count=THREADS, share=SHARES, seed=st.integers(0, 99))
def test_lists(threads, shape, count, share, seed):
    threads(count)
    check(listed(ROWS, shape, torch.float32, share, seed))


@DRAWN
@given(shape=LISTED, count=THREADS, share=SHARES, seed=st.integers(0, 99))
def test_biases_sinks_and_caps(threads, shape, count, share, seed):
    threads(count)
    check(listed(ADDED_TO, shape, torch.float32, share, seed, bias=BIAS[:2], sink=SINK, softcap=5.0))


@DRAWN
@given(
    q_len=st.integers(1, 8), k_len=st.integers(1, 900), batch=st.integers(1, 2), count=THREADS, seed=st.integers(0, 99)
)
def test_layouts(threads, q_len, k_len, batch, count, seed):
    threads(count)
    g = torch.Generator().manual_seed(seed)
    order = lambda heads, n: torch.rand(batch, heads, n, generator=g).argsort(-1)  # noqa: E731
    lists = drawn_lists(g, (batch, 2, 2), -(-(k_len + k_len // 5) // 16), 0.5)
    keeps = [parse_pred(text) & KEYS.filled for text in SCATTERED]
    program = Program.of(keeps, loads=4, queries=QUERIES, keys=KEYS)
    loads = [order(1, q_len), order(2, k_len), *lists]
    check(launch(program, (batch, GROUP, q_len, k_len), torch.float32, loads=loads, offset=0, seed=seed))


@DRAWN
@given(shape=LISTED, count=THREADS, seed=st.integers(0, 99), scale=st.sampled_from([0.25, 2.0]))
def test_skips_leave_out_little(threads, shape, count, seed, scale):
    """Each part of the keys has a largest score of its own, below that of all: what is skipped is bounded as before."""
    threads(count)
    call = replace(listed(ADDED_TO, shape, torch.float16, 0.5, seed, skips=SKIPS[2:4]), scale=scale)
    off = (CPP.run(call).double() - oracle(call)).abs().amax((0, 2, 3)) - 1e-2
    shares = [skip.share / (shape[3] if skip.by_length else 1) for skip in SKIPS[2:4]]
    assert all(float(off[h]) <= skipped(call, share) for h, share in enumerate(shares))
    assert torch.equal(CPP.run(call), CPP.run(call))


def masked(k_len, keys):
    """One query over keys, which a tensor adds to; 0 but for some keys."""
    add = torch.zeros(k_len)
    add[list(keys)] = torch.tensor(list(keys.values()))
    from sparsify.bias import Term, parse_load

    program = Program.of([P.causal().keep()] * 4, loads=1, bias=(Term(loads=(parse_load("_0[k]"),)),))
    return launch(program, (1, 4, 1, k_len), torch.float32, loads=[add])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, 1e4, -1e4])
def test_values_without_a_number(threads, count, value):
    """An infinite score, one that is no number, and scores far from the others, in the middle part of the keys."""
    threads(count)
    call = masked(640, {300: value, 310: -torch.inf})
    found, expected = CPP.run(call), oracle(call)
    if value in (1e4, -1e4, -torch.inf):
        assert torch.allclose(found.double(), expected, atol=1e-6)
    else:
        assert found.isnan().all()
    call.loads[0][:] = -torch.inf
    assert (CPP.run(call) == 0).all()


def test_only_what_is_kept_is_read(threads):
    """Every key and value that no head of a group keeps is NaN."""
    call = launch(Program.of(KEEPS), (2, 4, 2, 900), torch.float32)
    clean, used = oracle(call), kept(call).any(-2).view(-1, 1, 4, 900).any(2).expand(2, 1, 900)
    call.k[~used], call.v[~used] = torch.nan, torch.nan
    for count in (1, 3, 8):
        threads(count)
        assert torch.allclose(CPP.run(call).double(), clean, atol=1e-5)


def test_columns_far_apart(threads):
    """Keys whose columns don't lie side by side are packed; their numbers are the same."""
    threads(3)
    call = launch(Program.of(KEEPS), (1, 4, 1, 500), torch.float32)
    apart = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (call.k, call.v)]
    check(replace(call, k=apart[0], v=apart[1]))


def test_a_launch_is_split(threads):
    """The rounding of a sum in parts shows that it was: another one with each number of threads, always the same."""
    call = launch(Program.of(KEEPS), (1, 4, 1, 5000), torch.float32)
    found = []
    for count in (1, 2, 3, 5, 8):
        threads(count)
        found.append(CPP.run(call))
        assert all(torch.equal(CPP.run(call), found[-1]) for _ in range(20))
    assert len({tuple(out.flatten().tolist()) for out in found}) == len(found)
