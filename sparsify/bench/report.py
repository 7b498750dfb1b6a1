"""A benchmark's results as a table, and as JSON that names the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sparsify import __version__
from sparsify.bench.measure import Result


def table(results: Sequence[Result]) -> Table:
    """One line a case: milliseconds, ratios to each peer, and the useful rate as a share of the GEMM rate."""
    found = Table(title="sparsify beside its peers (medians of interleaved repeats)", title_justify="left")
    found.add_column("case", no_wrap=True)
    peers = ["dense", "flex"] + ["natten"] * any("natten" in result.timings for result in results)
    for column in ("density", "ms", *(f"vs {peer}" for peer in peers), "of GEMM"):
        found.add_column(column, justify="right", no_wrap=True)
    for result in results:
        found.add_row(*_row(result, peers))
    return found


def _row(result: Result, peers: Sequence[str]) -> list[str]:
    case = result.case
    name = f"{case.pattern} {case.length} D{case.head_dim} {SHORT.get(case.dtype, case.dtype)}"
    if not result.right:
        return [name, f"{result.density:.3f}", f"WRONG: error {result.error:.1e}", f"> {result.bound:.1e}", "", ""]
    share = result.rate("sparsify") / result.gemm_flops  # type: ignore[operator]
    ratios = [_ratio(result, peer) for peer in peers]
    return [name, f"{result.density:.3f}", f"{result.timings['sparsify'].median * 1e3:.2f}", *ratios, f"{share:.2f}"]


SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _ratio(result: Result, peer: str) -> str:
    ratio = result.ratio(peer)
    return "failed" if ratio is None else f"{ratio:.2f}x"


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "machine": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsify": __version__,
        "device": device,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(results: Sequence[Result], device: str, path: Path) -> Path:
    """Writes machine and results; a folder gets a file named after the machine. Returns the file's path."""
    about = machine(device)
    return write({"machine": about, "results": [r.as_dict() for r in results]}, json_path(path, about["machine"]))


def json_path(path: Path, name: str) -> Path:
    """The path itself if it is a .json file, else the file in that folder that is named after `name`."""
    if path.suffix == ".json":
        return path
    return path / ("".join(c if c.isalnum() else "-" for c in name.lower()).strip("-") + ".json")


def write(value: dict[str, Any], path: Path) -> Path:
    """Writes JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
    return path
