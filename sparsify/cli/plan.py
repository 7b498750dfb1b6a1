"""`sparsify plan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparsify.planner.plan import Plan
    from sparsify.planner.samples import Tokenizer


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with a Hugging Face model and its weights; or package.module:callable, which returns it.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Option(help="Text to profile with: a file, or a folder of files (repeat it).", show_default=False),
    ],
    lengths: Annotated[str, typer.Option(help="Lengths to profile, in tokens.")] = "1024,2048",
    budget: Annotated[str, typer.Option(help="A share of the dense cost, or a bound such as 'loss +1%'.")] = "0.5",
    of: Annotated[str, typer.Option(help="What it is a share of: time, tiles, pairs, memory.")] = "time",
    profile: Annotated[
        str,
        typer.Option(
            help="How losses are profiled: influence, effect, output, recall, local, echo, induction, retrieval, moa,"
            " gates."
        ),
    ] = "influence",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the spec goes; the plan is beside it, as JSON.")
    ] = Path("plan.yaml"),
    candidates: Annotated[
        str | None,
        typer.Option(help="A file of candidates, or kinds: elastic,windows,strides,selectors,neighborhoods."),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Of a grid of tokens, for neighborhoods: 64,64.")] = None,
    validate: Annotated[list[Path] | None, typer.Option(help="Text to validate with. Default: the data's end.")] = None,
    validate_length: Annotated[int | None, typer.Option(help="Tokens. Default: a length not profiled.")] = None,
    samples: Annotated[int, typer.Option(help="Pieces of text for each length.", min=1)] = 4,
    recall: Annotated[float | None, typer.Option(help="The share of them with planted facts to remember.")] = None,
    rounds: Annotated[int, typer.Option(help="How often the profile is made again on the way.", min=0)] = 2,
    rules: Annotated[int | None, typer.Option(help="Distinct rules that a layer may have.", min=1)] = None,
    kv_groups: Annotated[
        bool | None, typer.Option("--kv-groups/--heads", help="One rule a KV group. Default: for memory.")
    ] = None,
    dense_layers: Annotated[str, typer.Option(help="Layers that keep everything, such as 0-1.")] = "",
    reuse: Annotated[
        list[str] | None, typer.Option(help="A layer that selects, and those that take its choices: 2:3-5 (repeat it).")
    ] = None,
    machine: Annotated[str | None, typer.Option(help="Whose time is predicted. Default: this machine.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights. Default: the model's.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    state: Annotated[
        Path | None,
        typer.Option(help="A folder that keeps what was profiled, for plans at other budgets.", show_default=False),
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence/--no-evidence", help="Draw it beside the spec, as a page and a PNG.")
    ] = True,
) -> None:
    """Choose a pattern for every head of a model, by predicted cost and measured quality, and write the spec.

    Its attentions are caught, candidates are profiled on the text, a budget is spent on the heads that need it, and the
    choice is validated on text and at a length that no profile saw. A run that was killed goes on where it was.
    """
    from sparsify.cli.evidence import draw_evidence, origin
    from sparsify.cli.output import console
    from sparsify.planner.memory import keep_freed
    from sparsify.planner.samples import read_texts
    from sparsify.planner.terminal import Bar, summary

    keep_freed()

    settings = {
        "lengths": _numbers("lengths", lengths), "budget": budget, "of": of, "profile": profile, "samples": samples,
        "recall": recall, "rounds": rounds, "per_layer": rules, "joined": kv_groups, "dense_layers": dense_layers,
        "reuse": _reuse(reuse or []),
        "machine": machine, "validate_length": validate_length,
        "shape": None if shape is None else _numbers("shape", shape), **_candidates(candidates),
    }  # fmt: skip
    _check_out(out)
    made, tokenizer = _model(model, dtype, device)
    texts = read_texts(data)
    with Bar() as progress:
        kept = {"state": state or out.with_name(f"{out.name}.state"), "keep": state is not None}
        found = _planned(made, texts, validate, tokenizer, model, progress, settings | kept)
    found.spec().save(out, origin(found))
    found.save(out.with_suffix(".plan.json"))
    drawn = draw_evidence(found, made, texts, tokenizer, out) if evidence else []
    console().print(summary(found))
    written = [f"{out}: the spec", f"{out.with_suffix('.plan.json')}: the plan"]
    written += [f"{', '.join(map(str, drawn))}: the evidence"] if drawn else []
    console().print("; ".join(written), soft_wrap=True)


def _planned(
    made: Any, texts: list[str], validate: list[Path] | None, tokenizer: Tokenizer, name: str, progress: Any,
    settings: dict[str, Any],
) -> Plan:  # fmt: skip
    from sparsify.planner import plan as make
    from sparsify.planner.samples import read_texts

    held_out = read_texts(validate) if validate else None
    return make(
        made, texts, held_out=held_out, tokenizer=tokenizer, name=Path(name).name, progress=progress, **settings
    )


def _model(name: str, dtype: str | None, device: str) -> tuple[Any, Tokenizer]:
    """The model, and how it reads text: by its tokenizer, or by bytes where it has 256 tokens and none."""
    from sparsify.errors import InputError
    from sparsify.models import Wanted, called, loaded
    from sparsify.planner.samples import of_bytes, of_hugging_face

    wanted = Wanted(dtype=dtype, command="plan")
    made, tokenizer = (called(name, wanted)[0], None) if ":" in name else loaded(name, wanted)
    try:
        made = made.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"plan: device: the model can't be moved to '{device}': {reason}") from None
    if tokenizer is not None:
        return made, of_hugging_face(tokenizer)
    size = getattr(getattr(made, "config", None), "vocab_size", 256)
    if size != 256:
        raise InputError(f"plan: {name}: has no tokenizer, and its {size} tokens are no bytes")
    return made, of_bytes()


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from sparsify.errors import InputError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"plan: {name}: expected integers such as 1024,2048, found '{text}'") from None


def _candidates(text: str | None) -> dict[str, Any]:
    """From a file, or the names of kinds."""
    from sparsify.errors import InputError
    from sparsify.planner import candidates

    if text is None:
        return {}
    if Path(text).is_file():
        return {"candidates": candidates.read(text)}
    if os.sep in text or text.endswith((".yaml", ".yml", ".json")):
        raise InputError(f"plan: candidates: there is no file '{text}'")
    return {"kinds": tuple(text.split(","))}


def _reuse(texts: list[str]) -> dict[str, str]:
    from sparsify.errors import InputError

    pairs = [text.partition(":") for text in texts]
    for (source, sign, takers), text in zip(pairs, texts, strict=True):
        if not (source and sign and takers):
            raise InputError(f"plan: reuse: expected a layer and those that take its choices, 2:3-5, found '{text}'")
    return {source: takers for source, _, takers in pairs}


def _check_out(out: Path) -> None:
    from sparsify.errors import InputError

    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder '{out.parent}' does not exist")
