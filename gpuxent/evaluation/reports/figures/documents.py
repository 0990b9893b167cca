"""Documents, sorted by their mean loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.shared import Runs, Series, figure_of, series_of, short, tokens
from gpuxent.evaluation.reports.figures.style import (
    MOST_BANDS,
    Z95,
    colour,
    count_axis,
    legend,
    line,
    listed,
    marks,
    note,
)
from gpuxent.evaluation.reports.reported import ReportedRun

MOST_MARKS = 60  # documents with a mark each; of more there is a line
MOST_POINTS = 300  # of a line, and thin bars: more are not seen
NAMED = 3  # documents at each end


def documents(runs: Runs) -> Figure | None:
    """The documents' mean losses in order, with their errors."""
    found = series_of(runs, _sorted)
    if not found:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for each in found:
            _curve(axes, each, bars=len(found) <= MOST_BANDS)
            axes.axhline(each.run.result.cross_entropy, color=colour(each.number), linewidth=1, linestyle=":")
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        if len(found) == 1 and len(found[0].columns["rank"]) > 1:
            lowest, highest = _extremes(found[0].columns)
            note(axes, "\n".join(["highest documents", *highest]), "upper left")
            note(axes, "\n".join(["lowest documents", *lowest]), "lower right")
        most = max(len(each.columns["rank"]) for each in found)
        if most <= MOST_MARKS:
            axes.set_xlim(0.5, most + 0.5)
        count_axis(axes.xaxis)
        axes.set_xlabel("documents in the order of their loss (dotted: the mean of tokens)")
        axes.set_ylabel("cross-entropy, nats per token")
        legend(axes, several=not found[0].alone)

    intervals = ", with 95 % intervals (tokens of a document taken as independent)" * (len(found) <= MOST_BANDS)
    about = f"The documents' mean losses in order{intervals}."
    return figure_of(found, "documents", "Loss by document", about, _words, draw, _tips)


def _sorted(run: ReportedRun) -> dict[str, np.ndarray] | None:
    table = run.documents
    if not table or not np.isfinite(table.cross_entropy).any():
        return None
    order = np.argsort(table.cross_entropy, kind="stable")  # inf, then NaN last
    means = table.cross_entropy[order]
    stderr = np.full(len(table), np.nan) if run.document_stderr is None else run.document_stderr[order]
    return {
        "rank": np.arange(1, len(table) + 1),
        "document": table.document[order],
        "scored": table.scored[order],
        "cross_entropy": means,
        "stderr_iid": np.where(np.isfinite(means), stderr, np.nan),
    }


def _curve(axes: Any, each: Series, bars: bool) -> None:
    """Marks with bars, or a line with thin bars."""
    size = int(np.isfinite(each.columns["cross_entropy"]).sum())
    at = np.unique(np.linspace(0, size - 1, min(size, MOST_POINTS)).round().astype(np.int64))
    x, y, stderr = (each.columns[name][at] for name in ("rank", "cross_entropy", "stderr_iid"))
    half = Z95 * np.where(np.isfinite(stderr) & bars, stderr, 0.0)
    if len(each.columns["rank"]) <= MOST_MARKS:
        drawn = axes.errorbar(x, y, yerr=half, label=each.label, elinewidth=0.8, capsize=0, **marks(each.number))
        drawn[0].set_gid(each.id)
    else:
        axes.vlines(x, y - half, y + half, color=colour(each.number), alpha=0.35, linewidth=0.6)
        axes.plot(x, y, label=each.label, **line(each.number))


def _tips(each: Series) -> list[str]:
    """Of documents that have a mark each."""
    ids, counts, means = (each.columns[name].tolist() for name in ("document", "scored", "cross_entropy"))
    finite = [place for place, mean in enumerate(means) if math.isfinite(mean)]
    return [
        f"{each.label}\ndocument {ids[i]}: {short(means[i])} nats per token, {tokens(counts[i])}"
        for i in (finite if len(means) <= MOST_MARKS else ())
    ]


def _extremes(columns: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """The lowest and the highest, the ends first."""
    size = len(columns["rank"])
    named = min(NAMED, max(1, size // 2))

    def of(places: range) -> list[str]:
        return [f"{columns['document'][i]} ({short(columns['cross_entropy'][i])})" for i in places]

    return of(range(named)), of(range(size - 1, size - 1 - named, -1))


def _words(each: Series) -> str:
    means = each.columns["cross_entropy"]
    lowest, highest = (listed(ends) for ends in _extremes(each.columns))
    if means.size == 1:
        return f"One document: {lowest} nats per token."
    median = means[(means.size - 1) // 2]
    text = (
        f"{means.size:,} documents, the median {short(median)} nats per token; lowest: document "
        f"{lowest}; highest: {highest}."
    )
    bad = int((~np.isfinite(means)).sum())
    return text + (f" {bad:,} without a finite mean are not drawn." if bad else "")
