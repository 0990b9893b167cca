"""The command line: `python -m bench --help`. The table goes to stdout, all else to stderr."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import machine, report, results
from bench.cases import CASES, QUICK, TASKS, Case, select
from bench.results import CaseResult, Run
from bench.run import FULL as FULL_PLAN
from bench.run import QUICK as QUICK_PLAN
from bench.run import measure
from bench.timing import Plan

USAGE = 2


class Device(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
errors = Console(stderr=True, highlight=False)


@app.command()
def bench(
    patterns: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help='Names or globs, such as "loss-*"; all by default.')
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    quick: Annotated[bool, typer.Option("--quick", help="Small cases, few rounds: under a minute in all.")] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="Show the cases and stop.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write DEVICE.json and DEVICE.png there.", file_okay=False),
    ] = None,
) -> None:
    """Time gpuxent beside its rivals and the machine's own limit.

    Every contender is first compared with an oracle; a case in which gpuxent itself is wrong is not timed, is shown
    as FAILED, and makes the exit status 1. A run of all cases writes bench/results/DEVICE.json and DEVICE.png; a run
    of some, or a quick one, writes only where --output says. Nothing is written after a failure.
    """
    if device is Device.gpu:
        stop("there is no GPU backend to measure yet; leave out --device gpu")
    try:
        chosen = select(patterns or [], QUICK if quick else CASES)
    except ValueError as error:
        stop(str(error))
    if list_cases:
        for case in chosen:
            print(f"{case.name:24} {case.logits_bytes / 1e6:6.1f} MB  {TASKS[case.task].what}")
        return
    if output is None and not patterns and not quick:
        output = machine.ROOT / "bench" / "results"
    run = run_all(chosen, QUICK_PLAN if quick else FULL_PLAN)
    report.show(run, Console(width=None if sys.stdout.isatty() else 120))
    if run.failed:
        raise typer.Exit(1)
    if output is not None:
        results.write(run, output / f"{device}.json")
        report.draw(run, output / f"{device}.png")
        errors.print(f"wrote {output / device}.json and .png", soft_wrap=True)


def run_all(cases: list[Case], plan: Plan) -> Run:
    left_out: Counter[str] = Counter()
    done: list[CaseResult] = []
    columns = TextColumn("{task.description:56}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("", total=len(cases))
        for case in cases:

            def say(what: str, case: Case = case) -> None:
                progress.update(bar, description=f"{case.name}: {what}")

            result = measure(case, plan, say, left_out)
            done.append(result)
            progress.advance(bar)
            progress.console.print(f"{len(done)}/{len(cases)} {report.one_line(result)}", markup=False)
    return Run(
        device=machine.describe_cpu(),
        versions=machine.versions(),
        commit=machine.commit(),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        command=shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        cases=tuple(done),
        left_out=dict(left_out),
    )


def stop(message: str) -> NoReturn:
    errors.print(f"bench: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(USAGE)


if __name__ == "__main__":
    app()
