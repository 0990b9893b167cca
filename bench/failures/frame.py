"""What the failures share: a line (theirs, ours, the truth), its verdict, the table, and the exit status."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

EXACT = 1e-12  # relative: what gpuxent may differ by from the truth
FLOAT32 = 4 * float(np.finfo(np.float32).eps)  # the same for logits of at most 32 bits, which are computed in float32
FAILS = 1e-3  # relative: a rival that differs by more is wrong, whatever its precision
INSTALL = "pip install 'gpuxent[failures]'"


@dataclass(frozen=True)
class Raised:
    """An outcome that is no number: the name of an exception, and what it says."""

    kind: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


@dataclass(frozen=True)
class Missing:
    """A rival that is not installed."""

    package: str

    def __str__(self) -> str:
        return "not installed"


Outcome = float | Raised
Call = Callable[[], float]


@dataclass(frozen=True)
class Line:
    """One quantity, as a rival gets it, as gpuxent gets it, and as it is."""

    what: str
    rival: str
    theirs: Outcome | Missing
    ours: Outcome
    truth: Outcome
    within: float = EXACT

    @property
    def right(self) -> bool:
        return agree(self.ours, self.truth, self.within)

    @property
    def fails(self) -> bool | None:
        """Whether the rival is wrong; None where it is not installed."""
        return None if isinstance(self.theirs, Missing) else not agree(self.theirs, self.truth, FAILS)


def agree(found: Outcome, truth: Outcome, within: float) -> bool:
    """Whether numbers are the same up to a relative error; exceptions if they say, among else, what they have to."""
    if isinstance(found, Raised) or isinstance(truth, Raised):
        both = isinstance(found, Raised) and isinstance(truth, Raised)
        return both and found.kind == truth.kind and truth.text in found.text
    return found == truth or (math.isfinite(truth) and abs(found - truth) <= within * abs(truth))


def outcome(call: Call) -> Outcome:
    try:
        return float(call())
    except Exception as error:
        return raised(error)


def rival(call: Call) -> Outcome | Missing:
    """As `outcome`, without a rival's warnings: what counts here is the number it returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(call())
        except ModuleNotFoundError as error:
            return Missing((error.name or "a package").partition(".")[0].replace("_", "-"))
        except Exception as error:
            return raised(error)


def raised(error: Exception) -> Raised:
    lines = str(error).splitlines()
    return Raised(type(error).__name__, lines[0] if lines else "")


# ---- a failure ----


@dataclass(frozen=True)
class Failure:
    """A script: `lines(quick)` computes all that is shown, slowly or quickly."""

    name: str
    why: str  # one sentence: the cause
    lines: Callable[[bool], Iterable[Line]]
    note: Callable[[bool], str] = lambda quick: ""  # how the numbers were got, where that is not plain


def report(failures: list[Failure], quick: bool) -> int:
    """Runs and shows them. The exit status: 1 if gpuxent is wrong; a rival that fails no longer is news, no error."""
    started = perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    lines = [line for failure in failures for line in show(failure, quick, console)]
    how = " with --quick" if quick else ""
    console.print(f"\n{summary(lines)}; {perf_counter() - started:.0f} s{how}", style="bold")
    return 0 if all(line.right for line in lines) else 1


def show(failure: Failure, quick: bool, console: Console) -> list[Line]:
    started = perf_counter()
    lines = list(failure.lines(quick))
    console.print(Text.assemble("\n", (failure.name, "bold"), f"  {failure.why}"))
    console.print(table(lines))
    for package in dict.fromkeys(line.theirs.package for line in lines if isinstance(line.theirs, Missing)):
        console.print(f"  {package} is not installed, so its side is not shown: {INSTALL}", markup=False)
    if note := failure.note(quick):
        console.print(f"  {note}", markup=False)
    console.print(f"  {perf_counter() - started:.1f} s", style="dim")
    return lines


def summary(lines: list[Line]) -> str:
    there = [line for line in lines if line.fails is not None]
    wrong = sum(line.fails is True for line in there)
    parts = [
        f"gpuxent right in {sum(line.right for line in lines)} of {len(lines)}",
        f"rivals wrong in {wrong} of {len(there)}",
    ]
    if wrong < len(there):
        parts.append(f"no longer failing: {', '.join(line.rival for line in there if not line.fails)}")
    if len(there) < len(lines):
        parts.append(f"not installed in {len(lines) - len(there)}")
    return "; ".join(parts)


def table(lines: tuple[Line, ...]) -> Table:
    result = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("  what", "rival", "theirs", "ours", "truth", "verdict"):
        result.add_column(name, overflow="fold", no_wrap=name in ("  what", "rival", "verdict"))
    for line in lines:
        exact = line.truth.kind if isinstance(line.truth, Raised) else written(line.truth)
        cells = [f"  {line.what}", line.rival, written(line.theirs), written(line.ours), exact]
        result.add_row(*map(Text, cells), verdict(line))
    return result


def written(found: Outcome | Missing) -> str:
    if not isinstance(found, float):
        return str(found)
    counted = found.is_integer() and 1e6 <= found < 1e15
    return f"{found:,.0f}" if counted else f"{found:.6g}"


def verdict(line: Line) -> Text:
    wrong = "theirs raises" if isinstance(line.theirs, Raised) else "theirs wrong"
    theirs = {None: "", True: wrong, False: "theirs no longer fails"}[line.fails]
    own = ("ours right", "green") if line.right else ("OURS WRONG", "bold red")
    return Text.assemble((theirs, "yellow"), ", " if theirs else "", own)


def main(failure: Failure, arguments: list[str] | None = None) -> int:
    """The command line of one failure's module."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.failures.{failure.name}", description=failure.why)
    parser.add_argument("--quick", action="store_true", help="what is slow, smaller")
    quick = parser.parse_args(arguments).quick
    return report([failure], quick)
