"""Lifts the other backends over the blocks of a Dask array. The only file that imports Dask.

Rows and vocabulary may be split freely. Each block (a slice of some rows) gives a small float64 state (rows, 1,
fields) through one `blockwise`; a second one, contracting the vocabulary, merges the states of a row's slices in
column order. Dask does not fuse the second into the first, so no task ever holds all slices of its rows. Building a
graph computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np

from gpuxent._records import (
    IDENTITY,
    NO_LABEL,
    ROW_FIELDS,
    ExactSum,
    GradWeights,
    PairStats,
    RowStats,
    Spread,
    Transform,
)
from gpuxent.backends import backend_of
from gpuxent.backends._threads import threads

INTEGER_FIELDS = ("argmax", "rank")  # exact in float64 all the same


@dataclass(frozen=True)
class DaskBackend:
    """The functions of the contract for Dask arrays; `block_backend` names the backend of the blocks (None: the
    best)."""

    block_backend: str | None = None

    # ---- rows of logits ----

    def row_stats(
        self,
        logits: da.Array,
        labels: da.Array | None = None,
        vocab_start: int = 0,
        *,
        spread: Spread | None = None,
        transform: Transform = IDENTITY,
        label_logit: da.Array | None = None,
        also: Sequence[str] = (),
    ) -> RowStats:
        if "rank" in also and label_logit is None and logits.numblocks[-1] > 1:
            # a slice ranks its classes against a logit that may lie in another slice: one more, cheap read
            label_logit = self._label_logits(logits, labels, transform)

        def stats(logits: Any, labels: Any, start: Any, soft: Any, scale: Any, base: Any, label_logit: Any) -> Any:
            spread = None if scale is None else Spread(soft, scale, base)
            record = self._backend(logits).row_stats(
                logits,
                labels,
                int(start[0]),
                spread=spread,
                transform=transform,
                label_logit=label_logit,
                also=also,
            )
            return tuple(getattr(record, name) for name in ROW_FIELDS)

        states = self._states(
            stats, logits, labels, *self._spread_parts(logits, spread), label_logit, outputs=len(ROW_FIELDS)
        )
        return _row_record(self._contract(states, _merge_row_states))

    def _label_logits(self, logits: da.Array, labels: da.Array | None, transform: Transform) -> da.Array:
        def gather(logits: Any, labels: Any, start: Any) -> Any:
            return (self._backend(logits).label_logits(logits, labels, int(start[0]), transform),)

        return self._contract(self._states(gather, logits, labels, outputs=1), partial(np.max, axis=-2))[..., 0]

    def logit_grad(
        self,
        logits: da.Array,
        labels: da.Array | None,
        stats: RowStats,
        weights: GradWeights,
        vocab_start: int = 0,
        *,
        spread: Spread | None = None,
        transform: Transform = IDENTITY,
        out: None = None,
    ) -> da.Array:
        def grad(
            logits: Any, labels: Any, start: Any, soft: Any, scale: Any, base: Any,
            top: Any, rest: Any, label_logit: Any, softmax_weight: Any, label_weight: Any, spread_weight: Any,
        ) -> Any:  # fmt: skip
            spread = None if scale is None else Spread(soft, scale, base)
            return self._backend(logits).logit_grad(
                logits,
                labels,
                _known(top, rest, label_logit),
                GradWeights(softmax_weight, label_weight, spread_weight),
                int(start[0]),
                spread=spread,
                transform=transform,
            )

        vectors = (stats.max, stats.rest, stats.label_logit, *vars(weights).values())
        return self._rowwise(grad, logits, labels, *self._spread_parts(logits, spread), *vectors)

    def log_probs(self, logits: da.Array, stats: RowStats) -> da.Array:
        def log_probs(logits: Any, _labels: Any, _start: Any, top: Any, rest: Any) -> Any:
            return self._backend(logits).log_probs(logits, _known(top, rest))

        return self._rowwise(log_probs, logits, None, stats.max, stats.rest)

    # ---- sums over the vocabulary: states that are merged by addition ----

    def pair_stats(
        self,
        p: da.Array,
        q: da.Array,
        p_stats: RowStats | None = None,
        q_stats: RowStats | None = None,
        *,
        divergence: str,
    ) -> PairStats:
        def sums(p: Any, _labels: Any, _start: Any, q: Any, *vectors: Any) -> Any:
            stats = (_known(*vectors[:2]), _known(*vectors[2:])) if vectors else (None, None)
            return vars(self._backend(p).pair_stats(p, q, *stats, divergence=divergence)).values()

        vectors = [] if p_stats is None or q_stats is None else [p_stats.max, p_stats.rest, q_stats.max, q_stats.rest]
        return PairStats(*self._sums(sums, p, None, q, *vectors, outputs=1))

    def cross_sums(self, weights: da.Array, probs: da.Array, *, scale: np.ndarray | float = 1.0) -> da.Array:
        def sums(probs: Any, _labels: Any, _start: Any, weights: Any, scale: Any) -> Any:
            return (self._backend(probs).cross_sums(weights, probs, scale=scale),)

        return self._sums(sums, probs, None, weights, self._columns(probs, scale), outputs=1)[0]

    def row_sums(self, rows: da.Array, *, high: float = np.inf, ignore: float | None = None) -> tuple[da.Array, ...]:
        def sums(rows: Any, _labels: Any, _start: Any) -> Any:
            return self._backend(rows).row_sums(rows, high=high, ignore=ignore)

        return self._sums(sums, rows, None, outputs=2)

    def onehot_sums(self, rows: da.Array, vocab_start: int = 0) -> tuple[da.Array, ...]:
        def sums(rows: Any, _labels: Any, start: Any) -> Any:
            return self._backend(rows).onehot_sums(rows, int(start[0]))

        return self._sums(sums, rows, None, outputs=3)

    def take_label(self, rows: da.Array, labels: da.Array, vocab_start: int = 0) -> da.Array:
        def take(rows: Any, labels: Any, start: Any) -> Any:
            return (self._backend(rows).take_label(rows, labels, int(start[0])),)

        return self._sums(take, rows, labels, outputs=1)[0]

    # ---- independent sigmoids ----

    def binary_losses(
        self, scores: da.Array, targets: da.Array, *, pos_weight: Any, class_weight: Any, **how: Any
    ) -> da.Array:
        def losses(scores: Any, _labels: Any, _start: Any, targets: Any, pos_weight: Any, class_weight: Any) -> Any:
            weights = {"pos_weight": pos_weight, "class_weight": class_weight}
            return self._backend(scores).binary_losses(scores, targets, **weights, **how)

        columns = (self._columns(scores, pos_weight), self._columns(scores, class_weight))
        dtype = np.float64 if scores.dtype.itemsize == 8 else np.float32
        return self._rowwise(losses, scores, None, targets, *columns, dtype=dtype)

    def binary_sums(
        self, scores: da.Array, targets: da.Array, *, pos_weight: Any, class_weight: Any, **how: Any
    ) -> tuple[da.Array, ...]:
        def sums(scores: Any, _labels: Any, _start: Any, targets: Any, pos_weight: Any, class_weight: Any) -> Any:
            weights = {"pos_weight": pos_weight, "class_weight": class_weight}
            return self._backend(scores).binary_sums(scores, targets, **weights, **how)

        columns = (self._columns(scores, pos_weight), self._columns(scores, class_weight))
        return self._sums(sums, scores, None, targets, *columns, outputs=2)

    def binary_grad(
        self,
        scores: da.Array,
        targets: da.Array,
        scale: Any,
        *,
        pos_weight: Any,
        class_weight: Any,
        out: None = None,
        **how: Any,
    ) -> da.Array:
        def grad(
            scores: Any,
            _labels: Any,
            _start: Any,
            targets: Any,
            pos_weight: Any,
            class_weight: Any,
            scale: Any,
        ) -> Any:
            weights = {"pos_weight": pos_weight, "class_weight": class_weight}
            return self._backend(scores).binary_grad(scores, targets, scale, **weights, **how)

        columns = (self._columns(scores, pos_weight), self._columns(scores, class_weight))
        return self._rowwise(grad, scores, None, targets, *columns, scale)

    # ---- rows and vectors ----

    def map_rows(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        outputs: int = 1,
        dtype: Any = np.float64,
        at: bool = False,
    ) -> Any:
        flat, rebuild = _flatten(arguments)
        ndim = max(np.ndim(a) for a in flat)
        like = next((a for a in flat if isinstance(a, da.Array) and a.ndim == ndim), None)
        if like is None:  # numbers alone: nothing is lazy
            from gpuxent.backends import _numpy

            return _numpy.map_rows(function, *arguments, outputs=outputs, dtype=dtype, at=at)
        flat = [_chunked(a, like.chunks) if np.ndim(a) == ndim > 0 else a for a in flat]
        starts = [_starts(sizes) for sizes in like.chunks] if at else []

        def on_block(*block: Any) -> Any:
            values, corner = block[: len(flat)], block[len(flat) :]
            where = {"start": tuple(int(c[0]) for c in corner)} if at else {}
            with np.errstate(all="ignore"):
                result = function(*rebuild(values), **where)
            return np.asarray(result, dtype) if outputs == 1 else _stacked(result)

        index = tuple(range(ndim))
        pairs = [(a, index[: np.ndim(a)] if isinstance(a, da.Array) else None) for a in flat]
        pairs += [(start, (axis,)) for axis, start in enumerate(starts)]
        if outputs == 1:
            return _blockwise(on_block, index, pairs, dtype)
        states = _blockwise(on_block, (*index, ndim), pairs, np.float64, new_axes={ndim: outputs})
        return tuple(states[..., i] for i in range(outputs))

    def total(self, values: da.Array) -> da.Array:
        """The exact sum of all entries: an integer per block, added up in a tree."""
        if values.dtype.kind in "biu":
            return values.sum(dtype=np.int64).astype(np.float64)

        # `computing_meta`: Dask also calls these with empty arrays, to see what comes out
        def chunk(block: np.ndarray, axis: Any, keepdims: bool, computing_meta: bool = False) -> np.ndarray:
            return block if computing_meta else _one(ExactSum.of(block), block.ndim)

        def combine(parts: np.ndarray, axis: Any, keepdims: bool, computing_meta: bool = False) -> np.ndarray:
            return parts if computing_meta else _one(_merged(parts), parts.ndim)

        def aggregate(parts: np.ndarray, axis: Any, keepdims: bool, computing_meta: bool = False) -> Any:
            return np.empty(()) if computing_meta else np.array(_merged(parts).value)

        meta = np.empty((), np.float64)
        return da.reduction(values, chunk, aggregate, combine=combine, dtype=np.float64, meta=meta)

    def laid_out_as(self, logits: da.Array, values: Any) -> da.Array:
        return _chunked(values, logits.chunks[: values.ndim])

    def unlabelled(self, rows: da.Array) -> da.Array:
        return da.full(rows.shape[:-1], NO_LABEL, dtype=np.int64, chunks=rows.chunks[:-1])

    def after(self, guard: da.Array, rows: da.Array) -> da.Array:
        return self._rowwise(lambda rows, _labels, _start, _guard: rows, rows, None, guard)

    def block_results(self, function: Callable[..., Any], *arguments: da.Array) -> Iterator[Any]:
        """function(blocks, start=...) of every block of rows, computed now."""

        def on_block(*blocks: Any, start: tuple[int, ...]) -> np.ndarray:
            return _one(function(*blocks, start=start), blocks[0].ndim)

        results = self.map_rows(on_block, *arguments, dtype=object, at=True)
        return iter(results.compute().ravel())

    # ---- blockwise over (rows..., vocab) ----

    def _backend(self, block: Any) -> Any:
        return backend_of(block, self.block_backend)

    def _spread_parts(self, logits: da.Array, spread: Spread | None) -> tuple[Any, Any, Any]:
        if spread is None:
            return None, None, None
        return spread.soft, self._columns(logits, spread.scale), self._columns(logits, spread.base)

    def _columns(self, logits: da.Array, values: Any) -> Any:
        """A vector of length vocab, cut up as the logits' last axis (marked by a class, since rows may be as many)."""
        return _Columns(_chunked(values, logits.chunks[-1:])) if np.ndim(values) else values

    def _pairs(self, logits: da.Array, labels: Any, others: Sequence[Any]) -> list[tuple[Any, tuple[int, ...] | None]]:
        """The arguments of a blockwise: logits, labels, first column of the block, then the others."""
        ndim = logits.ndim
        pairs: list[tuple[Any, tuple[int, ...] | None]] = [
            (logits, tuple(range(ndim))),
            (labels, None if labels is None else tuple(range(ndim - 1))),
        ]
        pairs.append((_starts(logits.chunks[-1]), (ndim - 1,)))
        for other in others:
            if isinstance(other, _Columns):
                pairs.append((other.array, (ndim - 1,)))
            elif isinstance(other, da.Array):
                pairs.append((other, tuple(range(other.ndim))))
            else:
                pairs.append((other, None))
        return pairs

    def _rowwise(
        self, function: Callable[..., Any], logits: da.Array, labels: Any, *others: Any, dtype: Any = None
    ) -> da.Array:
        """A block for every block of logits."""
        return _blockwise(
            _single_threaded(function),
            tuple(range(logits.ndim)),
            self._pairs(logits, labels, others),
            logits.dtype if dtype is None else dtype,
        )

    def _states(
        self, function: Callable[..., Any], logits: da.Array, labels: Any, *others: Any, outputs: int
    ) -> da.Array:
        """The vectors that `function` gives for each block, as states (rows, slices, outputs)."""
        vocab, fields = logits.ndim - 1, logits.ndim

        def state(*block: Any) -> np.ndarray:
            return _stacked(function(*block))[..., None, :]

        return _blockwise(
            _single_threaded(state),
            (*range(vocab), vocab, fields),
            self._pairs(logits, labels, others),
            np.float64,
            new_axes={fields: outputs},
            adjust_chunks={vocab: lambda _: 1},
        )

    def _contract(self, states: da.Array, merge: Callable[[np.ndarray], np.ndarray]) -> da.Array:
        """States (rows, slices, fields) merged over the slices, in column order."""
        *rows, slices, fields = range(states.ndim)
        return _blockwise(merge, (*rows, fields), [(states, (*rows, slices, fields))], np.float64, concatenate=True)

    def _sums(
        self, function: Callable[..., Any], logits: da.Array, labels: Any, *others: Any, outputs: int
    ) -> tuple[da.Array, ...]:
        states = self._states(function, logits, labels, *others, outputs=outputs)
        sums = self._contract(states, _add_in_order)
        return tuple(sums[..., i] for i in range(outputs))


@dataclass(frozen=True)
class _Columns:
    """A Dask vector that runs along the vocabulary."""

    array: da.Array


def _blockwise(
    function: Callable[..., Any],
    index: tuple[int, ...],
    pairs: Sequence[tuple[Any, tuple[int, ...] | None]],
    dtype: Any,
    **how: Any,
) -> da.Array:
    """`da.blockwise` with a meta of our own: Dask would find it by calling the function with empty arrays."""
    flat = [part for pair in pairs for part in pair]
    meta = np.empty((0,) * len(index), dtype)
    return da.blockwise(function, index, *flat, dtype=dtype, meta=meta, align_arrays=False, **how)


def _single_threaded(function: Callable[..., Any]) -> Callable[..., Any]:
    """One thread per task: Dask runs as many tasks as there are cores."""
    return partial(_call_single_threaded, function)


def _call_single_threaded(function: Callable[..., Any], *block: Any) -> Any:
    with threads(1), np.errstate(all="ignore"):
        return function(*block)


def _chunked(values: Any, chunks: tuple[tuple[int, ...], ...]) -> da.Array:
    """NumPy or Dask values as a Dask array with these chunks."""
    if isinstance(values, da.Array):
        return values if values.chunks == chunks else values.rechunk(chunks)
    return da.from_array(np.asarray(values), chunks=chunks)


def _starts(sizes: tuple[int, ...]) -> da.Array:
    """Where each chunk of an axis begins: one chunk of one entry for each of its chunks."""
    return da.from_array(np.cumsum((0, *sizes[:-1])), chunks=1)


def _stacked(vectors: Any) -> np.ndarray:
    return np.stack([np.asarray(v, np.float64) for v in vectors], axis=-1)


def _row_record(states: Any) -> RowStats:
    """RowStats from states (..., fields), lazy or not."""
    fields = {name: states[..., i] for i, name in enumerate(ROW_FIELDS)}
    return RowStats(**fields | {name: fields[name].astype(np.int64) for name in INTEGER_FIELDS})


def _merge_row_states(states: np.ndarray) -> np.ndarray:
    record = RowStats.merge_all(_row_record(states[..., i, :]) for i in range(states.shape[-2]))
    return _stacked(getattr(record, name) for name in ROW_FIELDS)


def _add_in_order(states: np.ndarray) -> np.ndarray:
    total = states[..., 0, :].copy()
    for i in range(1, states.shape[-2]):
        total += states[..., i, :]
    return total


def _known(top: Any, rest: Any, label_logit: Any = None) -> RowStats:
    """RowStats of which only these fields are needed."""
    record = RowStats.identity()
    known = {"max": top, "rest": rest} | ({} if label_logit is None else {"label_logit": label_logit})
    return RowStats(**vars(record) | known)


def _flatten(arguments: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """The arguments with records opened into their fields, and the way back."""
    flat: list[Any] = []
    shapes: list[int | None] = []
    for argument in arguments:
        fields = list(vars(argument).values()) if isinstance(argument, RowStats) else [argument]
        shapes.append(len(fields) if isinstance(argument, RowStats) else None)
        flat += fields

    def rebuild(values: Sequence[Any]) -> list[Any]:
        rest = iter(values)
        return [next(rest) if n is None else RowStats(*(next(rest) for _ in range(n))) for n in shapes]

    return flat, rebuild


def _one(value: Any, ndim: int) -> np.ndarray:
    """An array of one Python object."""
    box = np.empty((1,) * ndim, object)
    box.flat[0] = value
    return box


def _merged(parts: np.ndarray) -> ExactSum:
    total = ExactSum()
    for part in parts.ravel():
        total = total.merge(part)
    return total
