"""Tuned values reach the kernels of both targets, and leave the numbers right."""

from __future__ import annotations

import importlib.util
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from cpp_checks import CPP, check, launch, poisoned
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interpreting import interpret, tuned_errors
from list_cases import ListCase, boxes, sorted_keys
from test_cpp import BANDS, GRIDS

from sparsify import patterns as P
from sparsify.codegen.cpp import launch as launching
from sparsify.codegen.cpp import tuned as cpp
from sparsify.codegen.cpp.tuning import ALLOWED, Tuning, fits, register_blocks
from sparsify.codegen.triton import tuned as triton
from sparsify.codegen.triton.tuning import tiled
from sparsify.errors import InputError
from sparsify.expr import Var
from sparsify.program import Layout, Program
from sparsify.runtime import machine_isa, tuned
from sparsify.runtime.toolchain import ISAS
from sparsify.runtime.tunings import Tuned
from sparsify.tuner.truth import Truth

__all__ = ["poisoned"]  # a fixture
built = pytest.mark.skipif(CPP.unavailable() is not None, reason=str(CPP.unavailable()))
MIXED = Program.of([one.keep() for one in (*BANDS[:3], P.dilated(3) & P.window(50))])


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TUNED", str(tmp_path / "tuned.json"))
    tuned.reload()
    yield tmp_path / "tuned.json"
    tuned.reload()


def entry(key, values):
    return Tuned(*key, values, 0.9, 1.0, 0.9, 0.9, 0.9, "2026-01-01T00:00:00+00:00")


def kernel_of(call):
    """The tuning of the kernel that a call of the C++ target gets."""
    return cpp.tuning(call.program, call.q.dtype, call.q.shape[3], call.v.shape[3], call.q.shape[2])


TUNINGS = st.fixed_dictionaries(
    {"tile": st.sampled_from(sorted(register_blocks(machine_isa())))},
    optional={name: st.sampled_from(some) for name, some in ALLOWED.items() if not name.startswith("block_")},
)


@built
@settings(max_examples=4)
@given(values=TUNINGS, dtype=st.sampled_from([torch.float32, torch.bfloat16]), few=st.booleans())
def test_any_tuning_gives_the_right_numbers(values, dtype, few):
    rows, vectors = values.pop("tile")
    assume(fits(vectors, values.get("keys", 64), machine_isa()))
    with tuned.forced(values | {"block_rows": rows, "block_vectors": vectors}):
        call = launch(MIXED, (1, 2, 3, 300) if few else (1, 1, 210, 260), dtype, (64, 64))
        assert kernel_of(call).block_rows == rows
        check(call)


@built
def test_a_box_of_queries_fits_the_lowest_query_tile():
    with tuned.forced({"block_rows": 2, "blocks": 4, "keys": 32, "block_vectors": 2}):
        check(boxes("cpp"))
        check(launch(Program.of([GRIDS[0].keep()]), (1, 1, 130, 130), torch.float32))


@pytest.mark.slow
@built
def test_lists_run_with_other_tiles():
    values = {"block_rows": 5, "block_vectors": 2, "keys": 32, "blocks": 20, "parts": 4, "fetch": 1, "cache_kib": 256}
    with tuned.forced(values):
        check(sorted_keys("cpp"))
        for case in (
            ListCase("causal", 64, 64, lengths=(300, 300)),
            ListCase("causal", 32, 64, lengths=(300, 300)),
            ListCase("causal", 16, heads=(8, 2), lengths=(1, 300)),
        ):
            check(case.launch("cpp"))


@built
def test_the_store_decides_what_is_built(store):
    few, many = (launch(MIXED, (1, 1, n, 200), torch.float32, (32, 32)) for n in (1, 200))
    usual = Tuning.of(machine_isa(), {})
    assert kernel_of(few) == kernel_of(many) == usual
    before = CPP.kernel(MIXED, torch.float32, 32, 32, 200)
    tuned.keep([entry(cpp.key(many), {"blocks": 12, "native": 1})])
    assert kernel_of(many) == replace(usual, blocks=12, native=1) and kernel_of(few) == usual
    after = CPP.kernel(MIXED, torch.float32, 32, 32, 200)
    assert after is not before and after is CPP.kernel(MIXED, torch.float32, 32, 32, 200)
    assert "BLOCKS = 12" in CPP.source(MIXED, torch.float32, 32, 32)
    check(many)


@built
def test_another_machine_or_software_decides_nothing(store):
    call = launch(MIXED, (1, 1, 200, 200), torch.float32, (32, 32))
    key = cpp.key(call)
    assert key[2] == "cpp" and "__fp32__d32__many__" in key[3]
    tuned.keep([entry(("another", *key[1:]), {"blocks": 12}), entry((key[0], "another", *key[2:]), {"blocks": 12})])
    assert kernel_of(call) == Tuning.of(machine_isa(), {})
    own, *others = (cpp.holds(entry((one, two, *key[2:]), {})) for one, two in (key[:2], ("x", key[1]), (key[0], "x")))
    assert own and not any(others)


@built
def test_values_that_can_not_be_are_ignored(store):
    call = launch(MIXED, (1, 1, 200, 200), torch.float32, (32, 32))
    for wrong in ({"blocks": 13}, {"speed": 9}):
        tuned.keep([entry(cpp.key(call), wrong)])
        assert kernel_of(call) == Tuning.of(machine_isa(), {})


def test_values_are_refused_in_words():
    with pytest.raises(InputError) as raised:
        Tuning.of(ISAS["avx2"], {"blocks": 13})
    assert str(raised.value) == "tuned kernel: blocks: found 13; allowed: 4, 6, 8, 10, 12, 16, 20, 24, 32, 48"
    with pytest.raises(
        InputError, match=r"^tuned kernel: block_vectors: found 4; expected a divisor of the 2 that 32 keys"
    ):
        Tuning.of(ISAS["avx512"], {"keys": 32})
    with pytest.raises(InputError, match=r"^tuned kernel: unknown field 'block_row'; did you mean 'block_rows'\?$"):
        cpp.check({"block_row": 4})
    with pytest.raises(InputError, match=r"^tuned kernel: num_warps: found True; allowed: 1, 2, 4, 8, 16$"):
        triton.check({"num_warps": True})


def test_the_same_kernel_whichever_head_has_which_rule():
    rules = [one.keep() for one in BANDS[:2]]
    calls = [launch(Program.of(some), (1, 1, 100, 100), torch.float32) for some in (rules, rules[::-1], rules * 4)]
    assert len({cpp.key(call) for call in calls}) == 1
    other = launch(Program.of(rules[:1]), (1, 1, 100, 100), torch.float32)
    assert cpp.key(other) != cpp.key(calls[0]) != cpp.key(launch(Program.of(rules), (1, 1, 9, 100), torch.float32))


def test_register_blocks_fit_the_registers():
    assert (6, 2) in register_blocks(ISAS["avx2"]) and (7, 2) not in set(register_blocks(ISAS["avx2"]))
    assert (6, 4) in set(register_blocks(ISAS["avx512"]))


@built
def test_what_is_tried_begins_with_no_field_that_is_not_there():
    call = launch(MIXED, (1, 1, 200, 200), torch.float32, (32, 32))
    for some in (call, replace(call, q=call.q[:, :, :1])):
        for values in (values for group in cpp.groups(some) for values in group):
            Tuning.of(machine_isa(), values)
            assert set(values) <= set(cpp.default(some))


def test_tiles_that_come_to_the_same_are_tried_once():
    laid_out = replace(MIXED, queries=Layout(Var("N"), Var("q")), keys=Layout(Var("N"), Var("k")))
    for program, clamps in ((MIXED, False), (laid_out, True)):
        call = replace(launch(program, (1, 1, 512, 512), torch.bfloat16, (128, 128)), program=program)
        first = triton.groups(call, 90)[0]
        tiles = [
            (*(min(one[name], 64 if clamps else 256) for name in ("block_m", "block_n")), one["num_warps"])
            for one in first
        ]
        assert len(set(tiles)) == len(tiles) > 2


@built
def test_a_truth_knows_wrong_rows_wherever_they_are():
    call = launch(MIXED, (1, 1, 300, 300), torch.float32, (32, 32))
    truth = Truth.of(call, CPP.run)
    out = CPP.run(call)
    assert truth.error(out) <= truth.bound < 1e-4
    for row in (0, 133, 299):
        wrong = out.clone()
        wrong[0, 0, row, 3] += 1e-3
        assert truth.error(wrong) > truth.bound
    out[0, 1, 7, 0] = torch.nan
    assert truth.error(out) == float("inf")


@built
def test_a_truth_knows_that_large_values_are_rounded_by_more(monkeypatch):
    monkeypatch.setattr("sparsify.tuner.truth.PAIRS", 0)  # the first and the last row alone are beside the oracle
    call = launch(Program.of([BANDS[0].keep()]), (1, 1, 900, 900), torch.bfloat16, (32, 32))
    truth = Truth.of(call, CPP.run)
    out, largest = CPP.run(call), int(truth.usual[0, 0, 1].abs().argmax())
    for row, right in ((1, True), (800, False)):  # of two keys, and of many
        other = out.clone()
        other[0, 0, row, largest] += out[0, 0, 1, largest].abs() * torch.finfo(torch.bfloat16).eps  # a place in row 1
        assert not torch.equal(other, out) and (truth.error(other) <= truth.bound) is right


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreter_runs_tuned_shapes():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), interpret) as pool:
        shape, ours, theirs = pool.submit(
            tuned_errors, "mixture", {"block_m": 64, "block_n": 16, "l2_mib": 12}
        ).result()
    assert (shape.block_m, shape.block_n, shape.l2_mib) == (64, 16, 12) and ours <= 2 * theirs + 1e-6


def test_the_store_decides_triton_shapes_for_a_chip():
    call = ListCase("causal", 64, 64, lengths=(300, 300), dtype="bfloat16").launch("triton")
    usual = tiled(call, 90)[1]
    tuned.keep([entry(triton.key(call, 90), {"block_m": 32, "block_n": 128, "num_warps": 2, "described": 0})])
    shape = tiled(call, 90)[1]
    found = shape.block_m, shape.block_n, shape.num_warps, shape.described
    assert found == (32, 64, 2, False)  # key tiles are no wider than a block of a list
    assert tiled(call, 80)[1] != shape and shape.num_stages == usual.num_stages
    tuned.keep([entry(triton.key(call, 90), {"block_m": 17})])
    assert tiled(call, 90)[1] == usual
    few = ListCase("causal", 16, heads=(8, 2), lengths=(1, 300)).launch("triton")
    tuned.keep([entry(triton.key(few, 90), {"splits": 4})])
    assert tiled(few, 90)[1].splits == 4


def test_a_thread_sees_what_is_forced():
    seen = []
    with tuned.forced({"blocks": 12}):
        thread = threading.Thread(target=lambda: seen.append(tuned.lookup(("a", "b", "c", "d"))))
        thread.start()
        thread.join()
    assert seen == [{"blocks": 12}] and launching.tuned.lookup(("a", "b", "c", "d")) == {}
