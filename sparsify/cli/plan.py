"""`sparsify plan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparsify.planner.plan import Plan
    from sparsify.planner.samples import Tokenizer

READ, GET, RUN = "What is read and profiled", "What heads may get", "The run"  # panels of the help

Model = Annotated[
    str,
    typer.Argument(
        help="A folder with a Hugging Face model and its weights; or package.module:callable, which returns it.",
        show_default=False,
    ),
]
Data = Annotated[
    list[Path], typer.Option(metavar="PATH", help="Text: a file, or a folder of files (repeat it).", show_default=False)
]
Lengths = Annotated[str, typer.Option(help="Lengths to profile, in tokens.")]
Budget = Annotated[str, typer.Option(help="A share of the dense cost, or a bound such as 'loss +1%'.")]
Of = Annotated[str, typer.Option(help="What it is a share of: time, tiles, pairs, memory.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the spec goes; the plan is beside it, as JSON.")]
Profile = Annotated[
    str,
    typer.Option(
        rich_help_panel=READ,
        help="How losses are profiled: influence, effect, output, recall, local, echo, induction, retrieval, moa,"
        " gates.",
    ),
]
Samples = Annotated[int, typer.Option(metavar="N", rich_help_panel=READ, help="Pieces of text for each length.", min=1)]
Recall = Annotated[
    float | None,
    typer.Option(metavar="SHARE", rich_help_panel=READ, help="The share of them with planted facts to remember."),
]
Rounds = Annotated[
    int, typer.Option(metavar="N", rich_help_panel=READ, help="How often the profile is made again on the way.", min=0)
]
Validate = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", rich_help_panel=READ, help="Text to validate with. Default: the data's end."),
]
ValidateLength = Annotated[
    int | None, typer.Option(rich_help_panel=READ, help="In tokens. Default: a length not profiled.")
]
Candidates = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=GET,
        help="A file of candidates, or kinds, joined by commas: elastic, windows, strides, selectors, neighborhoods.",
    ),
]
Shape = Annotated[str | None, typer.Option(rich_help_panel=GET, help="Of a grid of tokens, for neighborhoods: 64,64.")]
Rules = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=GET, help="Distinct rules that a layer may have.", min=1)
]
DenseLayers = Annotated[str, typer.Option(rich_help_panel=GET, help="Layers that keep everything, such as 0-1.")]
Reuse = Annotated[
    list[str] | None,
    typer.Option(
        metavar="L:L",
        rich_help_panel=GET,
        help="A layer that selects, and those that take its choices: 2:3-5 (repeat it).",
    ),
]
KvGroups = Annotated[
    bool | None,
    typer.Option("--kv-groups/--heads", rich_help_panel=GET, help="One rule a KV group. Default: for memory."),
]
Machine = Annotated[
    str | None, typer.Option(rich_help_panel=RUN, help="Whose time is predicted. Default: this machine.")
]
Dtype = Annotated[str | None, typer.Option(rich_help_panel=RUN, help="Of the weights. Default: the model's.")]
Device = Annotated[str, typer.Option(rich_help_panel=RUN, help="Where the model runs.")]
State = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=RUN, help="A folder that keeps what was profiled, for plans at other budgets.",
        show_default=False,
    ),
]  # fmt: skip
Evidence = Annotated[
    bool,
    typer.Option("--evidence/--no-evidence", rich_help_panel=RUN, help="Draw it beside the spec: a page and a PNG."),
]


def plan(
    model: Model,
    data: Data,
    lengths: Lengths = "1024,2048",
    budget: Budget = "0.5",
    of: Of = "time",
    profile: Profile = "influence",
    out: Out = Path("plan.yaml"),
    candidates: Candidates = None,
    shape: Shape = None,
    validate: Validate = None,
    validate_length: ValidateLength = None,
    samples: Samples = 4,
    recall: Recall = None,
    rounds: Rounds = 2,
    rules: Rules = None,
    kv_groups: KvGroups = None,
    dense_layers: DenseLayers = "",
    reuse: Reuse = None,
    machine: Machine = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    state: State = None,
    evidence: Evidence = True,
) -> None:
    """Choose a pattern for every head of a model, by predicted cost and measured quality, and write the spec.

    Its attentions are caught, candidates are profiled on the text, and a budget is spent on the heads that need it: at
    several shares, of which the one within the budget is taken that does best on text and at a length that no profile
    saw. A run that was killed goes on where it was.
    """
    settings = {
        "lengths": _numbers("lengths", lengths), "budget": budget, "of": of, "profile": profile, "samples": samples,
        "recall": recall, "rounds": rounds, "per_layer": rules, "joined": kv_groups, "dense_layers": dense_layers,
        "reuse": _reuse(reuse or []), "machine": machine, "validate_length": validate_length,
        "shape": None if shape is None else _numbers("shape", shape), **_candidates(candidates),
        "state": state or out.with_name(f"{out.name}.state"), "keep": state is not None,
    }  # fmt: skip
    _check_out(out, settings["state"], evidence)
    _make(model, dtype, device, data, validate, out, evidence, settings)


def _make(
    name: str, dtype: str | None, device: str, data: list[Path], validate: list[Path] | None, out: Path, evidence: bool,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Plans, writes the spec, the plan and its evidence, and prints what was found."""
    from sparsify.cli.evidence import draw_evidence, origin
    from sparsify.cli.output import console
    from sparsify.planner.memory import keep_freed
    from sparsify.planner.samples import read_texts
    from sparsify.planner.terminal import summary

    keep_freed()
    made, tokenizer = _model(name, dtype, device)
    texts = read_texts(data)
    found = _planned(made, texts, validate, tokenizer, name, settings)
    found.spec().save(out, origin(found))
    found.save(out.with_suffix(".plan.json"))
    drawn = draw_evidence(found, made, texts, tokenizer, out) if evidence else []
    console().print(summary(found))
    written = [f"{out}: the spec", f"{out.with_suffix('.plan.json')}: the plan"]
    written += [f"{', '.join(map(str, drawn))}: the evidence"] if drawn else []
    console().print("; ".join(written), soft_wrap=True)


def _planned(
    made: Any, texts: list[str], validate: list[Path] | None, tokenizer: Tokenizer, name: str, settings: dict[str, Any]
) -> Plan:
    from sparsify.planner import plan as make
    from sparsify.planner.samples import read_texts
    from sparsify.progress import Bar

    held_out = read_texts(validate) if validate else None
    with Bar(what="catching the model's attentions") as progress:
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


def _check_out(out: Path, state: Path, evidence: bool) -> None:
    """Raises InputError for a file that can't be made, before the work."""
    from sparsify.files import check_writable

    check_writable(out, "plan: --out")
    for ending in (".plan.json", *((".html", ".png") if evidence else ())):
        check_writable(out.with_suffix(ending), "plan: --out")
    check_writable(state / "profile", "plan: --state")
