"""The command line. Results go to stdout, all else to stderr; exit codes: 0 done, 2 usage, 3 bad input,
4 interrupted (a run directory can be gone on with)."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuxent import __version__
from gpuxent.cli.about import demo, info
from gpuxent.cli.calibrating import calibrate
from gpuxent.cli.comparing import compare
from gpuxent.cli.files import convert, inspect
from gpuxent.cli.reporting import plot, report
from gpuxent.cli.scoring import perplexity

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

for command in (perplexity, compare, calibrate, report, plot, inspect, convert, demo, info):  # as the help shows them
    app.command()(command)


def show_version(value: bool) -> None:
    if value:
        typer.echo(f"gpuxent {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Cross-entropy and perplexity over huge vocabularies."""


def main() -> None:
    app()
