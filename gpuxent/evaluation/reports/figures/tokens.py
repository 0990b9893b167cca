"""The losses of tokens: how they are distributed, and by position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import Figure
from gpuxent.evaluation.reports.figures.shared import Runs, caveats, of_run, stacked, subject
from gpuxent.evaluation.reports.figures.style import (
    BAND,
    Z95,
    colour,
    compact,
    dodged,
    finite,
    legend,
    log_axis,
    marked,
    series,
    shown,
)
from gpuxent.evaluation.reports.reported import ReportedRun
from gpuxent.evaluation.reports.tables import decimal

LOWEST_SHARE = 0.002  # of the tokens lie left of the histogram at most
STEPS = 6  # bins of the histogram in an octave


def losses(runs: Runs) -> Figure | None:
    """How the losses of tokens are distributed, on a log axis."""
    steps = [run.losses.steps() for run in runs]
    runs = [run for run, (values, counts) in zip(runs, steps, strict=True) if counts[2:-1].sum()]
    if not runs:
        return None
    found = [run.losses.steps() for run in runs]
    edges = _edges(found)
    counts = [np.histogram(values, edges, weights=weights)[0].astype(np.int64) for values, weights in found]
    totals = [int(weights.sum()) for _, weights in found]
    width = np.diff(np.log2(edges))
    shares = [count / total / width for count, total in zip(counts, totals, strict=True)]
    parts = [
        {"lower": edges[:-1], "upper": edges[1:], "tokens": count, "share_per_octave": share}
        for count, share in zip(counts, shares, strict=True)
    ]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, (run, share) in enumerate(zip(runs, shares, strict=True)):
            look = series(i)
            axes.stairs(share, edges, fill=True, color=colour(i), alpha=BAND)
            axes.stairs(share, edges, label=shown(run.name), linewidth=1.5, **look)
            mean = run.result.cross_entropy
            if edges[0] < mean < edges[-1]:
                axes.axvline(mean, linewidth=1, color=colour(i), linestyle=":")
        axes.set_xscale("log")
        log_axis(axes.xaxis, edges[0], edges[-1])
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_xlabel("loss of a token, nats (dotted: the mean)")
        axes.set_ylabel("share of the tokens per factor of 2")
        legend(axes, [run.name for run in runs])

    words = [
        of_run(runs, run) + _loss_words(run, values, weights, edges[0])
        for run, (values, weights) in zip(runs, found, strict=True)
    ]
    description = "A histogram of the losses of tokens on a log axis. " + " ".join(words) + caveats(runs)
    return Figure("losses", "Losses of tokens", description, stacked(runs, parts), draw, subject(runs))


def _edges(found: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """STEPS bins an octave, at edges of the bins of `LossHistogram`, so that counts are exact."""
    low, high = math.inf, 0.0
    for values, weights in found:
        filled, weight = values[2:-1], weights[2:-1]
        below = np.cumsum(weight) > LOWEST_SHARE * weight.sum()
        low, high = min(low, filled[np.argmax(below)]), max(high, filled[-1])
    octaves = np.arange(math.frexp(low)[1] - 1, math.frexp(high)[1])
    parts = 1 + np.round(128 * (2 ** (np.arange(STEPS) / STEPS) - 1)) / 128
    edges = np.append(np.ldexp(parts, octaves[:, None]).ravel(), np.ldexp(1.0, int(octaves[-1]) + 1))
    first = np.searchsorted(edges, low, "right") - 1
    return edges[first : np.searchsorted(edges, high, "right") + 1]


def _loss_words(run: ReportedRun, values: np.ndarray, weights: np.ndarray, lowest: float) -> str:
    quantiles = run.losses.quantiles((0.1, 0.5, 0.9))
    below = int(weights[values < lowest].sum())
    ends = [f"{name} {quantiles[q]:.3g}" for q, name in ((0.1, "10 %"), (0.5, "median"), (0.9, "90 %"))]
    left = f"; {below:,} tokens lie below {lowest:.2g} nats and are not drawn" if below else ""
    spread = "" if math.isnan(quantiles[0.5]) else f", {', '.join(ends)}"
    return f"mean {decimal(run.result.cross_entropy)} nats{spread}{left}."


def positions(runs: Runs) -> Figure | None:
    """The mean loss by the position of the token in its document."""
    runs = [run for run in runs if run.result.by_position]
    if not runs:
        return None
    parts = []
    for run in runs:
        ranges = run.result.by_position
        names = {"first": "first", "last": "last", "tokens": "scored", "cross_entropy": "cross_entropy"}
        names |= {"stderr_iid": "stderr_iid"}
        parts.append({name: np.array([getattr(r, field) for r in ranges]) for name, field in names.items()})

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, (run, part) in enumerate(zip(runs, parts, strict=True)):
            x = _octave(part["first"]) + dodged(i, len(runs))
            ok = finite(part["cross_entropy"])
            error = np.where(np.isfinite(part["stderr_iid"]), Z95 * part["stderr_iid"], 0.0)[ok]
            axes.errorbar(x[ok], part["cross_entropy"][ok], yerr=error, label=shown(run.name), **marked(i))
        octaves = sorted({int(o) for part in parts for o in _octave(part["first"])})
        every = 1 + len(octaves) // 12
        axes.set_xticks(octaves[::every], [compact(2**o >> 1) for o in octaves[::every]])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("tokens before it in its document (from here up to the next mark)")
        axes.set_ylabel("cross-entropy, nats per token")
        legend(axes, [run.name for run in runs])

    words = [of_run(runs, run) + _position_words(part) for run, part in zip(runs, parts, strict=True)]
    description = (
        "The mean loss of tokens by their position in the document, in octaves, with 95 % intervals (tokens taken as "
        "independent). " + " ".join(words) + caveats(runs)
    )
    return Figure("positions", "Loss by position", description, stacked(runs, parts), draw, subject(runs))


def _octave(first: np.ndarray) -> np.ndarray:
    return np.frexp(first.astype(np.float64))[1]


def _position_words(part: dict[str, np.ndarray]) -> str:
    ends = [0] if part["first"].size == 1 else [0, -1]
    said = [f"{decimal(part['cross_entropy'][i])} nats at {part['first'][i]:,} to {part['last'][i]:,}" for i in ends]
    return " and ".join(said) + "."
