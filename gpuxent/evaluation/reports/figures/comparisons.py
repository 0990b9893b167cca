"""The divergence of models from their base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import HEIGHT, Figure
from gpuxent.evaluation.reports.figures.shared import partial, short, tokens
from gpuxent.evaluation.reports.figures.style import legend, legend_height, log_axis, marked, marks, note, shown
from gpuxent.evaluation.reports.reported import ReportedComparison
from gpuxent.evaluation.reports.tables import error

ENDS = {0.0: "min", 0.5: "median", 1.0: "max"}


def kld(comparisons: Sequence[ReportedComparison]) -> Figure | None:
    """Percentiles of the tokens' KL(base || other), on a log axis."""
    found = [(i, c, _quantiles(c)) for i, c in enumerate(comparisons) if np.isfinite(_quantiles(c)[1]).any()]
    if not found:
        return None
    several = len(comparisons) > 1
    columns: dict[str, list[Any]] = {"comparison": [], "quantile": [], "kl": []}
    for _, c, (levels, kl) in found:
        columns["comparison"] += [c.name] * len(levels)
        columns["quantile"] += levels
        columns["kl"] += kl.tolist()

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        _curves(axes, found)
        if not several:
            note(axes, _mean(found[0][1]))
        legend(axes, several)

    words = [f"{shown(c.name)}: {_words(c, *quantiles)}" for _, c, quantiles in found]
    description = " ".join(["Percentiles of the tokens' divergence KL(base || other), on a log axis.", *words])
    height = HEIGHT + (legend_height([shown(c.name) for _, c, _ in found]) if several else 0.0)
    tips = {
        f"marks-{i}": [f"{shown(c.name)}\n{_level(q)}: {short(v)} nats" for q, v in zip(*pair, strict=True) if v > 0]
        for i, c, pair in found
    }
    subject = found[0][1].name if len(found) == 1 else ""
    return Figure("kld", "Divergence from the base", description, columns, draw, subject, height, tips)


def _quantiles(comparison: ReportedComparison) -> tuple[list[float], np.ndarray]:
    """(levels, divergences), the smallest first."""
    quantiles = comparison.result.kl_quantiles or {}
    levels = sorted(quantiles)
    return levels, np.array([quantiles[level] for level in levels])


def _curves(axes: Any, found: list[Any]) -> None:
    """On a log axis, where 0 is a hollow mark at its end."""
    levels = sorted({level for _, _, (own, _) in found for level in own})
    positive = [kl[(kl > 0) & np.isfinite(kl)] for _, _, (_, kl) in found]
    every = np.concatenate(positive)
    low, high = (every.min(), every.max()) if every.size else (1e-3, 1.0)
    hollow = ""
    for i, c, (own, kl) in found:
        x, ok, zero = np.searchsorted(levels, own), (kl > 0) & np.isfinite(kl), kl <= 0
        (curve,) = axes.plot(x[ok], kl[ok], label=shown(c.name), **marked(i))
        curve.set_gid(f"marks-{i}")
        if zero.any():
            hollow = " (hollow: 0)"
            axes.plot(x[zero], np.full(zero.sum(), low / 3), markerfacecolor="none", clip_on=False, **marks(i))
    axes.set_yscale("log")
    log_axis(axes.yaxis, low / 3, high)
    axes.set_ylim(low / 3, high * 1.6)
    axes.set_xticks(range(len(levels)), [_level(level) for level in levels], rotation=45)
    axes.set_xlabel(f"percentile of the tokens{hollow}")
    axes.set_ylabel("KL(base || other), nats")


def _level(level: float) -> str:
    return ENDS.get(level, f"{100 * level:g} %")


def _mean(comparison: ReportedComparison) -> str:
    kl = comparison.result.kl
    assert kl is not None
    stderr = kl.stderr_iid if kl.stderr_cluster is None else kl.stderr_cluster
    return f"mean {short(kl.value)} ± {error(stderr)} nats"


def _words(comparison: ReportedComparison, levels: list[float], values: np.ndarray) -> str:
    said = [f"{_level(q)} {v:.3g}" for q, v in zip(levels, values, strict=True) if q in (0.5, 0.9, 0.99, 1.0)]
    mean = "" if comparison.result.kl is None else f"{_mean(comparison)} (standard error); "
    r = comparison.result
    caveats = partial(r.share)
    if r.bad:
        caveats.append(f"{r.bad:,} of {tokens(r.scored, ' has', ' have')} a NaN or infinite loss.")
    return " ".join([f"{mean}{', '.join(said)} nats.", *caveats])
