"""What commands print on: results on stdout; progress and remarks on stderr, progress only at a terminal."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def console() -> Console:
    """The console of results: 80 columns and no colour where it isn't a terminal."""
    return Console(highlight=False)


def remark(text: str) -> None:
    """A line for people, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="yellow", markup=False)


def progress() -> Progress:
    """Progress on stderr that goes away when done, and that says nothing where nobody looks."""
    terminal = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)


def print_json(value: Any) -> None:
    """The value as JSON, on stdout."""
    typer.echo(json.dumps(value, indent=2))
