"""The cross-entropies of runs, side by side and while tokens come in."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.shared import (
    Runs,
    Series,
    figure_of,
    half_width,
    interval_words,
    series_of,
    short,
)
from gpuxent.evaluation.reports.figures.style import (
    BAND,
    Z95,
    colour,
    legend,
    line,
    listed,
    log_axis,
    marked,
    marks,
    shown,
)
from gpuxent.evaluation.reports.reported import ReportedRun
from gpuxent.evaluation.reports.tables import decimal

FEW = 10  # points that have marks
SETTLED = 0.05  # of the tokens: from there on all of the band is in the picture


def headline(runs: Runs) -> Figure | None:
    """Of two or more runs: the cross-entropies side by side."""
    if len(runs) < 2:
        return None

    def columns(run: ReportedRun) -> dict[str, np.ndarray]:
        value, half = run.result.cross_entropy, half_width(run)
        named = {"cross_entropy": value, "low": value - half, "high": value + half, "scored": run.result.scored}
        return {name: np.array([value]) for name, value in named.items()}

    found = series_of(runs, columns)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, run in enumerate(runs):
            value, half = run.result.cross_entropy, half_width(run)
            if np.isfinite(value):
                bar = axes.errorbar(value, i, xerr=None if np.isnan(half) else half, **marks(i))
                bar[0].set_gid(found[i].id)
            else:
                place = axes.get_yaxis_transform()
                axes.text(0.02, i, decimal(value), transform=place, va="center", color=colour(i))
        axes.set_yticks(range(len(runs)), [shown(run.name, 24) for run in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("nats per token, with 95 % intervals")

    about = f"The cross-entropy of {len(runs)} runs."
    height = 1.1 + 0.3 * len(runs)

    def words(each: Series) -> str:
        return f"{interval_words(each.run)}."

    def tips(each: Series) -> list[str]:
        return [f"{each.label}: {interval_words(each.run)}"]

    return figure_of(found, "headline", "Cross-entropy", about, words, draw, tips, height)


def running(runs: Runs) -> Figure | None:
    """The estimate while tokens come in."""
    found = series_of(runs, _running_columns)
    if not found:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for each in found:
            tokens, low, high = each.columns["tokens"], *_band(each)
            axes.fill_between(tokens, low, high, color=colour(each.number), alpha=BAND, linewidth=0)
            look = line(each.number) if tokens.size >= FEW else marked(each.number)
            axes.plot(tokens, each.columns["cross_entropy"], label=each.label, **look)
        _limit(axes, found)
        ends = [each.columns["tokens"][[0, -1]] for each in found]
        axes.set_xscale("log")
        log_axis(axes.xaxis, np.min(ends), np.max(ends))
        axes.set_xlabel("tokens, in the order of the data")
        axes.set_ylabel("cross-entropy so far, nats per token")
        legend(axes, several=not found[0].alone)

    title, about = "Running estimate of the cross-entropy", "The mean loss of the tokens so far, with a band of 95 %."
    return figure_of(found, "running", title, about, _running_words, draw)


def _running_columns(run: ReportedRun) -> dict[str, np.ndarray] | None:
    one = run.running
    if one is None or not one.tokens.size:
        return None
    cluster = np.full(one.tokens.size, np.nan) if one.stderr_cluster is None else one.stderr_cluster
    columns = {"tokens": one.tokens, "cross_entropy": one.mean, "stderr_iid": one.stderr_iid}
    return columns | {"stderr_cluster": cluster}


def _band(each: Series) -> tuple[np.ndarray, np.ndarray]:
    mean = each.columns["cross_entropy"]
    assert each.run.running is not None
    half = Z95 * each.run.running.stderr
    return mean - half, mean + half


def _limit(axes: Any, found: list[Series]) -> None:
    """The first tokens say little, and may leave the picture."""
    settled = [
        np.stack(_band(each))[:, each.columns["tokens"] >= SETTLED * each.columns["tokens"][-1]] for each in found
    ]
    ends = np.concatenate([part[np.isfinite(part)] for part in settled])
    if ends.size and ends.max() > ends.min():
        margin = 0.25 * (ends.max() - ends.min())
        axes.set_ylim(ends.min() - margin, ends.max() + margin)


def _running_words(each: Series) -> str:
    points, mean = each.columns["tokens"], each.columns["cross_entropy"]
    places = sorted({int(np.searchsorted(points, share * points[-1])) for share in (0.01, 0.1, 1)})
    said = [f"{short(mean[i])} after {points[i]:,}" for i in places]
    return f"{listed(said)} {'token' if points[-1] == 1 else 'tokens'} with a finite loss."
