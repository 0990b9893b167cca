"""What figures of several runs have in common: columns, and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.figures.style import Z95, shown
from gpuxent.evaluation.reports.reported import ReportedRun
from gpuxent.evaluation.reports.tables import decimal

Runs = Sequence[ReportedRun]


def subject(runs: Runs) -> str:
    return runs[0].name if len(runs) == 1 else ""


def of_run(runs: Runs, run: ReportedRun) -> str:
    """Words before what is said of a run, where there are several."""
    return f"{shown(run.name)}: " if len(runs) > 1 else ""


def stacked(runs: Runs, parts: Sequence[dict[str, Any]]) -> dict[str, Sequence[Any]]:
    """Columns of one run after the other, the first with its name."""
    columns: dict[str, list[Any]] = {"run": []}
    for run, part in zip(runs, parts, strict=True):
        lists = {name: np.asarray(values).tolist() for name, values in part.items()}
        columns["run"] += [run.name] * len(next(iter(lists.values())))
        for name, values in lists.items():
            columns.setdefault(name, []).extend(values)
    return dict(columns)


def caveats(runs: Runs) -> str:
    """What must be known of the numbers: rows that are missing, and losses that are not finite."""
    found = []
    for run in runs:
        r, of = run.result, of_run(runs, run)
        if not run.complete:
            found.append(f"{of}partial, {math.floor(1000 * r.share) / 10:g} % of the rows are done.")
        if r.infinite_rows:
            found.append(f"{of}{_tokens(r.infinite_rows)} an infinite loss.")
        if r.nan_rows:
            found.append(f"{of}{_tokens(r.nan_rows)} a loss of NaN.")
    return "".join(f" {text[0].upper()}{text[1:]}" for text in found)


def _tokens(count: int) -> str:
    return "1 token has" if count == 1 else f"{count:,} tokens have"


def half_width(run: ReportedRun) -> float:
    """Of the 95 % interval of the cross-entropy; NaN if it has none."""
    r = run.result
    clustered = r.stderr_cluster is not None and math.isfinite(r.stderr_cluster)
    return Z95 * (r.stderr_cluster if clustered else r.stderr_iid)  # type: ignore[operator]


def interval_words(run: ReportedRun) -> str:
    half, value = half_width(run), run.result.cross_entropy
    if not math.isfinite(half):
        return f"{decimal(value)} nats per token"
    r = run.result
    by = "documents" if r.stderr_cluster is not None and math.isfinite(r.stderr_cluster) else "tokens"
    ends = f"{value - half:.4g} to {value + half:.4g}"
    return f"{decimal(value)} nats per token (95 % interval {ends}, {by} taken as independent)"
