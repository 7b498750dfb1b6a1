"""`sparsify explain`."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A local folder with a Hugging Face config.json, or package.module:callable, which is called without"
            " arguments and returns (model, args, kwargs).",
            show_default=False,
        ),
    ],
    spec: Annotated[Path | None, typer.Option(help="The spec; without one, what the model's own masks give.")] = None,
    length: Annotated[int, typer.Option("--length", "-n", help="Tokens, for a Hugging Face model.", min=1)] = 512,
    batch: Annotated[int, typer.Option(help="Sequences, for a Hugging Face model.", min=1)] = 1,
    attn: Annotated[Literal["eager", "sdpa"], typer.Option(help="How a Hugging Face model attends.")] = "sdpa",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a site is refused.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which attention of a model is found, what its mask is, and what each head would keep; and why not.

    The model is run once, without gradients, and no kernel is built. Of a Hugging Face model only the structure
    counts: weights aren't read, so the folder needs a config.json only.
    """
    import torch

    import sparsify
    from sparsify.cli.output import console, print_json, progress

    with progress() as bar:
        bar.add_task("loading the model", total=None)
        made, args, kwargs = _called(model) if ":" in model else _from_config(Path(model), length, batch, attn)
        bar.add_task("capturing it", total=None)
        with torch.no_grad():
            report = sparsify.explain(made, *args, spec=spec, **kwargs)
    if json:
        print_json(report.to_dict())
    else:
        console().print(report)
    if strict and report.refused:
        raise typer.Exit(1)


def _called(name: str) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """What the user's callable returns."""
    from sparsify.errors import InputError

    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"explain: '{name}' can't be imported: {error}") from None
    found = function()
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise InputError(f"explain: {name}() must return (model, args) or (model, args, kwargs), found {type(found)}")
    made, args, *rest = found
    return made, tuple(args), rest[0] if rest else {}


def _from_config(folder: Path, length: int, batch: int, attn: str) -> tuple[Any, tuple[()], dict[str, Any]]:
    """A Hugging Face model of that structure with memory for weights but no values in it, and token inputs."""
    from sparsify.errors import InputError

    if not (folder / "config.json").is_file():
        what = "is not a folder with a config.json, and not package.module:callable"
        raise InputError(f"explain: '{folder}' {what}")
    try:
        import transformers
        from transformers.initialization import no_init_weights
    except ImportError:
        raise InputError("explain: a Hugging Face model needs transformers: pip install 'sparsify[demo]'") from None
    import torch

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
        kind = getattr(transformers, name, transformers.AutoModelForCausalLM)
        config._attn_implementation = attn
        with no_init_weights(), _dtype(getattr(config, "dtype", None)):
            made = kind(config) if issubclass(kind, transformers.PreTrainedModel) else kind.from_config(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"explain: {folder}: transformers can't make this model: {str(error).splitlines()[0]}"
        ) from None
    if made.main_input_name != "input_ids":
        raise InputError(f"explain: {name} reads {made.main_input_name}; give it as package.module:callable")
    tokens = torch.zeros(batch, length, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    return made.eval(), (), inputs


@contextlib.contextmanager
def _dtype(dtype: Any) -> Iterator[None]:
    """New parameters in this dtype, if it is one."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
