"""The losses of tokens: how they are distributed, and by position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.shared import Runs, Series, figure_of, series_of, short, tokens
from gpuxent.evaluation.reports.figures.style import (
    BAND,
    MOST_BANDS,
    Z95,
    colour,
    compact,
    dodged,
    legend,
    line,
    log_axis,
    marked,
)
from gpuxent.evaluation.reports.records import position_name
from gpuxent.evaluation.reports.reported import ReportedRun
from gpuxent.evaluation.reports.tables import decimal

LOWEST_SHARE = 0.002  # of the tokens lie left of the histogram at most
STEPS = 6  # bins of the histogram in an octave
MOST_TICKS = 12


def losses(runs: Runs) -> Figure | None:
    """How the losses of tokens are distributed, on a log axis."""
    positive = [run for run in runs if _positive(run)[1].size]
    if not positive:
        return None
    edges = _edges(positive)
    found = series_of(runs, lambda run: _histogram(run, edges) if run in positive else None)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for each in found:
            share, mean = each.columns["share_per_octave"], each.run.result.cross_entropy
            if len(found) <= MOST_BANDS:
                axes.stairs(share, edges, fill=True, color=colour(each.number), alpha=BAND)
                axes.stairs(share, edges, label=each.label, linewidth=1.5, **line(each.number))
            else:  # stairs of many would hide each other
                axes.plot(np.sqrt(edges[:-1]) * np.sqrt(edges[1:]), share, label=each.label, **line(each.number))
            if edges[0] < mean < edges[-1]:
                axes.axvline(mean, linewidth=1, color=colour(each.number), linestyle=":")
        axes.set_xscale("log")
        log_axis(axes.xaxis, edges[0], edges[-1])
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_xlabel("loss of a token, nats (dotted: the mean)")
        axes.set_ylabel("share of the tokens per factor of 2")
        legend(axes, several=not found[0].alone)

    def words(each: Series) -> str:
        return _loss_words(each.run, edges[0])

    return figure_of(found, "losses", "Losses of tokens", "A histogram of losses on a log axis.", words, draw)


def _positive(run: ReportedRun) -> tuple[np.ndarray, np.ndarray]:
    """(losses that a log axis has, how many are taken as each)"""
    values, counts = run.losses.steps()
    return values[2:-1], counts[2:-1]


def _edges(runs: Runs) -> np.ndarray:
    """STEPS bins an octave, at edges of the bins of `LossHistogram`, so that counts are exact."""
    low, high = math.inf, 0.0
    for values, counts in map(_positive, runs):
        low = min(low, values[np.argmax(np.cumsum(counts) > LOWEST_SHARE * counts.sum())])
        high = max(high, values[-1])
    octaves = np.arange(math.frexp(low)[1] - 2, math.frexp(high)[1] + 1)
    parts = 1 + np.round(128 * (2 ** (np.arange(STEPS) / STEPS) - 1)) / 128
    with np.errstate(over="ignore"):
        edges = np.ldexp(parts, octaves[:, None]).ravel()
    edges = np.unique(np.minimum(edges, np.finfo(np.float64).max))
    first, last = np.searchsorted(edges, low, "right") - 1, np.searchsorted(edges, high, "right")
    beside = STEPS if last - first < STEPS else 0  # of losses that are nearly the same: some room around them
    return edges[first - beside : last + beside + 1]


def _histogram(run: ReportedRun, edges: np.ndarray) -> dict[str, np.ndarray]:
    values, weights = _positive(run)
    counts = np.histogram(values, edges, weights=weights)[0].astype(np.int64)
    share = counts / run.result.scored / np.diff(np.log2(edges))
    return {"lower": edges[:-1], "upper": edges[1:], "tokens": counts, "share_per_octave": share}


def _loss_words(run: ReportedRun, lowest: float) -> str:
    quantiles = run.losses.quantiles((0.1, 0.5, 0.9))
    values, counts = run.losses.steps()
    below = int(counts[values < lowest].sum())
    text = f"Mean {decimal(run.result.cross_entropy)} nats"
    if not math.isnan(quantiles[0.5]):
        text += f", median {quantiles[0.5]:.2g}, 80 % of the tokens from {quantiles[0.1]:.2g} to {quantiles[0.9]:.2g}"
    return f"{text}; {tokens(below, ' lies', ' lie')} below {lowest:.2g}, left of the picture." if below else f"{text}."


def positions(runs: Runs) -> Figure | None:
    """The mean loss by the position of the token in its document."""
    found = series_of(runs, _position_columns)
    if not found:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for place, each in enumerate(found):
            mean, stderr = each.columns["cross_entropy"], each.columns["stderr_iid"]
            ok = np.isfinite(mean)
            x = _octave(each.columns["first"]) + dodged(place, len(found))
            half = np.where(np.isfinite(stderr), Z95 * stderr, 0.0)
            bars = axes.errorbar(x[ok], mean[ok], yerr=half[ok], label=each.label, **marked(each.number))
            bars[0].set_gid(each.id)
        octaves = sorted({int(octave) for each in found for octave in _octave(each.columns["first"])})
        ticks = octaves[:: 1 + len(octaves) // MOST_TICKS]
        axes.set_xticks(ticks, [compact(2**octave >> 1) for octave in ticks])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("tokens before it in its document (from here up to the next mark)")
        axes.set_ylabel("cross-entropy, nats per token")
        legend(axes, several=not found[0].alone)

    about = (
        "The mean loss by the number of tokens before in the document, in octaves, with 95 % intervals (tokens taken "
        "as independent)."
    )
    return figure_of(found, "positions", "Loss by position", about, _position_words, draw, _position_tips)


def _position_columns(run: ReportedRun) -> dict[str, np.ndarray] | None:
    ranges = run.result.by_position
    names = ("first", "last", "scored", "cross_entropy", "stderr_iid")
    if not any(math.isfinite(r.cross_entropy) for r in ranges):
        return None
    return {name: np.array([getattr(r, name) for r in ranges]) for name in names}


def _octave(first: np.ndarray) -> np.ndarray:
    return np.frexp(first.astype(np.float64))[1]


def _position_words(each: Series) -> str:
    ends = [each.run.result.by_position[i] for i in (0, -1)]
    said = [f"{short(p.cross_entropy)} nats at position {position_name(p.first, p.last)}" for p in dict.fromkeys(ends)]
    return f"{', '.join(said)}."


def _position_tips(each: Series) -> list[str]:
    ranges = [p for p in each.run.result.by_position if math.isfinite(p.cross_entropy)]
    return [
        f"{each.label}\nposition {position_name(p.first, p.last)}: {short(p.cross_entropy)} nats, {tokens(p.scored)}"
        for p in ranges
    ]
