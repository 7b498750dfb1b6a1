"""`sparsify bench --lossless`: models without a spec, against the inductor backend, in one process, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sparsify.bench.cold import cold_kernels, compiled_alone, first_call
from sparsify.bench.measure import Timing, interleaved, timing
from sparsify.bench.memory import peak_bytes
from sparsify.bench.models import Example, ModelCase
from sparsify.bench.report import json_path, machine, read, write
from sparsify.bench.tables import SHORT
from sparsify.errors import InputError
from sparsify.explanation import explain

BACKENDS = ("sparsify", "inductor")
ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}  # errors that are rounding alone, of outputs of about 1
FLOOR = 0.97  # what the zoo may not fall below


@dataclass(frozen=True)
class Lossless:
    """One case measured. error: the largest difference from the uncompiled model of each backend, over its scale;
    peak: bytes that one call takes beyond what was there."""

    case: ModelCase
    dtype: str
    timings: Mapping[str, Timing]
    error: Mapping[str, float]
    peak: Mapping[str, int]
    sites: int
    rewritten: int

    @property
    def right(self) -> bool:
        """Whether the outputs are those of the model, as near as Inductor's are; a wrong case gets no speed."""
        return is_lossless(self.error, self.dtype)

    @property
    def ratio(self) -> float | None:
        """How many times as fast sparsify is, or None for a wrong case."""
        return self.timings["inductor"].median / self.timings["sparsify"].median if self.right else None

    @property
    def complaint(self) -> str:
        """What is wrong with the case: its outputs, or that it is slower than it has to be; else nothing."""
        least = FLOOR if self.case.zoo else 1.0
        if self.ratio is None:
            errors = ", ".join(f"{name}'s {error:.1e}" for name, error in self.error.items())
            return f"{self.case.name}: WRONG: the largest errors over the output's scale are {errors}"
        if self.ratio < least:
            return f"{self.case.name}: {self.ratio:.2f}x as fast as inductor, and {least:g}x is the least wanted"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "case": self.case.name,
            "about": self.case.about,
            "length": self.case.length,
            "dtype": self.dtype,
            "right": self.right,
            "ratio": self.ratio,
            "error": dict(self.error),
            "peak_bytes": dict(self.peak),
            "sites": self.sites,
            "rewritten": self.rewritten,
            "seconds": {name: found.as_dict() for name, found in self.timings.items()},
        }


def is_lossless(error: Mapping[str, float], dtype: str) -> bool:
    """Whether sparsify's error is that of rounding: at most twice Inductor's, or what is usual in the dtype."""
    return error["sparsify"] <= max(2 * error["inductor"], ROUNDING[dtype])


def measure(case: ModelCase, dtype: str, repeats: int, seconds: float, tell: Callable[[str], None]) -> Lossless:
    """Compiles the model with both backends, checks the outputs, and times both in turn."""
    tell(f"{case.name}: making the model")
    example = _in_dtype(case.make(case.length), dtype)
    many = torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=64)
    with torch.inference_mode(), cold_kernels(), many:
        report = explain(example.model, **example.inputs)
        truth = example.model(**example.inputs)[0]
        runs, outputs, first = {}, {}, {}
        for backend in BACKENDS:
            tell(f"{case.name}: compiling with {backend}")
            runs[backend] = _run(example, backend)
            outputs[backend], first[backend] = first_call(runs[backend])
        tell(f"{case.name}: timing")
        samples = interleaved(runs, "cpu", repeats, seconds)
        peak = {name: peak_bytes(run) for name, run in runs.items()}
    error = {name: relative_error(found, truth, example.rows) for name, found in outputs.items()}
    timings = {name: timing(samples[name], first[name]) for name in BACKENDS}
    return Lossless(case, dtype, timings, error, peak, len(report.sites), len(report.rewritten))


def _in_dtype(example: Example, dtype: str) -> Example:
    kind = getattr(torch, dtype)
    floats = {
        name: value.to(kind) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in example.inputs.items()
    }
    return Example(example.model.to(kind), floats, example.rows)


def _run(example: Example, backend: str) -> Callable[[], torch.Tensor]:
    model = compiled_alone(example.model, backend=backend)
    return lambda: model(**example.inputs)[0]


def relative_error(found: torch.Tensor, truth: torch.Tensor, rows: torch.Tensor | None = None) -> float:
    """The largest difference over the truth's largest value, in the rows that mean something; infinite for a NaN."""
    if rows is not None:
        found, truth = found[rows], truth[rows]
    error = (found.double() - truth.double()).abs().max() / truth.double().abs().max()
    return float(error) if error.isfinite() else float("inf")


def table(results: Sequence[Lossless]) -> Table:
    """One line a case: milliseconds, the ratio, and peak memory and compile time of both."""
    found = Table(title="lossless: sparsify beside inductor (medians of interleaved repeats)", title_justify="left")
    for column in ("case", "ms", "inductor", "ratio", "peak MB", "compile s", "sites"):
        found.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for result in results:
        ours, theirs = (result.timings[name] for name in BACKENDS)
        peak = "/".join(f"{result.peak[name] / 2**20:.0f}" for name in BACKENDS)
        ratio = "WRONG" if result.ratio is None else f"{result.ratio:.2f}x"
        found.add_row(
            f"{result.case.name} {result.case.length} {SHORT.get(result.dtype, result.dtype)}",
            f"{ours.median * 1e3:.1f}" if result.right else f"error {result.error['sparsify']:.0e}",
            f"{theirs.median * 1e3:.1f}",
            ratio,
            peak,
            f"{ours.first:.1f}/{theirs.first:.1f}",
            f"{result.rewritten}/{result.sites}",
        )
    return found


def write_json(results: Sequence[Lossless], path: Path) -> Path:
    """Writes machine and results; cases of the same machine that are in the file already and were not run stay."""
    about, path = machine("cpu"), file_of(path)
    rows = {(row["case"], row["dtype"]): row for row in kept(path)}
    rows |= {(result.case.name, result.dtype): result.as_dict() for result in results}
    return write({"machine": about, "results": list(rows.values())}, path)


def file_of(path: Path) -> Path:
    """The file of results at a path, or in a folder."""
    return json_path(path, machine("cpu")["machine"] + " lossless")


def kept(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that are of this machine, none if there is no file. Raises InputError for other results."""
    if not path.is_file():
        return []
    about, rows = read(path, "--json")
    if not all({"case", "dtype"} <= row.keys() for row in rows):
        raise InputError(f"bench: --json: {path} holds results of something else than --lossless; give another file")
    return rows if about.get("machine") == machine("cpu")["machine"] else []
