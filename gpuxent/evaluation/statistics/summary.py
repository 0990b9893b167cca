"""What rows leave behind for every statistic of a data set; merged exactly, and stored without losing a bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from gpuxent._records import NO_SQUARES, NOTHING
from gpuxent.evaluation.statistics.clustered import LN2, document_statistics, unit_statistics
from gpuxent.evaluation.statistics.documents import DocumentSums
from gpuxent.evaluation.statistics.histogram import LossHistogram
from gpuxent.evaluation.statistics.metadata import Metadata
from gpuxent.evaluation.statistics.packed import pack_sum, unpack_sum
from gpuxent.evaluation.statistics.result import Evaluation, PositionRange
from gpuxent.evaluation.statistics.sums import LossSums
from gpuxent.evaluation.statistics.tokens import Tokens
from gpuxent.evaluation.statistics.totals import Totals, checked_format, exp

FORMAT = "gpuxent summary, version 1"
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class Summary:
    """Integers, and histograms and sums made of them: the same bit for bit under any grouping and order of the rows.

    To compare two, compare what `to_json` gives: a sum with NaN is not equal to itself.
    """

    totals: Totals
    positions: tuple[LossSums, ...] = ()  # by position in octaves: 0, 1, 2-3, 4-7, ...
    losses: LossHistogram = field(default_factory=LossHistogram)
    documents: DocumentSums | None = None  # None: the data set has no document ids

    @classmethod
    def identity(cls, topk: tuple[int, ...] = (1, 5), bins: int = 15, documents: bool = False) -> Summary:
        """No rows, of a data set with or without document ids."""
        return cls(Totals.identity(topk, bins), documents=DocumentSums() if documents else None)

    @classmethod
    def of(cls, tokens: Tokens, ignored: int, topk: tuple[int, ...] = (1, 5), bins: int = 15) -> Summary:
        """Of scored tokens, and so many rows without one; with documents if the tokens have their ids."""
        _, octaves = np.frexp(tokens.position.astype(np.float64))  # the number of bits
        positions = LossSums.of_groups(tokens.nll, octaves, int(octaves.max(initial=-1)) + 1)
        return cls(
            Totals.of(tokens, ignored, topk, bins, losses=LossSums.merge_all(positions)),
            positions,
            LossHistogram.of(tokens.nll),
            None if tokens.document is None else DocumentSums.of(tokens.document, tokens.nll),
        )

    def merge(self, other: Summary) -> Summary:
        if (self.documents is None) != (other.documents is None):
            raise ValueError("cannot merge a summary with documents and one without")
        positions = zip_longest(self.positions, other.positions, fillvalue=LossSums())
        return Summary(
            self.totals.merge(other.totals),
            tuple(a.merge(b) for a, b in positions),
            self.losses.merge(other.losses),
            None if self.documents is None or other.documents is None else self.documents.merge(other.documents),
        )

    def to_json(self) -> str:
        """All of it as text: about 2 kB of a block, and 2 bytes for each of its bins of losses and 20 for each of its
        documents."""
        data = {
            "format": FORMAT,
            "totals": self.totals.to_data(),
            "positions": [[p.count, pack_sum(p.total), pack_sum(p.squares)] if p.count else [] for p in self.positions],
            "losses": self.losses.to_data(),
            "documents": None if self.documents is None else self.documents.to_data(),
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Summary:
        data = checked_format(text, FORMAT)
        return cls(
            Totals.from_data(data["totals"]),
            tuple(
                LossSums(p[0], unpack_sum(p[1], NOTHING.scale), unpack_sum(p[2], NO_SQUARES.scale)) if p else LossSums()
                for p in data["positions"]
            ),
            LossHistogram.from_data(data["losses"]),
            None if data["documents"] is None else DocumentSums.from_data(data["documents"]),
        )

    def result(
        self,
        *,
        rows: int | None = None,
        metadata: Metadata | None = None,
        mixed: tuple[str, ...] = (),
        quantiles: tuple[float, ...] = QUANTILES,
    ) -> Evaluation:
        """The statistics. `rows` are those of the data set, if not all are in this summary; `metadata` is what a table
        says of the documents.

        Raises: ValueError: metadata about documents without their ids, or without a document that has scored tokens.
        """
        if self.documents is None and metadata is not None and metadata.needs_documents:
            raise ValueError(f"{metadata.name} is about documents, but the rows have no document ids")
        totals, about = self.totals, None
        done = totals.scored + totals.ignored
        if metadata is not None:
            about = metadata.of(_NO_IDS if self.documents is None else self.documents.run.ids)
        whole = totals.scored > 0 and (rows is None or done >= rows)  # else the bytes are those of more than was scored
        if self.documents is None:
            of_documents: dict[str, Any] = {"stderr_cluster": None}
        else:
            of_documents = document_statistics(self.documents, about, whole)
        if about is not None and whole:
            of_documents |= unit_statistics(totals.loss, self.documents, about)
        return Evaluation(
            cross_entropy=totals.mean_loss,
            perplexity=exp(totals.mean_loss),
            bits_per_token=totals.mean_loss / LN2,
            stderr_iid=totals.stderr_iid,
            scored=totals.scored,
            ignored=totals.ignored,
            accuracy=totals.topk_accuracy[1],
            topk_accuracy=totals.topk_accuracy,
            entropy=totals.entropy.divided_by(totals.scored),
            ece=totals.calibration_error,
            bins=totals.calibration_bins,
            nan_rows=totals.nan.count,
            first_nan_row=totals.nan.first,
            infinite_rows=totals.infinite.count,
            first_infinite_row=totals.infinite.first,
            quantiles=self.losses.quantiles(quantiles),
            by_position=tuple(
                PositionRange(2**octave >> 1, max(2**octave - 1, 0), sums.count, sums.mean, sums.stderr)
                for octave, sums in enumerate(self.positions)
                if sums.count
            ),
            rows=done if rows is None else rows,
            share=done / rows if rows else 1.0,
            mixed=tuple(mixed),
            **of_documents,
        )


_NO_IDS = np.zeros(0, np.int64)
