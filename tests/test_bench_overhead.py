"""`sparsify bench --overhead` and `--mixture`: what they count, tell and write."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sparsify.bench import mixture, overhead, runs
from sparsify.bench.cases import Case
from sparsify.bench.check import Check
from sparsify.bench.overhead import Call, Compiling, Growth, Overhead
from sparsify.bench.peers import Inputs


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_TARGET", "cpp")


def test_a_longer_sequence_builds_nothing(kernels) -> None:
    """Of the graph, Dynamo makes one for the first length and one for any; of the kernels there is one."""
    found = {grown.name: grown for grown in overhead.growing(range(40, 44))}
    assert set(found) == {"sparsify.attention", "compiled", "a model"}
    assert found["sparsify.attention"].graphs == (0, 0, 0, 0)
    for grown in found.values():
        assert grown.later == 0 and len(grown.kernels) == 4 and sum(grown.kernels) <= 1
    assert sum(found["a model"].kernels) == 1 and sum(found["compiled"].graphs) == 2


def test_eager_calls_have_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_TARGET", "null")  # what they take is told the same way
    monkeypatch.setattr(overhead, "COLD_BYTES", 2**20)
    found = overhead.eager_calls(calls=3)
    assert [call.name for call in found] == ["one pattern", "a pattern a head", "a pattern and a mask"]
    assert all(min(call.us, call.cold, call.sdpa, call.sdpa_cold) > 0 for call in found)


MADE = Overhead(
    (Call("one pattern", 41.23, 152.7, 9.9, 88.4),),
    (Compiling("no spec", 0.5, 25.0),),
    (Growth("a model", (1, 1, 0, 0), (1, 0, 0, 0)),),
)


def test_overhead_is_told_and_written(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(overhead, "measure", lambda tell: MADE)
    assert runs.overhead(runs.How(5, 1.0, "cpu", tmp_path / "a.json"))
    told = capsys.readouterr().out
    assert "41.2" in told and "88.4" in told and "2.0%" in told and "1, 1, 0, 0" in told
    assert json.loads((tmp_path / "a.json").read_text())["results"][0]["compiling"][0]["passes"] == 0.5
    again = replace(MADE, growth=(Growth("a model", (1, 1, 1, 0), (1, 0, 0, 0)),))
    monkeypatch.setattr(overhead, "measure", lambda tell: again)
    assert not runs.overhead(runs.How(5, 1.0, "cpu", None))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_mixture_is_measured_beside_its_parts(kernels, kv_heads: int) -> None:
    found = mixture.measure(
        Inputs.draw(Case("mixture", 300, 16, "float32", 8, kv_heads), "cpu"), 5, 0.1, lambda _: None
    )
    assert found.right and set(found.timings) == {"together", *(f"head {h}" for h in range(8))}
    assert found.ratio == found.timings["together"].median / sum(
        timing.median for name, timing in found.timings.items() if name != "together"
    )
    assert found.as_dict()["right"] and len(found.as_dict()["rules"]) == 8
    assert f"fp32 D16 H8/{kv_heads} 300" in _text(mixture.table([found]))
    wrong = replace(found, checked=Check({"together": 1.0, "apart": 0.0}, 1e-5, 1))
    assert wrong.ratio is None and "WRONG 1e+00" in _text(mixture.table([wrong]))


def _text(table) -> str:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.slow
@torch.inference_mode()
def test_a_mixture_is_written(kernels, tmp_path, capsys) -> None:
    assert runs.mixture([256], [16], None, None, runs.How(5, 0.1, "cpu", tmp_path / "m.json"))
    (row,) = json.loads((tmp_path / "m.json").read_text())["results"]
    assert row["length"] == 256 and row["of_parts"] > 0 and "of parts" in capsys.readouterr().out
