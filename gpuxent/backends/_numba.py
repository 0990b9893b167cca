"""The functions of the contract at the speed of memory: NumPy does the vectors, `_numba_rows`, `_numba_pairs` and
`_numba_binary` what runs over rows. They and what they are made of are loaded when the first array turns up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numba.core.compiler_lock import global_compiler_lock

from gpuxent._records import (
    DIVERGENCES,
    IDENTITY,
    NO_LABEL,
    Divergences,
    GradWeights,
    PairStats,
    RowStats,
    Spread,
    Transform,
)
from gpuxent.backends import _numba_binary, _numba_pairs, _numba_rows, _numpy, _threads
from gpuxent.backends._numba_rows import FIELDS
from gpuxent.backends._numba_sums import limb_sums
from gpuxent.backends._numba_tiles import LANES, TILE
from gpuxent.backends._numpy import (
    after,
    cross_sums,
    laid_out_as,
    map_rows,
    onehot_sums,
    take_label,
    total,
    unlabelled,
)

__all__ = [
    "after",
    "binary_grad",
    "binary_losses",
    "binary_sums",
    "cross_sums",
    "divergence_sums",
    "label_logits",
    "laid_out_as",
    "limb_sums",
    "log_probs",
    "logit_grad",
    "map_rows",
    "onehot_sums",
    "pair_stats",
    "row_stats",
    "row_stats_and_grad",
    "row_sums",
    "take_label",
    "total",
    "unlabelled",
]

# The types that the loops read, each with an empty array of it; Numba has none for 16-bit floats in memory.
LIKE = {
    np.dtype(stored): np.empty(0, loaded)
    for stored, loaded in (
        (np.float32, np.float32),
        (np.float64, np.float64),
        (ml_dtypes.bfloat16, np.uint16),
        (np.float16, np.int16),
        (np.bool_, np.uint8),
        (np.uint8, np.uint8),
    )
}
BLOCK = 1 << 18  # elements of rows that are copied at a time, where the loops cannot read them as they are
NEAR = 1 << 19  # bytes of two models' rows that are read twice: what a core's own cache holds, but a pair at least
FEW = 1 << 20  # elements for which to wake another thread costs as much as it saves

if hasattr(os, "register_at_fork"):  # a child forked while another thread compiles would wait for it for ever
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


class Rows:
    """Rows of an array as the loops want them: their addresses, and an empty array of their elements' type.

    Rows that are not contiguous, aligned and in native byte order are copied block by block, into `dtype`.
    """

    def __init__(self, array: np.ndarray, dtype: Any = None) -> None:
        self.array = array[None] if array.ndim == 1 else array
        self.count, self.columns = math.prod(array.shape[:-1]), array.shape[-1]
        contiguous = array.strides[-1] == array.itemsize or self.columns == 1
        self.in_place = contiguous and array.flags.aligned and array.dtype.isnative and array.dtype in LIKE
        self.dtype = array.dtype if self.in_place else np.dtype(dtype or array.dtype).newbyteorder("=")
        self.like = LIKE[self.dtype]
        self.addresses = _addresses(self.array) if self.in_place else np.empty(self.count, np.int64)

    def hold(self, first: int, last: int, read: bool = True) -> Any:
        """Make the addresses of these rows good for as long as what is returned is kept."""
        if self.in_place:
            return self.array
        block = np.empty((last - first, self.columns), self.dtype)
        if read:
            block[...] = self.array[self._index(first, last)]
        self.addresses[first:last] = _addresses(block)
        return block

    def write(self, first: int, last: int, held: Any) -> None:
        if not self.in_place:
            self.array[self._index(first, last)] = held

    def _index(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        return np.unravel_index(np.arange(first, last), self.array.shape[:-1])


def _addresses(array: np.ndarray) -> np.ndarray:
    """Of every row, in order."""
    addresses = np.array([array.__array_interface__["data"][0]])
    for size, stride in zip(array.shape[:-1], array.strides[:-1], strict=True):
        addresses = (addresses[:, None] + np.arange(size) * stride).ravel() if size != 1 else addresses
    return addresses


def _over_rows(call: Callable[[int, int], None], sources: Sequence[Rows], target: Rows | None = None) -> None:
    """Call call(first, last) for groups of rows, on the thread pool; their addresses are good meanwhile."""
    count, columns = sources[0].count, sources[0].columns
    in_place = all(rows.in_place for rows in sources) and (target is None or target.in_place)
    step = max(1, count if in_place else BLOCK // columns)

    def group(items: Sequence[int]) -> None:
        for first in range(items[0], items[-1] + 1, step):
            last = min(first + step, items[-1] + 1)
            held = [rows.hold(first, last) for rows in sources]
            result = None if target is None else target.hold(first, last, read=False)
            call(first, last)
            if target is not None:
                target.write(first, last, result)
            del held

    if count * columns >= (FEW if target is None else FEW // 2):
        _threads.run(group, range(count))
    elif count:
        group(range(count))


# ---- rows of logits ----


def row_stats(
    logits: np.ndarray,
    labels: np.ndarray | None = None,
    vocab_start: int = 0,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    label_logit: np.ndarray | None = None,
    also: Sequence[str] = (),
) -> RowStats:
    """RowStats of (a slice of) the rows; see the contract in `backends`."""
    job = _Job(logits, labels, vocab_start, spread, transform)
    ranked = None
    if "rank" in also:
        ranked = job.label_logits() if label_logit is None else np.array(label_logit, np.float64).ravel()
    flags = ("argmax" in also, "moment" in also)
    record = np.zeros((len(FIELDS), job.rows.count))

    def call(first: int, last: int) -> None:
        _numba_rows.measure_rows(first, last, job.logits, job.labels, ranked, job.how, flags, job.tiles(), record)

    _over_rows(call, job.sources)
    return job.stats(record, also)


def logit_grad(
    logits: np.ndarray,
    labels: np.ndarray | None,
    stats: RowStats,
    weights: GradWeights,
    vocab_start: int = 0,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The gradient that `GradWeights` describes, times the slope of the transform."""
    out = np.empty(logits.shape, logits.dtype) if out is None else out
    job, target = _Job(logits, labels, vocab_start, spread, transform), Rows(out)
    record, pushes = np.empty((len(FIELDS), job.rows.count)), _stacked(weights, job.rows.count)
    for field, values in (
        (_numba_rows.MAX, stats.max),
        (_numba_rows.REST, stats.rest),
        (_numba_rows.LABEL_LOGIT, stats.label_logit),
        (_numba_rows.SPREAD_WEIGHT, stats.spread_weight),
    ):
        record[field] = np.ravel(values)

    def call(first: int, last: int) -> None:
        given = (job.how, job.tiles(), record, pushes, target.addresses)
        _numba_rows.push_rows(first, last, job.logits, job.labels, *given)

    _over_rows(call, job.sources, target)
    return out


def row_stats_and_grad(
    logits: np.ndarray,
    labels: np.ndarray | None,
    weights: GradWeights,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    also: Sequence[str] = (),
    out: np.ndarray | None = None,
) -> tuple[RowStats, np.ndarray]:
    """Both, in one read of memory: a row's second read finds it in the cache."""
    out = np.empty(logits.shape, logits.dtype) if out is None else out
    job, target = _Job(logits, labels, 0, spread, transform), Rows(out)
    record, pushes = np.zeros((len(FIELDS), job.rows.count)), _stacked(weights, job.rows.count)
    flags = ("argmax" in also, "moment" in also)

    def call(first: int, last: int) -> None:
        given = (job.how, flags, job.tiles(), record, pushes, target.addresses)
        _numba_rows.measure_and_push_rows(first, last, job.logits, job.labels, *given)

    _over_rows(call, job.sources, target)
    return job.stats(record, also), out


def label_logits(logits: np.ndarray, labels: np.ndarray, vocab_start: int, transform: Transform) -> np.ndarray:
    """The transformed logit at each row's label, float64; -inf where the label is not in this slice."""
    return _Job(logits, labels, vocab_start, None, transform).label_logits().reshape(labels.shape)


def log_probs(logits: np.ndarray, stats: RowStats) -> np.ndarray:
    """log softmax in the logits' dtype: (logit - max) - log1p(rest)."""
    out = np.empty(logits.shape, logits.dtype)
    rows, target = Rows(logits), Rows(out)
    arguments = (rows.addresses, rows.like, rows.columns)
    record = np.stack([np.ravel(stats.max), np.ravel(stats.rest)])

    def call(first: int, last: int) -> None:
        _numba_rows.log_prob_rows(first, last, arguments, record, target.addresses)

    _over_rows(call, [rows], target)
    return out


class _Job:
    """Rows of logits with what goes with them, in the form that the loops take."""

    def __init__(
        self,
        logits: np.ndarray,
        labels: np.ndarray | None,
        vocab_start: int,
        spread: Spread | None,
        transform: Transform,
    ) -> None:
        self.shape, self.vocab_start = logits.shape[:-1], vocab_start
        self.rows = Rows(logits)
        self.sources = [self.rows]
        self.logits = (self.rows.addresses, self.rows.like, self.rows.columns)
        self.labels = np.full(self.rows.count, NO_LABEL) if labels is None else labels.ravel() - vocab_start
        self.transform = None if transform.is_identity else (transform.softcap or 0.0, float(transform.temperature))
        self.tile = self.rows.like if self.transform is None else LIKE[np.dtype(np.float64)]
        self.dtype = np.float64 if self.tile.itemsize == 8 else np.float32
        self.how = (self._spread(spread), self.transform)

    def _spread(self, spread: Spread | None) -> Any:
        if spread is None:
            return None
        base = per_column(spread.base, self.dtype)
        if spread.soft is None:
            return (base,)
        soft = Rows(spread.soft)
        self.sources.append(soft)
        return soft.addresses, soft.like, per_column(spread.scale, self.dtype), base

    def tiles(self) -> tuple[np.ndarray, ...]:
        """Scratch for one thread."""
        stored, computed = self.tile.dtype, self.dtype
        weights = np.empty(TILE if self.how[0] is not None else 0, computed)
        scratch = np.empty(TILE if self.transform is not None else 0, stored)
        return scratch, np.empty(LANES, stored), weights, np.empty(TILE, computed)

    def label_logits(self) -> np.ndarray:
        out = np.empty(self.rows.count)

        def call(first: int, last: int) -> None:
            _numba_rows.label_logits(first, last, self.logits, self.labels, self.transform, self.tiles(), out)

        _over_rows(call, [self.rows])
        return out

    def stats(self, record: np.ndarray, also: Sequence[str]) -> RowStats:
        """The record as RowStats, whose fields are numbered alike."""
        stats = RowStats(*record.reshape(len(record), *self.shape))
        if "argmax" in also:
            stats = replace(stats, argmax=stats.argmax.astype(np.int64) + self.vocab_start)
        if "rank" in also:
            stats = replace(stats, rank=stats.rank.astype(np.int64))
        return stats


def per_column(values: np.ndarray | float, dtype: Any) -> np.ndarray:
    """One number per column, or a constant tile."""
    return np.array(values, dtype) if np.ndim(values) else np.full(TILE, values, dtype)


def _stacked(weights: GradWeights, rows: int) -> np.ndarray:
    pushes = np.empty((3, rows))
    for row, values in zip(pushes, (weights.label, weights.spread, weights.lse), strict=True):
        row[...] = np.ravel(values)
    return pushes


# ---- two models' rows ----


def pair_stats(
    base: np.ndarray,
    other: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
    divergences: Sequence[str] = DIVERGENCES,
    also: Sequence[str] = (),
) -> PairStats:
    """Statistics and divergences of two models' rows, in one read of memory: a row's second read finds it in the
    cache."""
    jobs = _pair_jobs(base, other, labels, transforms)
    records = [np.zeros((len(FIELDS), job.rows.count)) for job in jobs]
    ranked = [job.label_logits() if "rank" in also else None for job in jobs]
    out = np.zeros((len(DIVERGENCES), jobs[0].rows.count))
    flags = ("argmax" in also, "moment" in also)
    step = max(1, NEAR // sum(job.rows.columns * job.rows.dtype.itemsize for job in jobs))

    def call(first: int, last: int) -> None:
        tiles = [job.tiles() for job in jobs]
        for start in range(first, last, step):
            stop = min(start + step, last)
            for job, labelled, scratch, record in zip(jobs, ranked, tiles, records, strict=True):
                given = (job.logits, job.labels, labelled, job.how, flags, scratch, record)
                _numba_rows.measure_rows(start, stop, *given)
            _numba_pairs.diverge_rows(start, stop, *map(_side, jobs, tiles, records), out)

    _over_rows(call, [job.rows for job in jobs])
    p, q = (job.stats(record, also) for job, record in zip(jobs, records, strict=True))
    return PairStats(p, q, _named(divergences, out, base.shape[:-1]))


def divergence_sums(
    p: np.ndarray,
    q: np.ndarray,
    p_stats: RowStats | None = None,
    q_stats: RowStats | None = None,
    *,
    transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
    divergences: Sequence[str] = DIVERGENCES,
) -> Divergences:
    """The divergences that are named: of rows of logits with their stats, or of probabilities (by NumPy)."""
    if p_stats is None or q_stats is None:
        return _numpy.divergence_sums(p, q, divergences=divergences)
    jobs = _pair_jobs(p, q, None, transforms)
    records = [np.stack([np.ravel(stats.max), np.ravel(stats.rest)]) for stats in (p_stats, q_stats)]
    out = np.zeros((len(DIVERGENCES), jobs[0].rows.count))

    def call(first: int, last: int) -> None:
        _numba_pairs.diverge_rows(first, last, *map(_side, jobs, (job.tiles() for job in jobs), records), out)

    _over_rows(call, [job.rows for job in jobs])
    return _named(divergences, out, p.shape[:-1])


def _pair_jobs(
    p: np.ndarray, q: np.ndarray, labels: np.ndarray | None, transforms: tuple[Transform, Transform]
) -> list[_Job]:
    return [_Job(logits, labels, 0, None, transform) for logits, transform in zip((p, q), transforms, strict=True)]


def _side(job: _Job, tiles: tuple[np.ndarray, ...], record: np.ndarray) -> tuple[Any, ...]:
    """One of the two as `_numba_pairs` takes it."""
    return job.logits, job.transform, tiles, record


def _named(divergences: Sequence[str], found: np.ndarray, shape: tuple[int, ...]) -> Divergences:
    values = dict(zip(DIVERGENCES, found.reshape(len(found), *shape), strict=True))
    return Divergences(**{name: values[name] for name in divergences})


# ---- sums of rows and independent sigmoids ----


def row_sums(rows: np.ndarray, *, high: float = np.inf, ignore: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(how many entries are not in [0, high], the sum of all) per row; an entry equal to `ignore` is no fault."""
    if rows.shape[-1] == 1:
        values = rows[..., 0]
        fault = ~((values >= 0) & (values <= high)) & (True if ignore is None else values != ignore)
        return fault.astype(np.int64), values.astype(np.float64)
    source = Rows(rows, np.float64)
    outside, totals = np.empty(source.count, np.int64), np.empty(source.count)

    def call(first: int, last: int) -> None:
        given = (float(high), np.nan if ignore is None else float(ignore), outside, totals)
        _numba_binary.sum_rows(first, last, (source.addresses, source.like), source.columns, *given)

    _over_rows(call, [source])
    return outside.reshape(rows.shape[:-1]), totals.reshape(rows.shape[:-1])


def binary_losses(scores: np.ndarray, targets: np.ndarray, *, from_probs: bool, **how: Any) -> np.ndarray:
    """The loss of every element, float64 for float64 scores and float32 otherwise; 0 where ignored."""
    if from_probs:
        return _numpy.binary_losses(scores, targets, from_probs=True, **how)
    out = np.empty(scores.shape, np.float64 if scores.dtype.itemsize == 8 else np.float32)
    return _binary(scores, targets, out, slope=False, **how)


def binary_sums(
    scores: np.ndarray, targets: np.ndarray, *, from_probs: bool, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the losses over the last axis, and the number of elements that count; float64."""
    if from_probs:
        return _numpy.binary_sums(scores, targets, from_probs=True, **how)
    if scores.shape[-1] == 1:  # a row of one element is its own sum
        losses = _binary(scores, targets, np.empty(scores.shape), slope=False, **how)
        return losses[..., 0], (targets != how["ignore_index"])[..., 0].astype(np.float64)
    job = _BinaryJob(scores, targets, **how)
    sums, counts = np.empty(job.scores.count), np.empty(job.scores.count)

    def call(first: int, last: int) -> None:
        _numba_binary.binary_sum_rows(first, last, *job.arguments, np.empty(TILE, job.dtype), sums, counts)

    _over_rows(call, [job.scores, job.targets])
    return sums.reshape(scores.shape[:-1]), counts.reshape(scores.shape[:-1])


def binary_grad(
    logits: np.ndarray, targets: np.ndarray, scale: Any, *, out: np.ndarray | None = None, **how: Any
) -> np.ndarray:
    """scale * class_weight * ((1 - y) sigmoid(x) - pos_weight y sigmoid(-x)), in the logits' dtype; 0 where ignored."""
    if np.ndim(scale):
        return _numpy.binary_grad(logits, targets, scale, out=out, **how)
    out = np.empty(logits.shape, logits.dtype) if out is None else out
    how["class_weight"] = how["class_weight"] * float(scale)
    return _binary(logits, targets, out, slope=True, **how)


def _binary(scores: np.ndarray, targets: np.ndarray, out: np.ndarray, *, slope: bool, **how: Any) -> np.ndarray:
    if scores.shape[-1] == 1 and all(array.flags.c_contiguous for array in (scores, targets, out)):
        for part, shape in _long_rows(scores.size):
            x, y, z = (array.reshape(-1)[part].reshape(shape) for array in (scores, targets, out))
            _binary_rows(x, y, z, slope, how)
    else:
        _binary_rows(scores, targets, out, slope, how)
    return out


def _binary_rows(scores: np.ndarray, targets: np.ndarray, out: np.ndarray, slope: bool, how: dict[str, Any]) -> None:
    job, target = _BinaryJob(scores, targets, **how), Rows(out)

    def call(first: int, last: int) -> None:
        result = (np.empty(TILE, job.dtype), (target.addresses, target.like), slope)
        _numba_binary.binary_rows(first, last, *job.arguments, *result)

    _over_rows(call, [job.scores, job.targets], target)


LONG = 8192  # elements of a row that is made of rows of one


def _long_rows(count: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Where rows of one element are read as longer ones, and the shape of these."""
    whole = count - count % LONG
    if whole:
        yield slice(0, whole), (-1, LONG)
    if whole < count:
        yield slice(whole, count), (1, -1)


def _exceeds_float32(*weights: np.ndarray | float) -> bool:
    """Could a product of these and a loss be too large or too small for float32?"""
    sizes = np.abs(np.concatenate([np.ravel(weight) for weight in weights]))
    return bool(np.any((sizes != 0) & ((sizes < 1e-18) | (sizes > 1e18))))


class _BinaryJob:
    """Scores and targets of independent sigmoids in the form that the loops take."""

    def __init__(
        self, scores: np.ndarray, targets: np.ndarray, *, pos_weight: Any, class_weight: Any, ignore_index: float | None
    ) -> None:
        self.scores, self.targets = Rows(scores), Rows(targets, np.float32 if targets.dtype.kind in "biu" else None)
        wide = np.float64 in (self.scores.dtype, self.targets.dtype)
        self.dtype = np.float64 if wide or _exceeds_float32(pos_weight, class_weight) else np.float32
        weights = (per_column(pos_weight, self.dtype), per_column(class_weight, self.dtype))
        ignore = np.nan if ignore_index is None else float(ignore_index)
        self.arguments = (
            (self.scores.addresses, self.scores.like),
            (self.targets.addresses, self.targets.like),
            *(self.scores.columns, weights, ignore),
        )
