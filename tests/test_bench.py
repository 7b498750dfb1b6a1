"""`sparsify bench`: which cases there are, what counts as right, and what the tables, summaries and files say."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsify.bench import decode, peers, report, selection
from sparsify.bench.cases import GRID, PATTERNS, Case, grid, whole_grid
from sparsify.bench.check import Check, check
from sparsify.bench.measure import Memory, Result, Timing, kept_share, timing
from sparsify.bench.memory import peak_bytes
from sparsify.bench.peers import SAME, Inputs, peers_of
from sparsify.bench.selection import SelectionCase
from sparsify.bench.summary import summaries
from sparsify.errors import InputError
from sparsify.patterns import causal, topk, window
from sparsify.progress import Bar, duration

measuring = importlib.import_module("sparsify.bench.measure")


def at(median: float, first: float = 3.0) -> Timing:
    return Timing(median, 0.9 * median, 1.1 * median, first)


def result(case: Case, error: float = 1e-6, **seconds: float) -> Result:
    """A case of density 1/8, whose dense peer took 8 s and whose GEMM runs at as many FLOP/s as sparsify in 1 s."""
    timings = {"sparsify": 1.0, "dense": 8.0, "flex": 2.0, **seconds} if error < 1e-5 else {}
    found = Result(case, {}, {}, 1.0, 0.125, Check({"sparsify": error}, 1e-5, case.length))
    memory = {"sparsify": Memory(0, 2**20), "flex": Memory(2**23, 2**20)}
    named = {name: at(value) for name, value in timings.items()}
    return Result(case, named, {}, found.flops, 0.125, found.checked, memory)


WINDOW = Case("window512", 4096, 64, "float32")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and kernels are interpreted."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setenv("SPARSIFY_TARGET", "null")


def narrowed(**given: Any) -> tuple[Case, ...]:
    return whole_grid(*map(given.get, ("pattern", "length", "head_dim", "dtype", "heads", "kv_heads")))


def test_the_grid_is_every_pattern_at_every_shape() -> None:
    cases = narrowed()
    assert {case.pattern for case in cases} == set(GRID) and len(cases) == len(set(cases)) == (10 * 5 + 1) * 8
    assert {(case.heads, case.kv_heads) for case in cases} == {(8, 8), (8, 2)}
    assert {case.length for case in cases if case.pattern == "near_2d"} == {4096}
    assert {case.pattern for case in cases if case.dynamic} == {"topk"}
    assert len({rule.keep() for rule in Case("mixture", 1024, 64, "float32").rules}) == 8
    assert all(rule.fits(case.length) == "" for case in cases for rule in case.rules)


def test_options_narrow_the_grid() -> None:
    cases = whole_grid(["causal", "near_2d"], [512, 4096], [80], ["float16"], 4, None)
    assert [(case.pattern, case.length, case.kv_heads) for case in cases] == [
        ("causal", 512, 4), ("causal", 4096, 4), ("near_2d", 4096, 4),
        ("causal", 512, 1), ("causal", 4096, 1), ("near_2d", 4096, 1),
    ]  # fmt: skip
    assert {(case.head_dim, case.dtype) for case in cases} == {(80, "float16")}
    assert [case.kv_heads for case in whole_grid(["causal"], [64], [64], ["float32"], 6, None)] == [6]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: narrowed(pattern=["casual"]), "unknown pattern 'casual'; did you mean 'causal'?"),
        (
            lambda: narrowed(pattern=["near_2d"], length=[512]),
            "--length: no case of the grid is left: near_2d has 4096 tokens",
        ),
        (lambda: narrowed(heads=8, kv_heads=3), "8 query heads are not a multiple of 3 key heads"),
        (lambda: grid(["near_2d"], [512], [64], ["float32"], 4, 4), "near_2d at length 512: "),
    ],
)
def test_cases_that_can_not_be(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert str(raised.value).startswith(f"bench: {message}")


def test_peers_are_those_that_mean_something() -> None:
    assert list(peers_of(WINDOW)) == ["sparsify", "dense", "full", "mask", "flex"]
    assert list(peers_of(Case("full", 16384, 64, "float32"))) == ["sparsify", "dense", "flex"]


@pytest.mark.parametrize("name", ["window256", "mixture", "s2_stride", "topk"])
def test_every_peer_with_the_mask_has_the_same_numbers(name: str, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATTERNS, "window256", lambda heads: (window(17),) * heads)
    monkeypatch.setitem(PATTERNS, "topk", lambda heads: (topk(2, unit=16, queries=16) & causal(),) * heads)
    monkeypatch.setattr(peers, "_compiled_flex", lambda function: function)
    inputs = Inputs.draw(Case(name, 96, 16, "float32", 8, 2), "cpu")
    with torch.inference_mode():
        there = [peer for peer in SAME if peer in peers_of(inputs.case)]
        outputs = {peer: peers_of(inputs.case)[peer](inputs)() for peer in there}
        found = check(inputs, outputs)
        density = kept_share(inputs)
    assert all(map(found.right, there)) and {"sparsify", "mask", "flex"} <= set(there)
    assert found.rows == 96 and 0 < found.bound < 1e-5
    heads, rows = torch.arange(8), torch.arange(96)
    assert density == pytest.approx(inputs.kept(heads, rows).double().mean().item())
    assert name != "topk" or density < 0.4


def test_long_cases_are_compared_on_some_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.bench.check.WHOLE", 64)
    monkeypatch.setattr("sparsify.bench.check.ROWS", 16)
    inputs = Inputs.draw(Case("full", 96, 16, "float32", 2, 1), "cpu")
    out = peers.dense(inputs)()
    assert check(inputs, {"out": out}).right("out") and check(inputs, {"out": out}).rows == 16
    out[:, 1] += 1
    assert not check(inputs, {"out": out}).right("out")


def test_a_nan_is_wrong() -> None:
    inputs = Inputs.draw(Case("causal", 32, 16, "float32", 1, 1), "cpu")
    out = peers.dense(inputs)()
    out[0, 0, 7, 3] = math.nan
    assert check(inputs, {"out": out}).error["out"] == math.inf


def test_a_choice_is_combined_by_and_only() -> None:
    with pytest.raises(InputError, match="bench: a selection can be combined with other patterns by & only"):
        peers.mask_mod([topk(2) | window(3)], 64)


def broken(inputs: Inputs) -> peers.Run:
    raise RuntimeError("no such kernel\nand more")


def stubbed(monkeypatch: pytest.MonkeyPatch, **outputs: Callable[[Inputs], Any]) -> list[str]:
    """Peers that give these outputs, and a clock that gives the n-th of them n seconds; what is timed."""
    timed: list[str] = []

    def interleaved(runs: dict[str, Any], *_: Any) -> dict[str, list[float]]:
        timed[:] = runs
        return {name: [float(number)] * 5 for number, name in enumerate(runs, 1)}

    monkeypatch.setattr(measuring, "peers_of", lambda case, device: outputs)
    monkeypatch.setattr(measuring, "interleaved", interleaved)
    monkeypatch.setattr(measuring, "gemm_side", lambda dtype, device: 16)
    return timed


def test_a_wrong_case_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = stubbed(monkeypatch, sparsify=lambda inputs: peers.full(inputs), dense=peers.dense)
    told: list[str] = []
    found = measuring.measure(Case("causal", 32, 16, "float32", 2, 1), "cpu", 5, 0.1, told.append)
    assert not found.right and not timed and found.rate is None and found.ratio("dense") is None
    assert found.as_dict()["seconds"] == {} and found.as_dict()["ratios"] == {} and "checking" in told[-1]


def test_peers_that_fail_or_are_wrong_get_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = stubbed(monkeypatch, sparsify=peers.masked, dense=peers.dense, mask=broken, flex=peers.full)
    found = measuring.measure(Case("causal", 32, 16, "float32", 2, 1), "cpu", 5, 0.1, lambda text: None)
    assert found.right and timed == ["sparsify", "dense", "gemm"]
    assert found.ratio("dense") == 2.0 and found.ratio("flex") is None
    assert found.failures["mask"] == "RuntimeError: no such kernel"
    assert found.failures["flex"].startswith("its numbers are wrong by ")
    assert found.gemm_flops == 2 * 16**3 / 3 and set(found.memory) == {"sparsify", "dense"}


def test_a_sparsify_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch, sparsify=broken, dense=peers.dense)
    with pytest.raises(RuntimeError, match="no such kernel"):
        measuring.measure(Case("causal", 32, 16, "float32", 2, 1), "cpu", 5, 0.1, lambda text: None)


def test_the_first_time_is_that_of_the_first_call_and_the_quartiles_are_kept() -> None:
    assert timing([5.0, 1.0, 2.0, 3.0, 4.0], 9.0) == Timing(3.0, 2.0, 4.0, 9.0)


def test_shares_are_of_what_the_dense_peer_computes() -> None:
    found = result(WINDOW)
    assert found.flops == 4 * 64 * 0.125 * 8 * 4096**2 and found.of_gemm == 1.0
    assert found.share == pytest.approx(0.25, rel=1e-3) and found.of_ideal == pytest.approx(2.0, rel=1e-3)
    whole = result(Case("full", 4096, 64, "float32"))
    assert whole.share == 0.125 and whole.of_ideal == 1.0
    assert Memory(3, 2).peak == 3


def printed(*what: Any) -> str:
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        for one in what:
            console.print(one)
    return captured.get()


RESULTS = [
    result(WINDOW, full=16.0),
    result(Case("block_diagonal", 16384, 64, "float32"), flex=1.1),
    result(Case("topk", 4096, 64, "float32"), flex=0.5),
    result(Case("near_2d", 4096, 128, "bfloat16", 8, 2), error=1e-2),
    result(Case("causal", 4096, 128, "bfloat16", 8, 2), dense=0.1, flex=123.4),
]


def test_tables_fit_80_columns_and_say_what_is_wrong() -> None:
    text = printed(report.speed_table(RESULTS), report.cost_table(RESULTS), report.summary_table(summaries(RESULTS)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "…" not in text and all(len(line) <= 80 for line in text.splitlines())
    assert {"fp32 D64 H8/8", "bf16 D128 H8/2"} <= set(lines)
    assert "window512 4096 12.5% 1000 10% 4.29 1.00 2.00 8.00x 16.0x - 2.00x" in lines
    assert "near_2d 4096 12.5% WRONG" in lines
    assert "window512 4096 3.00 3.00 1.00 - - 8.00" in lines


def test_summaries_are_of_static_cases() -> None:
    fp32, bf16 = summaries(RESULTS)
    assert (fp32.cases, fp32.wrong, fp32.flex_cases, fp32.below_floor) == (2, 0, 2, 1)
    assert fp32.ratios["flex"] == pytest.approx(math.sqrt(2 * 1.1)) and fp32.of_gemm == 1.0
    assert fp32.worst["flex"] == (pytest.approx(1.1), "block_diagonal N=16384 D=64 float32 H=8/8")
    assert (bf16.cases, bf16.wrong, bf16.below_floor) == (1, 1, 0) and bf16.ratios["dense"] == pytest.approx(0.1)
    told = list(report.remarks(RESULTS, [fp32, bf16]))
    assert "near_2d N=4096 D=128 bfloat16 H=8/2: WRONG: the error is 1.0e-02, the bound 1.0e-05" in told
    assert "fp32: the least against flex is 1.10x, at block_diagonal N=16384 D=64 float32 H=8/8" in told
    assert "fp32: 1 of 2 cases are below 1.2x of flex" in told
    assert summaries(RESULTS[2:3]) == []


def test_files_name_the_machine_and_versions(tmp_path) -> None:
    path = report.write_json(RESULTS, summaries(RESULTS), "cpu", tmp_path)
    found = json.loads(path.read_text())
    assert {"machine", "isa", "threads", "system", "python", "torch", "sparsify", "numpy"} <= set(found["machine"])
    assert [row["pattern"] for row in found["results"]] == [one.case.pattern for one in RESULTS]
    assert found["results"][0]["memory"]["flex"] == {"prepare": 2**23, "call": 2**20}
    assert [one["dtype"] for one in found["summary"]] == ["float32", "bfloat16"]
    assert path.parent == tmp_path and path.suffix == ".json" and not list(tmp_path.glob("*.partial"))


def test_what_is_no_number_is_null_in_files(tmp_path) -> None:
    wrong = {"error": math.nan, "bounds": [math.inf, 1.0], "seconds": ({"low": -math.inf},)}
    text = report.write(wrong, tmp_path / "found.json").read_text()
    assert json.loads(text) == {"error": None, "bounds": [None, 1.0], "seconds": [{"low": None}]} and "NaN" not in text


def test_memory_is_what_a_call_takes_at_its_highest() -> None:
    size = 2**25

    def take() -> None:
        torch.ones(size, dtype=torch.uint8)  # freed before the call is over

    assert 0.9 * size < peak_bytes(take) < 1.5 * size
    assert peak_bytes(lambda: None) < size / 4


def test_memory_is_looked_at_where_the_system_keeps_no_mark(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.bench.memory.CLEAR", tmp_path / "none" / "clear_refs")
    kept = []
    assert peak_bytes(lambda: kept.append(torch.ones(2**25, dtype=torch.uint8))) > 0.9 * 2**25


def test_progress_counts_and_says_what_is_left() -> None:
    now = [0.0]
    with Bar([1.0, 1.0, 8.0], clock=lambda: now[0]) as steps:
        steps.tell("one")
        assert (steps.count, steps.left) == ("1/3", "")
        now[0] = 30.0
        steps.advance()
        assert (steps.count, steps.left) == ("2/3", "about 4 min left")
        now[0] = 40.0
        steps.advance()
        steps.expect([4.0])
        assert (steps.count, steps.left) == ("3/4", "about 4 min left")
        steps.advance()
        steps.advance()
        assert (steps.count, steps.left) == ("4/4", "")
    with Bar(what="something") as steps:
        assert (steps.count, steps.left) == ("", "")
    assert [duration(s) for s in (0.4, 99, 101, 7500)] == ["0 s", "99 s", "2 min", "2 h 5 min"]


def test_decoding_counts_the_bytes_that_a_group_keeps(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def interleaved(runs: dict[str, Any], *_: Any) -> dict[str, list[float]]:
        made.update({name: run() for name, run in runs.items()})
        return dict.fromkeys(runs, [2.0] * 5)

    monkeypatch.setattr(decode, "interleaved", interleaved)
    monkeypatch.setattr(decode, "KEYS", 3000)
    monkeypatch.setitem(decode.SIZES, "cpu", decode.Size(1, 8, 2**20, 2, 2 * 2 * 2 * 3000 * 128 * 2))
    for case, keys in zip(decode.CASES, (2 * 1028, 2 * 3000, 3000 + 7 * 1028), strict=True):
        found = decode.measure(case, "bfloat16", "cpu", 5, 0.1, lambda text: None)
        assert found.right and found.kept == keys * 128 * 2 * 2
        assert found.layers == (2 if case.group > 1 else 1)  # eight KV heads are more bytes than two caches may have
        assert found.of_memory == pytest.approx(found.layers * found.kept / 2**20)
        assert found.of_read == found.timings["read"].median / found.timings["sparsify"].median
        shared = dict.fromkeys(("sparsify", "dense", "read"), 2.0 / found.layers)
        assert {name: one.median for name, one in found.timings.items()} == {"memory": 2.0, "alone": 2.0} | shared
        assert [len(made[name]) for name in ("sparsify", "dense", "read", "alone")] == [found.layers] * 3 + [1]
        as_data = json.loads(json.dumps(found.as_dict()))
        assert (as_data["of_memory"], as_data["of_read"]) == (found.of_memory, found.of_read)
        assert as_data["layers"] == found.layers
    wrong = replace(found, error=1.0)
    assert wrong.of_memory is None and wrong.of_read is None and "WRONG 1e+00" in printed(decode.table([wrong]))


def test_a_selection_is_checked_against_what_its_lists_keep(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(runs: dict[str, Any], *_: Any) -> dict[str, list[float]]:
        return {name: [float(number)] * 5 for number, name in enumerate(runs, 1)}

    monkeypatch.setattr(selection, "interleaved", interleaved)
    blocks = SelectionCase("blocks", "", topk(2, unit=16, queries=16) & causal(), 96, 96, 4, 2, 16)
    pages = SelectionCase("pages", "", topk(2, unit=16, score="minmax_bound"), 1, 160, 4, 2, 16)
    for case, share in ((blocks, 0.8), (pages, 0.4)):
        found = selection.measure(case, "float32", 5, 0.1, lambda text: None)
        assert found.right and 0 < found.share < share and found.ratio == 4.0


@pytest.mark.parametrize("pattern", ["window256", "mixture", "topk"])
def test_a_large_mask_of_flex_attention_is_built_row_after_row(pattern: str) -> None:
    inputs = Inputs.draw(Case(pattern, 900, 64, "float32"), "cpu")
    usual, unit = peers.block_mask(inputs), (64, 64) if pattern == "topk" else (128, 128)
    found = peers.mask_by_rows(inputs, torch.arange(8 if inputs.per_head else 1), unit)
    assert found.shape == usual.shape and torch.equal(found.to_dense(), usual.to_dense())
    whole = [peers.BlockMask.from_kv_blocks(one.full_kv_num_blocks, one.full_kv_indices) for one in (found, usual)]
    assert torch.equal(*(one.to_dense() for one in whole))
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(usual, name))
