"""Documents, sorted by their mean loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.shared import Runs, caveats, of_run, stacked, subject
from gpuxent.evaluation.reports.figures.style import (
    Z95,
    colour,
    count_axis,
    legend,
    listed,
    note,
    points,
    series,
    shown,
)
from gpuxent.evaluation.reports.reported import ReportedRun

MOST_MARKS = 60  # documents with a mark and a bar each; of more there is a line and thin bars
MOST_POINTS = 300  # of a line: more are not seen
NAMED = 3  # documents at each end


def documents(runs: Runs) -> Figure | None:
    """The documents' mean losses in order, with their errors."""
    runs = [run for run in runs if run.documents]
    if not runs:
        return None
    parts = [_sorted(run) for run in runs]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, (run, part) in enumerate(zip(runs, parts, strict=True)):
            _curve(axes, i, part, shown(run.name))
            axes.axhline(run.result.cross_entropy, color=colour(i), linewidth=1, linestyle=":")
        if len(runs) == 1:
            note(axes, "highest documents\n" + "\n".join(_extremes(parts[0])[1]), "upper left")
            note(axes, "lowest documents\n" + "\n".join(_extremes(parts[0])[0]), "lower right")
        count_axis(axes.xaxis)
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("documents in the order of their loss (dotted: the mean of tokens)")
        axes.set_ylabel("cross-entropy, nats per token")
        legend(axes, [run.name for run in runs])

    words = [of_run(runs, run) + _words(part) for run, part in zip(runs, parts, strict=True)]
    description = (
        "The documents' mean losses in order, with 95 % intervals (tokens of a document taken as independent). "
        + " ".join(words)
        + caveats(runs)
    )
    return Figure("documents", "Loss by document", description, stacked(runs, parts), draw, subject(runs))


def _sorted(run: ReportedRun) -> dict[str, np.ndarray]:
    table = run.documents
    assert table is not None
    order = np.argsort(table.cross_entropy, kind="stable")  # inf, then NaN last
    stderr = np.full(len(table), np.nan) if run.document_stderr is None else run.document_stderr
    means = table.cross_entropy[order]
    return {
        "rank": np.arange(1, len(table) + 1),
        "document": table.document[order],
        "tokens": table.scored[order],
        "cross_entropy": means,
        "stderr_iid": np.where(np.isfinite(means), stderr[order], np.nan),
    }


def _curve(axes: Any, number: int, part: dict[str, np.ndarray], label: str) -> None:
    """Marks with bars, or a line with thin bars."""
    size = int(np.isfinite(part["cross_entropy"]).sum())
    at = np.unique(np.linspace(0, size - 1, min(size, MOST_POINTS)).round().astype(np.int64))
    x, y, stderr = (part[name][at] for name in ("rank", "cross_entropy", "stderr_iid"))
    error = Z95 * np.where(np.isfinite(stderr), stderr, 0.0)
    if len(part["rank"]) <= MOST_MARKS:
        axes.errorbar(x, y, yerr=error, label=label, elinewidth=0.8, capsize=0, **points(number))
    else:
        axes.vlines(x, y - error, y + error, color=colour(number), alpha=0.35, linewidth=0.6)
        axes.plot(x, y, label=label, **series(number))


def _extremes(part: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """(the lowest, the highest) by name, each end first."""
    size = len(part["rank"])
    named = min(NAMED, max(1, size // 2))

    def of(places: range) -> list[str]:
        return [f"{part['document'][i]}: {part['cross_entropy'][i]:.3f}" for i in places]

    return of(range(named)), of(range(size - 1, size - 1 - named, -1))


def _words(part: dict[str, np.ndarray]) -> str:
    size = len(part["rank"])
    lowest, highest = (listed([f"document {end.replace(': ', ' with ')}" for end in ends]) for ends in _extremes(part))
    if size == 1:
        return f"1 document: {lowest} nats per token."
    bad = int((~np.isfinite(part["cross_entropy"])).sum())
    median = part["cross_entropy"][(size - 1) // 2]
    text = f"{size:,} documents, the median {median:.3f} nats per token; lowest {lowest}, highest {highest}."
    return text + (f" {bad:,} without a finite mean are not drawn." if bad else "")
