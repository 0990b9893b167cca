"""Headline numbers of a report, each with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpuxent.evaluation.comparison.result import Comparison, Estimate
from gpuxent.evaluation.reports.figures.style import Z95
from gpuxent.evaluation.reports.reported import ReportedRun
from gpuxent.evaluation.reports.tables import decimal, percent
from gpuxent.evaluation.statistics.totals import exp


@dataclass(frozen=True)
class Card:
    name: str
    value: str
    note: str = ""  # the interval and what it is taken over


def of_run(run: ReportedRun) -> Iterator[Card]:
    result = run.result
    by_document = result.stderr_cluster is not None
    half = Z95 * (result.stderr_cluster if result.stderr_cluster is not None else result.stderr_iid)
    low, high = result.cross_entropy - half, result.cross_entropy + half
    by = _taken_over(by_document)
    yield Card("Cross-entropy, nats", decimal(result.cross_entropy), _interval(low, high, by))
    yield Card("Perplexity", decimal(result.perplexity), _interval(exp(low), exp(high), by))
    for unit in ("byte", "word"):
        bits, error = getattr(result, f"bits_per_{unit}"), getattr(result, f"bits_per_{unit}_stderr")
        if bits is not None:
            note = "" if error is None else _interval(bits - Z95 * error, bits + Z95 * error, by)
            yield Card(f"Bits per {unit}", decimal(bits), note)
    accuracy, ece = "", ""
    if run.reliability is not None:
        found = run.reliability
        accuracy = f"{percent(found.accuracy.low)} to {percent(found.accuracy.high)}, bootstrap"
        ece = _interval(found.ece.low, found.ece.high, "bootstrap")
    yield Card("Accuracy", percent(result.accuracy), accuracy)
    yield Card("Calibration error (ECE)", decimal(_short(result.ece)), ece)
    yield Card("Tokens scored", f"{result.scored:,}", f"{result.ignored:,} ignored")


def of_comparison(result: Comparison) -> Iterator[Card]:
    yield _estimate("Change of the cross-entropy, nats", result.log_ratio, signed=True)
    yield _estimate("Ratio of the perplexities", result.ratio)
    if result.kl is not None:
        yield _estimate("KL divergence from the base, nats", result.kl)
    if result.same_top is not None:
        yield _estimate("Same top class, %", result.same_top, factor=100)
    yield _estimate("Change of the label's probability, %", result.delta_p, factor=100, signed=True)
    yield Card("Tokens compared", f"{result.scored:,}")


def _estimate(name: str, estimate: Estimate, *, factor: float = 1, signed: bool = False) -> Card:
    by_document = estimate.stderr_cluster is not None
    stderr = estimate.stderr_cluster if estimate.stderr_cluster is not None else estimate.stderr_iid
    value, half = factor * estimate.value, factor * Z95 * stderr
    sign = "+" if signed and value > 0 else ""
    return Card(name, sign + decimal(_short(value)), _interval(value - half, value + half, _taken_over(by_document)))


def _taken_over(documents: bool) -> str:
    return "by document" if documents else "independent tokens"


def _interval(low: float, high: float, by: str) -> str:
    return "" if math.isnan(low) or math.isnan(high) else f"{decimal(_short(low))} to {decimal(_short(high))}, {by}"


def _short(value: float) -> float:
    """Five significant digits are as many as an interval lets one read."""
    return float(f"{value:.5g}")
