"""The Triton target without a GPU: numerics in Triton's interpreter, builds for chips that are not here.

Triton decides at import whether it interprets, so each way runs in processes of its own, whatever this one did.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:  # not imported here: the processes below choose how
    pytest.skip("triton is not installed (pip install 'sparsify[triton]')", allow_module_level=True)

from list_cases import ListCase, boxes, sorted_keys
from strategies import BIASES, SINKS
from triton_cases import CASES, FLOOR, LSE_ERROR, Case, errors
from triton_list_cases import Made, added, skipping_errors

from sparsify import patterns as p
from sparsify.codegen.target import Launch
from sparsify.codegen.triton import TritonTarget, printer, ranges, tuning
from sparsify.codegen.triton.catalogue import ARCHS, LISTED, entries, programs
from sparsify.codegen.triton.expressions import TritonPrinter
from sparsify.codegen.triton.module import write_once
from sparsify.codegen.triton.resources import kernel_resources
from sparsify.codegen.triton.summaries import summary_arguments
from sparsify.errors import BuildError, InputError
from sparsify.program import Program
from sparsify.text import parse_expr, parse_pred

Interpreted = Callable[..., tuple[float, ...]]
SPAWN = multiprocessing.get_context("spawn")


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function in an interpreting process."""
    with ProcessPoolExecutor(1, SPAWN, _interpret) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


# Of the cases that run in both 16-bit dtypes, every other one waits with each of them for `make test-slow`.
HALVES = sorted(
    {case.name for case in CASES if case.dtype == "float16"} & {case.name for case in CASES if case.dtype == "bfloat16"}
)
SKIPPED = {(name, ("bfloat16", "float16")[place % 2]) for place, name in enumerate(HALVES)}
# The interpreter's time goes by programs and tiles: fewer batches, heads or keys than a GPU gets, where all that a case
# is about is met all the same.
SMALLER = {
    "mixture": {"batch": 1},
    "gqa": {"heads": (4, 2), "lengths": (40, 70)},
    "padding": {"heads": (1, 1)},
    "documents": {"heads": (1, 1)},
    "bool_tensor": {"batch": 1},
    "bias_softcap": {"lengths": (40, 70)},
    **{f"bias_{name}": {"heads": (2, 1), "batch": 1} for name in BIASES},
    "bias_tensor": {"heads": (2, 1), "lengths": (40, 70)},
    "bias_alibi": {"heads": (4, 2), "batch": 1, "lengths": (40, 70)},
    "split_window": {"heads": (4, 2), "lengths": (3, 390)},
    "split_mixture": {"lengths": (5, 390), "batch": 1},
    "split_holes": {"heads": (4, 2), "lengths": (2, 390), "loads": (("bool", (2, 390)),)},
    "split_softcap": {"heads": (4, 1), "lengths": (2, 390)},
    "split_bias": {"heads": (2, 1), "lengths": (3, 390)},
    "split_far_stride": {"lengths": (1, 4700), "heads": (1, 1)},
    "far_stride": {"lengths": (30, 2500)},
    "run_from_end": {"batch": 1},
    "run_shifted": {"batch": 1},
    "run_of_runs": {"heads": (1, 1)},
    "run_of_thirds": {"heads": (1, 1)},
    "full_by_data": {"batch": 1},
    "row_limits": {"batch": 1},
}
INTERPRETED = [
    pytest.param(replace(case, **SMALLER.get(case.name, {})), id=f"{case.name}-{case.dtype}",
                 marks=pytest.mark.slow if (case.name, case.dtype) in SKIPPED else ())
    for case in CASES
]  # fmt: skip


@pytest.mark.parametrize("case", INTERPRETED)
def test_at_most_twice_the_error_of_pytorch(interpreted: Interpreted, case: Case | Made):
    ours, theirs, lse = interpreted(errors, case)
    assert ours <= 2 * theirs + FLOOR[case.dtype] and lse <= LSE_ERROR


def test_skips_leave_out_what_the_null_target_does(interpreted: Interpreted):
    ours, lost = interpreted(skipping_errors)
    assert ours <= 1e-6 < 1e-3 < lost


def test_the_cases_name_every_pattern():
    used = {str(case.pattern) for case in CASES if isinstance(case, Case)}
    static = [name for name, made in p.PATTERNS.items() if made not in (*p.PRESETS, *p.SELECTIONS)]
    missing = [name for name in static if not any(f"{name}(" in text for text in used)]
    assert not missing


def test_without_keys_an_lse_is_that_of_the_sinks():
    q, keys, logits = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 0, 16), torch.randn(3)
    for sink, expected in ((None, torch.tensor(-torch.inf)), (SINKS["by head"], logits.view(1, 3, 1))):
        program = Program.of([p.causal().keep()] * 3, loads=1, sink=sink, target="triton")
        launch = Launch(program, q, keys, keys, (logits,), 0, 1.0, torch.full((2, 3, 5), torch.nan))
        assert (TritonTarget().run(launch) == 0).all()
        assert torch.equal(launch.lse, expected.expand(2, 3, 5))


def _rows(**options):
    return kernel_resources(**options, jobs=2)


def _spilled(rows):
    """What spills. Beside the loops of lists, the compiler may keep a few numbers on the stack to run more warps."""
    return [row for row in rows if row.takes.spills > 64 * (row.kernel.split("__")[0] in LISTED)]


def test_builds_for_every_chip_without_spills():
    found = {(entry.name, entry.dtype, entry.head_dim): entry for entry in entries()}
    some = [found["streaming", "bfloat16", 128], found["pages", "bfloat16", 128], found["streaming", "float32", 80]]
    some += [found["blocks64", "float16", 64], found["neighborhood", "bfloat16", 64], found["skip", "bfloat16", 128]]
    seen: list[tuple[int, int]] = []
    rows = _rows(catalogue=some, progress=lambda done, total: seen.append((done, total)))
    assert not _spilled(rows)
    assert all(row.takes.registers > 0 and row.takes.shared > 0 for row in rows)
    merges = [row for row in rows if row.kernel.endswith("_merge")]
    assert [row.kernel.split("__")[0] for row in merges] == ["pages"] * 4  # one query, whose keys are split
    rows = [row for row in rows if row not in merges]
    assert [row.arch for row in rows] == ["sm_80", "sm_90", "sm_100", "gfx942"] * 6
    assert seen == [(done, 24) for done in range(1, 25)]
    assert rows[0].kernel == "streaming__bfloat16__d128__m64n64w8s2"
    matrix = [row.takes.matrix for row in rows]
    assert matrix[:4] == ["mma.sync", "wgmma+tma", "tcgen05+tma", "mfma"]
    assert matrix[4:8] == ["mma.sync", "mma.sync", "mma.sync", "mfma"]  # few rows, pages of 16 keys
    assert matrix[8:12] == [""] * 3 + ["mfma"]  # float32 in float32


def test_what_merges_split_keys_is_built_too():
    decode = next(entry for entry in entries() if entry.name == "decode_lse")
    attend, merge = _rows(catalogue=[decode], archs=(90,))
    assert merge.kernel == f"{attend.kernel}_merge" and merge.arch == attend.arch == "sm_90"
    assert merge.takes.registers > 0 and (merge.takes.spills, merge.takes.matrix) == (0, "")


@pytest.mark.slow
def test_the_whole_catalogue_builds_without_spills():
    rows = _rows()
    assert len([row for row in rows if not row.kernel.endswith("_merge")]) == len(list(entries())) * len(ARCHS)
    assert not _spilled(rows)


def test_a_kernel_that_does_not_build_is_named():
    entry = replace(next(entries()), head_dim=64)
    with pytest.raises(BuildError, match=r"kernel dense__bfloat16__d64__\w+ doesn't build for gfx1"):
        _rows(catalogue=[entry], archs=["gfx1"])


@pytest.mark.parametrize("name", programs())
def test_sources_are_python_and_fill_every_hole(name):
    source = TritonTarget().source(programs()[name], torch.bfloat16, 64, 64)
    compile(source, name, "exec")
    assert "{{" not in source and "{%" not in source


@pytest.mark.parametrize("name", ["causal", "float_tensor", "neighborhood", "pages", "sink", "skip"])
def test_an_lse_costs_nothing_where_nobody_asks(name):
    """But for the lines that write it, the kernel is the same."""
    plain, lse = (printer.kernel_source(programs()[name], "bfloat16", 64, 64, lse=lse) for lse in (False, True))
    names = [printer.kernel_name(programs()[name], "bfloat16", 64, 64, lse=lse) for lse in (False, True)]
    left = [line for line in lse.replace(names[1], names[0]).replace(", LSE, ", ", ").splitlines()
            if not re.search(r"\blse(\b|_)|\bLSE\b", line)]  # fmt: skip
    assert left == plain.splitlines()


def test_a_full_tile_runs_without_masks_and_a_closed_form_without_tests():
    source = TritonTarget().source(programs()["streaming"], torch.bfloat16, 64, 64)
    assert "inside(" in source and "empty_0" not in source
    assert "empty_0" in TritonTarget().source(programs()["column_stride"], torch.bfloat16, 64, 64)


def _meta(program: Program, *loads: torch.Tensor, length: int = 8192, q_offset: int = 0) -> Launch:
    x = torch.empty(2, 1, length, 16, device="meta")
    return Launch(program, x, x, x, loads, q_offset, 1.0)


def test_loads_along_keys_are_vectors_of_32_bit_offsets():
    source = TritonTarget().source(programs()["float_tensor"], torch.bfloat16, 64, 64)
    assert "(q - q0).to(OFFSETS) * _0_stride_2 + k.to(OFFSETS) * _0_stride_3" in source
    bias = programs()["float_tensor"].bias
    program = Program.of([p.causal().keep()], loads=1, bias=bias, target="triton")
    tensor = torch.empty(2, 1, 40_000, 40_000, device="meta")  # more than 2**31 elements, but not inside a tile
    launch = _meta(program, tensor, length=40_000)
    assert not ranges.far(launch, launch.q)


def test_only_indices_that_can_be_negative_count_from_the_end():
    relative, table = programs()["relative"], torch.empty(1, 2 * 8192 - 1, device="meta")
    program = Program.of(relative.keep[:1], loads=1, bias=relative.bias, target="triton")
    assert not ranges.wrapped(_meta(program, table))
    wrapped = ranges.wrapped(_meta(program, table, q_offset=1))
    assert [str(index) for index in wrapped] == ["Nq + k - q - 1"]
    assert "element((Nq - q - 1) + (k)" in printer.kernel_source(program, "float32", 16, 16, wrapped)
    assert printer.kernel_name(program, "float32", 16, 16, wrapped) != printer.kernel_name(program, "float32", 16, 16)


def test_distances_are_floats_only_where_floats_are_exact():
    alibi, slopes = programs()["alibi"], torch.empty(1, device="meta")
    program = Program.of(alibi.keep[:1], loads=1, bias=alibi.bias, target="triton")
    assert ranges.exact(_meta(program, slopes)) and not ranges.exact(_meta(program, slopes, length=2**23))


def test_summaries_hold_the_extremes_of_blocks():
    program = Program.of([parse_pred("_0[b, k] == _0[b, q] and _1[k, h]")], loads=2, target="triton")
    documents, keys = torch.arange(260).view(2, 130), torch.arange(130).view(130, 1) < 128
    x = torch.zeros(2, 1, 130, 16)
    found = summary_arguments(Launch(program, x, x, x, (documents, keys), 0, 1.0))
    assert {name: summary.tolist() for name, summary in found.items()} == {
        "_0_least_1": [[0, 64, 128], [130, 194, 258]],
        "_0_greatest_1": [[63, 127, 129], [193, 257, 259]],
        "_1_least_0": [[1], [1], [0]],
        "_1_greatest_0": [[1], [1], [0]],
    }


def test_conditions_that_no_tile_decides_are_tested_on_every_tile():
    sources = {name: TritonTarget().source(programs()[name], torch.bfloat16, 64, 64) for name in programs()}
    assert {name for name, source in sources.items() if "def beside(" in source} >= {"bool_tensor"}
    assert "def beside(" not in sources["padding"] + sources["documents"] + sources["causal"] + sources["alibi"]
    assert "SCAN" in sources["padding"] and "SCAN" not in sources["window"]
    by_bits = {name for name, source in sources.items() if "def bits(" in source}
    assert by_bits == {"dilated", "column_stride", "expr", "neighborhood"}


def test_a_missing_hole_and_an_unused_one_both_raise():
    with pytest.raises(ValueError, match=r"differ in .'size'."):
        printer.fill("{{ name }} {{ size }}", {"name": "x"})
    with pytest.raises(ValueError, match=r"differ in .'size'."):
        printer.fill("{{ name }}", {"name": "x", "size": 1})
    assert printer.fill("{{ name }}", {"name": "x"}) == "x"


def test_names_follow_from_all_that_is_compiled_in():
    first = Program.of([p.window(8).keep()] * 2)
    other = Program.of([p.window(9).keep()] * 2)
    different = [
        (first, "float32", 64, 64),
        (first, "bfloat16", 64, 64),
        (first, "float32", 64, 32),
        (other, "float32", 64, 64),
    ]
    names = [printer.kernel_name(*one) for one in different]
    assert len(set(names)) == 4
    assert all(name.startswith("attention_1rules_triton_") for name in names)


def test_positions_widen_only_where_a_product_can_pass_32_bits():
    limits = dict.fromkeys(("q", "k", "N", "Nq", "h", "b"), 2**20)
    assert ranges.magnitude(p.expr("q * k % 5 == 1").keep(), limits) >= 2**40
    assert ranges.magnitude(((p.sinks(4) | p.window(512)) & p.causal()).keep(), limits) < 2**23


def test_query_tiles_go_longest_first_under_a_causal_rule():
    longest = {name: printer.longest_last(program) for name, program in programs().items()}
    assert longest["causal"] and longest["streaming"] and longest["mixture"]
    assert not longest["dense"] and not longest["window"]


@pytest.mark.parametrize(
    ("dtype", "size"), list(itertools.product(["float32", "bfloat16"], [1, 64, 65, 128, 200, 256]))
)
def test_every_head_size_has_a_shape_on_every_chip(dtype, size):
    for arch in (*ARCHS, 86, 120, None):
        shape = tuning.launch_shape(dtype, size, 64, 4096, arch)
        assert shape.block_m >= 16 and shape.block_n >= 16
        assert tuning.launch_shape(dtype, size, 64, 1, arch).block_m == 16


@pytest.mark.parametrize(
    ("case", "arch", "expected"),
    [
        (ListCase("causal", 64, 64, lengths=(300, 300), dtype="bfloat16"), 90, (64, 64, 1)),
        (ListCase("causal", 64, 48, lengths=(300, 300), dtype="bfloat16"), 90, (64, 48, 1)),
        (ListCase("causal", 16, 0, lengths=(300, 300), dtype="bfloat16"), 90, (64, 64, 1)),
        (ListCase("causal", 16, heads=(8, 2), lengths=(1, 300)), 90, (16, 1, 4)),
        (ListCase("causal", 16, heads=(24, 2), lengths=(3, 300), dtype="bfloat16"), 90, (64, 4, 12)),
        (ListCase("causal", 16, heads=(71, 1), lengths=(1, 300), dtype="bfloat16", size=64), 90, (128, 1, 71)),
        (ListCase("causal", 16, heads=(71, 1), lengths=(1, 300)), 90, (16, 1, 1)),
        (ListCase("causal", 64, 1, heads=(8, 2), lengths=(300, 300), dtype="bfloat16"), 90, (16, 1, 4)),
        (ListCase("causal", 16, scope="head", lengths=(1, 300)), 90, (16, 16, 1)),
        (ListCase("by head", 16, lengths=(1, 300)), 90, (16, 16, 1)),
        (ListCase("causal", 16, lengths=(1, 300), mixed=True), 90, (16, 16, 1)),
        (ListCase("causal", 16, lengths=(1, 300)), None, (16, 1, 2)),
    ],
    ids=lambda value: value.name if isinstance(value, ListCase) else str(value),
)
def test_a_query_tile_has_one_list_and_at_decode_the_heads_that_share_it(case, arch, expected):
    shape = tuning.tiled(case.launch("triton"), arch)[1]
    assert (shape.block_m, shape.queries, shape.heads) == expected


def test_what_is_added_to_rows_of_several_heads_is_asked_by_head():
    launch = added(ListCase("causal", 16, lengths=(1, 300)))
    packed = tuning.tiled(launch, 90)[0].program
    assert "head" in str(packed.bias) and packed.keep == launch.program.keep
    assert tuning.tiled(launch, 90)[0].program.text() != launch.program.text()


def test_tiles_of_slots_are_no_larger_than_boxes():
    for launch in (boxes("triton"), sorted_keys("triton")):
        for arch in (*ARCHS, None):
            shape = tuning.tiled(launch, arch)[1]
            assert 64 % shape.block_n == 0 and shape.rows <= 64


def test_offsets_widen_where_any_row_can_be_read():
    far = torch.empty(1, 1, 2**20, 4096, device="meta")[..., :16]
    listed = ListCase("causal", 1, heads=(1, 1), lengths=(1, 2**20)).launch("triton")
    near, wide = (replace(listed, q=far[:, :, :1], k=far, v=far, program=program) for program in (
        Program.of([p.causal().keep()], target="triton"), listed.program))  # fmt: skip
    assert not ranges.far(near, near.q) and ranges.far(wide, wide.q)
    apart = torch.empty(1, 2, 2**20, 4096, device="meta")[:, :, -1:, :16]
    assert ranges.far(replace(near, q=apart), apart)  # both heads are in one tile


def test_lists_that_start_inside_a_query_tile_are_refused():
    launch = ListCase("causal", 64, 64, lengths=(128, 256)).launch("triton")
    with pytest.raises(InputError, match=r"^triton: query 100 of 128 is not the first of its list in listed\("):
        tuning.tiled(replace(launch, q_offset=100), 90)


def test_refusals_say_what_and_what_to_do():
    target, program = TritonTarget(), Program.of([p.causal().keep()])
    assert target.refuse(program, torch.float16, 256, 256) is None
    assert str(target.refuse(program, torch.float64, 64, 64)) == (
        "the triton target can't run float64 (use float32, bfloat16 or float16)"
    )
    assert str(target.refuse(program, torch.float32, 64, 257)) == (
        "value size 257 is outside the triton target's 1 to 256 (use the cpp target)"
    )
    assert str(target.refuse(program, torch.float32, 0, 64)) == "head size 0 is outside the triton target's 1 to 256"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_or_the_interpreter_it_says_so():
    with ProcessPoolExecutor(1, SPAWN, _unset) as pool:
        assert pool.submit(_unavailable).result() == (
            "no GPU was found (TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly)"
        )
        message = pool.submit(_run_here).result()
    assert message.startswith("triton: no GPU was found")


def _unset() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _unavailable() -> str:
    return str(TritonTarget().unavailable())


def _run_here() -> str:
    x = torch.zeros(1, 1, 4, 16)
    try:
        TritonTarget().run(Launch(Program.of([p.causal().keep()]), x, x, x, (), 0, 1.0))
    except InputError as error:
        return str(error)
    return "it ran"


def test_a_cut_kernel_file_is_replaced_and_a_locked_cache_is_named(tmp_path):
    path = write_once(tmp_path / "deep" / "kernel.py", "x = 1\n")
    path.write_text("x =")
    assert write_once(path, "x = 1\n").read_text() == "x = 1\n"
    assert [found.name for found in path.parent.iterdir()] == ["kernel.py"]
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="set SPARSIFY_CACHE_DIR"):
        write_once(tmp_path / "file" / "kernel.py", "x = 1\n")


def test_whole_tiles_take_few_operations():
    """Bounds on both sides are one test, and what depends on rows or on keys only is put together before."""

    def text(rule):
        return TritonPrinter(Program.of([p.causal().keep()], target="triton")).text(parse_pred(rule))

    assert text("0 <= q - k and q - k <= 511") == "((unsigned(q - k) <= 511))"
    assert text("q - k < 512 and k <= q and k < 7") == "((unsigned(q - k) <= 511) & (k <= 6))"
    assert text("0 <= q and q <= 5") == "((q <= 5) & (q >= 0))"  # of rows only: nothing is won
    assert text("q - k >= 3 and q - k <= 1099511627776") == "((q - k >= 3) & (q - k <= 1099511627776))"
    assert text("(q//8 - k//16 + q%4 - k%32) % 5 == 0").count("((q) >> 3)") == 1
    assert "(((q) >> 3) + ((q) & 3)) - (((k) >> 4) + ((k) & 31))" in text("(q//8 - k//16 + q%4 - k%32) % 5 == 0")


@pytest.mark.parametrize("divisor", [2, 64, 2**20])
def test_powers_of_two_are_printed_as_shifts_that_round_down(divisor):
    printer = TritonPrinter(Program.of([p.causal().keep()], target="triton"))
    quotient, rest = (printer.text(parse_expr(f"q {op} {divisor}")) for op in ("//", "%"))
    assert ">>" in quotient and "&" in rest
    for number in (-(2**31), -divisor - 1, -divisor, -1, 0, 1, divisor, 2**31 - 1):
        assert (eval(quotient, {"q": number}), eval(rest, {"q": number})) == divmod(number, divisor)


def test_the_sizes_of_launches_on_hopper():
    def launch(rule, length):
        q = torch.empty(1, 8, length, 128, dtype=torch.bfloat16, device="meta")
        return Launch(Program.of([rule.keep()] * 8, target="triton"), q, q, q, (), 0, 1.0)

    stride = (p.block_window(64, 16) | p.column_stride(8, block=64)) & p.causal()
    shapes = {rule: tuning.tiled(launch(rule, 131072), 90)[1] for rule in (p.causal(), p.window(1024), stride)}
    assert [shapes[rule].block_n for rule in shapes] == [128, 64, 64]  # of 128, half would be no key of the stride
    assert tuning.section(launch(p.causal(), 131072), shapes[p.causal()]) == 1
    assert tuning.section(launch(p.window(1024), 131072), shapes[p.window(1024)]) == 8  # a head reads half a megabyte
    assert tuning.section(launch(p.dense(), 16384), shapes[p.causal()]) == 3  # 24 MiB of 8
    assert tuning.splits([32768] * 8, 8, 64, 132) == 4  # 4.1 are wanted
    assert tuning.splits([32768] * 4 + [2200] * 28, 8, 64, 132) == 8  # 5.6: the longest heads wait for nobody
    assert tuning.splits([64] * 8, 1, 64, 132) == tuning.splits([0] * 8, 1, 64, 132) == 1
