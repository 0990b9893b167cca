"""The statistics of a data set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from gpuxent.evaluation.statistics.documents import Document
from gpuxent.evaluation.statistics.histogram import RELATIVE_ERROR


@dataclass(frozen=True)
class CalibrationBin:
    """Rows whose top probability lies in (lower, upper]: how many, how often the top class was right, their mean
    p_max."""

    lower: float
    upper: float
    count: int
    accuracy: float
    confidence: float


@dataclass(frozen=True)
class PositionRange:
    """The tokens with `first` to `last` rows before them in their document and sequence; nats."""

    first: int
    last: int
    scored: int
    cross_entropy: float
    stderr_iid: float


@dataclass(frozen=True)
class GroupStatistics:
    """The documents that have one value in the column of `group_by`; bits per byte and word where they are known."""

    group: str
    documents: int
    scored: int
    cross_entropy: float
    perplexity: float
    stderr_cluster: float  # of the cross-entropy
    bits_per_byte: float | None = None
    bits_per_word: float | None = None


@dataclass(frozen=True, eq=False)
class DocumentTable:
    """Scored tokens and mean losses of documents, as columns in the order of the ids; iteration gives `Document`s."""

    document: np.ndarray  # int64
    scored: np.ndarray  # int64
    cross_entropy: np.ndarray  # float64, nats per token

    def __len__(self) -> int:
        return self.document.size

    def __iter__(self) -> Iterator[Document]:
        yield from map(Document, self.document.tolist(), self.scored.tolist(), self.cross_entropy.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DocumentTable) and all(
            np.array_equal(getattr(self, f.name), getattr(other, f.name), equal_nan=f.name == "cross_entropy")
            for f in fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    def best(self, count: int) -> list[Document]:
        """The documents of the smallest mean losses, the smallest first."""
        return self._at(self._ranked()[:count])

    def worst(self, count: int) -> list[Document]:
        """The documents of the largest mean losses, NaN before all, then the largest."""
        return self._at(self._ranked()[::-1][:count])

    def _ranked(self) -> np.ndarray:
        return np.argsort(self.cross_entropy, kind="stable")  # NaN last

    def _at(self, places: np.ndarray) -> list[Document]:
        return list(DocumentTable(self.document[places], self.scored[places], self.cross_entropy[places]))


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns. Means are over the scored tokens; NaN if there are none.

    cross_entropy and entropy (of the model's distribution) are in nats per token; perplexity is exp(cross_entropy),
    inf if that overflows, and word_perplexity exp(nats per word). accuracy, topk_accuracy[k] and ece (the expected
    calibration error of the top class, from `bins`) are shares from 0 to 1. Of equally probable classes the first
    counts. Rows whose loss is NaN or infinite are among the scored ones; first_*_row are their numbers, leading axes
    flattened.

    stderr_iid is the standard error of the cross-entropy with tokens taken as independent. Those of one document are
    not, so where document ids are given stderr_cluster is the one to quote: of documents drawn independently (NaN if
    there are fewer than two). document_cross_entropy is the mean of the documents' means: every document counts the
    same, however long. Bits per byte and word are all bits over all bytes or words of the documents with a scored
    token, known where these are, and all rows are scored; their standard errors where they are known by document.

    quantiles[q] of the tokens' losses are right within the relative `quantile_error`. by_position and groups split the
    tokens, by_document has all documents. rows are those of the data set, and `share` of them is in these numbers: less
    than 1 of an interrupted run. mixed names the backends and CPU types if there were several: the last bits of the
    row losses depend on these.
    """

    cross_entropy: float
    perplexity: float
    bits_per_token: float
    stderr_iid: float
    stderr_cluster: float | None
    scored: int
    ignored: int
    accuracy: float
    topk_accuracy: dict[int, float]
    entropy: float
    ece: float
    nan_rows: int
    first_nan_row: int | None
    infinite_rows: int
    first_infinite_row: int | None
    bins: tuple[CalibrationBin, ...] = field(repr=False)
    documents: int | None = None
    document_cross_entropy: float | None = None
    document_stderr: float | None = None  # of document_cross_entropy
    bits_per_byte: float | None = None
    bits_per_byte_stderr: float | None = None
    bits_per_word: float | None = None
    bits_per_word_stderr: float | None = None
    word_perplexity: float | None = None
    quantiles: dict[float, float] = field(default_factory=dict)
    quantile_error: float = RELATIVE_ERROR
    by_position: tuple[PositionRange, ...] = field(default=(), repr=False)
    groups: tuple[GroupStatistics, ...] = ()
    by_document: DocumentTable | None = field(default=None, repr=False)
    rows: int = 0
    share: float = 1.0
    mixed: tuple[str, ...] = ()

    def to_dict(self, by_document: bool = True) -> dict[str, Any]:
        """For JSON: None for what is not finite (the counts of NaN and infinite rows tell why), top-k as
        top5_accuracy; the list by_document only if there are documents, and if it is wanted."""
        data: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "topk_accuracy":
                data |= {f"top{k}_accuracy": share for k, share in value.items() if k != 1}
            elif f.name == "quantiles":
                data[f.name] = {str(q): nll for q, nll in value.items()}
            elif f.name == "by_document":
                if by_document and value is not None:
                    data[f.name] = [asdict(document) for document in value]
            elif isinstance(value, tuple):
                data[f.name] = [item if isinstance(item, str) else asdict(item) for item in value]
            else:
                data[f.name] = value
        return finite(data)


def finite(data: Any) -> Any:
    """None in place of every number that JSON cannot say."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
