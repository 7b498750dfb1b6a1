"""The command line: `sparsify explain | show | plan | import | bench | tune | schema | doctor`.

A command is a function in a module of its own, listed in `COMMANDS`. What a user did wrong is raised as a
SparsifyError anywhere below, and becomes one line on stderr and exit code 2 here, in one place.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sparsify.bench.command import bench
from sparsify.cli.doctor import doctor
from sparsify.cli.explain import explain
from sparsify.cli.import_ import import_
from sparsify.cli.plan import plan
from sparsify.cli.schema import schema
from sparsify.cli.show import show
from sparsify.cli.tune import tune
from sparsify.errors import SparsifyError

COMMANDS = (explain, show, plan, import_, bench, tune, schema, doctor)

app = typer.Typer(
    name="sparsify",
    help="Rewrites the attention of PyTorch models into generated sparse kernels.",
    epilog="In Python: torch.compile(model, backend='sparsify', options={'spec': 'spec.yaml'})",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command(command.__name__.strip("_"))(command)  # `import_` is named as Python allows


def _version(wanted: bool) -> None:
    if wanted:
        from sparsify import __version__

        typer.echo(f"sparsify {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line. Exit codes: 0, 1 for a negative answer, 2 for what the user gave wrongly."""
    try:
        app(prog_name="sparsify")
    except SparsifyError as error:
        print(f"sparsify: {error}", file=sys.stderr)
        sys.exit(2)
