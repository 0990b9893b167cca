"""All figures of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpuxent.evaluation.reports.figures.calibration import reliability
from gpuxent.evaluation.reports.figures.comparisons import kld
from gpuxent.evaluation.reports.figures.documents import documents
from gpuxent.evaluation.reports.figures.estimates import headline, running
from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.tokens import losses, positions
from gpuxent.evaluation.reports.reported import ReportedComparison, ReportedRun

OF_RUNS: dict[str, Callable[[Sequence[ReportedRun]], Figure | None]] = {
    "headline": headline,
    "reliability": reliability,
    "losses": losses,
    "positions": positions,
    "documents": documents,
    "running": running,
}
NAMES = (*OF_RUNS, "kld")


def figures(runs: Sequence[ReportedRun], comparisons: Sequence[ReportedComparison] = ()) -> list[Figure]:
    """Those that there is something to show in, in the order of a report: each of all runs that have it."""
    found = [make(runs) for make in OF_RUNS.values()]
    return [figure for figure in (*found, kld(comparisons)) if figure is not None]
