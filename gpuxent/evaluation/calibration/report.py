"""How reliability is shown: tables for people, and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, TextIO

from gpuxent.evaluation.calibration.reliability import Estimate, Reliability
from gpuxent.evaluation.calibration.temperature import TemperatureCheck
from gpuxent.evaluation.reports.tables import Section, decimal, error, percent, write_text
from gpuxent.evaluation.statistics.result import finite

NAMES = {
    "accuracy": "accuracy",
    "confidence": "confidence",
    "ece": "ECE",
    "mce": "MCE",
    "ace": "ACE",
    "brier": "Brier score",
    "reliability": "- reliability",
    "resolution": "- resolution",
    "uncertainty": "- uncertainty",
    "brier_all_classes": "Brier, classes",
    "nll": "NLL, nats",
}


def write(
    result: Reliability | TemperatureCheck, form: str, run: dict[str, Any], file: TextIO, width: int | None = None
) -> None:
    """The result as "table", "markdown" or "json"; `run` says what was measured and how."""
    if form == "json":
        data = result.to_dict() | {"run": finite(run)}
        file.write(json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")
        return
    if isinstance(result, Reliability):
        columns = [("value", result)]
        lines = [_first_line(result, run)]
    else:
        columns = [("before", result.before), ("after", result.after)]
        lines = [_first_line(result.before, run), *_fit_lines(result)]
    write_text(lines, [_scores(columns), *map(_bins, columns)], form, file, width)


def warnings(result: Reliability | TemperatureCheck) -> Iterator[str]:
    """What there is to warn of."""
    if isinstance(result, TemperatureCheck) and not result.helps:
        risen = [name for name in ("nll", "ece") if not _of(result.after, name) < _of(result.before, name)]
        yield f"on the rows held out the temperature does not lower {' and '.join(map(str.upper, risen))}"


def _of(result: Reliability, name: str) -> float:
    return getattr(result, name).value


def _first_line(result: Reliability, run: dict[str, Any]) -> str:
    parts = [f"scored {result.scored:,}", f"ignored {result.ignored:,}"]
    if result.documents is not None:
        parts.append(f"docs {result.documents:,}")
    if run.get("source"):
        parts.append(f"from {run['source']}")
    parts.append(f"bins of equal {result.binning}")
    return "  ".join(parts)


def _fit_lines(result: TemperatureCheck) -> Iterator[str]:
    fit = result.fit
    by_document = fit.stderr_cluster is not None
    spread = error(fit.stderr_cluster if by_document else fit.stderr_iid)
    unit = "cluster(doc)" if by_document else "iid"
    yield f"temperature {decimal(fit.temperature)} ± {spread} ({unit}), of {fit.scored:,} other rows"


def _scores(columns: list[tuple[str, Reliability]]) -> Section:
    level = f"{100 * columns[0][1].level:g} % interval"
    heads = ("", *(head for name, _ in columns for head in (name, level)))
    rows = []
    for name, label in NAMES.items():
        cells = [getattr(result, name) for _, result in columns]
        if None not in cells:
            rows.append((label, *(text for cell in cells for text in (decimal(_short(cell.value)), _interval(cell)))))
    return Section("", heads, rows)


def _bins(column: tuple[str, Reliability]) -> Section:
    name, result = column
    rows = [
        (
            f"{b.lower:.4f} to {b.upper:.4f}",
            f"{b.count:,}",
            percent(b.confidence),
            percent(b.accuracy.value),
            f"{percent(b.accuracy.low)} - {percent(b.accuracy.high)}",
        )
        for b in result.bins
        if b.count
    ]
    title = "Bins" if name == "value" else f"Bins, {name}"
    return Section(title, ("probability", "rows", "confidence", "accuracy", "interval"), rows)


def _interval(cell: Estimate) -> str:
    if math.isnan(cell.low):
        return "-"
    return f"{decimal(_short(cell.low))} - {decimal(_short(cell.high))}"


def _short(value: float) -> float:
    """Four significant digits are as many as an interval lets one read."""
    return float(f"{value:.4g}")
