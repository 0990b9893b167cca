"""The mean loss while tokens come in, and how sure it is; from a stream of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from gpuxent.evaluation.statistics.tokens import Tokens
from gpuxent.evaluation.statistics.totals import Totals

POINTS = 300
FEWEST, SMALLEST_SHARE = 30, 0.001  # tokens at the first point: what a handful says is not worth the room


@dataclass(frozen=True, eq=False)
class Running:
    """The mean of the first so many losses that are finite, in the order of the rows, at points that grow by the same
    factor; nats. The errors are those of `Evaluation`, at that point; NaN of one token or document."""

    tokens: np.ndarray  # int64 (points,)
    mean: np.ndarray
    stderr_iid: np.ndarray
    stderr_cluster: np.ndarray | None  # None: no documents

    @property
    def stderr(self) -> np.ndarray:
        """The one to quote."""
        return self.stderr_iid if self.stderr_cluster is None else self.stderr_cluster


class RunningMean:
    """Sums so far of all tokens and of each document, noted at the points of `Running`.

    Losses are taken relative to the mean of all: so squares lose no digits to it.
    """

    def __init__(self, totals: Totals, documents: np.ndarray | None) -> None:
        finite = totals.scored - totals.nan.count - totals.infinite.count
        self.seen = 0  # tokens, those whose loss is not finite among them
        self._centre = replace(totals.loss, nonfinite=0.0).divided_by(finite) if finite else 0.0
        first = max(1.0, min(FEWEST, finite / 10), SMALLEST_SHARE * finite)
        self._points = np.unique(np.geomspace(first, finite, POINTS).round().astype(np.int64)) if finite else _NO_POINTS
        self._ids = documents  # sorted
        size = 0 if documents is None else documents.size
        self._counts, self._sums, self._squares = np.zeros(size, np.int64), np.zeros(size), np.zeros(size)
        self._count, self._sum, self._square = 0, 0.0, 0.0
        self._noted: list[tuple[float, float, float]] = []  # mean, stderr_iid, stderr_cluster

    def add(self, tokens: Tokens) -> None:
        self.seen += len(tokens)
        finite = np.isfinite(tokens.nll)
        away = tokens.nll[finite] - self._centre
        places = None
        if self._ids is not None and tokens.document is not None:
            places = np.searchsorted(self._ids, tokens.document[finite])
        start = 0
        while start < away.size:
            to_next = self._points[len(self._noted)] - self._count
            piece = slice(start, start + int(to_next))
            self._advance(away[piece], None if places is None else places[piece])
            start += int(to_next)
            if self._count == self._points[len(self._noted)]:
                self._noted.append(self._now())

    def _advance(self, away: np.ndarray, places: np.ndarray | None) -> None:
        with np.errstate(over="ignore"):
            squares = away * away
            self._count += away.size
            self._sum += float(away.sum())
            self._square += float(squares.sum())
            if places is not None:
                np.add.at(self._counts, places, 1)
                np.add.at(self._sums, places, away)
                np.add.at(self._squares, places, squares)

    def _now(self) -> tuple[float, float, float]:
        n, mean = self._count, self._sum / self._count
        iid = math.sqrt(max(self._square - self._sum * mean, 0.0) / (n - 1) / n) if n > 1 else math.nan
        return self._centre + mean, iid, self._stderr_cluster(mean)

    def _stderr_cluster(self, mean: float) -> float:
        """As `clustered.ratio`, of the documents that have tokens by now."""
        documents = np.count_nonzero(self._counts)
        if documents < 2:
            return math.nan
        with np.errstate(over="ignore"):
            squares = float(np.square(self._sums - mean * self._counts).sum())
        return math.sqrt(documents / (documents - 1) * squares) / self._count

    def result(self) -> Running:
        mean, iid, cluster = np.array(self._noted).reshape(-1, 3).T
        return Running(self._points[: mean.size], mean, iid, None if self._ids is None else cluster)

    def document_stderr(self) -> np.ndarray | None:
        """Of each document's mean over its finite losses, tokens taken as independent; NaN of fewer than two."""
        if self._ids is None:
            return None
        n = self._counts
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            variance = np.maximum(self._squares - self._sums**2 / n, 0.0) / (n - 1)
            return np.where(n > 1, np.sqrt(variance / n), math.nan)


_NO_POINTS = np.zeros(0, np.int64)
