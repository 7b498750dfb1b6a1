"""Lists, layouts and skips in the C++ target, against the float64 oracle."""

import itertools
from dataclasses import replace

import pytest
import torch
from cpp_checks import BEST_ALONE, CPP, DRAWN, FEW, bf16_pairs, check, isa, launch, poisoned
from hypothesis import given
from hypothesis import strategies as st
from list_cases import CASES, ListCase, boxes, drawn_lists, sorted_keys
from strategies import term

from sparsify.codegen.oracle import kept, oracle
from sparsify.program import Layout, Program, Skip
from sparsify.text import parse_expr, parse_pred

__all__ = ["bf16_pairs", "isa", "poisoned"]  # fixtures
pytestmark = pytest.mark.skipif(CPP.unavailable() is not None, reason=str(CPP.unavailable()))

HEADS, GROUP = 8, 2
# Rules by head with the lists that they name: (keys of a unit, queries that share a list or 0, lists). One kernel holds
# all, so that one build tests them, and heads of a group that have different lists, none, or two.
ROWS = (
    ("{} and k <= q", (64, 64, 4)),
    ("{} and k <= q", (64, 64, 4)),
    ("({} or k < 5) and k <= q", (16, 64, 8)),
    ("({} or q - k < 37) and k <= q", (128, 192, 8)),
    ("{}", (1, 128, 1)),
    ("{} and (q - k) % 3 == 0 and _0[b,k]", (48, 0, 4)),
    ("({} or {} or k < 4) and k <= q", (64, 64, 1), (1, 64, 8)),
    ("k <= q and q - k < 70", None),
)
FEWER = (*ROWS[2:4], *ROWS[5:7]) * 2  # gathered units, those of several tiles, padding, two lists: half to build
EVERYWHERE = ("{}",)
ALONE = (*((*EVERYWHERE, lists) for lists in ((16, 0, 2), (16, 0, 2), (64, 64, 4), (1, 0, 1))),)
BY_ROW = (*((*EVERYWHERE, lists) for lists in ((64, 1, 2), (64, 1, 2), (16, 8, 4), (16, 8, 4))),)
SHAPES = st.tuples(
    st.integers(1, 2), st.just(GROUP), st.one_of(st.integers(1, 9), st.integers(60, 200)), st.integers(1, 400)
)
SHARES = st.sampled_from([0.0, 0.1, 0.5, 1.0])


def program(rules, **fields):
    """The program of rules by head; load 0 is padding, and each distinct list has the next two."""
    distinct = list(dict.fromkeys(lists for _, *found in rules for lists in found if lists))
    atoms = {lists: _atom(1 + 2 * i, len(rules), *lists) for i, lists in enumerate(distinct)}
    keeps = [parse_pred(text.format(*(atoms[lists] for lists in found if lists))) for text, *found in rules]
    return Program.of(keeps, loads=1 + 2 * len(distinct), **fields)


def _atom(load, heads, unit, row, count):
    which = "0" if count == 1 else f"h//{heads // count}"
    place = f"b, {which}, {f'(q - N + Nq)//{row}' if row else '0'}"
    return f"listed(_{load}[{place}, 0], _{load + 1}[{place}], k//{unit})"


def loads(rules, shape, share, seed):
    """Padding, and the lists. Where a rule names two, they have no key in common: the second leaves the first's out."""
    batch, _, q_len, k_len = shape
    g = torch.Generator().manual_seed(seed)
    found = {}
    for _, *named in rules:
        taken = torch.zeros(batch, 1, 1, k_len, dtype=torch.bool)
        for unit, row, count in filter(None, named):
            size = (batch, count, -(-q_len // row) if row else 1)
            if (unit, row, count) not in found:
                index, used = drawn_lists(g, size, -(-k_len // unit), share)
                found[unit, row, count] = _without(index, used, taken, unit)
            taken = taken | _members(*found[unit, row, count], unit, k_len)
    padding = torch.rand(batch, k_len, generator=g) > 0.2
    return [padding, *(t for pair in found.values() for t in pair)]


def _members(index, count, unit, k_len):
    """Which keys (B, L, R, Nk) are in lists."""
    units = -(-k_len // unit)
    table = torch.zeros(*index.shape[:-1], units + 1, dtype=torch.bool)
    table.scatter_(-1, torch.where(torch.arange(index.shape[-1]) < count[..., None], index.long(), units), True)
    return table[..., :-1].repeat_interleave(unit, -1)[..., :k_len]


def _without(index, count, taken, unit):
    """The lists less the units that have a key in `taken`, with a stride in their last axis."""
    member = _members(index, count, unit, taken.shape[-1]) & ~taken
    starts = member[..., ::unit]
    units = starts.shape[-1]
    left = torch.where(starts, torch.arange(units), units).sort(-1).values.int()
    return torch.stack([left, left * 0 - 1], -1)[..., 0], starts.sum(-1).int()


def listed(rules, shape, dtype, share, seed, head=(16, 16), **fields):
    named = loads(rules, shape, share, seed)
    return launch(program(rules, **fields), shape, dtype, head, loads=named, seed=seed)


@DRAWN
@given(shape=SHAPES, share=SHARES, seed=st.integers(0, 99))
def test_lists(isa, shape, share, seed):
    check(listed(ROWS, shape, torch.float32, share, seed))


@pytest.mark.parametrize(  # float16 with lists runs in test_cpp_decode.py, too
    ("dtype", "head"),
    [(torch.bfloat16, (40, 24)), pytest.param(torch.float16, (33, 64), marks=pytest.mark.slow)],
    ids=str,
)
@FEW
@given(shape=SHAPES, share=SHARES, seed=st.integers(0, 99))
def test_lists_in_half_precision(dtype, head, shape, share, seed):
    check(listed(ROWS, shape, dtype, share, seed, head))


@FEW
@given(shape=SHAPES, share=SHARES, seed=st.integers(0, 99))
def test_lists_of_bf16_in_pairs(bf16_pairs, shape, share, seed):
    call = listed(FEWER, shape, torch.bfloat16, share, seed, (33, 41))
    assert "#define PACKED_BF16 1" in CPP.source(call.program, torch.bfloat16, 33, 41)
    check(call)


@DRAWN
@given(shape=SHAPES, share=SHARES, seed=st.integers(0, 99))
def test_lists_that_few_queries_share(shape, share, seed):
    check(listed(BY_ROW, shape, torch.float32, share, seed))


BIAS = (
    term(-0.01, integer="q - k"),
    term(-1.5, where="k % 3 == q % 2"),
    term(loads="_0[b,k]", integer="k % 5 - q % 4"),
    term(-0.1, integer="max(k - q + 7, 0)"),
)


@DRAWN
@given(shape=SHAPES, share=SHARES, seed=st.integers(0, 99))
def test_biases_and_sinks_with_lists(shape, share, seed):
    fields = {"bias": BIAS, "sink": (term(0.4, integer="h"),), "softcap": 5.0}
    check(listed(FEWER, shape, torch.float32, share, seed, **fields))


@DRAWN
@given(
    q_len=st.one_of(st.integers(1, 9), st.integers(60, 200)), k_len=st.integers(1, 400), share=SHARES,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_only_listed_keys_are_read(q_len, k_len, share, seed):
    """Every row of keys and values that no head of the group keeps is NaN, and so is what lies behind the last."""
    call = listed(ALONE, (1, GROUP, q_len, k_len), torch.float32, share, seed)
    clean = oracle(call)
    used = kept(call).any(2).view(1, 2, GROUP, k_len).any(2)
    call.k[~used], call.v[~used] = torch.nan, torch.nan
    assert torch.allclose(CPP.run(call).double(), clean, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(isa, case: ListCase):
    check(case.launch("cpp"))


@pytest.mark.parametrize("make", [boxes, sorted_keys])
def test_layouts(make):
    check(make("cpp"))


# Slots hold tokens in any order, some none, and some tokens have no slot.
QUERIES = Layout(parse_expr("Nq - Nq//4 + 3"), parse_expr("_0[b, h//4, q]"), parse_pred("q % 7 != 3 and q < Nq"))
KEYS = Layout(parse_expr("N + N//5"), parse_expr("_1[b, h//2, k]"), parse_pred("k % 5 != 4 and k < N"))
SCATTERED = [
    "k <= q + 9",
    "listed(_2[b, h//2, q//64, 0], _3[b, h//2, q//64], k//16) or k < 3",
    "listed(_2[b, h//2, q//64, 0], _3[b, h//2, q//64], k//16) and k <= q + 9",
    "True",
]


@pytest.mark.parametrize("isa", BEST_ALONE, indirect=True)
@DRAWN
@given(q_len=st.integers(1, 200), k_len=st.integers(1, 300), batch=st.integers(1, 2), seed=st.integers(0, 99))
def test_scattered_tokens(isa, q_len, k_len, batch, seed):
    g = torch.Generator().manual_seed(seed)
    order = lambda heads, n: torch.rand(batch, heads, n, generator=g).argsort(-1)  # noqa: E731
    query, key = order(1, q_len), order(2, k_len)
    index, count = drawn_lists(g, (batch, 2, (q_len + 66) // 64), -(-(k_len + k_len // 5) // 16), 0.5)
    keeps = [parse_pred(text) & KEYS.filled for text in SCATTERED]
    scattered = Program.of(keeps, loads=4, queries=QUERIES, keys=KEYS)
    shape = (batch, GROUP, q_len, k_len)
    call = launch(scattered, shape, torch.float32, loads=[query, key, index, count], offset=0, seed=seed)
    check(call)
    clean, held = CPP.run(call), torch.arange(k_len) % 5 != 4
    for b, h in itertools.product(range(batch), range(2)):  # the tokens that no slot holds are not read
        call.k[b, h, key[b, h, ~held]], call.v[b, h, key[b, h, ~held]] = torch.nan, torch.nan
    assert torch.equal(CPP.run(call), clean)


def test_no_slot_at_all():
    """Every query keeps nothing where a layout has no slots."""
    none = Layout(parse_expr("Nq - Nq"), parse_expr("q"))
    check(launch(Program.of([parse_pred("k <= q")] * 4, queries=none), (2, 1, 9, 70), torch.float32))


SKIPS = (Skip(1e-2), None, Skip(0.3), Skip(1.0, by_length=True), None, None, Skip(1.0), Skip(1.0))


def skipped(call, share):
    """How much an output may change by where each key that is left out weighs less than `share` of the largest."""
    lost = share * call.k.shape[2]
    return 2 * lost / (1 + lost) * float(call.v.abs().max()) + 1e-5


@pytest.mark.parametrize("isa", BEST_ALONE, indirect=True)
@DRAWN
@given(shape=SHAPES, seed=st.integers(0, 99), scale=st.sampled_from([0.25, 2.0]))
def test_skips_leave_out_little(isa, shape, seed, scale):
    """Heads without a skip lose nothing; the others no more than their shares allow."""
    call = replace(listed(ROWS, shape, torch.float32, 0.5, seed, skips=SKIPS), scale=scale)
    off = (CPP.run(call).double() - oracle(call)).abs().amax((0, 2, 3))
    shares = [0 if skip is None else skip.share / (shape[3] if skip.by_length else 1) for skip in SKIPS]
    assert all(float(off[h]) <= skipped(call, share) for h, share in enumerate(shares))


def test_what_weighs_little_is_skipped():
    """With keys that point away from all queries behind the first tile, nothing behind it is in the output."""
    rule = parse_pred("k <= q")
    call = launch(Program.of([rule] * 4, skips=(Skip(1e-4),) * 4), (1, 1, 500, 500), torch.float32, scale=1.0)
    call.q[:], call.k[:, :, :64], call.k[:, :, 64:] = 1.0, 1.0, -1.0
    call.v[:, :, 64:] = torch.nan
    assert not CPP.run(call)[:, :, 256:].isnan().any()


@DRAWN
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_skips_of_almost_nothing_change_nothing(shape, seed):
    call = listed(FEWER, shape, torch.float32, 0.5, seed, skips=(Skip(1e-30), None, Skip(1e-30), Skip(1e-30)) * 2)
    check(call)


@pytest.mark.parametrize("key", [70, 93, 127])
def test_nan_is_never_skipped(key):
    call = launch(Program.of([parse_pred("k <= q")], skips=(Skip(1e-2),)), (1, 1, 150, 150), torch.float32, scale=9.0)
    call.k[0, 0, key] = torch.nan
    found = CPP.run(call)
    assert not found[0, 0, :64].isnan().any() and found[0, 0, key:].isnan().all()


def test_an_output_of_many_pages_is_written_whole():
    """From 32 MiB on an output gets large pages: each query that keeps itself alone gets its own value."""
    call = launch(Program.of([parse_pred("k == q")] * 8), (1, 1, 8200, 8200), torch.float32, head=(128, 128))
    found = CPP.run(call)
    assert found.nbytes > 2**25
    torch.testing.assert_close(found, call.v)
