"""The command line: `python -m bench --help`. The table goes to stdout, all else to stderr."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import devices, machine, report, results
from bench.cases import TASKS, Case, select
from bench.devices import Device
from bench.results import CaseResult, Run
from bench.run import measure
from bench.timing import Plan

USAGE = 2


class On(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
errors = Console(stderr=True, highlight=False)


@app.command()
def bench(
    patterns: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help='Names or globs, such as "loss-*"; all by default.')
    ] = None,
    on: Annotated[On, typer.Option("--device", help="Where to compute.")] = On.cpu,
    quick: Annotated[bool, typer.Option("--quick", help="Small cases, few rounds: a minute in all.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no case after so long; results then lack the cases left.")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Show the cases and stop.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write cpu.json, or gpu-MODEL.json, and .png there.", file_okay=False),
    ] = None,
) -> None:
    """Time gpuxent beside its rivals and the machine's own limit.

    Every contender is first compared with an oracle; a case in which gpuxent itself is wrong is not timed, is shown
    as FAILED, and makes the exit status 1. A run of all cases writes its results to bench/results, if none failed; a
    run of some, or a quick one, writes only where --output says.
    """
    try:
        device = devices.device(on)
        chosen = select(patterns or [], device.quick if quick else device.cases)
    except (RuntimeError, ValueError) as error:
        stop(str(error))
    if list_cases:
        for case in chosen:
            print(f"{case.name:24} {case.logits_bytes / 1e6:6.1f} MB  {TASKS[case.task].what}")
        return
    until = None if minutes is None else monotonic() + 60 * minutes
    run = run_all(chosen, device, device.quick_plan if quick else device.plan, until)
    report.show(run, Console(width=None if sys.stdout.isatty() else 120))
    if output is None and not patterns and not quick and not run.failed:
        output = machine.ROOT / "bench" / "results"
    if output is not None:
        name = device.results()
        results.write(run, output / f"{name}.json")
        report.draw(run, output / f"{name}.png")
        errors.print(f"wrote {output / name}.json and .png", soft_wrap=True)
    if run.failed:
        raise typer.Exit(1)


def run_all(cases: list[Case], device: Device, plan: Plan, until: float | None = None) -> Run:
    left_out: Counter[str] = Counter()
    done: list[CaseResult] = []
    columns = TextColumn("{task.description:56}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("", total=len(cases))
        for case in cases:
            if until is not None and monotonic() > until:
                left_out["all: no time was left"] += 1
                continue

            def say(what: str, case: Case = case) -> None:
                progress.update(bar, description=f"{case.name}: {what}")

            result = measure(case, device, plan, say, left_out)
            done.append(result)
            progress.advance(bar)
            progress.console.print(f"{len(done)}/{len(cases)} {report.one_line(result)}", markup=False)
    return Run(
        device=device.describe(),
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
