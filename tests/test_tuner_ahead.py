"""Candidates for a GPU that isn't here: what is pruned, why, and that a run on such a GPU leaves it out."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from tuner_runners import Here, Runner

from sparsify import patterns as P
from sparsify.codegen.target import Launch
from sparsify.codegen.triton import tuned as home
from sparsify.codegen.triton.resources import Resources
from sparsify.errors import InputError
from sparsify.program import Program
from sparsify.tuner import ahead
from sparsify.tuner.children import Child, Failed
from sparsify.tuner.jobs import Job, jobs_of
from sparsify.tuner.search import Limits, Search
from sparsify.tuner.trials import PRUNED, Journal

DEFAULT = Resources(128, 0, 60000)
USUAL = {"num_warps": 8}


def job(q_len: int = 256) -> Job:
    """A kernel of the Triton target, for a chip of capability 90."""
    q, k = torch.randn(1, 2, q_len, 32), torch.randn(1, 2, 256, 32)
    launch = Launch(Program.of([P.window(64).keep()] * 2, target="triton"), q, k, k, (), 256 - q_len, 0.2)
    return ahead.jobs_for([Job(("", "", "", ""), "window64", (launch,))], 90)[0]


def judged(values, answer):
    return ahead._judged(values, answer, USUAL, 90, None, [ahead.Built({}, DEFAULT, 1, None)])


def test_what_spills_more_or_does_not_fit_is_pruned():
    assert judged({}, DEFAULT).why == "" and judged({}, DEFAULT).programs == 2
    assert judged({}, Resources(128, 16, 60000)).why == "it spills 16 bytes, the default 0"
    assert judged({}, Resources(128, 0, 300000)).why == "300000 bytes of shared memory are more than the chip's 232448"
    assert judged({"num_warps": 16}, Resources(200, 0, 1)).why == "200 registers a thread leave room for no program"
    assert judged({"num_warps": 4}, Resources(200, 0, 1)).programs == 2
    assert judged({}, "it doesn't build: no").why == "it doesn't build: no"


def test_programs_side_by_side_are_bound_by_what_runs_out_first():
    assert Resources(32, 0, 1).programs(4, 90) == 16  # threads
    assert Resources(128, 0, 1).programs(4, 90) == 4  # registers
    assert Resources(32, 0, 100 << 10).programs(4, 90) == 2  # shared memory
    assert Resources(128, 0, 1).programs(4, "gfx942") == 4


def test_a_chip_by_its_name():
    assert (ahead.chip("90"), ahead.chip("sm_80"), ahead.chip("gfx942")) == (90, 80, "gfx942")
    with pytest.raises(InputError, match=r"^tune: --arch: found 'gfx94'; did you mean 'gfx942'\?$"):
        ahead.chip("gfx94")


class Builder(Runner):
    """Builds whose resources are made up: what has 64 keys in a tile spills, what has 5 stages doesn't build."""

    def __init__(self, arch: int) -> None:
        assert arch == 90

    def build(self, values: dict) -> Resources:
        if values.get("num_stages") == 5:
            raise Failed("it doesn't build")
        return Resources(100, 8 * (values.get("block_n") == 64), 1000)


@pytest.fixture
def pruned(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "Child", Here)
    monkeypatch.setattr(ahead, "Builder", Builder)
    one = job()
    return one, ahead.prune([one], 90, 100.0, lambda: 0.0)["window64"]


def test_candidates_that_fit_come_first(pruned):
    _, built = pruned
    fits = [each for each in built if not each.why]
    assert built[: len(fits)] == fits and {} in [each.values for each in fits]
    assert all(each.values.get("block_n") != 64 and each.values.get("num_stages") != 5 for each in fits)
    assert {each.why for each in built[len(fits) :]} == {"it doesn't build", "it spills 8 bytes, the default 0"}
    assert all(each.seconds and each.seconds > 0.99 * fits[0].seconds for each in fits)
    text = ahead.table({"window64": built}, 90)
    assert text.row_count == 1 + 1 + ahead.SHOWN


def test_a_run_on_such_a_gpu_leaves_out_what_is_pruned(pruned, tmp_path):
    one, built = pruned
    bad = [trial.values for trial in Journal.here().of(one.key) if trial.state == PRUNED]
    assert len(bad) == sum(bool(each.why) for each in built)
    assert all(each.values in bad for each in built if each.why)
    groups = [[{"tile": 8}, {"tile": 16}]]
    journal = Journal(tmp_path / "own.jsonl")
    search = Search(
        ("m", "s", "triton", "k"), {"tile": 4}, groups, (), [Here()], journal, 1e9, pruned=[{"tile": 8}],
        limits=Limits(), clock=lambda: 0.0,
    )  # fmt: skip
    assert search.run(tmp_path / "job.pt").values == {"tile": 16}


def test_a_build_that_takes_its_time_ends_with_the_budget(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "Child", Here)
    monkeypatch.setattr(ahead, "Builder", Builder)
    ticks = iter(range(100))
    built = ahead.prune([job()], 90, 1.0, lambda: float(next(ticks)))["window64"]
    assert {} in [each.values for each in built] and len(built) <= 8


def test_the_key_of_a_chip_is_that_of_no_gpu():
    one = job()
    assert one.key[0] == "sm_90" and one.key[2] == "triton" and "window64__fp32__d32__many" in one.key[3]
    assert home.key(one.launches[0], "gfx942")[0] == "gfx942"
    assert jobs_of(one.launches, lambda launch: "a")[0].key[0] == "Triton's interpreter"


def test_what_is_tuned_holds_for_one_default():
    causal = Program.of([P.causal().keep()] * 2, target="triton")
    q = {n: torch.empty(1, 2, n, 64, dtype=torch.bfloat16, device="meta") for n in (2048, 4096, 16384)}
    keys = [home.key(Launch(causal, one, one, one, (), 0, 0.2), 90)[3] for one in q.values()]
    assert keys[0] == keys[1] != keys[2]  # longer ones have larger tiles
    assert keys[0].endswith("__m64n64w4s2") and keys[2].endswith("__m64n128w4s3")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_candidate_is_built(tmp_path):
    one = job()
    child = Child(partial(ahead.Builder, 90))
    child.open(one.write(tmp_path, 0))
    try:
        usual, low = (child.ask("build", values, seconds=200) for values in ({}, {"block_m": 16, "num_warps": 4}))
        assert usual.registers > 16 and usual.spills == 0 and low.registers != usual.registers
    finally:
        child.end()
