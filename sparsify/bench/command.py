"""`sparsify bench`: the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparsify.bench.runs import How

MODE = "What to measure (one of these; without any, single cases)"

Grid = Annotated[
    bool,
    typer.Option(
        "--grid", rich_help_panel=MODE, help="Measure every pattern at every shape; the options below narrow it."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MODE,
        help="Measure a whole model with random weights: a config.json, a folder with one, a model type such as"
        " llama, or package.module:callable. Prefill and decode, with Inductor and with sparsify.",
        show_default=False,
    ),
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        rich_help_panel=MODE, help="Say what got slower from one file of results to another.", show_default=False
    ),
]
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless", rich_help_panel=MODE, help="Measure small models without a spec beside the inductor backend."
    ),
]
Neighborhood = Annotated[
    bool,
    typer.Option(
        "--neighborhood", rich_help_panel=MODE, help="Measure neighborhoods in grids, and those of video models."
    ),
]
Selection = Annotated[
    bool,
    typer.Option(
        "--selection", rich_help_panel=MODE, help="Measure selections from the data, and what choosing costs of it."
    ),
]
Decode = Annotated[
    bool,
    typer.Option(
        "--decode", rich_help_panel=MODE, help="Measure one query over a long cache beside the rate of memory."
    ),
]
Mixture = Annotated[
    bool,
    typer.Option(
        "--mixture", rich_help_panel=MODE, help="Measure eight unlike heads in one call beside each of them alone."
    ),
]
Overhead = Annotated[
    bool,
    typer.Option(
        "--overhead",
        rich_help_panel=MODE,
        help="Measure eager calls, the passes' part of compiling, and what a longer sequence builds again.",
    ),
]
Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate", rich_help_panel=MODE, help="Predict drawn patterns and shapes, and measure them beside it."
    ),
]
Preparation = Annotated[
    bool,
    typer.Option("--preparation", rich_help_panel=MODE, help="Measure what a mask costs before the first tile."),
]
Pattern = Annotated[list[str] | None, typer.Option(help="Patterns to measure (repeat it). Default: windows.")]
Length = Annotated[list[int] | None, typer.Option(help="Sequence lengths. Default: 4096, of a model 2048.", min=1)]
HeadDim = Annotated[list[int] | None, typer.Option(help="Head sizes. Default: 64.", min=1)]
Dtype = Annotated[
    list[str] | None,
    typer.Option(help="float32, bfloat16, float16. Default: the first two, of a model the first."),
]
Heads = Annotated[int | None, typer.Option(help="Query heads. Default: 8.", min=1)]
KvHeads = Annotated[int | None, typer.Option(help="Key heads. Default: as many; in the grid, a quarter, too.", min=1)]
Case = Annotated[
    list[str] | None,
    typer.Option(help="Cases of --lossless, --neighborhood, --selection or --decode (repeat it). Default: all."),
]
Spec = Annotated[Path | None, typer.Option(help="A spec that --model runs with, too.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", help="A field of --model's config, as NAME=VALUE (repeat it).")]
Count = Annotated[int, typer.Option(help="How many patterns --simulate draws.", min=10)]
Seed = Annotated[
    int | None, typer.Option(help="What --simulate draws from; another one each time, if not given.", min=0)
]
Repeats = Annotated[int, typer.Option(help="Interleaved rounds, at most.", min=5)]
Seconds = Annotated[float, typer.Option(help="Time for one case's rounds, about.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Json = Annotated[Path | None, typer.Option(help="Write results here (a .json file or a folder).")]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw speed-up against density here (a .png or .html file, or a folder for both)."),
]


def bench(
    context: typer.Context,
    grid: Grid = False,
    model: Model = None,
    compare: Compare = None,
    lossless: Lossless = False,
    neighborhood: Neighborhood = False,
    selection: Selection = False,
    decode: Decode = False,
    mixture: Mixture = False,
    overhead: Overhead = False,
    simulate: Simulate = False,
    preparation: Preparation = False,
    pattern: Pattern = None,
    length: Length = None,
    head_dim: HeadDim = None,
    dtype: Dtype = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    case: Case = None,
    spec: Spec = None,
    set_: Set = None,
    count: Count = 80,
    seed: Seed = None,
    repeats: Repeats = 30,
    seconds: Seconds = 6.0,
    device: Device = "auto",
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Measure sparsify beside dense SDPA, SDPA with the mask, and compiled FlexAttention: one process, interleaved.

    Without options: causal windows 512 of 4096 and 1024 of 8192, head sizes 64 and 128, float32 and bfloat16.
    A case whose numbers miss the oracle's bound is reported as wrong and gets no speed; the exit code is then 1.
    --compare exits with 1 when something got slower by more than 5 % and beyond its spread, --simulate when its errors
    are larger than those of a calibrated machine should be.
    """
    given = SimpleNamespace(**locals())  # the options by their names
    from sparsify.bench.modes import mode_of
    from sparsify.bench.runs import How
    from sparsify.errors import InputError

    sources = {name: context.get_parameter_source(name) for name in context.params}
    mode = mode_of([name.rstrip("_") for name, source in sources.items() if source and source.name == "COMMANDLINE"])
    if not 0 < seconds < float("inf"):
        raise InputError(f"bench: --seconds: found {seconds:g}; expected a time above 0, such as 6")
    _check_outputs(json, plot)
    if not _holds(mode, given, How(repeats, seconds, device, json)):
        raise typer.Exit(1)


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    """Raises InputError for a file that can't be made, before anything is measured."""
    from sparsify.bench.plot import paths
    from sparsify.bench.report import json_path
    from sparsify.files import check_writable

    if json is not None:
        check_writable(json_path(json, "results"), "bench: --json")
    for path in [] if plot is None else paths(plot, "plot"):
        check_writable(path, "bench: --plot")


def _holds(mode: str | None, g: Any, how: How) -> bool:
    """Measures what is asked for, and says whether it holds. g: what is given, by the options' names."""
    from sparsify.bench import runs

    modes: dict[str | None, Callable[[], bool]] = {
        "compare": lambda: runs.compared(*g.compare),
        "model": lambda: runs.model(g.model, g.spec, g.set_, g.length, g.dtype, how),
        "lossless": lambda: runs.lossless(g.case, g.dtype, how),
        "neighborhood": lambda: runs.neighborhood(g.case, how),
        "selection": lambda: runs.selection(g.case, g.dtype, how),
        "decode": lambda: runs.decode(g.case, g.dtype, how),
        "mixture": lambda: runs.mixture(g.length, g.head_dim, g.dtype, g.kv_heads, how),
        "overhead": lambda: runs.overhead(how),
        "simulate": lambda: runs.simulate(g.count, g.seed, g.dtype, how),
        "preparation": runs.preparation,
    }
    if mode in modes:
        return modes[mode]()
    cases = runs.cases(g.grid, g.pattern, g.length, g.head_dim, g.dtype, g.heads, g.kv_heads)
    return runs.attention(cases, how, g.plot)
