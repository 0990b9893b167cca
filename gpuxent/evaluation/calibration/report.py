"""How reliability is shown: tables for people, and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from gpuxent.evaluation.calibration.checking import CalibrationCheck
from gpuxent.evaluation.calibration.reliability import ClasswiseReliability, Interval, Reliability
from gpuxent.evaluation.calibration.scaling import ScalingFit
from gpuxent.evaluation.calibration.temperature import TemperatureFit
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
    result: Reliability | CalibrationCheck,
    form: str,
    run: dict[str, Any],
    file: TextIO,
    width: int | None = None,
    classes: ClasswiseReliability | None = None,
) -> None:
    """The result as "table", "markdown" or "json"; `run` says what was measured and how, `classes` are those of a
    Reliability."""
    if form == "json":
        data = result.to_dict() | ({} if classes is None else {"classes": classes.to_dict()})
        file.write(json.dumps(data | {"run": finite(run)}, indent=2, allow_nan=False, default=str) + "\n")
        return
    if isinstance(result, Reliability):
        columns, by_class = [("value", result)], [("", classes)]
        lines = [_first_line(result, run)]
    else:
        columns = [("before", result.before), ("after", result.after)]
        by_class = [("before", result.classes_before), ("after", result.classes_after)]
        lines = [_first_line(result.before, run), *_fit_lines(result.fit)]
    classwise = [_classes(name, found) for name, found in by_class if found is not None]
    write_text(lines, [_scores(columns), *map(_bins, columns), *classwise], form, file, width)


def warnings(result: Reliability | CalibrationCheck) -> Iterator[str]:
    """What there is to warn of."""
    if isinstance(result, Reliability):
        return
    if isinstance(result.fit, ScalingFit) and not result.fit.converged:
        yield result.fit.unfinished
    if not result.helps:
        risen = [name for name in ("nll", "ece") if not _of(result.after, name) < _of(result.before, name)]
        what = f"{result.fit.method} scaling" if isinstance(result.fit, ScalingFit) else "the temperature"
        yield f"on the rows held out {what} does not lower {' and '.join(map(str.upper, risen))}"


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


def _fit_lines(fit: TemperatureFit | ScalingFit) -> Iterator[str]:
    if isinstance(fit, ScalingFit):
        whole = fit.scale if fit.method == "vector" else np.diagonal(fit.scale)
        ends = [f"{decimal(_short(v.min()))} to {decimal(_short(v.max()))}" for v in (whole, fit.bias)]
        yield f"{fit.method} scaling, C = {fit.C:g}, of {fit.scored:,} other rows, in {fit.passes} passes"
        yield f"{'scales' if fit.method == 'vector' else 'diagonal'} {ends[0]}, biases {ends[1]}"
        return
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


def _classes(name: str, found: ClasswiseReliability) -> Section:
    level = f"{100 * found.by_class[0].level:g} % interval"
    rows = [
        (
            str(c),
            percent(one.accuracy.value),
            percent(one.confidence.value),
            decimal(_short(one.ece.value)),
            _interval(one.ece),
            decimal(_short(one.brier.value)),
        )
        for c, one in zip(found.classes, found.by_class, strict=True)
    ]
    title = f"Classes, {name}" if name else "Classes"
    return Section(title, ("class", "is label", "mean p", "ECE", level, "Brier score"), rows)


def _interval(cell: Interval) -> str:
    if math.isnan(cell.low):
        return "-"
    return f"{decimal(_short(cell.low))} - {decimal(_short(cell.high))}"


def _short(value: float) -> float:
    """Four significant digits are as many as an interval lets one read."""
    return float(f"{value:.4g}")
