"""`sparsify bench --model`: which runs and phases there are, what counts as right, and what is said of it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsify.bench import cold, end_to_end, runs
from sparsify.bench.end_to_end import measure, remarks, table
from sparsify.bench.report import write_results
from sparsify.errors import InputError
from sparsify.models import Wanted

pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FIELDS = {"llama": {**SIZES, "vocab_size": 64}, "vit": {**SIZES, "image_size": 32}, "bert": {**SIZES, "vocab_size": 64}}


class Shifted(torch.nn.Module):
    """A model's compiled code that adds something to what it gives."""

    def __init__(self, made: torch.nn.Module, shift: float) -> None:
        super().__init__()
        self.made, self.shift = made, shift

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (self.made(*args, **kwargs)[0] + self.shift,)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Nothing is compiled: a backend gives what the model gives, and what this adds; the n-th run takes n seconds."""
    shifts: dict[str, float] = {}

    def compile(made: torch.nn.Module, backend: str, options: Any = None, **_: Any) -> torch.nn.Module:
        return Shifted(made, shifts.get("spec" if options else backend, 0.0))

    def interleaved(runs: dict[str, Any], *_: Any) -> dict[str, list[float]]:
        return {name: [float(number)] * 5 for number, name in enumerate(runs, 1)}

    report = SimpleNamespace(sites=[1, 2], rewritten=[1])
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(cold, "cold_caches", nullcontext)
    monkeypatch.setattr(end_to_end, "interleaved", interleaved)
    monkeypatch.setattr(end_to_end, "explain", lambda *args, **kwargs: report)
    return shifts


def measured(name: str, spec: str | None = None, **given: Any) -> list[end_to_end.Phase]:
    wanted = Wanted(length=24, dtype="float32", overrides=FIELDS.get(name, {}), **given)
    return measure(name, spec and Path(spec), wanted, "cpu", 5, 0.1, lambda text: None)


def test_prefill_and_decode_of_every_run(compiled, tmp_path) -> None:
    prefill, decode = found = measured("llama", "s.yaml")
    assert (prefill.phase, decode.phase, prefill.length, prefill.dtype) == ("prefill", "decode", 24, "float32")
    assert list(prefill.timings) == ["inductor", "sparsify", "spec"] and prefill.right and decode.right
    assert prefill.error == dict.fromkeys(prefill.timings, 0.0) and decode.error == prefill.error
    assert decode.ratio("spec") == pytest.approx(1 / 3) and decode.sites == {"sparsify": (1, 2), "spec": (1, 2)}
    path = write_results(found, "models", "cpu", tmp_path)
    assert path.name.endswith("-models.json")
    rows = json.loads(path.read_text())["results"]
    assert [(row["model"], row["spec"], row["phase"]) for row in rows] == [
        ("llama", "s.yaml", "prefill"),
        ("llama", "s.yaml", "decode"),
    ]
    assert set(rows[0]["seconds"]) == set(rows[0]["peak_bytes"]) == {"inductor", "sparsify", "spec"}
    assert remarks(found) == []


def test_weights_and_inputs_are_drawn() -> None:
    made, _, given = end_to_end.from_config("llama", Wanted(length=24, overrides=FIELDS["llama"], drawn=True))
    assert given["input_ids"].unique().numel() > 10
    weights = made.model.layers[0].self_attn.q_proj.weight
    assert 0.01 < weights.std() < 0.03
    again, _, _ = end_to_end.from_config("llama", Wanted(length=24, overrides=FIELDS["llama"], drawn=True))
    assert torch.equal(weights, again.model.layers[0].self_attn.q_proj.weight)


def test_a_wrong_run_gets_no_speed(compiled) -> None:
    compiled |= {"sparsify": 0.1, "spec": float("nan")}
    found = measured("llama", "s.yaml")
    assert not found[0].right and list(found[0].timings) == ["inductor"] and found[0].ratio("sparsify") is None
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(found))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert sum("sparsify WRONG" in line for line in lines) == 2
    assert any(line.startswith("prefill 24 fp32 inductor 1.000 ") for line in lines)
    assert all("…" not in line for line in lines)
    assert any(line.startswith("decode 24 fp32 inductor 1.00 ") for line in lines)
    assert remarks(found)[0].startswith("prefill 24: WRONG: without a spec the error is ")
    assert remarks(found)[1] == "prefill 24: WRONG: the outputs with the spec are not finite"


def test_a_spec_that_changes_nothing_is_told(compiled, monkeypatch) -> None:
    monkeypatch.setattr(end_to_end, "explain", lambda *args, **kwargs: SimpleNamespace(sites=[1], rewritten=[]))
    assert remarks(measured("llama", "s.yaml")[:1]) == [
        "prefill 24: the spec changed no site: sparsify explain llama --spec s.yaml"
    ]


def test_models_without_a_cache_are_not_decoded(compiled) -> None:
    (image,) = measured("vit")
    assert (image.phase, image.length) == ("prefill", 0) and list(image.timings) == ["inductor", "sparsify"]
    (text,) = measured("bert")
    assert (text.phase, text.length) == ("prefill", 24)


def test_a_callable_gives_its_own_inputs(compiled, tmp_path, monkeypatch) -> None:
    (tmp_path / "own.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(3, 3), torch.ones(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    (found,) = measured("own:make")
    assert found.right and found.model == "own:make"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lama", {}, "'lama' is no config.json, no folder with one, no package.module:callable and no model type"),
        ("llama", {"attn": "fast"}, "llama: transformers can't make this model: "),
        ("wav2vec2", {}, "Wav2Vec2Model reads input_values; give it as package.module:callable"),
    ],
)
def test_models_that_can_not_be_made(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        measured(name, **given)
    assert str(raised.value).startswith(f"bench: {message}")


def test_models_that_are_too_large(monkeypatch) -> None:
    monkeypatch.setattr("sparsify.models.LARGE", 1)
    with pytest.raises(InputError) as raised:
        measured("llama")
    message = "its 0 GiB of weights are too many to run it; make it smaller: --set num_hidden_layers=2"
    assert str(raised.value) == f"bench: llama: {message}"


def test_options_of_models_are_checked_before_anything_runs(tmp_path) -> None:
    how = runs.How(5, 0.1, "cpu", None)
    for fields, length, dtype, option in ((["a=1"], None, None, "--set"), (None, [64], None, "--length")):
        with pytest.raises(InputError) as raised:
            runs.model("own:make", None, fields, length, dtype, how)
        assert str(raised.value) == (
            f"bench: {option} does not go with a callable, which makes its model and inputs itself"
        )
    with pytest.raises(InputError, match="bench: unknown dtype 'float31'; did you mean 'float32'"):
        runs.model("llama", None, None, None, ["float31"], how)
    with pytest.raises(ValueError, match="there is no such file"):
        runs.model("llama", tmp_path / "no.yaml", None, None, None, how)
