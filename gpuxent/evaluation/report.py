"""How a result is shown: a table for people, JSON for programs."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from gpuxent.evaluation.documents import DocumentTotals
from gpuxent.evaluation.result import Evaluation
from gpuxent.evaluation.totals import exp

SHOWN_DOCUMENTS = 5


def to_json(result: Evaluation, documents: DocumentTotals | None, run: dict[str, Any]) -> str:
    """The statistics; `run` says what was scored and how."""
    data = result.to_dict() | {"run": run}
    if documents is not None:
        data["documents"] = [
            {"document": d.document, "scored": d.scored, "cross_entropy": _json_number(d.cross_entropy)}
            for d in documents.rows()
        ]
        data["document_mean_cross_entropy"] = _json_number(documents.mean())
    return json.dumps(data, indent=2, allow_nan=False, default=str)


def to_table(result: Evaluation, documents: DocumentTotals | None) -> RenderableType:
    parts: list[RenderableType] = [*bad_rows(result), _statistics(result, documents)]
    if documents is not None:
        ranked = sorted(documents.rows(), key=lambda d: (math.isnan(d.cross_entropy), d.cross_entropy))  # NaN: worst
        if len(ranked) > 2 * SHOWN_DOCUMENTS:
            parts.append(document_table("best documents", ranked[:SHOWN_DOCUMENTS]))
            parts.append(document_table("worst documents", ranked[: -SHOWN_DOCUMENTS - 1 : -1]))
        elif ranked:
            parts.append(document_table("documents", ranked))
    return Group(*parts)


def _statistics(result: Evaluation, documents: DocumentTotals | None) -> Table:
    table = Table(title=f"{result.scored:,} tokens scored, {result.ignored:,} ignored", title_justify="left")
    table.add_column("statistic")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    stderr, ppl = result.stderr, result.perplexity
    rows = [
        ("cross-entropy (nats per token)", decimal(result.cross_entropy), decimal(stderr)),
        ("perplexity", decimal(ppl), decimal(ppl * stderr)),  # d exp(x) = exp(x) dx
        ("bits per token", decimal(result.bits_per_token), decimal(stderr / math.log(2))),
    ]
    if documents is not None:
        mean = documents.mean()
        rows.append((f"mean over {len(documents):,} documents (nats)", decimal(mean), ""))
    rows += [("accuracy" if k == 1 else f"top-{k} accuracy", percent(a), "") for k, a in result.topk_accuracy.items()]
    rows.append(("entropy of the model (nats)", decimal(result.entropy), ""))
    rows.append((f"calibration error (ECE, {len(result.bins)} bins)", decimal(result.ece), ""))
    for row in rows:
        table.add_row(*row)
    return table


def document_table(title: str, documents: list[Any]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("document", justify="right")
    table.add_column("scored", justify="right")
    table.add_column("cross-entropy", justify="right")
    table.add_column("perplexity", justify="right")
    for d in documents:
        table.add_row(str(d.document), f"{d.scored:,}", decimal(d.cross_entropy), decimal(exp(d.cross_entropy)))
    return table


def bad_rows(result: Evaluation) -> list[str]:
    """What there is to warn of: these rows decide the mean."""
    lines = []
    if result.nan_rows:
        lines.append(f"{_rows_have(result.nan_rows)} a loss of NaN, first row {result.first_nan_row:,}")
    if result.infinite_rows:
        lines.append(f"{_rows_have(result.infinite_rows)} an infinite loss, first row {result.first_infinite_row:,}")
    return lines


def _rows_have(count: int) -> str:
    return "1 row has" if count == 1 else f"{count:,} rows have"


def decimal(value: float) -> str:
    """Six significant digits, but all digits before the point."""
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
    return (
        f"{value:,.0f}"
        if abs(value) >= 1e6
        else f"{value:,.6g}"
        if abs(value) >= 1e-4 or value == 0
        else f"{value:.2e}"
    )


def percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.2f} %"


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
