"""What is scored and how: small enough to send to every worker, and the same there for any block of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._records import IGNORED
from gpuxent.backends import computed, is_cupy, on_gpu, on_host, to_gpu
from gpuxent.evaluation.runs.directory import Run
from gpuxent.evaluation.runs.fingerprint import computed_by
from gpuxent.evaluation.sources import Source
from gpuxent.evaluation.statistics.summary import Summary
from gpuxent.evaluation.statistics.tokens import BlockResult, TokenColumns, Tokens
from gpuxent.evaluation.statistics.totals import score_rows

RETRY_AFTER = (0.1, 1.0, 5.0)  # seconds; what a network file system needs to find its server again
MOST_ID = np.iinfo(np.int64).max
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Job:
    """Sources of logits (..., vocab) and of labels, document ids and a mask (...), and the options of their scoring.

    A row is scored by the label `shift` rows after it, in its own sequence (the last leading axis) and document. A row
    is ignored if its label is `ignore_index`, lies beyond the sequence or document, is masked out (the mask belongs to
    the labels), or if fewer than `min_context` rows of its sequence and document come before it.
    """

    record: ClassVar[type[TokenColumns]] = Tokens  # what is kept of a token

    logits: Source
    labels: Source
    documents: Source | None = None
    mask: Source | None = None
    shift: int = 0
    min_context: int = 0
    limit: int | None = None  # only the first rows
    ignore_index: int | None = arguments.DEFAULT_IGNORE_INDEX
    check_labels: bool = True
    transform: dict[str, Any] = field(default_factory=dict)  # softcap and temperature
    backend: str | None = None
    topk: tuple[int, ...] = (1, 5)
    bins: int = 15
    keep_tokens: bool = False
    rows_at_once: int | None = None  # so many rows of a block are in memory; None: all of them

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.logits.shape[:-1])

    @property
    def all_rows(self) -> int:
        return math.prod(self.lead)

    @property
    def rows(self) -> int:
        return self.all_rows if self.limit is None else min(self.limit, self.all_rows)

    @property
    def row_bytes(self) -> int:
        return self.logits.shape[-1] * self.logits.dtype.itemsize

    @property
    def sources(self) -> dict[str, Source | None]:
        return {"logits": self.logits, "labels": self.labels, "documents": self.documents, "mask": self.mask}

    @property
    def inputs(self) -> dict[str, Source | None]:
        """What is read: of logits that are products, the factors."""
        factors = getattr(self.logits, "factors", {"logits": self.logits})
        return factors | {name: source for name, source in self.sources.items() if name != "logits"}

    @property
    def has_products(self) -> bool:
        """Are the logits made of hidden states, by BLAS?"""
        return hasattr(self.logits, "factors")

    @property
    def options(self) -> dict[str, Any]:
        """By the names that users know: what a run depends on beside its sources."""
        names = ("shift", "min_context", "limit", "ignore_index", "check_labels", "topk", "bins")
        found = {name: getattr(self, name) for name in names} | self.transform
        fixed = getattr(self.logits, "tile_rows", None)
        return found if fixed is None else found | {"tile_rows": fixed}

    def identity(self) -> Any:
        return Summary.identity(self.topk, self.bins, documents=self.documents is not None)

    def summary_of(self, run: Run) -> Any:
        """Of the blocks that a run of this job has finished."""
        return run.summary(self.identity())

    def score(self, first: int, stop: int, computing: AbstractContextManager[Any] | None = None) -> BlockResult:
        """The rows [first, stop). Reading is done outside `computing`, so that others compute meanwhile."""
        step = self.rows_at_once or max(1, stop - first)
        starts = range(first, max(stop, first + 1), step)
        return BlockResult.joined([self._score(start, min(start + step, stop), computing) for start in starts])

    def _score(self, first: int, stop: int, computing: AbstractContextManager[Any] | None) -> BlockResult:
        logits = self._read(self.logits, first, stop, columns=slice(None))
        labelled = self.labelled(first, stop)
        with computing or nullcontext():
            scores = on_cpu(self.row_scores(logits, labelled.classes))
            self.logits.check(slice(first, stop), slice(None))  # a mapped file is read only now
            return self.block_result(first, labelled, scores, computed_by(self.kind))

    def row_scores(self, logits: Any, classes: np.ndarray) -> Any:
        """Of rows (n, vocab) on the CPU, on a GPU or (lazily) of Dask, and their classes as `labelled` gives them."""
        logits, labels, options = self.opened(logits, classes)
        return score_rows(logits, labels, normalized=self.normalized, **options)

    @property
    def normalized(self) -> bool:
        """Are the logits log-probabilities whose normalizer is 0, whatever is missing of them?"""
        unchanged = self.transform.get("softcap") is None and self.transform.get("temperature", 1.0) == 1.0
        return unchanged and getattr(self.logits, "normalized", False)

    def opened(self, logits: Any, classes: np.ndarray) -> tuple[Any, Any, dict[str, Any]]:
        """(logits, labels, options), as `Rows.open` takes them."""
        if self.backend == "cupy" and isinstance(logits, np.ndarray):
            logits = to_gpu(logits)  # once: what is scored takes two reads
        labels = to_gpu(classes, logits) if is_cupy(logits) else classes
        backend = None if is_cupy(logits) else self.backend
        return logits, labels, {"ignore_index": IGNORED, "check_labels": False, "backend": backend, **self.transform}

    def block_result(self, first: int, labelled: Labelled, scores: Any, kind: str) -> BlockResult:
        rows = labelled.classes.size
        on = np.flatnonzero(labelled.classes != IGNORED)
        tokens = Tokens(
            row=on + first,
            label=labelled.classes[on],
            position=labelled.positions[on],
            nll=scores.loss[on],
            entropy=scores.entropy[on],
            p_max=scores.p_max[on],
            rank=scores.rank[on].astype(np.int64),
            document=None if labelled.documents is None else labelled.documents[on],
        )
        summary = Summary.of(tokens, rows - on.size, self.topk, self.bins)
        return BlockResult(first, rows, summary, tokens if self.keep_tokens else None, kind)

    @property
    def kind(self) -> str | None:
        """The backend that computes; None: the one that NumPy arrays go to where the block is scored."""
        return "cupy" if on_gpu(getattr(self.logits, "array", None)) else self.backend

    # ---- labels, positions, documents ----

    def labelled(self, first: int, stop: int) -> Labelled:
        """What belongs to the rows [first, stop) beside their logits."""
        rows = np.arange(first, stop)
        starts, ids, same = self._runs(first, stop)
        positions = rows - starts
        counts = same & (positions >= self.min_context)
        values = self._shifted(self.labels, first, stop)
        if self.mask is not None:
            counts &= self._shifted(self.mask, first, stop).astype(bool)
        # what does not count is not checked either: padding holds anything
        values = values if counts.all() else np.where(counts, values, 0)
        try:
            classes = arguments.class_labels(
                values,
                vocab=self.logits.shape[-1],
                ignore=self.ignore_index,
                check=self.check_labels,
                start=(first + self.shift,),
                shape=self.lead,
            )
        except IndexError as error:
            raise IndexError(f"{error} (in {self.labels.name})") from None
        return Labelled(np.where(counts, classes, IGNORED), positions, ids)

    def _shifted(self, source: Source, first: int, stop: int) -> np.ndarray:
        """The entries that belong to the rows' labels; 0 past the end, where no label counts."""
        values = self._read(source, first + self.shift, min(stop + self.shift, self.all_rows))
        short = stop - first - values.size
        return np.concatenate([values, np.zeros(short, values.dtype)]) if short else values

    def _runs(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Of each row: where its sequence or document begins, its document id, and whether the row that its label
        belongs to lies in the same."""
        rows, length = np.arange(first, stop), self.lead[-1]
        starts = rows - rows % length
        same = rows + self.shift < starts + length
        if self.documents is None:
            return starts, None, same
        seen = self._ids(first, min(stop + self.shift, self.all_rows))
        ids = seen[: rows.size]
        begins = np.concatenate([[True], ids[1:] != ids[:-1]])
        begun = np.where(begins, rows, 0)
        begun[0] = self._document_start(first, ids[0], int(starts[0]))
        after = seen[self.shift :]
        same[: after.size] &= ids[: after.size] == after
        return np.maximum(starts, np.maximum.accumulate(begun)), ids, same

    def _document_start(self, row: int, document: int, bound: int) -> int:
        """Looking back from the row, no further than the bound: the first row of the document's run."""
        size = 4096
        while row > bound:
            begin = max(bound, row - size)
            others = np.flatnonzero(self._ids(begin, row) != document)
            if others.size:
                return begin + int(others[-1]) + 1
            row, size = begin, 2 * size
        return bound

    def _ids(self, first: int, stop: int) -> np.ndarray:
        assert self.documents is not None
        ids = self._read(self.documents, first, stop)
        if ids.dtype == np.uint64 and ids.max(initial=0) > MOST_ID:
            raise ValueError(f"documents ({self.documents.name}) must be below 2**63, got {ids.max()}")
        return ids.astype(np.int64)

    def _read(self, source: Source, first: int, stop: int, columns: slice | None = None) -> Any:
        def read() -> Any:
            return source.read(slice(first, stop), columns)

        values = retried(read, f"{source.name}, rows {first:,} to {stop:,}")
        return values if columns is not None else np.asarray(on_host(computed(values)[0]))


def on_cpu(scores: Any) -> Any:
    """RowScores, or another record of arrays of any kind, with NumPy arrays."""
    return type(scores)(*map(on_host, computed(*vars(scores).values())))


@dataclass(frozen=True)
class Labelled:
    """What belongs to rows beside their logits: int64 vectors of one length."""

    classes: np.ndarray  # IGNORED where the row does not count
    positions: np.ndarray
    documents: np.ndarray | None


def retried(read: Callable[[], Any], what: str) -> Any:
    """What `read` gives, tried again after errors that may pass; the last one says of what."""
    for wait in (*RETRY_AFTER, None):
        try:
            return read()
        except LASTING:
            raise
        except OSError as error:
            if wait is None:
                raise OSError(f"{what}: {error} (tried {len(RETRY_AFTER) + 1} times)") from error
            time.sleep(wait)


def check(job: Job) -> None:
    """What can be seen without reading: dtypes and shapes."""
    logits = job.logits
    if logits.dtype.newbyteorder("=") not in arguments.FLOAT_DTYPES:
        raise TypeError(f"logits ({logits.name}) must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if len(logits.shape) < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits ({logits.name}) must have shape (rows, vocab) or (..., vocab), got {logits.shape}")
    for name, source in job.sources.items():
        if source is None or name == "logits":
            continue
        kinds, expected = ("biu", "integers or booleans") if name == "mask" else ("iu", "integers")
        if source.dtype.kind not in kinds:
            raise TypeError(f"{name} ({source.name}) must be {expected}, got {source.dtype}")
        if source.shape != job.lead:
            raise ValueError(
                f"{name} ({source.name}) must have shape {job.lead} for logits of shape {logits.shape}, "
                f"got {source.shape}"
            )
