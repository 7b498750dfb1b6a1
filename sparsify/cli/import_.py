"""`sparsify import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparsify.imports import Imported

PlanFile = Annotated[
    Path,
    typer.Argument(
        help="A plan of MoA (alphas and betas), DuoAttention (full_attention_heads.tsv and config.json, or their"
        " folder) or MInference (a class and two numbers by head), or scores of retrieval heads.",
        show_default=False,
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The spec to write, YAML or JSON. Default: print it.")]
Format = Annotated[
    str | None,
    typer.Option(help="moa, duo_attention, minference or retrieval_heads. Default: what the file looks like."),
]
Model = Annotated[str | None, typer.Option(help="Compare with this model's layers and heads; as for sparsify explain.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="A field of the model's config, as NAME=VALUE (repeat it).")
]
QueryHeads = Annotated[
    int | None,
    typer.Option(help="Query heads a layer: DuoAttention's gates are by KV head; of others, what has to be planned."),
]
Sparsity = Annotated[
    float | None, typer.Option(help="DuoAttention: the share of KV heads that stream. Default: the config's.")
]
Threshold = Annotated[
    float | None,
    typer.Option(help="The gate (DuoAttention; 0.5) or mean score (0.1) from which a head is dense."),
]
Top = Annotated[int | None, typer.Option(help="Scores of retrieval heads: how many of the best are dense.")]
Sinks = Annotated[int | None, typer.Option(help="First keys that streaming heads keep.")]
Recent = Annotated[int | None, typer.Option(help="Latest keys that streaming heads keep.")]
MaxNew = Annotated[int | None, typer.Option(help="MoA: tokens to be generated, counted by its spans. Default: 1024.")]


def import_(
    path: PlanFile,
    out: Out = None,
    format: Format = None,
    model: Model = None,
    set_: Set = None,
    query_heads: QueryHeads = None,
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    top: Top = None,
    sinks: Sinks = None,
    recent: Recent = None,
    max_new: MaxNew = None,
) -> None:
    """Turn a plan of another system into a spec: which heads keep what, by the preset of that system's rule.

    Every head is named in the spec, so a model with other heads is an error when it is compiled; --model says so now.
    """
    from sparsify.errors import InputError
    from sparsify.files import check_writable
    from sparsify.imports import load
    from sparsify.models import overrides

    if model is not None and query_heads is not None:
        raise InputError("import: --query-heads and --model both say how many heads there are; give one")
    if model is None and set_:
        raise InputError("import: --set goes with --model only")
    if out is not None and path.exists() and out.exists() and out.samefile(path):
        raise InputError(f"import: --out: '{out}' is the plan itself, which would be lost; give another file")
    if out is not None:
        check_writable(out, "import: --out")
    given = {
        "sparsity": sparsity, "threshold": threshold, "top": top, "sinks": sinks, "recent": recent,
        "max_new": max_new,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    found = load(path, format, query_heads=query_heads, **options)
    if model is not None:
        found = found.for_heads(*_heads(model, overrides(set_ or [])))
    if out is None:
        from sparsify.spec.dump import yaml_text

        typer.echo(yaml_text(found.spec().to_dict(), found.comment()), nl=False)
        return
    found.spec().save(out, found.comment())
    _tell(found, out)


def _tell(found: Imported, out: Path) -> None:
    from rich import box
    from rich.table import Table

    from sparsify.cli.output import console, remark

    total = sum(found.counts().values())
    table = Table("pattern", "heads", "share", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, count in found.counts().items():
        table.add_row(name, f"{count}", f"{count / total:.1%}")
    console().print(f"{found.format}, {found.shape()}: {out}", markup=False)
    console().print(table)
    if found.by_kv_head:
        remark("gates of KV heads are taken as those of query heads; --query-heads or --model says how many there are")
    for note in found.notes:
        console().print(note, markup=False)


def _heads(model: str, fields: dict[str, Any]) -> tuple[dict[int, int], str, dict[int, int]]:
    """The query heads of each layer that attends, of a model as `sparsify explain` takes it, its name, and its KV heads
    where several query heads share one."""
    import torch

    import sparsify
    from sparsify.models import Wanted, called, of_config
    from sparsify.progress import progress
    from sparsify.report import Report

    def report(made: Any, args: Any, kwargs: Any) -> Report:
        return sparsify.explain(made, *args, **kwargs)

    wanted = Wanted(length=64, overrides=fields, command="import")
    with progress() as bar, torch.no_grad():
        bar.add_task("capturing the model", total=None)
        found = report(*called(model, wanted)) if ":" in model else of_config(model, wanted, report)
    known = [(site.layer, site.heads, site.kv_heads) for site in found.sites if site.layer is not None and site.heads]
    shared = {layer: kv_heads for layer, heads, kv_heads in known if kv_heads is not None and kv_heads < heads}
    return {layer: heads for layer, heads, _ in known}, model, shared
