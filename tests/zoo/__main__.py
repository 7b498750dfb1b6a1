"""`python -m tests.zoo`: walk the zoo, or the entries that globs name; print the table, write data and the README."""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console

from tests.zoo import numerics, record
from tests.zoo.entry import Variant, variants
from tests.zoo.registry import HELD_OUT, SURVEYED, available
from tests.zoo.table import details, markdown, table
from tests.zoo.walk import Result, walked


def main(
    globs: Annotated[list[str] | None, typer.Argument(help="names of entries; all by default")] = None,
    held_out: Annotated[bool, typer.Option(help="the held-out entries instead of the main ones")] = False,
    dynamic: Annotated[bool, typer.Option(help="also with dynamic shapes")] = True,
    compare: Annotated[bool, typer.Option(help="also compare numbers: one run of each entry through C++")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write everything that is known here")] = None,
    write: Annotated[bool, typer.Option(help="update results.json and the README's table")] = False,
) -> None:
    """Walks the zoo and prints what is caught."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = Console()
    results = []
    for entry in HELD_OUT if held_out else SURVEYED:
        if not any(fnmatchcase(entry.name, glob) for glob in globs or ["*"]):
            continue
        if not available(entry):
            console.print(f"skipped {entry.name}: {entry.package} is not installed")
            continue
        chosen = [variant for variant in variants(entry) if dynamic or not variant.dynamic]
        results += [_show(console, walked(variant)) for variant in chosen]
        if compare:
            _compare(console, chosen)
    console.print(table("held out" if held_out else "the zoo", results))
    for line in details(results):
        console.print(line, markup=False)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(result) for result in results], indent=1))
    if write:
        _write(results)


def _show(console: Console, result: Result) -> Result:
    sites = result.expected - result.outside
    cost = f"{result.milliseconds / max(result.found, 1):.0f} ms a site"
    console.print(f"{result.name}: {result.found} of {sites} found, {result.rewritten} rewritten, {cost}", markup=False)
    return result


def _compare(console: Console, chosen: list[Variant]) -> None:
    """The last run with static shapes: mostly the padded one."""
    variant = [variant for variant in chosen if not variant.dynamic][-1]
    apart = numerics.difference(variant)
    verdict = "fine" if apart.fine else "WRONG"
    console.print(f"{variant}: off by {apart.found:.1e}, allowed {apart.allowed:.1e}: {verdict}", markup=False)


def _write(results: list[Result]) -> None:
    kept = record.merge(record.load(), results)
    record.save(kept)
    block = markdown([r for r in kept if not r.held_out], [r for r in kept if r.held_out])
    record.README.write_text(record.readme_with(block, record.README.read_text()))


if __name__ == "__main__":
    typer.run(main)
