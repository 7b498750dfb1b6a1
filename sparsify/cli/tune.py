"""`sparsify tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

WHAT = "What to do (one of these)"

Grid = Annotated[
    bool, typer.Option("--grid", rich_help_panel=WHAT, help="Tune the kernels of the grid of sparsify bench.")
]
Model = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHAT,
        help="Tune the kernels of a model, named as for sparsify explain, with --spec or with its own masks.",
        show_default=False,
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option("--calibrate", rich_help_panel=WHAT, help="Measure this machine for the cost simulator."),
]
Export = Annotated[
    Path | None,
    typer.Option(rich_help_panel=WHAT, help="Write what is tuned to this file.", show_default=False),
]
Import = Annotated[
    Path | None,
    typer.Option("--import", rich_help_panel=WHAT, help="Add what --export wrote elsewhere.", show_default=False),
]
Spec = Annotated[Path | None, typer.Option(help="The spec that --model runs with.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", help="A field of --model's config, as NAME=VALUE (repeat it).")]
Pattern = Annotated[list[str] | None, typer.Option(help="Patterns of --grid (repeat it). Default: all.")]
Length = Annotated[list[int] | None, typer.Option(help="Sequence lengths. Default: 4096, of a model 2048.", min=1)]
HeadDim = Annotated[list[int] | None, typer.Option(help="Head sizes of --grid. Default: all.", min=1)]
Dtype = Annotated[
    list[str] | None,
    typer.Option(help="float32, bfloat16, float16. Default: the grid's, of a model the first."),
]
Heads = Annotated[int | None, typer.Option(help="Query heads of --grid. Default: 8.", min=1)]
KvHeads = Annotated[int | None, typer.Option(help="Key heads of --grid. Default: as many, and a quarter.", min=1)]
Target = Annotated[Literal["auto", "cpp", "triton"], typer.Option(help="Whose kernels.")]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Build Triton kernels for this chip (80, 90, 100, gfx942) without a GPU, and prune those that spill or"
        " don't fit.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Budget = Annotated[str, typer.Option(help="Time for all kernels together: 90s, 5m, 1h30m.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run of these kernels ended or was interrupted.")]
Json = Annotated[Path | None, typer.Option(help="Write what was won here, too.", show_default=False)]


def tune(
    context: typer.Context,
    grid: Grid = False,
    model: Model = None,
    calibrate: Calibrate = False,
    export: Export = None,
    import_: Import = None,
    spec: Spec = None,
    set_: Set = None,
    pattern: Pattern = None,
    length: Length = None,
    head_dim: HeadDim = None,
    dtype: Dtype = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    target: Target = "auto",
    arch: Arch = None,
    device: Device = "auto",
    budget: Budget = "5m",
    resume: Resume = False,
    json: Json = None,
) -> None:
    """Find how kernels run fastest on this machine, and keep it: what is compiled from then on runs so.

    Candidates are built, checked against the oracle and timed in child processes, in turns with the best so far; what
    isn't faster beyond the spread doesn't win. The results are kept for this machine, these kernels and this software.
    """
    from sparsify.tuner import command
    from sparsify.tuner.modes import mode_of

    sources = {name: context.get_parameter_source(name) for name in context.params}
    mode = mode_of([name.rstrip("_") for name, source in sources.items() if source and source.name == "COMMANDLINE"])
    if export is not None:
        return command.export(export)
    if import_ is not None:
        return command.take(import_)
    if mode == "calibrate":
        return command.calibrate()
    seconds = command.seconds_of(budget)
    shapes = (length, dtype)
    with command.targeted(target, device, arch) as place:
        if model is None:
            jobs = command.of_grid(pattern, head_dim, heads, kv_heads, *shapes, place)
        else:
            jobs = command.of_model(model, spec, set_, *shapes, place, run=arch is None)
        ahead = None if arch is None else command.ahead(jobs, arch, seconds)
        holds = command.tune(jobs, seconds, resume, place, json) if ahead is None else ahead
    if not holds:
        raise typer.Exit(1)
