"""`sparsify bench`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODE = "What to measure (one of these; without any, single cases)"


def bench(
    context: typer.Context,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid", rich_help_panel=MODE, help="Measure every pattern at every shape; the options below narrow it."
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MODE,
            help="Measure a whole model with random weights: a config.json, a folder with one, a model type such as"
            " llama, or package.module:callable. Prefill and decode, with Inductor and with sparsify.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            rich_help_panel=MODE, help="Say what got slower from one file of results to another.", show_default=False
        ),
    ] = None,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless", rich_help_panel=MODE, help="Measure small models without a spec beside the inductor backend."
        ),
    ] = False,
    neighborhood: Annotated[
        bool,
        typer.Option(
            "--neighborhood", rich_help_panel=MODE, help="Measure neighborhoods in grids, and those of video models."
        ),
    ] = False,
    selection: Annotated[
        bool,
        typer.Option(
            "--selection", rich_help_panel=MODE, help="Measure selections from the data, and what choosing costs of it."
        ),
    ] = False,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode", rich_help_panel=MODE, help="Measure one query over a long cache beside the rate of memory."
        ),
    ] = False,
    mixture: Annotated[
        bool,
        typer.Option(
            "--mixture", rich_help_panel=MODE, help="Measure eight unlike heads in one call beside each of them alone."
        ),
    ] = False,
    overhead: Annotated[
        bool,
        typer.Option(
            "--overhead",
            rich_help_panel=MODE,
            help="Measure eager calls, the passes' part of compiling, and what a longer sequence builds again.",
        ),
    ] = False,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate", rich_help_panel=MODE, help="Predict drawn patterns and shapes, and measure them beside it."
        ),
    ] = False,
    preparation: Annotated[
        bool,
        typer.Option("--preparation", rich_help_panel=MODE, help="Measure what a mask costs before the first tile."),
    ] = False,
    pattern: Annotated[
        list[str] | None, typer.Option(help="Patterns to measure (repeat it). Default: windows.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Sequence lengths. Default: 4096, of a model 2048.", min=1)
    ] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head sizes. Default: 64.", min=1)] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, float16. Default: the first two, of a model the first."),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads. Default: 8.", min=1)] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key heads. Default: as many; in the grid, a quarter, too.", min=1)
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Cases of --lossless, --neighborhood, --selection or --decode (repeat it). Default: all."),
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="A spec that --model runs with, too.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of --model's config, as NAME=VALUE (repeat it).")
    ] = None,
    count: Annotated[int, typer.Option(help="How many patterns --simulate draws.", min=10)] = 80,
    seed: Annotated[
        int | None, typer.Option(help="What --simulate draws from; another one each time, if not given.", min=0)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds, at most.", min=5)] = 30,
    seconds: Annotated[float, typer.Option(help="Time for one case's rounds, about.")] = 6.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write results here (a .json file or a folder).")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw speed-up against density here (a .png or .html file, or a folder for both)."),
    ] = None,
) -> None:
    """Measure sparsify beside dense SDPA, SDPA with the mask, and compiled FlexAttention: one process, interleaved.

    Without options: causal windows 512 of 4096 and 1024 of 8192, head sizes 64 and 128, float32 and bfloat16.
    A case whose numbers miss the oracle's bound is reported as wrong and gets no speed; the exit code is then 1.
    --compare exits with 1 when something got slower by more than 5 % and beyond its spread, --simulate when its errors
    are larger than those of a calibrated machine should be.
    """
    from sparsify.bench import runs
    from sparsify.bench.modes import mode_of

    sources = {name: context.get_parameter_source(name) for name in context.params}
    mode = mode_of([name.rstrip("_") for name, source in sources.items() if source and source.name == "COMMANDLINE"])
    how = runs.How(repeats, seconds, device, json)
    if mode == "compare" and compare is not None:
        holds = runs.compared(*compare)
    elif mode == "model" and model is not None:
        holds = runs.model(model, spec, set_, length, dtype, how)
    elif mode == "lossless":
        holds = runs.lossless(case, dtype, how)
    elif mode == "neighborhood":
        holds = runs.neighborhood(case, how)
    elif mode == "selection":
        holds = runs.selection(case, dtype, how)
    elif mode == "decode":
        holds = runs.decode(case, dtype, how)
    elif mode == "mixture":
        holds = runs.mixture(length, head_dim, dtype, kv_heads, how)
    elif mode == "overhead":
        holds = runs.overhead(how)
    elif mode == "simulate":
        holds = runs.simulate(count, seed, dtype, how)
    elif mode == "preparation":
        holds = runs.preparation()
    else:
        holds = runs.attention(runs.cases(grid, pattern, length, head_dim, dtype, heads, kv_heads), how, plot)
    if not holds:
        raise typer.Exit(1)
