"""`sparsify bench` as a command: what it measures, prints and writes, and its exit codes."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from test_bench import result

from sparsify import cli
from sparsify.bench.cases import WINDOWS, Case
from sparsify.bench.measure import Result
from sparsify.bench.modes import MODES, mode_of
from sparsify.errors import InputError


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path):
    """Runs the command in an empty folder with results that are made up; (exit code, stdout, the cases measured)."""
    cases: list[Case] = []

    def measure(case: Case, *_: Any) -> Result:
        cases.append(case)
        return result(case, error=1e-2 if case.head_dim == 99 else 1e-6)

    monkeypatch.setattr(import_module("sparsify.bench.measure"), "measure", measure)
    monkeypatch.setattr(import_module("sparsify.bench.cold"), "cold_caches", nullcontext)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, list[Case]]:
        cases.clear()
        monkeypatch.setattr(sys, "argv", ["sparsify", "bench", *line.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        out, run.err = capsys.readouterr()
        return ended.value.code or 0, out, list(cases)

    return run


def test_without_options_it_measures_windows(bench) -> None:
    code, out, cases = bench("")
    assert code == 0 and cases == list(WINDOWS) and "GFLOP/s" in out and "geometric means" in out
    assert [case.kv_heads for case in bench("--heads 4 --kv-heads 2")[2]] == [2] * len(WINDOWS)


def test_one_case_has_no_means(bench) -> None:
    code, out, cases = bench("--pattern topk --length 512 --dtype float16")
    assert (code, cases) == (0, [Case("topk", 512, 64, "float16")]) and "geometric means" not in out


def test_the_grid_writes_its_files(bench) -> None:
    code, out, cases = bench("--grid --length 1024 --head-dim 64 --json out/a.json --plot pictures")
    assert code == 0 and len(cases) == 2 * 2 * 10
    assert len(json.loads(Path("out/a.json").read_text())["results"]) == len(cases)
    drawn = sorted(path.suffix for path in Path("pictures").iterdir())
    assert drawn == [".html", ".png"] and out.count("written to") == 3
    assert all(len(line) <= 80 for line in out.splitlines() if "written to" not in line)
    assert bench("--compare out/a.json out/a.json")[0] == 0


def test_the_file_grows_case_by_case(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [result(Case("causal", 1024, 64, "float32"))]
    monkeypatch.setattr(import_module("sparsify.bench.measure"), "measure", lambda *_: found.pop())
    with pytest.raises(IndexError):
        bench("--pattern causal --length 1024 --length 2048 --json a.json")
    assert [row["length"] for row in json.loads(Path("a.json").read_text())["results"]] == [1024]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--json /dev/null/x/b.json", "bench: --json: '/dev/null/x/b.json' can't be written: "),
        ("--json file", "bench: --json: 'file/results.json' can't be written: "),
        ("--json folder.json", "bench: --json: expected the name of a file, found 'folder.json', which is a folder"),
        ("--plot /dev/null/x.html", "bench: --plot: '/dev/null/x.html' can't be written: "),
        ("--plot /dev/null/x", "bench: --plot: '/dev/null/x/plot.png' can't be written: "),
        ("--seconds -1", "bench: --seconds: found -1; expected a time above 0"),
        ("--seconds nan", "bench: --seconds: found nan; expected a time above 0"),
    ],
)
def test_what_can_not_be_written_is_told_before_anything_is_measured(bench, line, says) -> None:
    Path("folder.json").mkdir()
    Path("file").write_text("")
    before = sorted(Path().rglob("*"))
    code, out, cases = bench(f"--pattern causal --length 1024 {line}")
    assert (code, out, cases) == (2, "", []) and bench.err.startswith(f"sparsify: {says}")
    assert sorted(Path().rglob("*")) == before


def test_a_length_beyond_the_memory_is_told_before_anything_is_measured(bench, monkeypatch) -> None:
    monkeypatch.setattr("sparsify.bench.cases._memory", lambda: 16 * 2**30)
    code, out, cases = bench("--length 99999999999 --dtype float32")
    said = "bench: --length: queries, keys, values and output of window512 N=99999999999 D=64 float32 H=8/8 need"
    assert (code, out, cases) == (2, "", []) and bench.err.count("\n") == 1
    assert bench.err.startswith(f"sparsify: {said} 762,939 GiB, and this machine has 16 GiB; give fewer tokens")


def test_more_tokens_than_the_memory_holds_are_told_before_a_model_is_made(bench, monkeypatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("sparsify.bench.cases._memory", lambda: 16 * 2**30)
    monkeypatch.setattr("sparsify.models._made", lambda *_: pytest.fail("a model is made"))
    fields = "--set hidden_size=64 --set num_attention_heads=4 --set num_key_value_heads=2"
    code, out, _ = bench(f"--model llama {fields} --length 512 --length 100000000000 --dtype float32")
    said = "bench: --length: tokens, and hidden states, keys and values of one layer of llama at 100000000000 tokens"
    need = 1e11 * (8 + 4 * (64 + 2 * 2 * 16)) / 2**30
    assert (code, out) == (2, "") and bench.err.count("\n") == 1
    assert bench.err.startswith(f"sparsify: {said} need {need:,.0f} GiB, and this machine has 16 GiB; give fewer")


def test_a_wrong_case_ends_with_1(bench) -> None:
    code, out, _ = bench("--pattern causal --head-dim 99")
    assert code == 1 and "WRONG: the error is 1.0e-02, the bound 1.0e-05" in out


def test_every_mode_is_an_option_and_takes_options_only() -> None:
    command = cli.app.registered_commands[[c.callback.__name__ for c in cli.app.registered_commands].index("bench")]
    names = {name.rstrip("_") for name in command.callback.__annotations__} - {"context", "return"}
    assert set(MODES) <= names and {name for taken in MODES.values() for name in taken} <= names
    assert mode_of([]) is None and mode_of(["length"]) is None and mode_of(["grid", "kv_heads"]) == "grid"
    with pytest.raises(InputError, match="bench: --kv-heads does not go with --model; what does: --spec, --set, "):
        mode_of(["model", "kv_heads"])
