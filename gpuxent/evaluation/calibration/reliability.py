"""Bins of forecasts, what is made of them, and how far chance moves it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from gpuxent._records import ExactSum
from gpuxent.evaluation.calibration.forecasts import Forecasts
from gpuxent.evaluation.statistics.result import finite
from gpuxent.evaluation.statistics.sums import exact_sum, sums_by_group
from gpuxent.evaluation.statistics.totals import bin_edges

BINNINGS = ("width", "mass")
MOST_UNITS = 1000  # that are resampled: the error of an interval's width is then 2 %
SEVERAL = 2**22  # numbers that a batch of resamples makes at once


@dataclass(frozen=True)
class Interval:
    """A statistic between the ends of the interval that resampling gives it (NaN where there is none)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ReliabilityBin:
    """Forecasts in (lower, upper], the first bin with its lower end: how many, their mean, and how often the event
    came."""

    lower: float
    upper: float
    count: int
    confidence: float
    accuracy: Interval


@dataclass(frozen=True)
class Reliability:
    """How forecasts of an event compare with it: with n_k forecasts in bin k, of mean confidence_k, and events in a
    share of accuracy_k of them,

        ece = sum of n_k / n * |accuracy_k - confidence_k|      (expected calibration error)
        ace = mean over the bins that are not empty of the same (average, or with bins of equal mass adaptive)
        mce = the largest of them
        brier = mean of (forecast - event)**2
              = reliability - resolution + uncertainty + within_bin_variance - within_bin_covariance

    (Murphy 1973, J. Appl. Meteor. 12:595; the last two terms, without which it is no identity, Stephenson et al. 2008,
    Wea. Forecasting 23:752.) brier_all_classes is the mean of sum over classes of (p - y)**2, None where only the
    largest probability is known; nll is in nats. Nothing depends on chunks or order of the rows, and the intervals
    only on `seed` besides.
    """

    scored: int
    ignored: int
    documents: int | None
    binning: str
    level: float  # of the intervals
    accuracy: Interval  # share of the rows in which the event came
    confidence: Interval  # mean forecast
    ece: Interval
    mce: Interval
    ace: Interval
    brier: Interval
    reliability: Interval
    resolution: Interval
    uncertainty: Interval
    within_bin_variance: Interval
    within_bin_covariance: Interval
    brier_all_classes: Interval | None
    nll: Interval
    bins: tuple[ReliabilityBin, ...] = field(repr=False)

    @property
    def intervals(self) -> dict[str, Interval]:
        """By name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Interval)}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite."""
        return finite(asdict(self) | {"bins": [asdict(item) for item in self.bins]})


@dataclass(frozen=True)
class ClasswiseReliability:
    """`Reliability` of each class, with the mean of their ece over the classes, and the largest of them."""

    classes: tuple[int, ...]
    ece: Interval
    max_ece: Interval
    by_class: tuple[Reliability, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite."""
        by_class = [{"class": c} | r.to_dict() for c, r in zip(self.classes, self.by_class, strict=True)]
        return finite({"ece": asdict(self.ece), "max_ece": asdict(self.max_ece), "by_class": by_class})


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: `resamples` draws of documents, or of rows where there are none."""

    level: float = 0.95
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """The statistics of forecasts, and the same of resamples (resamples,), (resamples, bins) for a bin's."""

    values: dict[str, Any]
    resampled: dict[str, np.ndarray]
    edges: np.ndarray
    counts: np.ndarray
    confidences: np.ndarray


def edges_of(probability: np.ndarray, bins: int, binning: str) -> np.ndarray:
    """What divides the bins: an edge belongs to the bin below it. With equal mass, equal forecasts share a bin, so
    there may be fewer bins than asked for."""
    if binning == "width":
        return bin_edges(bins)[1:-1]
    ranked = np.sort(probability)
    last = -(-np.arange(1, bins) * ranked.size // bins) - 1  # of each bin but the last one
    edges = np.unique(ranked[last[last >= 0]])
    return edges[edges < ranked[-1]]


def measure(forecasts: Forecasts, bins: int, binning: str, how: Resampling) -> Measured:
    """One forecast of each row, in bins that resampling leaves where they are."""
    p, event = forecasts.probability, forecasts.event
    edges = edges_of(p, bins, binning)
    place, size = np.searchsorted(edges, p, side="left"), edges.size + 1
    counts, events = np.bincount(place, minlength=size), np.bincount(place[event], minlength=size)
    sums = sums_by_group(p, place, size)
    centres = np.array([total.divided_by(int(n)) if n else 0.0 for total, n in zip(sums, counts, strict=True)])
    away = p - centres[place]
    columns = {
        "away": away,
        "away_squared": away * away,
        "away_events": np.where(event, away, 0.0),
        "nll": forecasts.nll,
    }
    if forecasts.brier is not None:
        columns["brier_all_classes"] = forecasts.brier
    exact = {name: _values(values, place, size) for name, values in columns.items()}
    values = statistics(counts, events, centres, exact)
    gaps = [abs(hits - total.value) for hits, total in zip(events.tolist(), sums, strict=True)]
    values |= {"ece": math.fsum(gaps) / len(p), "brier": exact_sum((p - event) ** 2).divided_by(len(p))}
    for name in ("nll", "brier_all_classes"):
        if name in columns:
            values[name] = exact_sum(columns[name]).divided_by(len(p))
    resampled = _resampled(columns, event, place, centres, forecasts.document, how)
    return Measured(values, resampled, edges, counts, centres)


def _values(values: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    totals: list[ExactSum] = sums_by_group(values, place, size)
    return np.array([total.value for total in totals])


def statistics(counts: Any, events: Any, centres: np.ndarray, sums: dict[str, np.ndarray]) -> dict[str, Any]:
    """From sums over the bins (..., bins); those of `away`, the forecast minus its bin's centre."""
    n = counts.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        filled = counts > 0
        many = np.where(filled, counts, 1)
        accuracy, drift = events / many, sums["away"] / many
        gap = np.where(filled, np.abs(accuracy - centres - drift), 0.0)
        rate = events.sum(-1) / n
        reliability = (counts * gap**2).sum(-1) / n
        resolution = (counts * (accuracy - rate[..., None]) ** 2).sum(-1) / n
        variance = np.maximum(sums["away_squared"] - drift * sums["away"], 0.0).sum(-1) / n
        covariance = 2 * (sums["away_events"] - accuracy * sums["away"]).sum(-1) / n
        found = {
            "accuracy": rate,
            "confidence": (counts * centres + sums["away"]).sum(-1) / n,
            "ece": (counts * gap).sum(-1) / n,
            "mce": gap.max(-1),
            "ace": gap.sum(-1) / filled.sum(-1),
            "brier": reliability - resolution + rate * (1 - rate) + variance - covariance,
            "reliability": reliability,
            "resolution": resolution,
            "uncertainty": rate * (1 - rate),
            "within_bin_variance": variance,
            "within_bin_covariance": covariance,
            "bin_accuracy": np.where(filled, accuracy, np.nan),
        }
        means = {name: sums[name].sum(-1) / n for name in ("nll", "brier_all_classes") if name in sums}
    return found | means


def _resampled(
    columns: dict[str, np.ndarray],
    event: np.ndarray,
    place: np.ndarray,
    centres: np.ndarray,
    documents: np.ndarray | None,
    how: Resampling,
) -> dict[str, np.ndarray]:
    """The statistics of resamples: units drawn with replacement, as many as there are."""
    rng = np.random.default_rng(how.seed)
    unit, units = dealt(place.size, documents, rng)
    if units < 2 or not how.resamples:
        return {}
    size = centres.size
    cell = unit * size + place
    tables = [np.bincount(cell, minlength=units * size), np.bincount(cell[event], minlength=units * size)]
    tables += [np.bincount(cell, values, units * size) for values in columns.values() if np.isfinite(values).all()]
    names = ["counts", "events", *(name for name, values in columns.items() if np.isfinite(values).all())]
    table = np.stack(tables).reshape(len(names), units, size).astype(np.float64)
    parts = []
    batch = max(1, SEVERAL // max(units, len(names) * size))
    for start in range(0, how.resamples, batch):
        draws = rng.multinomial(units, np.full(units, 1 / units), min(batch, how.resamples - start))
        sums = dict(zip(names, draws.astype(np.float64) @ table, strict=True))
        parts.append(statistics(sums.pop("counts"), sums.pop("events"), centres, sums))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def dealt(rows: int, documents: np.ndarray | None, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(unit of each row, units): documents or rows, dealt at random into groups if there are many."""
    unit, units = np.arange(rows), rows
    if documents is not None:
        names, unit = np.unique(documents, return_inverse=True)
        units = names.size
    if units <= MOST_UNITS:
        return unit, units
    return rng.integers(0, MOST_UNITS, units)[unit], MOST_UNITS


LIMITS = {"resolution": (0.0, 0.25), "uncertainty": (0.0, 0.25), "within_bin_covariance": (-math.inf, math.inf)}
LIMITS |= {"nll": (0.0, math.inf), "brier_all_classes": (0.0, 2.0)}


def interval(name: str, value: float, resampled: Any, level: float) -> Interval:
    """With twice the value minus the quantiles of resamples, the basic bootstrap interval.

    Chance makes |accuracy - confidence| of a bin larger, and resampling adds as much again: this takes it off, where
    the quantiles as they are keep it twice. Of nominally 95 % intervals for a true ECE of 0.047 from 300 rows 84 %
    held it, of those of quantiles 19 %; from 3000 rows 91 and 86 %. (Of an ECE of 0, the end of its range, 54 and 0 %.)
    """
    if resampled is None or not math.isfinite(value):
        return Interval(float(value), math.nan, math.nan)
    finite_ones = resampled[np.isfinite(resampled)]
    if not finite_ones.size:
        return Interval(float(value), math.nan, math.nan)
    below, above = np.quantile(finite_ones, [(1 - level) / 2, (1 + level) / 2])
    low, high = np.clip([2 * value - above, 2 * value - below], *LIMITS.get(name, (0.0, 1.0)))
    return Interval(float(value), float(low), float(high))


def result_of(forecasts: Forecasts, found: Measured, binning: str, how: Resampling) -> Reliability:
    """The measured statistics with their intervals."""
    made = {
        name: interval(name, value, found.resampled.get(name), how.level)
        for name, value in found.values.items()
        if name != "bin_accuracy"
    }
    ends = [0.0, *found.edges.tolist(), 1.0]
    shares = found.resampled.get("bin_accuracy")
    bins = tuple(
        ReliabilityBin(
            ends[i],
            ends[i + 1],
            int(count),
            float(found.confidences[i]) if count else math.nan,
            interval("", found.values["bin_accuracy"][i], None if shares is None else shares[:, i], how.level),
        )
        for i, count in enumerate(found.counts)
    )
    documents = None if forecasts.document is None else np.unique(forecasts.document).size
    head = (len(forecasts), forecasts.ignored, documents, binning, how.level)
    optional = {"brier_all_classes": None} | made
    return Reliability(*head, **optional, bins=bins)  # type: ignore[arg-type]


def classwise(
    classes: tuple[int, ...], by_class: list[Forecasts], bins: int, binning: str, how: Resampling
) -> ClasswiseReliability:
    """Each class by itself, and all with the same resamples, so that their means are of these."""
    found = [measure(forecasts, bins, binning, how) for forecasts in by_class]
    eces = np.array([one.values["ece"] for one in found])
    again = [one.resampled["ece"] for one in found if one.resampled]
    mean, most = (np.mean(again, axis=0), np.max(again, axis=0)) if len(again) == len(found) else (None, None)
    return ClasswiseReliability(
        classes,
        interval("ece", math.fsum(eces) / len(eces), mean, how.level),
        interval("ece", eces.max(), most, how.level),
        tuple(result_of(forecasts, one, binning, how) for forecasts, one in zip(by_class, found, strict=True)),
    )
