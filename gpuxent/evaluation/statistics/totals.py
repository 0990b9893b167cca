"""What a data set leaves behind: counts and exact sums, the same bit for bit under any grouping of its rows."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from gpuxent import _row_loss
from gpuxent._records import IGNORED, NO_SQUARES, NOTHING, ExactSum
from gpuxent._rows import Rows
from gpuxent.backends import on_host
from gpuxent.evaluation.statistics.packed import pack_sum, unpack_sum
from gpuxent.evaluation.statistics.result import CalibrationBin
from gpuxent.evaluation.statistics.sums import LossSums, exact_sum, sums_by_group
from gpuxent.evaluation.statistics.tokens import Tokens

FORMAT = "gpuxent totals, version 2"


@dataclass(frozen=True)
class RowScores:
    """What is measured of each row of a block, in arrays of one shape; meaningless where not `scored`."""

    scored: np.ndarray
    loss: np.ndarray  # nats, float64
    entropy: np.ndarray  # nats, float64
    rank: np.ndarray  # classes before the label: 0 is a hit
    p_max: np.ndarray


def score_rows(logits: Any, labels: Any, *, normalized: bool = False, **options: Any) -> RowScores:
    """RowScores of rows; `options` are those of `cross_entropy` that do not change what is measured. normalized: the
    rows are log-probabilities.

    Those of CuPy rows are brought to the CPU, where totals are made, which waits for the GPU.
    """
    rows = Rows.open(logits, labels, **options)
    measured = partial(measures, normalized=normalized)
    fields = rows.backend.map_rows(measured, rows.stats(also=("moment", "rank")), rows.labels, outputs=5)
    scored, *others = map(on_host, fields)
    return RowScores(scored.astype(bool), *others)


def measures(stats: Any, labels: np.ndarray, normalized: bool = False) -> tuple[np.ndarray, ...]:
    """The fields of RowScores, of statistics with moment and rank."""
    if normalized:
        stats = replace(stats, rest=rest_of_log_probs(stats.max))
    loss, _ = _row_loss.row_losses(stats, labels, 1.0, smoothing=0.0, z_loss=0.0, has_spread=False)
    return labels != IGNORED, loss, _row_loss.entropy(stats), stats.rank, 1.0 / (1.0 + stats.rest)


def rest_of_log_probs(top: np.ndarray) -> np.ndarray:
    """RowStats.rest of rows that are log-probabilities, some of which may be missing: their normalizer is 0."""
    return np.maximum(np.exp(-top) - 1.0, 0.0)  # a probability of 1 may be rounded up


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
        if not other.count:
            return self
        return Bin(self.count + other.count, self.hits + other.hits, self.confidence.merge(other.confidence))


NO_BIN = Bin()


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
        return cls(topk, (0,) * len(topk), (NO_BIN,) * bins)

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        ignored: int,
        topk: tuple[int, ...] = (1, 5),
        bins: int = 15,
        *,
        losses: LossSums | None = None,
    ) -> Totals:
        """Of scored tokens, and so many rows without one; `losses` are the sums of tokens.nll, if somebody has them."""
        topk = tuple(sorted({1, *topk}))
        loss, rank = tokens.nll, tokens.rank
        losses = losses or LossSums(len(tokens), exact_sum(loss), exact_sum(loss, squared=True))
        nan, infinite = np.isnan(loss), np.isinf(loss)
        hits = rank[~(nan | infinite)]  # a class of probability 0 is never a hit
        return cls(
            topk,
            tuple(int(np.count_nonzero(hits < k)) for k in topk),
            _bins(tokens.p_max[~nan], (np.where(infinite, 1, rank) == 0)[~nan], bins),
            scored=len(tokens),
            ignored=ignored,
            loss=losses.total,
            loss_squares=losses.squares,
            entropy=exact_sum(tokens.entropy),
            nan=BadRows.of(nan, tokens.row),
            infinite=BadRows.of(infinite, tokens.row),
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

    @property
    def stderr_iid(self) -> float:
        """Of the mean loss, tokens taken as independent; NaN with fewer than two, or with a loss that is not finite."""
        return LossSums(self.scored, self.loss, self.loss_squares).stderr

    @property
    def topk_accuracy(self) -> dict[int, float]:
        return {
            k: hits / self.scored if self.scored else math.nan for k, hits in zip(self.topk, self.hits, strict=True)
        }

    @property
    def calibration_bins(self) -> tuple[CalibrationBin, ...]:
        edges = bin_edges(len(self.bins)).tolist()
        return tuple(
            CalibrationBin(
                lower=lower,
                upper=upper,
                count=b.count,
                accuracy=b.hits / b.count if b.count else math.nan,
                confidence=b.confidence.divided_by(b.count),
            )
            for b, (lower, upper) in zip(self.bins, pairwise(edges), strict=True)
        )

    @property
    def calibration_error(self) -> float:
        """sum over bins of |hits - sum of p_max| / n (Guo et al. 2017, arXiv 1706.04599)."""
        if self.scored == 0 or self.nan.count:
            return math.nan
        return math.fsum(abs(b.hits - b.confidence.value) for b in self.bins) / self.scored

    def to_json(self) -> str:
        """All of it as text, without losing a bit."""
        return json.dumps({"format": FORMAT, **self.to_data()}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Totals:
        return cls.from_data(checked_format(text, FORMAT))

    def to_data(self) -> dict[str, Any]:
        return {
            "topk": self.topk,
            "hits": self.hits,
            "bins": [[b.count, b.hits, pack_sum(b.confidence)] if b.count else [] for b in self.bins],
            "scored": self.scored,
            "ignored": self.ignored,
            **{name: pack_sum(getattr(self, name)) for name in _SUMS},
            **{name: [getattr(self, name).count, getattr(self, name).first] for name in _BAD},
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Totals:
        return cls(
            topk=tuple(data["topk"]),
            hits=tuple(data["hits"]),
            bins=tuple(Bin(b[0], b[1], unpack_sum(b[2], NOTHING.scale)) if b else NO_BIN for b in data["bins"]),
            scored=data["scored"],
            ignored=data["ignored"],
            **{name: unpack_sum(data[name], scale) for name, scale in _SUMS.items()},  # type: ignore[arg-type]
            **{name: BadRows(*data[name]) for name in _BAD},  # type: ignore[arg-type]
        )


_SUMS = {"loss": NOTHING.scale, "loss_squares": NO_SQUARES.scale, "entropy": NOTHING.scale}
_BAD = ("nan", "infinite")


def exp(x: float) -> float:
    """exp that overflows to inf."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def checked_format(text: str, name: str) -> dict[str, Any]:
    """The object in the text, which must say that it is of this format."""
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.pop("format", None) != name:
        raise ValueError(f"text is not of the format {name!r}")
    return data


def bin_edges(count: int) -> np.ndarray:
    """The count + 1 ends of bins of equal width in [0, 1]; others than k / count in the last bit of some."""
    return np.linspace(0, 1, count + 1)


def _bins(p_max: np.ndarray, hit: np.ndarray, count: int) -> tuple[Bin, ...]:
    place = np.searchsorted(bin_edges(count)[1:-1], p_max, side="left")  # p on an edge belongs to the bin below it
    counts, hits = (np.bincount(chosen, minlength=count).tolist() for chosen in (place, place[hit]))
    confidences = sums_by_group(p_max, place, count)
    return tuple(Bin(*b) if b[0] else NO_BIN for b in zip(counts, hits, confidences, strict=True))
