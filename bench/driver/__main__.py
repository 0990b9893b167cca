"""The command line: `python -m bench.driver --help`. The table goes to stdout, all else to stderr."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import figures, machine
from bench.cpu.machine import describe
from bench.driver import blocks, processes, threads
from bench.driver.data import WrongResult
from bench.figures import Figure, Report
from bench.timing import Plan

MIB = 2**20
TIMING, ONCE = Plan(seconds=15, least=7, most=60), Plan(seconds=0.2, least=1, most=3)

# What is measured in full, and quickly: small, to see that all of it works.
PARTS: dict[str, tuple[Callable[[], Iterator[Figure]], Callable[[], Iterator[Figure]]]] = {
    "backend": (
        lambda: threads.against_the_backend(512 * MIB, TIMING),
        lambda: threads.against_the_backend(MIB, ONCE),
    ),
    "overlap": (
        lambda: threads.overlap(32, 32 * MIB, TIMING),
        lambda: threads.overlap(8, MIB, ONCE),
    ),
    "processes": (
        lambda: processes.two_against_one(4096 * MIB, TIMING),
        lambda: processes.two_against_one(4 * MIB, ONCE),
    ),
    "overhead": (lambda: blocks.overhead(1000, TIMING), lambda: blocks.overhead(50, ONCE)),
    "memory": (
        lambda: blocks.memory(1_000_000, 200_000, 100_000),
        lambda: blocks.memory(10_000, 1000, 1000),
    ),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
errors = Console(stderr=True, highlight=False)


@app.command()
def bench(
    parts: Annotated[
        list[str] | None, typer.Argument(metavar="[PART]...", help=f"Some of {', '.join(PARTS)}; all by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small: half a minute, to see that all of it works.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write driver.json there.", file_okay=False)
    ] = None,
) -> None:
    """What the driver costs beside the work itself: on threads, on processes, per block, in memory.

    Each part is first compared with the serial run, bit for bit: what differs is not timed, and the exit status is 1.
    A full run of all parts writes its results to bench/results; others write only where --output says.
    """
    for name in parts or []:
        if name not in PARTS:
            errors.print(f"bench: there is no part {name!r}; there are {', '.join(PARTS)}", markup=False)
            raise typer.Exit(2)
    found: list[Figure] = []
    try:
        for name in parts or PARTS:
            errors.print(f"{name} ...")
            found += PARTS[name][quick]()
    except WrongResult as error:
        errors.print(f"bench: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    report = Report(
        device=describe(),
        versions=machine.versions() | {name: version(name) for name in ("distributed", "pyarrow")},
        commit=machine.commit(),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        command=shlex.join(["python", "-m", "bench.driver", *sys.argv[1:]]),
        figures=tuple(found),
    )
    figures.show(report, Console(width=None if sys.stdout.isatty() else 160))
    if output is None and not parts and not quick:
        output = machine.ROOT / "bench" / "results"
    if output is not None:
        figures.write(report, output / "driver.json")
        errors.print(f"wrote {output / 'driver.json'}", soft_wrap=True)


if __name__ == "__main__":
    app()
