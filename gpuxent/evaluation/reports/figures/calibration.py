"""The reliability diagram."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.shared import Runs, caveats, of_run, stacked, subject
from gpuxent.evaluation.reports.figures.style import BAND, MUTED, colour, compact, finite, legend, marked, note, shown
from gpuxent.evaluation.reports.reported import ReportedRun

MOST_BANDS = 2  # runs whose intervals are bands; more would hide each other, and have bars


def reliability(runs: Runs) -> Figure | None:
    """How often the top class is right, against its probability, above the number of tokens in each bin."""
    runs = [run for run in runs if any(b.count for b in run.result.bins)]
    if not runs:
        return None
    parts = [_bins(run) for run in runs]

    def draw(figure: Any) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for i, (run, part) in enumerate(zip(runs, parts, strict=True)):
            label = shown(run.name) + (f"  ECE {run.result.ece:.3f}" if len(runs) > 1 else "")
            _line(axes, i, part, label, len(runs) <= MOST_BANDS)
            edges = np.append(part["lower"], part["upper"][-1])
            below.stairs(part["tokens"], edges, fill=True, color=colour(i), alpha=BAND)
            below.stairs(part["tokens"], edges, color=colour(i), linewidth=1)
        if len(runs) == 1:
            note(axes, _ece(runs[0]))
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        below.set(xlabel="confidence: probability of the top class", ylabel="tokens", ylim=(0, None))
        below.yaxis.set_major_locator(_few_ticks())
        below.yaxis.set_major_formatter(compact)
        figure.align_ylabels()
        legend(axes, [run.name for run in runs])

    words = [of_run(runs, run) + _words(run, part) for run, part in zip(runs, parts, strict=True)]
    description = (
        "How often the most probable class is right, against its probability; on the diagonal they are equal. "
        + " ".join(words)
        + caveats(runs)
    )
    return Figure("reliability", "Reliability", description, stacked(runs, parts), draw, subject(runs), height=4.2)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=2, integer=True)


def _bins(run: ReportedRun) -> dict[str, np.ndarray]:
    """With intervals where there are any."""
    found = run.result.bins if run.reliability is None else run.reliability.bins
    columns: dict[str, list[float]] = {"lower": [], "upper": [], "tokens": [], "confidence": [], "accuracy": []}
    columns |= {"accuracy_low": [], "accuracy_high": []}
    for b in found:
        if isinstance(b.accuracy, float):
            ends = [b.accuracy, math.nan, math.nan]
        else:
            ends = [b.accuracy.value, b.accuracy.low, b.accuracy.high]
        for name, value in zip(columns, (b.lower, b.upper, b.count, b.confidence, *ends), strict=True):
            columns[name].append(value)
    return {name: np.array(values) for name, values in columns.items()}


def _line(axes: Any, number: int, part: dict[str, np.ndarray], label: str, band: bool) -> None:
    ok = part["tokens"] > 0
    x, y, low, high = (part[name][ok] for name in ("confidence", "accuracy", "accuracy_low", "accuracy_high"))
    sure = finite(low, high)
    error = None
    if band:
        axes.fill_between(x, low, high, where=sure, color=colour(number), alpha=BAND, linewidth=0)
    else:
        error = np.where(sure, np.maximum([y - low, high - y], 0.0), 0.0)
    axes.errorbar(x, y, yerr=error, label=label, elinewidth=0.8, capsize=0, clip_on=False, **marked(number))


def _ece(run: ReportedRun) -> str:
    found = run.reliability
    if found is None:
        return f"ECE {run.result.ece:.4f}"
    ends = f" ({found.ece.low:.4f} to {found.ece.high:.4f})" if math.isfinite(found.ece.low) else ""
    return f"ECE {found.ece.value:.4f}{ends}"


def _words(run: ReportedRun, part: dict[str, np.ndarray]) -> str:
    tokens = part["tokens"]
    ok = tokens > 0
    accuracy, confidence = (np.average(part[name][ok], weights=tokens[ok]) for name in ("accuracy", "confidence"))
    side = "over" if confidence > accuracy else "under"
    gap = np.abs(part["accuracy"] - part["confidence"])[ok]
    worst = int(np.argmax(gap))
    text = f"the expected calibration error (ECE) is {_ece(run).removeprefix('ECE ')}"
    if run.reliability is not None and math.isfinite(run.reliability.ece.low):
        text = f"{text.removesuffix(')')}, {100 * run.reliability.level:g} % interval)"
    text = f"{text} over {int(tokens.sum()):,} tokens, accuracy {accuracy:.3f} at a mean confidence of {confidence:.3f}"
    if confidence != accuracy:
        text += f" ({side}confident)"
    bounds = f"{part['lower'][ok][worst]:.2f} to {part['upper'][ok][worst]:.2f}"
    text += f"; the largest gap, {gap[worst]:.3f}, is in the bin from {bounds}."
    return text + (f" No intervals: {run.why_no_reliability}." if run.why_no_reliability else "")
