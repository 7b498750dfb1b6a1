"""What commands print on: results on stdout, remarks on stderr."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console


def console() -> Console:
    """The console of results: 80 columns and no colour where it isn't a terminal."""
    return Console(highlight=False)


def remark(text: str) -> None:
    """A line for people, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="yellow", markup=False)


def print_json(value: Any) -> None:
    """The value as JSON, on stdout."""
    typer.echo(json.dumps(value, indent=2))
