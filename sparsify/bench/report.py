"""A benchmark's results as tables, and as JSON that names the machine."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sparsify import __version__
from sparsify.bench.cases import Case
from sparsify.bench.measure import Result
from sparsify.bench.summary import Summary
from sparsify.bench.tables import SHORT, new_table, short
from sparsify.errors import InputError, SparsifyError
from sparsify.files import write_whole
from sparsify.runtime import machine_isa
from sparsify.runtime.machine import cpu_name

RATIOS = ("dense", "full", "mask", "flex")  # the peers of every table
SOMETIMES = ("cudnn", "natten")  # those that join where they ran
MEMORY = ("sparsify", "dense", "mask", "flex")
LIBRARIES = ("numpy", "transformers", "diffusers", "triton", "natten")
SPEED_NOTE = (
    "±: half of the middle half of the times. GFLOP/s: 4 D kept pairs / time. dense: SDPA, causal where the case is;"
    " full: SDPA with all pairs; mask: SDPA with the mask."
)


def speed_table(results: Sequence[Result]) -> Table:
    """One line a case: kept pairs, milliseconds and spread, useful rate, its shares of GEMM's and the ideal, ratios."""
    peers = [*RATIOS, *(peer for peer in SOMETIMES if any(peer in result.timings for result in results))]
    found = new_table(
        "speed (medians of interleaved repeats)", "kept", "ms", "±", "GFLOP/s", "GEMM", "ideal", *peers, gap=1
    )
    found.caption = SPEED_NOTE

    def row(result: Result) -> list[str]:
        kept = f"{short(100 * result.density)}%"
        if not result.right:
            return [kept, "WRONG"]
        found = result.timings["sparsify"]
        spread = f"{(found.high - found.low) / 2 / found.median:.0%}"
        shares = [f"{result.of_gemm:.2f}", "-" if result.of_ideal is None else f"{result.of_ideal:.2f}"]
        rates = [kept, short(found.median * 1e3), spread, short((result.rate or 0) / 1e9)]
        return [*rates, *shares, *(ratio_text(result, peer) for peer in peers)]

    return _filled(found, results, row)


def cost_table(results: Sequence[Result]) -> Table:
    """One line a case: seconds to the first result, and megabytes at the highest, of sparsify and its peers."""
    found = new_table(
        "first result in s, peak memory beyond the inputs in MB",
        "first s", "flex", *("MB" if name == "sparsify" else name for name in MEMORY),
    )  # fmt: skip

    def row(result: Result) -> list[str]:
        first = [result.timings.get(peer) for peer in ("sparsify", "flex")]
        peaks = [result.memory.get(peer) for peer in MEMORY]
        return [
            *("-" if timing is None else short(timing.first) for timing in first),
            *("-" if memory is None else short(memory.peak / 2**20) for memory in peaks),
        ]

    return _filled(found, results, row)


def _filled(table: Table, results: Sequence[Result], row: Callable[[Result], list[str]]) -> Table:
    """With a heading for each run of results of one dtype and shape."""
    for heading, some in groupby(results, lambda result: shape_text(result.case)):
        table.add_row(heading, style="bold")
        for result in some:
            table.add_row(f"{result.case.pattern} {result.case.length}", *row(result))
        table.add_section()
    return table


def shape_text(case: Case) -> str:
    """`fp32 D64 H8/2`, where 8 heads share 2 key heads."""
    return f"{SHORT.get(case.dtype, case.dtype)} D{case.head_dim} H{case.heads}/{case.kv_heads}"


def ratio_text(result: Result, peer: str) -> str:
    """`1.23x`; `failed` for a peer that did, and `-` for one that isn't measured."""
    ratio = result.ratio(peer)
    if ratio is not None:
        return f"{short(ratio)}x"
    return "failed" if peer in result.failures else "-"


def summary_table(summaries: Sequence[Summary]) -> Table:
    """One line a dtype: geometric means over the static cases."""
    found = new_table("geometric means over the static cases", "cases", "GEMM", "ideal", *RATIOS, first="dtype")
    for one in summaries:
        means = [one.of_gemm, one.of_ideal, *(one.ratios.get(peer) for peer in RATIOS)]
        shown = ["-" if mean is None else short(mean) + "x" * (number > 1) for number, mean in enumerate(means)]
        found.add_row(SHORT.get(one.dtype, one.dtype), str(one.cases), *shown)
    return found


def remarks(results: Sequence[Result], summaries: Sequence[Summary]) -> Iterator[str]:
    """Sentences below the tables: what is wrong, what failed, and the worst cases."""
    for result in results:
        if not result.right:
            error, bound = result.checked.error["sparsify"], result.checked.bound
            yield f"{result.case.name}: WRONG: the error is {error:.1e}, the bound {bound:.1e}"
        for peer, why in result.failures.items():
            yield f"{result.case.name}: {peer} failed: {why}"
    for one in summaries:
        name = SHORT.get(one.dtype, one.dtype)
        for peer in ("dense", "flex"):
            if peer in one.worst:
                yield f"{name}: the least against {peer} is {short(one.worst[peer][0])}x, at {one.worst[peer][1]}"
        if (one.of_gemm or 0) > 1:
            yield f"{name}: torch has no fast matrix product in {one.dtype} here, so the shares of GEMM say nothing"
        if "flex" in one.worst:
            yield f"{name}: {one.below_floor} of {one.flex_cases} cases are below {Summary.FLOOR}x of flex"


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on, and with what."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "machine": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsify": __version__,
        "device": device,
        **_versions(),
    }


def _isa() -> str:
    try:
        found = machine_isa()
        return found.name + (" with bf16 dot products" if found.bf16_dot else "")
    except SparsifyError as error:
        return str(error)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_json(results: Sequence[Result], summaries: Sequence[Summary], device: str, path: Path) -> Path:
    """Writes machine, results and summaries, as `write_results` does."""
    return write_results(results, "", device, path, summary=[one.as_dict() for one in summaries])


def write_results(results: Sequence[Any], kind: str, device: str, path: Path, **more: Any) -> Path:
    """Writes machine, results (whatever has `as_dict`) and `more`. Returns the file's path, which in a folder is named
    after the machine and the kind."""
    about = machine(device)
    value = {"machine": about, "results": [one.as_dict() for one in results], **more}
    return write(value, json_path(path, f"{about['machine']} {kind}"))


def json_path(path: Path, name: str) -> Path:
    """The path itself if it is a .json file, else the file in that folder that is named after `name`."""
    return path if path.suffix == ".json" else path / f"{stem(name)}.json"


def stem(name: str) -> str:
    """A machine's name as that of a file."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def write(value: dict[str, Any], path: Path) -> Path:
    """Writes JSON, whole or not at all; numbers that it has no words for (of a wrong case's error) as null. Raises
    InputError."""
    write_whole(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n", "bench: --json")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path, option: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine and the rows of a file of results that `option` names. Raises InputError."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"bench: {option}: {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"bench: {option}: {path} is no JSON: {error}") from None
    about, rows = (found.get(part) for part in ("machine", "results")) if isinstance(found, dict) else (None, None)
    if not isinstance(about, dict) or not isinstance(rows, list):
        raise InputError(f"bench: {option}: {path} holds no results of `sparsify bench --json`: no machine or results")
    for number, row in enumerate(rows):
        seconds = row.get("seconds") if isinstance(row, dict) else None
        if not isinstance(seconds, dict) or not all(map(_is_timing, seconds.values())):
            raise InputError(f"bench: {option}: {path}: results[{number}] has no seconds with median, low and high")
    return about, rows


def _is_timing(value: Any) -> bool:
    parts = ("low", "median", "high")
    numbers = [value.get(part) for part in parts] if isinstance(value, dict) else [None]
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
