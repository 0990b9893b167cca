"""The divergence of models from their base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.figure import HEIGHT, Figure
from gpuxent.evaluation.reports.figures.shared import short
from gpuxent.evaluation.reports.figures.style import legend, legend_height, log_axis, marked, marks, note, shown
from gpuxent.evaluation.reports.reported import ReportedComparison
from gpuxent.evaluation.reports.tables import error

ENDS = {0.0: "min", 0.5: "median", 1.0: "max"}


def kld(comparisons: Sequence[ReportedComparison]) -> Figure | None:
    """Percentiles of the tokens' KL(base || other), on a log axis."""
    found = [c for c in comparisons if c.result.kl_quantiles]
    if not found:
        return None
    levels = sorted({level for c in found for level in c.result.kl_quantiles or ()})
    values = [np.array([(c.result.kl_quantiles or {}).get(level, np.nan) for level in levels]) for c in found]
    columns: dict[str, list[Any]] = {"comparison": [], "quantile": [], "kl": []}
    for c, own in zip(found, values, strict=True):
        columns["comparison"] += [c.name] * len(levels)
        columns["quantile"] += levels
        columns["kl"] += own.tolist()

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        positive = np.concatenate([own[(own > 0) & np.isfinite(own)] for own in values])
        low, high = (positive.min(), positive.max()) if positive.size else (1e-3, 1.0)
        bottom = low / 3
        for c, own in zip(found, values, strict=True):
            i = comparisons.index(c)
            places = np.arange(len(levels))
            ok = (own > 0) & np.isfinite(own)
            axes.plot(places[ok], own[ok], label=shown(c.name), **marked(i))
            zero = own <= 0
            axes.plot(places[zero], np.full(zero.sum(), bottom), markerfacecolor="none", clip_on=False, **marks(i))
        if len(found) == 1 and found[0].result.kl is not None:
            note(axes, _mean(found[0]))
        axes.set_yscale("log")
        log_axis(axes.yaxis, bottom, high)
        axes.set_ylim(bottom, high * 1.6)
        axes.set_xticks(range(len(levels)), [_level(level) for level in levels], rotation=45)
        zero_too = any((own <= 0).any() for own in values)
        axes.set_xlabel("percentile of the tokens" + (" (hollow: 0)" if zero_too else ""))
        axes.set_ylabel("KL(base || other), nats")
        legend(axes, several=len(comparisons) > 1)

    words = [f"{shown(c.name)}: {_words(c, levels, own)}" for c, own in zip(found, values, strict=True)]
    description = " ".join(["Percentiles of the tokens' divergence KL(base || other), on a log axis.", *words])
    height = HEIGHT + (legend_height([shown(c.name) for c in found]) if len(comparisons) > 1 else 0.0)
    subject = found[0].name if len(found) == 1 else ""
    return Figure("kld", "Divergence from the base", description, columns, draw, subject, height)


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
    bad = comparison.result.bad
    left = f" {bad:,} of {comparison.result.scored:,} tokens have a NaN or infinite loss." if bad else ""
    return f"{mean}{', '.join(said)} nats.{left}"
