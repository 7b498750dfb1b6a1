"""`sparsify explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from sparsify.models import Wanted
    from sparsify.report import Report


def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face config.json or a folder with one; a model type of transformers, such as llama; or"
            " package.module:callable, called without arguments, which returns a model, (model, inputs) or"
            " (model, args, kwargs).",
            show_default=False,
        ),
    ],
    spec: Annotated[Path | None, typer.Option(help="The spec; without one, what the model's own masks give.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the config, as NAME=VALUE (repeat it).")
    ] = None,
    length: Annotated[int, typer.Option("--length", "-n", help="Tokens, for a Hugging Face model.", min=1)] = 512,
    batch: Annotated[int, typer.Option(help="Sequences, for a Hugging Face model.", min=1)] = 1,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights. Default: the config's.")
    ] = None,
    attn: Annotated[str, typer.Option(help="How a Hugging Face model attends: eager, sdpa, flex_attention.")] = "sdpa",
    padding: Annotated[
        bool, typer.Option("--padding", help="Give an attention mask, with padding on the left.")
    ] = False,
    decode: Annotated[bool, typer.Option("--decode", help="One more token, with a cache of all before it.")] = False,
    target: Annotated[
        Literal["auto", "cpp", "triton", "null"] | None, typer.Option(help="Who would run it. Default: auto.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a site is refused.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which attention of a model is found, what its mask is, and what each head would keep; and why not.

    No kernel is built. Of a Hugging Face model only the structure counts: it is followed with fake tensors, so models
    of any size can be asked about, and nothing is downloaded. A callable's model is run once, without gradients.
    """
    from sparsify.cli.output import console, print_json
    from sparsify.models import Wanted, overrides
    from sparsify.progress import progress

    wanted = Wanted(length, batch, dtype, attn, padding, decode, overrides(set_ or []))
    with progress() as bar:
        bar.add_task("capturing the model", total=None)
        report = _report(model, wanted, {"spec": spec, "target": target})
    if json:
        print_json(report.to_dict())
    else:
        console().print(report)
    if strict and report.refused:
        raise typer.Exit(1)


def _report(model: str, wanted: Wanted, options: dict[str, Any]) -> Report:
    import torch

    import sparsify
    from sparsify.models import called, of_config

    def report(made: Any, args: Any, kwargs: Any) -> Report:
        return sparsify.explain(made, *args, **options, **kwargs)

    with torch.no_grad():
        return report(*called(model, wanted)) if ":" in model else of_config(model, wanted, report)
