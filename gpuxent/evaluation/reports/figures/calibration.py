"""The reliability diagram."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.shared import Runs, Series, figure_of, series_of, short, tokens
from gpuxent.evaluation.reports.figures.style import (
    BAND,
    MOST_BANDS,
    MUTED,
    colour,
    compact,
    finite,
    legend,
    marked,
    note,
)
from gpuxent.evaluation.reports.reported import ReportedRun


def reliability(runs: Runs) -> Figure | None:
    """How often the top class is right, against its probability, above the number of tokens in each bin."""
    found = series_of(runs, _bins)
    if not found:
        return None

    def draw(figure: Any) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for each in found:
            _line(axes, each, band=len(found) <= MOST_BANDS)
            counts, edges = each.columns["tokens"], np.append(each.columns["lower"], each.columns["upper"][-1])
            if len(found) <= MOST_BANDS:
                below.stairs(counts, edges, fill=True, color=colour(each.number), alpha=BAND)
            below.stairs(counts, edges, color=colour(each.number), linewidth=1)
        if len(found) == 1:
            _note(axes, found[0])
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        below.set(xlabel="confidence: probability of the top class", ylabel="tokens", ylim=(0, None))
        _few_ticks(below.yaxis)
        figure.align_ylabels()
        legend(axes, several=not found[0].alone)

    about = "How often the most probable class is right, against its probability; on the diagonal they are equal."
    return figure_of(found, "reliability", "Reliability", about, _words, draw, _tips, height=4.2)


def _note(axes: Any, each: Series) -> None:
    """On the side of the diagonal where the line is not."""
    count, _, _, confidence, accuracy = _in_order(each.columns)
    gaps = (count * (accuracy - confidence))[count > 0]
    note(axes, f"ECE {_ece(each.run)}", "lower right" if gaps.sum() > 0 else "upper left")


def _few_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=2, integer=True))
    axis.set_major_formatter(compact)


def _bins(run: ReportedRun) -> dict[str, np.ndarray] | None:
    """With intervals where there are any; None if all are empty."""
    found = run.result.bins if run.reliability is None else run.reliability.bins
    names = ("lower", "upper", "tokens", "confidence", "accuracy", "accuracy_low", "accuracy_high")
    rows = []
    for b in found:
        share = b.accuracy
        ends = (share, math.nan, math.nan) if isinstance(share, float) else (share.value, share.low, share.high)
        rows.append((b.lower, b.upper, b.count, b.confidence, *ends))
    columns = dict(zip(names, np.array(rows).T, strict=True))
    columns["tokens"] = columns["tokens"].astype(np.int64)
    return columns if columns["tokens"].any() else None


def _line(axes: Any, each: Series, band: bool) -> None:
    ok = each.columns["tokens"] > 0
    x, y, low, high = (each.columns[name][ok] for name in ("confidence", "accuracy", "accuracy_low", "accuracy_high"))
    label = each.label if each.alone else f"{each.label}  ECE {each.run.result.ece:.3f}"
    sure, error = finite(low, high), None
    if band:
        axes.fill_between(x, low, high, where=sure, color=colour(each.number), alpha=BAND, linewidth=0)
    else:
        error = np.where(sure, np.maximum([y - low, high - y], 0.0), 0.0)
    look = {"elinewidth": 0.8, "capsize": 0, "clip_on": False} | marked(each.number)
    axes.errorbar(x, y, yerr=error, label=label, **look)[0].set_gid(each.id)


def _ece(run: ReportedRun) -> str:
    found = run.reliability
    if found is None or not math.isfinite(found.ece.low):
        return short(run.result.ece)
    level = f"{100 * found.level:g} % interval"
    return f"{found.ece.value:.4f} ({level} {found.ece.low:.4f} to {found.ece.high:.4f})"


def _words(each: Series) -> str:
    run, ok = each.run, each.columns["tokens"] > 0
    count, lower, upper, confidence, accuracy, *_ = (column[ok] for column in _in_order(each.columns))
    gap = np.abs(accuracy - confidence)
    worst = int(np.argmax(gap))
    share, sure = np.average(accuracy, weights=count), np.average(confidence, weights=count)
    side = "" if share == sure else " (overconfident)" if sure > share else " (underconfident)"
    text = (
        f"The expected calibration error (ECE) is {_ece(run)} over {tokens(count.sum())}, accuracy {share:.3f} at a "
        f"mean confidence of {sure:.3f}{side}; the largest gap, {gap[worst]:.3f}, is in the bin from "
        f"{lower[worst]:.2f} to {upper[worst]:.2f}."
    )
    return text + (f" There are no intervals: {run.why_no_reliability}." if run.why_no_reliability else "")


def _tips(each: Series) -> list[str]:
    count, _, _, confidence, accuracy = _in_order(each.columns)
    return [
        f"{each.label}\naccuracy {accuracy[i]:.3f} at a confidence of {confidence[i]:.3f}, {tokens(int(count[i]))}"
        for i in np.flatnonzero(count)
    ]


def _in_order(columns: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [columns[name] for name in ("tokens", "lower", "upper", "confidence", "accuracy")]
