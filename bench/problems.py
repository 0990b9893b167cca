"""The data of a case, the same for every contender: logits on which a wrong or a sloppy loss shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import ml_dtypes
import numpy as np

from bench.cases import Case

DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}

# A confident row has its label this far above the lse of the other classes: p = 1 - 1e-12 at the widest.
GAPS = (27.7, 0.5, 14.0, 4.0)
OFFSET = 10000.0  # 16-bit logits have no digits left there
SAMPLE = 64  # rows that are compared one by one


@dataclass(frozen=True)
class Answer:
    """What a contender, or the oracle, says; None where the task has no such thing.

    value: the mean loss, or divergence. rows: a number per sampled row (binary: per element). entries: sampled rows of
    a gradient or softmax.
    """

    value: float | None = None
    rows: np.ndarray | None = None
    entries: np.ndarray | None = None


@dataclass(frozen=True)
class Problem:
    """logits (rows, vocab); labels int64 (rows,), or (rows, vocab) in the logits' dtype: soft or binary labels, or the
    logits of another model.

    They may be on a GPU, and larger than what is in `host`, which is what the oracle reads: (logits, labels) in NumPy,
    whose rows the problem's rows repeat in turn.
    """

    case: Case
    logits: Any
    labels: Any
    host: tuple[np.ndarray, np.ndarray]

    @cached_property
    def scratch(self) -> Any:
        """Room for a result of the logits' size, shared by all that write over it."""
        return self.logits.copy()

    def restore_scratch(self) -> None:
        np.copyto(self.scratch, self.logits)

    @cached_property
    def sample(self) -> np.ndarray:
        """Indices of the rows to compare: all of them, or as many as SAMPLE at random."""
        rows = self.case.rows
        if rows <= SAMPLE:
            return np.arange(rows)
        return np.sort(_generator(self.case).choice(rows, SAMPLE, replace=False))


def make(case: Case) -> Problem:
    rng = _generator(case)
    if case.task == "binary":
        logits = _binary_logits(case, rng)
        return _in_memory(case, logits, rng.integers(0, 2, logits.shape).astype(logits.dtype))
    logits = np.empty((case.rows, case.vocab), _dtype(case))
    labels = rng.integers(0, case.vocab, case.rows)
    for i in range(case.rows):
        row = 3 * rng.standard_normal(case.vocab, dtype=np.float32)
        if i % 3 == 0:  # the model is right, more or less sure of it
            lse = np.log(np.sum(np.exp(np.delete(row, labels[i])), dtype=np.float64))
            row[labels[i]] = lse + GAPS[i // 3 % len(GAPS)]
        if i % 5 == 0 and case.dtype == "f32":
            row += OFFSET
        logits[i] = row
    if case.task == "pairs":
        return _in_memory(case, logits, _of_another_model(logits, rng))
    return _in_memory(case, logits, _distributions(case, rng) if case.task == "soft" else labels)


def _in_memory(case: Case, logits: np.ndarray, labels: np.ndarray) -> Problem:
    return Problem(case, logits, labels, (logits, labels))


def _generator(case: Case) -> np.random.Generator:
    return np.random.default_rng(crc32(case.name.encode()))  # the same data in every run


def _dtype(case: Case) -> np.dtype:
    return DTYPES[case.dtype]


def _of_another_model(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Logits as a quantised copy of the model would give them."""
    other = np.empty_like(logits)
    for theirs, row in zip(other, logits, strict=True):
        theirs[:] = row.astype(np.float32) + 0.3 * rng.standard_normal(row.size, dtype=np.float32)
    return other


def _distributions(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Rows of probabilities, as another model would give them."""
    labels = np.empty((case.rows, case.vocab), _dtype(case))
    for row in labels:
        weights = np.exp(3 * rng.standard_normal(case.vocab, dtype=np.float32))
        row[:] = weights / np.sum(weights)
    return labels


def _binary_logits(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Independent logits, one in eight of them sure: the loss of +-27.7 is 1e-12 or 27.7."""
    logits = 3 * rng.standard_normal((case.rows, case.vocab), dtype=np.float32)
    sure = rng.random(logits.shape, dtype=np.float32) < 0.125
    np.copyto(logits, np.copysign(np.float32(GAPS[0]), logits), where=sure)
    return logits.astype(_dtype(case))
