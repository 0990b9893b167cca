"""What a sample of an array's rows says of its values: hints for people, on which no result depends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gpuxent.evaluation.sources import Source
from gpuxent.normalizers import logsumexp

SAMPLE_BYTES = 64 * 2**20  # of rows of floats
INTEGER_BYTES = 512 * 2**20  # of labels and document ids, which are read whole if they fit: one wrong label is enough
RUNS = 16  # places that the sample is spread over
DECODED_BYTES = 8 * SAMPLE_BYTES  # the most that storage in chunks may have to unpack for it


@dataclass
class Range:
    """From the least to the greatest of what was seen."""

    least: float = math.inf
    greatest: float = -math.inf

    def add(self, values: np.ndarray) -> None:
        if values.size:
            self.least = min(self.least, values.min().item())
            self.greatest = max(self.greatest, values.max().item())

    def within(self, least: float, greatest: float) -> bool:
        return least <= self.least <= self.greatest <= greatest

    def to_dict(self) -> dict[str, Any]:
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass
class FloatSample:
    """What was seen of rows of floats."""

    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0  # of reading
    values: int = 0
    nan: int = 0
    plus_inf: int = 0
    minus_inf: int = 0
    constant_rows: int = 0  # of one value only
    finite: Range = field(default_factory=Range)
    row_sum: Range = field(default_factory=Range)  # of rows without NaN
    row_lse: Range = field(default_factory=Range)
    row_ratio: Range = field(default_factory=Range)  # greatest over least value
    row_span: Range = field(default_factory=Range)  # greatest minus least finite value

    def add(self, block: np.ndarray) -> None:
        self.rows, self.bytes, self.values = self.rows + len(block), self.bytes + block.nbytes, self.values + block.size
        x = block.astype(np.float64)
        finite, nan = np.isfinite(x), np.isnan(x)
        self.nan += int(nan.sum())
        self.plus_inf += int(np.isposinf(x).sum())
        self.minus_inf += int(np.isneginf(x).sum())
        self.finite.add(x[finite])
        if x.ndim > 1:
            self._add_rows(x[~nan.any(-1)])

    def _add_rows(self, x: np.ndarray) -> None:
        if x.size == 0:
            return
        high, low = x.max(-1), np.where(np.isneginf(x), np.inf, x).min(-1)
        self.constant_rows += int((x == x[:, :1]).all(-1).sum())
        self.row_sum.add(x.sum(-1))
        self.row_lse.add(logsumexp(x, axis=-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            self.row_ratio.add(high / low)
            self.row_span.add(high - low)


@dataclass
class IntegerSample:
    """What was seen of labels or document ids."""

    entries: int = 0
    bytes: int = 0
    ignored: int = 0  # equal to the ignore_index
    negative: int = 0  # others below 0
    counted: Range = field(default_factory=Range)  # of those not ignored
    nondecreasing: bool = True
    last: int | None = None
    bad: int = 0  # outside the vocabulary and not ignored
    first_bad: tuple[int, int] | None = None  # its number and value

    def add(self, first: int, block: np.ndarray, ignore_index: int, vocab: int | None) -> None:
        self.entries, self.bytes = self.entries + block.size, self.bytes + block.nbytes
        on = block != ignore_index  # NumPy compares at full width: uint8 has no -100
        self.ignored += int(block.size - on.sum())
        self.negative += int((on & (block < 0)).sum())
        self.counted.add(block[on])
        if block.size:
            sorted_here = bool((block[1:] >= block[:-1]).all())
            self.nondecreasing &= sorted_here and (self.last is None or self.last <= int(block[0]))
            self.last = int(block[-1])
        if vocab is not None:
            bad = np.flatnonzero(on & ((block < 0) | (block >= vocab)))
            self.bad += bad.size
            if self.first_bad is None and bad.size:
                self.first_bad = (first + int(bad[0]), int(block[bad[0]]))


def runs(total: int, row_bytes: int, budget: int, chunk: int = 1) -> Iterator[range]:
    """Rows to look at: all if they fit into the budget, else runs spread evenly, the first and the last rows among
    them. They begin with a chunk, if chunks are not much larger."""
    affordable = max(budget // max(row_bytes, 1), 1)
    if total <= affordable:
        step = max(affordable // RUNS, 1)
        yield from (range(first, min(first + step, total)) for first in range(0, total, step))
        return
    places = max(3, min(RUNS, affordable, DECODED_BYTES // max(chunk * row_bytes, 1)))
    size = max(min(affordable, total) // places, 1)
    size -= size % chunk if size > chunk else 0
    for i in range(places):
        first = i * (total - size) // (places - 1)
        if i < places - 1 and chunk <= total // places:
            first -= first % chunk
        yield range(first, first + size)


def sample_floats(source: Source, budget: int = SAMPLE_BYTES) -> FloatSample:
    """Of logits (..., vocab), or of a vector of floats; about so many bytes of them."""
    found, vector = FloatSample(), len(source.shape) < 2
    columns = None if vector else slice(0, source.shape[-1])
    row_bytes = source.dtype.itemsize * (1 if vector else source.shape[-1])
    total = math.prod(source.shape if vector else source.shape[:-1])
    for run in runs(total, row_bytes, budget, source.row_chunk):
        started = time.perf_counter()
        block = np.asarray(source.read(slice(run.start, run.stop), columns))
        found.seconds += time.perf_counter() - started
        found.add(block)
    return found


def sample_integers(source: Source, ignore_index: int, vocab: int | None = None) -> IntegerSample:
    found = IntegerSample()
    for run in runs(math.prod(source.shape), source.dtype.itemsize, INTEGER_BYTES):
        block = np.asarray(source.read(slice(run.start, run.stop)))
        found.add(run.start, block, ignore_index, vocab)
    return found


def kind_of_floats(sample: FloatSample, vocab: int, eps: float) -> tuple[str, list[str]]:
    """What the rows look like, and what there is to say of it. A guess: the same numbers may be meant otherwise."""
    if sample.finite.least > sample.finite.greatest:
        return "nothing", ["no value in the sample is finite"]
    kind, notes = _kind(sample, max(0.02, eps * math.log(vocab)), max(1e-3, 2 * eps))
    if sample.constant_rows == sample.rows:
        kind, notes = "constant rows", ["every sampled row has one value only: never written, or a uniform model"]
    elif sample.constant_rows:
        notes.append(f"{sample.constant_rows:,} of {sample.rows:,} sampled rows have one value only: never written?")
    return kind, notes


def _kind(sample: FloatSample, lse_error: float, sum_error: float) -> tuple[str, list[str]]:
    values, sums, lse = sample.finite, sample.row_sum, sample.row_lse
    twice = "no class is over e times as probable as another in its row: softmax applied twice, or an untrained model"
    if values.least >= 0 and values.greatest <= 1 + sum_error and not sample.minus_inf:
        if sums.within(1 - sum_error, 1 + sum_error):
            also = [twice] if sample.row_ratio.greatest <= 1.02 * math.e else []
            return "probabilities", ["perplexity would apply softmax to them again: convert them to logarithms", *also]
        return "logits in [0, 1]?", [
            f"all values are in [0, 1], but rows sum to {_between(sums)}: logits, or probabilities of another kind "
            "(not normalised, or sigmoids); the values do not tell"
        ]
    if values.greatest <= 0:
        if lse.within(-lse_error, lse_error):
            also = [twice] if sample.row_span.greatest <= 1.02 else []
            return "log-probabilities", ["perplexity takes them as they are: log-softmax does not change them", *also]
        return "logits", [
            f"all values are <= 0, but logsumexp of the rows is {_between(lse)} and not 0: logits, or logarithms of "
            "probabilities of some of the classes"
        ]
    return "logits", []


def kind_of_integers(sample: IntegerSample, ignore_index: int) -> tuple[str, list[str]]:
    if sample.counted.least > sample.counted.greatest:
        return "labels", [f"every entry is {ignore_index}: nothing would be scored"]
    notes = [f"{sample.negative:,} are negative and not {ignore_index}: no labels"] if sample.negative else []
    if sample.ignored:
        return "labels", notes
    if sample.counted.least == sample.counted.greatest:
        return "labels or document ids", ["all values are the same"]
    if sample.nondecreasing:
        return "document ids", ["the values never decrease"]
    return "labels", notes


def _between(found: Range) -> str:
    return f"{found.least:.4g} to {found.greatest:.4g}"
