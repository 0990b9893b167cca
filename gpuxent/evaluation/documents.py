"""Totals per document."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpuxent._records import ExactSum
from gpuxent.evaluation.totals import RowScores


@dataclass(frozen=True)
class Document:
    """A document's id, its scored tokens, and their mean loss in nats."""

    document: int
    scored: int
    cross_entropy: float


class DocumentTotals:
    """Scored tokens and the exact sum of their losses for each document id, added up in place: there may be millions.

    A document without a scored token is not listed.
    """

    def __init__(self) -> None:
        self._totals: dict[int, tuple[int, ExactSum]] = {}

    def __len__(self) -> int:
        return len(self._totals)

    def add(self, scores: RowScores, ids: np.ndarray) -> None:
        """More rows, with the document id of each."""
        ids, loss = ids[scores.scored], scores.loss[scores.scored]
        order = np.argsort(ids, kind="stable")
        names, starts = np.unique(ids[order], return_index=True)
        for name, losses in zip(names.tolist(), np.split(loss[order], starts[1:]), strict=False):
            count, total = self._totals.get(name, (0, ExactSum()))
            self._totals[name] = (count + losses.size, total.merge(ExactSum.of(losses)))

    def rows(self) -> Iterator[Document]:
        """By document id."""
        for name, (count, total) in sorted(self._totals.items()):
            yield Document(name, count, total.divided_by(count))

    def mean(self) -> float:
        """The mean of the documents' mean losses: each document counts once, however long. NaN without documents."""
        means = [document.cross_entropy for document in self.rows()]
        return math.fsum(means) / len(means) if means else math.nan
