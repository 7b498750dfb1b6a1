"""`results.json`: what a whole walk found, kept so that the README's table is generated and a later walk compared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from tests.zoo.walk import Result

PATH = Path(__file__).parent / "results.json"
README = Path(__file__).parents[2] / "README.md"
KEPT = ("entry", "family", "implementation", "call", "dynamic", "held_out", "expected", "outside", "found", "false",
        "rewritten", "refused", "masks", "failed_in")  # fmt: skip
UNSET = {field.name: field.default for field in fields(Result)}


def save(results: Iterable[Result], path: Path = PATH) -> None:
    """Writes one line a run, in order; what has its default is left out."""
    lines = [json.dumps(_brief(result)) for result in sorted(results, key=lambda result: result.name)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def _brief(result: Result) -> dict[str, Any]:
    values = {name: getattr(result, name) for name in KEPT}
    return {name: value for name, value in values.items() if value and value != UNSET[name]}


def load(path: Path = PATH) -> list[Result]:
    return [Result(**{"dynamic": False, **line}) for line in json.loads(path.read_text())] if path.exists() else []


def merge(old: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """The old results with those of a new walk in their place."""
    return list({result.name: result for result in [*old, *new]}.values())


def readme_with(block: str, text: str) -> str:
    """The README's text with the block between its markers."""
    from tests.zoo.table import BEGIN, END

    before, _, rest = text.partition(BEGIN)
    return before + block + rest.partition(END)[2]
