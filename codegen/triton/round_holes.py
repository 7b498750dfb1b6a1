"""What fills the skeleton's holes for a round: where its lists lie, and what is kept of their tiles."""

from __future__ import annotations

from typing import Any

from sparsify.codegen.triton.expressions import TritonPrinter
from sparsify.codegen.triton.listing import Round
from sparsify.codegen.triton.summaries import list_rule, split
from sparsify.expr import TRUE, Pred

Texts = tuple[str, str]


def round_holes(turn: Round, printer: TritonPrinter) -> dict[str, Any]:
    """The round's holes; a text that depends on the rule comes with a test of it, `when`, None for always."""
    keeps = [None if step is None else step.keep for step in turn.steps]
    beside = [None if keep is None else split(keep)[1] for keep in keeps]
    numbers = range(len(keeps))
    reads = _grouped([_read(turn, number, printer) for number in numbers])
    kinds = _grouped([_kind(turn, number, printer) for number in numbers])
    if len(kinds) == 1:  # rules without a list have no tiles to ask about
        kinds = [(None, texts) for _, texts in kinds]
    return {
        "unit": turn.unit,
        "source": next(step.listed.index.source for step in turn.steps if step is not None),
        "reads": [{"when": when, "entries": texts[0], "count": texts[1]} for when, texts in reads],
        "kinds": [{"when": when, "empty": texts[0], "full": texts[1]} for when, texts in kinds],
        "keep": [_and(keep, printer) for keep in keeps],
        "beside": [_and(keep, printer) for keep in beside],
        "tested": any(keep not in (None, TRUE) for keep in beside),
    }


def _and(pred: Pred | None, printer: TritonPrinter) -> str:
    return "" if pred is None or pred == TRUE else f" & {printer.text(pred)}"


def _read(turn: Round, number: int, printer: TritonPrinter) -> Texts | None:
    """A pointer to a rule's list, and its count."""
    listed = turn.read(number)
    return None if listed is None else (printer.place(listed.index), printer.text(listed.count))


def _kind(turn: Round, number: int, printer: TritonPrinter) -> Texts | None:
    """When a rule keeps nothing of a tile, and when all of it."""
    step = turn.steps[number]
    if step is None:
        return None
    empty, full = list_rule(step)
    return printer.text(empty), printer.text(full)


def _grouped(texts: list[Texts | None]) -> list[tuple[str | None, Texts]]:
    """The distinct texts, each with a test for the rules that have it; None where all rules do."""
    groups: dict[Texts, list[int]] = {}
    for number, text in enumerate(texts):
        if text is not None:
            groups.setdefault(text, []).append(number)
    if len(groups) == 1 and None not in texts:
        return [(None, text) for text in groups]
    return [(" | ".join(f"(rule == {number})" for number in rules), text) for text, rules in groups.items()]
