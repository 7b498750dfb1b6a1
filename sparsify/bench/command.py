"""`sparsify bench`: the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from sparsify.codegen.target import DTYPES
from sparsify.errors import InputError, nearest

if TYPE_CHECKING:
    from sparsify.bench.cases import Case
    from sparsify.bench.measure import Result


def bench(
    pattern: Annotated[
        list[str] | None, typer.Option(help="Patterns to measure (repeat it). Default: windows.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Sequence lengths. Default: 4096.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head sizes. Default: 64.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16. Default: the first two.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key heads.", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds, at most.", min=5)] = 30,
    seconds: Annotated[float, typer.Option(help="Time for one case's rounds, about.")] = 6.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    preparation: Annotated[
        bool, typer.Option(help="Measure what a mask costs before the first tile, instead.")
    ] = False,
    lossless: Annotated[
        bool, typer.Option(help="Measure whole models without a spec beside the inductor backend, instead.")
    ] = False,
    neighborhood: Annotated[
        bool, typer.Option(help="Measure neighborhoods in grids, and those of video and image models, instead.")
    ] = False,
    selection: Annotated[
        bool, typer.Option(help="Measure selections from the data, and what choosing costs of it, instead.")
    ] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Cases of --lossless, --neighborhood or --selection (repeat it). Default: all."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write results here (a .json file or a folder).")] = None,
) -> None:
    """Measure sparsify beside dense SDPA and compiled FlexAttention, in one process, interleaved.

    Without options: causal windows 512 of 4096 and 1024 of 8192, head sizes 64 and 128, float32 and bfloat16.
    A case whose numbers miss the oracle's bound is reported as wrong and gets no speed; the exit code is then 1.
    """
    if preparation:
        return _preparation()
    if lossless:
        return _lossless(case, dtype, repeats, seconds, json)
    if neighborhood:
        return _neighborhood(case, repeats, seconds, json)
    if selection:
        return _selection(case, dtype, repeats, seconds, json)
    import torch

    cases = _cases(pattern, length, head_dim, dtype, heads, kv_heads)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    results = _measured(cases, place, repeats, seconds)
    _print(results, place, json)
    if not all(result.right for result in results):
        raise typer.Exit(1)


def _lossless(case: list[str] | None, dtype: list[str] | None, repeats: int, seconds: float, json: Path | None) -> None:
    from sparsify.bench.models import named

    _check_dtypes(dtype)
    cases = named(case)
    from sparsify.bench import lossless

    results = []
    with _progress() as progress:
        task = progress.add_task("", total=None)
        for one in cases:
            for kind in dtype or ("float32",):
                tell = partial(_describe, progress, task)
                results.append(lossless.measure(one, kind, repeats, seconds, tell))
                if json is not None:
                    lossless.write_json(results[-1:], json)
    console = Console()
    console.print(lossless.table(results))
    for result in results:
        if not result.holds:
            console.print(f"{result.case.name}: not what it has to be", style="red", highlight=False)
    if not all(result.right for result in results):
        raise typer.Exit(1)


def _neighborhood(case: list[str] | None, repeats: int, seconds: float, json: Path | None) -> None:
    from sparsify.bench.measure import measure
    from sparsify.bench.sites import named

    results = []
    with _progress() as progress:
        task = progress.add_task("", total=None)
        for prepare in named(case):
            inputs = prepare("cpu")
            tell = partial(_describe, progress, task)
            results.append(measure(inputs.case, "cpu", repeats, seconds, tell, inputs))
            _print(results[-1:], "cpu", None)
    _print(results, "cpu", json)
    if not all(result.right for result in results):
        raise typer.Exit(1)


def _selection(
    case: list[str] | None, dtype: list[str] | None, repeats: int, seconds: float, json: Path | None
) -> None:
    from sparsify.bench import selection

    _check_dtypes(dtype)
    results = []
    with _progress() as progress:
        task = progress.add_task("", total=None)
        for one in selection.named(case):
            for kind in dtype or ("float32",):
                results.append(selection.measure(one, kind, repeats, seconds, partial(_describe, progress, task)))
    Console().print(selection.table(results))
    if json is not None:
        Console().print(f"written to {selection.write_json(results, json)}", soft_wrap=True, highlight=False)
    if not all(result.right for result in results):
        raise typer.Exit(1)


def _check_dtypes(dtype: list[str] | None) -> None:
    for name in dtype or ():
        if name not in DTYPES:
            raise InputError(f"bench: unknown dtype '{name}'; {nearest(name, DTYPES)}")


def _cases(
    pattern: list[str] | None,
    length: list[int] | None,
    head_dim: list[int] | None,
    dtype: list[str] | None,
    heads: int,
    kv_heads: int,
) -> tuple[Case, ...]:
    """The grid that the options ask for, or the two windows; the head counts hold for both."""
    from sparsify.bench.cases import WINDOWS, grid

    _check_dtypes(dtype)
    asked = grid(pattern or ["window512"], length or [4096], head_dim or [64], dtype or [*DTYPES][:2], heads, kv_heads)
    if any(option is not None for option in (pattern, length, head_dim, dtype)):
        return asked
    return tuple(replace(case, heads=heads, kv_heads=kv_heads) for case in WINDOWS)


def _measured(cases: Sequence[Case], device: str, repeats: int, seconds: float) -> list[Result]:
    from sparsify.bench.measure import measure

    results = []
    with _progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            tell = partial(_describe, progress, task)
            results.append(measure(case, device, repeats, seconds, tell))
            progress.advance(task)
    return results


def _progress() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _describe(progress: Progress, task: TaskID, what: str) -> None:
    progress.update(task, description=what)


def _print(results: Sequence[Result], device: str, json: Path | None) -> None:
    from sparsify.bench import report

    console = Console()
    console.print(report.table(results))
    about = report.machine(device)
    console.print(f"{about['machine']}, {about['threads']} threads, torch {about['torch']}", highlight=False)
    for result in results:
        for peer, why in result.failures.items():
            console.print(f"{result.case.name}: {peer} failed: {why}", highlight=False)
    if json is not None:
        console.print(f"written to {report.write_json(results, device, json)}", highlight=False)


def _preparation() -> None:
    from sparsify.bench.prepare import measure_preparation

    for row in measure_preparation(length=131072, heads=32, flex_length=2048):
        print(
            f"{row.what:9} N={row.length:<7} {row.heads} heads, mixture: "
            f"{row.seconds * 1e3:8.1f} ms, {row.peak_bytes / 2**20:7.0f} MB"
        )
