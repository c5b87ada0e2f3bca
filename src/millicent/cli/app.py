"""`millicent`: the commands, and where errors become one line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import millicent
from millicent.cli.batch import batch
from millicent.cli.convert import convert
from millicent.cli.cost import cost
from millicent.cli.edit import edit
from millicent.cli.gpus import gpus
from millicent.cli.inspect import inspect
from millicent.cli.plan import plan
from millicent.cli.preflight import preflight
from millicent.cli.pull import pull
from millicent.errors import MillicentError

app = typer.Typer(
    name="millicent",
    help="Edit product images with open models, for tens of millicents an image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"millicent {millicent.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Edit product images with open models, for tens of millicents an image."""


# in the order of a first day: will this machine do, which card, the weights, a picture, the bill
app.command()(preflight)
app.command()(gpus)
app.command()(plan)
app.command()(pull)
app.command()(inspect)
app.command()(convert)
app.command()(edit)
app.add_typer(batch, name="batch")
app.add_typer(cost, name="cost")


def main() -> None:
    try:
        app(prog_name="millicent")
    except MillicentError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # typer sees those that come while a command runs, but not those while it cleans up
        sys.exit(130)
