"""The cross-entropies of runs, side by side and while tokens come in."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.shared import (
    Runs,
    caveats,
    half_width,
    interval_words,
    of_run,
    stacked,
    subject,
)
from gpuxent.evaluation.reports.figures.style import BAND, Z95, colour, legend, listed, log_axis, points, series, shown
from gpuxent.evaluation.reports.tables import decimal


def headline(runs: Runs) -> Figure | None:
    """Of two or more runs: the cross-entropies side by side."""
    if len(runs) < 2:
        return None
    values = np.array([run.result.cross_entropy for run in runs])
    half = np.array([half_width(run) for run in runs])
    words = [f"{shown(run.name)} {interval_words(run)}" for run in runs]
    columns = {
        "run": [run.name for run in runs],
        "cross_entropy": values.tolist(),
        "low": (values - half).tolist(),
        "high": (values + half).tolist(),
        "scored": [run.result.scored for run in runs],
    }

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i in np.flatnonzero(np.isfinite(values)).tolist():
            error = None if np.isnan(half[i]) else half[i]
            axes.errorbar(values[i], i, xerr=error, **points(i))
        for i in np.flatnonzero(~np.isfinite(values)).tolist():
            axes.text(0.02, i, decimal(values[i]), transform=axes.get_yaxis_transform(), va="center", color=colour(i))
        axes.set_yticks(range(len(runs)), [shown(run.name, 28) for run in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("cross-entropy, nats per token, with 95 % intervals")

    description = f"The cross-entropy of {len(runs)} runs: {listed(words)}.{caveats(runs)}"
    return Figure("headline", "Cross-entropy", description, columns, draw, height=1.1 + 0.3 * len(runs))


def running(runs: Runs) -> Figure | None:
    """The estimate while tokens come in."""
    runs = [run for run in runs if run.running is not None and run.running.tokens.size]
    if not runs:
        return None
    found = [run.running for run in runs if run.running is not None]
    names = {
        "tokens": "tokens",
        "mean": "cross_entropy",
        "stderr_iid": "stderr_iid",
        "stderr_cluster": "stderr_cluster",
    }
    parts = []
    for one in found:
        cluster = [None] * one.tokens.size if one.stderr_cluster is None else one.stderr_cluster
        columns = {"tokens": one.tokens, "mean": one.mean, "stderr_iid": one.stderr_iid, "stderr_cluster": cluster}
        parts.append({names[name]: values for name, values in columns.items()})

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, (run, one) in enumerate(zip(runs, found, strict=True)):
            low, high = one.mean - Z95 * one.stderr, one.mean + Z95 * one.stderr
            axes.fill_between(one.tokens, low, high, color=colour(i), alpha=BAND, linewidth=0)
            axes.plot(one.tokens, one.mean, label=shown(run.name), **series(i))
        settled = np.concatenate([_ends(one)[one.tokens * 20 >= one.tokens[-1]].ravel() for one in found])
        settled = settled[np.isfinite(settled)]
        if settled.size and settled.max() > settled.min():  # the first few tokens say little, and leave the picture
            margin = 0.25 * (settled.max() - settled.min())
            axes.set_ylim(settled.min() - margin, settled.max() + margin)
        axes.set_xscale("log")
        log_axis(axes.xaxis, min(one.tokens[0] for one in found), max(one.tokens[-1] for one in found))
        axes.set_xlabel("tokens, in the order of the data")
        axes.set_ylabel("cross-entropy so far, nats per token")
        legend(axes, [run.name for run in runs])

    words = [f"{of_run(runs, run)}{_running_words(one)}" for run, one in zip(runs, found, strict=True)]
    description = "The mean loss of the tokens so far, with a band of 95 %. " + " ".join(words) + caveats(runs)
    title = "Running estimate of the cross-entropy"
    return Figure("running", title, description, stacked(runs, parts), draw, subject(runs))


def _ends(one: Any) -> np.ndarray:
    return np.stack([one.mean - Z95 * one.stderr, one.mean + Z95 * one.stderr], axis=1)


def _running_words(one: Any) -> str:
    places = sorted({np.searchsorted(one.tokens, share * one.tokens[-1]) for share in (0.01, 0.1, 1)})
    return listed([f"{one.mean[i]:.4g} after {one.tokens[i]:,}" for i in places]) + " tokens with a finite loss."
