"""What a data set leaves behind: counts and exact sums, the same bit for bit under any grouping of its rows."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np

from gpuxent import _row_loss
from gpuxent._records import IGNORED, NO_SQUARES, NOTHING, ExactSum
from gpuxent._rows import Rows
from gpuxent.backends import on_host
from gpuxent.evaluation.result import CalibrationBin, Evaluation

FORMAT = "gpuxent totals, version 1"


@dataclass(frozen=True)
class RowScores:
    """What is measured of each row of a block, in arrays of one shape; meaningless where not `scored`."""

    scored: np.ndarray
    loss: np.ndarray  # nats, float64
    entropy: np.ndarray  # nats, float64
    rank: np.ndarray  # classes before the label: 0 is a hit
    p_max: np.ndarray


def score_rows(logits: Any, labels: Any, **options: Any) -> RowScores:
    """RowScores of rows; `options` are those of `cross_entropy` that do not change what is measured.

    Those of CuPy rows are brought to the CPU, where totals are made, which waits for the GPU.
    """
    rows = Rows.open(logits, labels, **options)
    fields = rows.backend.map_rows(_scores, rows.stats(also=("moment", "rank")), rows.labels, outputs=5)
    scored, *measured = map(on_host, fields)
    return RowScores(scored.astype(bool), *measured)


def _scores(stats: Any, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    loss, _ = _row_loss.row_losses(stats, labels, 1.0, smoothing=0.0, z_loss=0.0, has_spread=False)
    return labels != IGNORED, loss, _row_loss.entropy(stats), stats.rank, 1.0 / (1.0 + stats.rest)


@dataclass(frozen=True)
class BadRows:
    """How many rows have a loss that is NaN (or infinite), and the first of them."""

    count: int = 0
    first: int | None = None

    @classmethod
    def of(cls, bad: np.ndarray, numbers: np.ndarray) -> BadRows:
        return cls(int(bad.sum()), int(numbers[bad].min()) if bad.any() else None)

    def merge(self, other: BadRows) -> BadRows:
        firsts = [first for first in (self.first, other.first) if first is not None]
        return BadRows(self.count + other.count, min(firsts, default=None))


NO_BAD_ROWS = BadRows()


@dataclass(frozen=True)
class Bin:
    """Rows whose p_max lies in one interval: how many, how many hits, and the sum of p_max."""

    count: int = 0
    hits: int = 0
    confidence: ExactSum = NOTHING

    def merge(self, other: Bin) -> Bin:
        return Bin(self.count + other.count, self.hits + other.hits, self.confidence.merge(other.confidence))


@dataclass(frozen=True)
class Totals:
    """Counts and exact sums over rows. `merge` adds integers, so grouping and order do not matter to a single bit."""

    topk: tuple[int, ...]
    hits: tuple[int, ...]  # one per k: rows whose label is among the k most probable classes
    bins: tuple[Bin, ...]  # equal widths over (0, 1], each closed on the right
    scored: int = 0
    ignored: int = 0
    loss: ExactSum = NOTHING
    loss_squares: ExactSum = NO_SQUARES
    entropy: ExactSum = NOTHING
    nan: BadRows = NO_BAD_ROWS
    infinite: BadRows = NO_BAD_ROWS

    @classmethod
    def identity(cls, topk: tuple[int, ...] = (1, 5), bins: int = 15) -> Totals:
        """No rows. Top-1 is always counted."""
        topk = tuple(sorted({1, *topk}))
        return cls(topk, (0,) * len(topk), (Bin(),) * bins)

    def with_rows(self, scores: RowScores, numbers: np.ndarray) -> Totals:
        """These totals and those of more rows, which bear the given numbers in the data set."""
        on = scores.scored
        loss, p_max, rank = scores.loss[on], scores.p_max[on], scores.rank[on]
        nan = np.isnan(loss)
        probable = np.isfinite(loss)  # a class of probability 0 is never a hit
        hits = tuple(int(np.count_nonzero(probable & (rank < k))) for k in self.topk)
        return self.merge(
            Totals(
                self.topk,
                hits,
                _bins(p_max[~nan], (probable & (rank == 0))[~nan], len(self.bins)),
                scored=int(on.sum()),
                ignored=int(on.size - on.sum()),
                loss=ExactSum.of(loss),
                loss_squares=ExactSum.of_squares(loss),
                entropy=ExactSum.of(scores.entropy[on]),
                nan=BadRows.of(nan, numbers[on]),
                infinite=BadRows.of(np.isinf(loss), numbers[on]),
            )
        )

    def merge(self, other: Totals) -> Totals:
        if self.topk != other.topk or len(self.bins) != len(other.bins):
            raise ValueError(
                f"cannot merge totals of topk={self.topk} with {len(self.bins)} bins and topk={other.topk} with "
                f"{len(other.bins)} bins"
            )
        return replace(
            self,
            hits=tuple(a + b for a, b in zip(self.hits, other.hits, strict=True)),
            bins=tuple(a.merge(b) for a, b in zip(self.bins, other.bins, strict=True)),
            scored=self.scored + other.scored,
            ignored=self.ignored + other.ignored,
            **{name: getattr(self, name).merge(getattr(other, name)) for name in (*_SUMS, *_BAD)},
        )

    @property
    def mean_loss(self) -> float:
        """Cross-entropy in nats, rounded once."""
        return self.loss.divided_by(self.scored)

    def result(self) -> Evaluation:
        """The statistics, each from exact sums."""
        mean = self.mean_loss
        accuracy = {
            k: hits / self.scored if self.scored else math.nan for k, hits in zip(self.topk, self.hits, strict=True)
        }
        return Evaluation(
            cross_entropy=mean,
            perplexity=exp(mean),
            bits_per_token=mean / math.log(2),
            stderr=self._standard_error(),
            scored=self.scored,
            ignored=self.ignored,
            accuracy=accuracy[1],
            topk_accuracy=accuracy,
            entropy=self.entropy.divided_by(self.scored),
            ece=self._calibration_error(),
            bins=tuple(
                CalibrationBin(
                    lower=i / len(self.bins),
                    upper=(i + 1) / len(self.bins),
                    count=b.count,
                    accuracy=b.hits / b.count if b.count else math.nan,
                    confidence=b.confidence.divided_by(b.count),
                )
                for i, b in enumerate(self.bins)
            ),
            nan_rows=self.nan.count,
            first_nan_row=self.nan.first,
            infinite_rows=self.infinite.count,
            first_infinite_row=self.infinite.first,
        )

    def _standard_error(self) -> float:
        """Of the mean, tokens taken as independent: sqrt(variance / n), the variance from exact integers."""
        n = self.scored
        if n < 2 or self.nan.count or self.infinite.count:
            return math.nan
        mean_square = Fraction(self.loss_squares.units, n)  # in units of the squares
        squared_mean = Fraction(self.loss.units, n) ** 2
        try:
            return math.sqrt((mean_square - squared_mean) / (n - 1) / (1 << self.loss_squares.scale))
        except OverflowError:
            return math.inf

    def _calibration_error(self) -> float:
        """sum over bins of |hits - sum of p_max| / n (Guo et al. 2017, arXiv 1706.04599)."""
        if self.scored == 0 or self.nan.count:
            return math.nan
        return math.fsum(abs(b.hits - b.confidence.value) for b in self.bins) / self.scored

    def to_json(self) -> str:
        """All of it as text, without losing a bit."""
        return json.dumps(
            {
                "format": FORMAT,
                "topk": self.topk,
                "hits": self.hits,
                "bins": [[b.count, b.hits, _sum_to_json(b.confidence)] for b in self.bins],
                "scored": self.scored,
                "ignored": self.ignored,
                **{name: _sum_to_json(getattr(self, name)) for name in _SUMS},
                **{name: [getattr(self, name).count, getattr(self, name).first] for name in _BAD},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Totals:
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"text is not of the format {FORMAT!r}")
        return cls(
            topk=tuple(data["topk"]),
            hits=tuple(data["hits"]),
            bins=tuple(Bin(count, hits, _sum_from_json(s)) for count, hits, s in data["bins"]),
            scored=data["scored"],
            ignored=data["ignored"],
            **{name: _sum_from_json(data[name]) for name in _SUMS},  # type: ignore[arg-type]
            **{name: BadRows(*data[name]) for name in _BAD},  # type: ignore[arg-type]
        )


_SUMS = ("loss", "loss_squares", "entropy")
_BAD = ("nan", "infinite")


def merge_all(totals: list[Totals]) -> Totals:
    return reduce(Totals.merge, totals)


def exp(x: float) -> float:
    """exp that overflows to inf."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _bins(p_max: np.ndarray, hit: np.ndarray, count: int) -> tuple[Bin, ...]:
    edges = np.linspace(0, 1, count + 1)[1:-1]
    place = np.searchsorted(edges, p_max, side="left")  # p equal to an edge belongs to the bin below it
    return tuple(
        Bin(int(here.sum()), int(hit[here].sum()), ExactSum.of(p_max[here])) if (here := place == i).any() else Bin()
        for i in range(count)
    )


def _sum_to_json(total: ExactSum) -> list[Any]:
    # a string: JSON readers of other languages make floats of long integers
    return [hex(total.units), repr(total.nonfinite), total.scale]


def _sum_from_json(data: list[Any]) -> ExactSum:
    return ExactSum(int(data[0], 16), float(data[1]), data[2])
