"""What figures of several runs have in common: series, their columns, and words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import HEIGHT, Figure
from gpuxent.evaluation.reports.figures.style import Z95, legend_height, shown
from gpuxent.evaluation.reports.reported import ReportedRun
from gpuxent.evaluation.reports.tables import decimal

Runs = Sequence[ReportedRun]
Columns = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Series:
    """What a figure shows of a run."""

    number: int  # the run's place in the report: it has the same colour in all figures
    run: ReportedRun
    columns: Columns
    alone: bool  # no other run is in the report

    @property
    def id(self) -> str:
        """Of its line in a drawing."""
        return f"marks-{self.number}"

    @property
    def label(self) -> str:
        return shown(self.run.name)


def series_of(runs: Runs, columns: Callable[[ReportedRun], Columns | None]) -> list[Series]:
    """Of the runs that have some."""
    made = [(number, run, columns(run)) for number, run in enumerate(runs)]
    return [Series(number, run, part, len(runs) == 1) for number, run, part in made if part is not None]


def figure_of(
    found: Sequence[Series],
    name: str,
    title: str,
    about: str,
    words: Callable[[Series], str],
    draw: Callable[[Any], None],
    tips: Callable[[Series], Sequence[str]] = lambda each: (),
    height: float = HEIGHT,
) -> Figure:
    """Described by what it is about, and what is said of each series; with their columns one after the other. `tips`
    are those of the marks of the line that has the series' id."""
    said = [about]
    for each in found:
        of_run = "" if each.alone else f"{each.label}: "
        said += [of_run + text for text in (words(each), *caveats(each.run))]
    columns: dict[str, list[Any]] = {"run": []}
    for each in found:
        columns["run"] += [each.run.name] * len(next(iter(each.columns.values())))
        for column, values in each.columns.items():
            columns.setdefault(column, []).extend(values.tolist())
    subject = found[0].run.name if len(found) == 1 else ""
    if name != "headline" and not found[0].alone:  # which has the names beside its axes
        height += legend_height([each.label for each in found])
    return Figure(name, title, " ".join(said), columns, draw, subject, height, {each.id: tips(each) for each in found})


def caveats(run: ReportedRun) -> list[str]:
    """What must be known of its numbers: rows that are missing, and losses that are not finite."""
    r, found = run.result, partial(run.result.share)
    if r.infinite_rows:
        found.append(tokens(r.infinite_rows, " has", " have") + " an infinite loss.")
    if r.nan_rows:
        found.append(tokens(r.nan_rows, " has", " have") + " a loss of NaN.")
    return found


def partial(share: float) -> list[str]:
    """What to say of a run of which only so much is done."""
    return [f"Partial: {math.floor(1000 * share) / 10:g} % of the rows are done."] if share < 1 else []


def tokens(count: int, one: str = "", more: str = "") -> str:
    """1 token, 2 tokens; with the verb that goes with it."""
    return f"1 token{one}" if count == 1 else f"{count:,} tokens{more or one}"


def short(value: float) -> str:
    """In four digits."""
    return f"{value:.4g}" if math.isfinite(value) else decimal(value)


def half_width(run: ReportedRun) -> float:
    """Of the 95 % interval of the cross-entropy; NaN if it has none."""
    r = run.result
    return Z95 * (r.stderr_cluster if _clustered(run) else r.stderr_iid)  # type: ignore[operator]


def _clustered(run: ReportedRun) -> bool:
    stderr = run.result.stderr_cluster
    return stderr is not None and math.isfinite(stderr)


def interval_words(run: ReportedRun) -> str:
    half, value = half_width(run), run.result.cross_entropy
    text = f"{decimal(value)} nats per token"
    if not math.isfinite(half):
        return text
    by = "documents" if _clustered(run) else "tokens"
    return f"{text} (95 % interval {decimal(value - half)} to {decimal(value + half)}, {by} taken as independent)"
