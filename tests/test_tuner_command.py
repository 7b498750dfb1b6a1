"""`sparsify tune` as a command: what it takes, says and keeps, and its exit codes."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tuner_runners import DEFAULT, GROUPS, Here, Runner

from sparsify import cli
from sparsify.bench.cases import Case
from sparsify.codegen import target
from sparsify.codegen.cpp import tuned as cpp
from sparsify.runtime import tuned, tunings
from sparsify.tuner import command
from sparsify.tuner.command import seconds_of
from sparsify.tuner.jobs import jobs_of, read, recorded
from sparsify.tuner.modes import MODES
from sparsify.tuner.order import Order, machine_for
from sparsify.tuner.sources import of_cases

CPP = target("cpp")
built = pytest.mark.skipif(CPP.unavailable() is not None, reason=str(CPP.unavailable()))
GRID = "--grid --pattern window256 --pattern causal --head-dim 16 --length 256 --dtype float32"


@pytest.fixture
def tune(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder, with a cache and a store of its own; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSIFY_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    tuned.reload()

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsify", "tune", *line.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        found = capsys.readouterr()
        return ended.value.code or 0, found.out, found.err

    yield run
    tuned.reload()


@pytest.fixture
def made_up(monkeypatch):
    """Kernels whose times are made up."""
    monkeypatch.setattr(import_module("sparsify.tuner.run"), "Child", Here)
    monkeypatch.setattr(command.Run.__init__, "__defaults__", (Runner, *command.Run.__init__.__defaults__[1:]))
    monkeypatch.setattr(cpp, "default", lambda launch: DEFAULT)
    monkeypatch.setattr(cpp, "groups", lambda launch: GROUPS)
    monkeypatch.setattr(import_module("sparsify.tuner.run"), "machine_for", lambda launch: None)


@built
def test_it_says_what_was_won_and_keeps_it(tune, made_up):
    code, out, _ = tune(f"{GRID} --json won.json")
    assert code == 0 and re.search(r"window256 fp32 D16 N256 H8/8 +1000 +760 +1.316x +0.2% +5 +tile 8, stages 2", out)
    assert "2 kernels: 1.316 times as fast as by default, in geometric mean\n" in out
    found = json.loads(Path("won.json").read_text())
    assert found["faster"] == pytest.approx(1 / 0.76, rel=0.01) and len(found["results"]) == 2
    kept = tunings.read(Path("tuned.json"))
    assert {entry.values["tile"] for entry in kept.values()} == {8} and len(kept) == 2


@built
def test_what_was_won_before_is_tried_again_and_not_forgotten(tune, made_up, monkeypatch):
    tune(GRID)
    before = {key: one.values for key, one in tunings.read(Path("tuned.json")).items()}
    monkeypatch.setattr(cpp, "groups", lambda launch: [])
    tune(GRID)
    assert {key: one.values for key, one in tunings.read(Path("tuned.json")).items()} == before
    assert Path("tuned.json").stat().st_mode & 0o044 == 0o044  # others may read it


@built
def test_resume_measures_nothing_again(tune, made_up, monkeypatch):
    first = tune(GRID)[1]
    monkeypatch.setattr(Runner, "race", None)
    assert tune(f"{GRID} --resume")[1] == first


@built
def test_when_the_time_is_over_it_says_how_to_go_on(tune, made_up, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(command.Run.__init__, "__defaults__", (Runner, lambda: float(next(ticks))))
    code, out, _ = tune(f"{GRID} --budget 5s")
    assert code == 0 and "the time is over: 1 of 2 kernels; --resume goes on from here\n" in out
    assert "2 kernels: " in tune(f"{GRID} --resume")[1]


@built
def test_export_and_import_share_a_store(tune, tmp_path, monkeypatch):
    (job,) = of_cases([Case("causal", 64, 16, "float32")], "cpu", lambda text: None)
    entry = tunings.Tuned(*job.key, {"blocks": 12}, 0.9, 1.0, 0.9, 0.9, 0.9, "2026-01-01T00:00:00+00:00")
    tuned.keep([entry, replace(entry, machine="another")])
    assert tune("--export out/fleet.json")[1] == "2 kernels written to out/fleet.json\n"
    monkeypatch.setenv("SPARSIFY_TUNED", str(tmp_path / "other.json"))
    assert tuned.lookup(job.key) == {}
    code, out, _ = tune("--import out/fleet.json")
    assert (code, out) == (
        0,
        f"2 kernels of out/fleet.json are in {tmp_path}/other.json; 1 of them are for this machine and software\n",
    )
    assert tuned.lookup(job.key) == {"blocks": 12}


WRONG = {
    "": "nothing is asked for; give one of --grid, --model, --calibrate, --export, --import",
    "--grid --model llama": "--grid and --model exclude each other",
    "--grid --spec a.yaml": "--spec does not go with --grid; what does: --pattern, --head-dim, --heads, --kv-heads,",
    "--export a.json --budget 5m": "--budget does not go with --export; what does: no other option",
    "--grid --budget soon": "--budget: found 'soon'; expected a time above 0, such as 90s, 5m or 1h30m",
    "--grid --budget 0m": "--budget: found '0m'; expected a time above 0, such as 90s, 5m or 1h30m",
    "--grid --dtype float23": "--dtype: found 'float23'; did you mean 'float32'?",
    "--grid --pattern window513": "unknown pattern 'window513'; did you mean 'window512'?",
    "--grid --device gpu": "--device: found 'gpu'; did you mean 'cpu'?",
    "--grid --heads 6 --kv-heads 4": "6 query heads are not a multiple of 4 key heads",
    "--grid --arch 90": "--arch goes with --target triton only, found auto",
    "--grid --target triton --arch 90 --resume": "--resume does not go with --arch, which builds kernels and ",
    "--grid --target triton --arch 91": "--arch: found '91'; did you mean '90'?",
    "--import nothing.json": "--import: nothing.json: the store of tuned kernels can't be read: No such file or dir",
    "--export a.json": "--export: nothing is tuned yet (the store is ",
    "--model a:b --length 5": "--length does not go with a callable, which makes its model and inputs itself",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_one_sentence(tune, line):
    code, out, err = tune(line)
    assert (code, out) == (2, "") and err.startswith(f"sparsify: tune: {WRONG[line]}") and err.count("\n") == 1


def test_without_a_gpu_triton_is_built_ahead_of_time(tune, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, _, err = tune("--grid --target triton")
    assert "torch finds no GPU here; --arch 90 builds for one ahead of time" in err


def test_a_wrong_file_leaves_no_trace(tune):
    Path("v2.json").write_text('{"version": 2, "tuned": []}')
    code, _, err = tune("--import v2.json")
    message = "tune: --import: v2.json: store version 2 can't be read by this sparsify (it reads 1)"
    assert (code, err) == (2, f"sparsify: {message}\n")
    entry = tunings.Tuned("m", "s", "cpp", "k", {"blocks": 13}, 0.9, 1.0, 0.9, 0.9, 0.9, "2026-01-01T00:00:00+00:00")
    tunings.write(Path("bad.json"), [entry])
    said = "sparsify: tune: --import: bad.json: k: tuned kernel: blocks: found 13; allowed: 4, 6"
    assert tune("--import bad.json")[2].startswith(said)
    good, late = replace(entry, kernel="g", values={}), replace(entry, values={}, measured="9999-01-01T00:00:00+00:00")
    tunings.write(Path("late.json"), [good, late])
    assert "late.json: k: measured: found '9999-01-01T00:00:00+00:00', which is" in tune("--import late.json")[2]
    tunings.write(Path("null.json"), [replace(entry, target="null")])
    assert "null.json: k: target 'null' has nothing to tune; allowed: cpp, triton" in tune("--import null.json")[2]
    assert not Path("tuned.json").exists()


def test_no_store_is_said_at_once(tune, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TUNED", "0")
    assert tune(GRID)[2] == (
        "sparsify: environment variable SPARSIFY_TUNED: found '0', so what is tuned can't be kept\n"
    )


MODEL = """
import torch
from torch.nn.functional import scaled_dot_product_attention

class Model(torch.nn.Module):
    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, dim=-1))
        return scaled_dot_product_attention(q, k, v, is_causal=True)

def made():
    return Model(), torch.randn(1, 80, 96)

def other():
    return torch.nn.Linear(96, 96), torch.randn(1, 80, 96)
"""


@built
def test_the_kernels_of_a_model_with_a_spec(tune, made_up, tmp_path, monkeypatch):
    (tmp_path / "tuned_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    Path("spec.yaml").write_text("version: 1\nsites:\n  - {match: '*', heads: {window: 24}}\n")
    code, out, _ = tune("--model tuned_model:made --spec spec.yaml")
    assert code == 0 and "window24 fp32 D16 N80 H2/2" in out
    code, out, err = tune("--model tuned_model:other")
    assert (code, out) == (2, "") and err == (
        "sparsify: tune: tuned_model:other: the backend rewrites no attention there; see: sparsify explain"
        " tuned_model:other\n"
    )


def test_calibrating_keeps_a_machine_as_it_is_by_default(tune, monkeypatch):
    from sparsify import cost

    def calibrate(progress):
        progress("timing", 1, 2)
        assert tuned.token() == frozenset()
        return cost.machine("h100").model_copy(update={"name": "mine"})

    monkeypatch.setattr(cost, "calibrate", calibrate, raising=False)
    code, out, err = tune("--calibrate")
    (path,) = Path("cache").rglob("*.json")
    assert (code, out, err) == (0, f"mine: kept in {path.absolute()}\n", "") and cost.machine().name == "mine"


def test_doctor_shows_the_store(tune, tmp_path):
    from sparsify.cli.doctor import _tuned

    path = tmp_path / "tuned.json"
    assert _tuned().found == f"none in {path}" and "sparsify tune --grid" in _tuned().hint
    entry = tunings.Tuned("m", "s", "cpp", "k", {"blocks": 12}, 0.9, 1.0, 0.9, 0.9, 0.9, "2026-01-01T00:00:00+00:00")
    tuned.keep([entry])
    found = _tuned()
    assert found.ok is None and found.found == (
        f"0 for this machine and software, 1 for others, which are ignored ({path})"
    )
    tuned.keep([replace(entry, values={"blocks": 13})])
    assert _tuned().ok is False and "tuned[0]: tuned kernel: blocks: found 13" in _tuned().found
    path.write_text('{"version": 2, "tuned": []}')
    tuned.reload()
    assert "store version 2 can't be read" in _tuned().found and _tuned().hint == "kernels run as by default"


def test_times_are_read():
    times = {"90": 90, "90s": 90, "5m": 300, "1h30m": 5400, "2h": 7200}
    assert {text: seconds_of(text) for text in times} == times


def test_every_option_has_a_mode():
    options = {name for names in MODES.values() for name in names} | set(MODES)
    names = import_module("sparsify.cli.tune").tune.__annotations__
    assert {name.rstrip("_") for name in names} - {"context", "return"} == options


@built
def test_a_job_has_the_launches_of_one_kernel(tmp_path):
    cases = [Case("window256", n, 16, "float32", kv_heads=kv) for n in (128, 256) for kv in (8, 2)]
    (job,) = of_cases(cases, "cpu", lambda text: None)
    assert [launch.k.shape[1:3] for launch in job.launches] == [(8, 128), (2, 128), (8, 256), (2, 256)]
    path = job.write(tmp_path, 3)
    for launch, same in zip(job.launches, read(path), strict=True):
        assert same.program == launch.program and torch.equal(same.q, launch.q)
        assert same.q.stride() == launch.q.stride() and same.scale == launch.scale


@built
def test_a_model_is_run_once_for_its_kernels():
    from sparsify import attention, patterns

    q, k, v = torch.randn(3, 1, 4, 100, 16).unbind(0)
    with recorded() as launches:
        out = attention(q, k, v, patterns.window(9))
        attention(q[:, :, :1], k, v, patterns.window(9))
    assert out.any() and [launch.q.shape[2] for launch in launches] == [100, 1]
    many, few = jobs_of(launches, lambda launch: "a")
    assert "__many__" in many.key[3] and "__few__" in few.key[3]


def test_candidates_are_ordered_and_pruned_as_predicted():
    (job,) = of_cases([Case("window256", 2048, 64, "float32")], "cpu", lambda text: None)
    launch = job.launches[0]
    order = Order(launch, machine_for(launch))
    group = [{"blocks": blocks} for blocks in (4, 16, 48)]
    found = order(group, {})
    times = [order.seconds(step) for step in found]
    assert times == sorted(times) and all(step in group for step in found)
    assert order([{"blocks": 4}], {"block_rows": 2}) == [{"blocks": 4}]
    assert Order(launch, None)(group, {}) == group
