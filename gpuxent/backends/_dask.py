"""Lifts the other backends over the blocks of a Dask array. The only file that imports Dask.

Rows and vocabulary may be split freely. Each block (a slice of some rows) gives a small float64 state (rows, 1,
fields) through one `blockwise`; a second one, contracting the vocabulary, merges the states of a row's slices in
column order. Dask does not fuse the second into the first, so no task ever holds all slices of its rows. Building a
graph computes nothing.

Blocks may be CuPy arrays: states and vectors then stay on their GPU. NumPy chunks of labels, of weights and the like
are moved beside them inside the task, and only exact sums come to the CPU. No graph has a kernel in it, only names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial, reduce
from itertools import islice
from typing import Any

import dask
import dask.array as da
import numpy as np

from gpuxent._records import (
    DIVERGENCES,
    IDENTITY,
    NO_LABEL,
    ROW_FIELDS,
    Divergences,
    ExactSum,
    GradWeights,
    LinearGrad,
    PairStats,
    RowStats,
    Spread,
    Transform,
)
from gpuxent.backends import _numpy, backend_of, is_cupy, on_host, to_gpu
from gpuxent.backends._threads import threads

Pair = tuple[Any, tuple[int, ...] | None]  # an argument of a blockwise and the axes it runs along
BlockFunction = Callable[
    ..., Any
]  # (backend of the block, logits, labels, first column, others...) -> what a block gives


@dataclass(frozen=True)
class DaskBackend:
    """The functions of the contract for Dask arrays; `block_backend` names the backend of the blocks (None: the best).

    Each says what a block does; `_rowwise` makes an array like the logits of that, and `_sums` and `_states` sums and
    records of the rows.
    """

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

        def stats(backend: Any, logits: Any, labels: Any, start: int, spread: Any, label_logit: Any) -> Any:
            how = {"spread": spread, "transform": transform, "label_logit": label_logit, "also": also}
            return vars(backend.row_stats(logits, labels, start, **how)).values()

        states = self._states(stats, logits, labels, _cut(spread, logits), label_logit, outputs=len(ROW_FIELDS))
        return RowStats.unstacked(_contract(states, _merge_row_states))

    def _label_logits(self, logits: da.Array, labels: da.Array | None, transform: Transform) -> da.Array:
        def gather(backend: Any, logits: Any, labels: Any, start: int) -> Any:
            return (backend.label_logits(logits, labels, start, transform),)

        return _contract(self._states(gather, logits, labels, outputs=1), partial(np.max, axis=-2))[..., 0]

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
        def grad(backend: Any, logits: Any, labels: Any, start: int, stats: Any, weights: Any, spread: Any) -> Any:
            return backend.logit_grad(logits, labels, stats, weights, start, spread=spread, transform=transform)

        return self._rowwise(grad, logits, labels, _needed(stats), weights, _cut(spread, logits))

    def row_stats_and_grad(
        self,
        logits: da.Array,
        labels: da.Array | None,
        weights: GradWeights,
        *,
        spread: Spread | None = None,
        transform: Transform = IDENTITY,
        also: Sequence[str] = (),
        out: None = None,
    ) -> tuple[RowStats, da.Array]:
        stats = self.row_stats(logits, labels, spread=spread, transform=transform, also=also)
        return stats, self.logit_grad(logits, labels, stats, weights, spread=spread, transform=transform)

    def row_stats_and_parameter_grad(self, *arguments: Any, **options: Any) -> tuple[RowStats, LinearGrad]:
        from gpuxent.backends import _dask_linear

        return _dask_linear.row_stats_and_parameter_grad(self, *arguments, **options)

    def log_probs(self, logits: da.Array, stats: RowStats) -> da.Array:
        def log_probs(backend: Any, logits: Any, _labels: Any, _start: int, stats: Any) -> Any:
            return backend.log_probs(logits, stats)

        return self._rowwise(log_probs, logits, None, _needed(stats))

    # ---- sums over the vocabulary ----

    def pair_stats(
        self,
        base: da.Array,
        other: da.Array,
        labels: da.Array | None = None,
        *,
        transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
        divergences: Sequence[str] = DIVERGENCES,
        also: Sequence[str] = (),
    ) -> PairStats:
        if base.numblocks[-1] > 1:  # the divergences of a slice need the normalizers of whole rows: a second read
            sides = zip((base, other), transforms, strict=True)
            p, q = (self.row_stats(rows, labels, transform=transform, also=also) for rows, transform in sides)
            sums = self.divergence_sums(base, other, p, q, transforms=transforms, divergences=divergences)
            return PairStats(p, q, sums)

        def stats(backend: Any, base: Any, labels: Any, _start: int, other: Any) -> Any:
            found = backend.pair_stats(base, other, labels, transforms=transforms, divergences=divergences, also=also)
            sums = [getattr(found.divergences, name) for name in divergences]
            return (*vars(found.base).values(), *vars(found.other).values(), *sums)

        count = len(ROW_FIELDS)
        states = self._states(stats, base, labels, other, outputs=2 * count + len(divergences))[..., 0, :]
        found = {name: states[..., 2 * count + i] for i, name in enumerate(divergences)}
        p, q = (RowStats.unstacked(states[..., start : start + count]) for start in (0, count))
        return PairStats(p, q, Divergences(**found))

    def divergence_sums(
        self,
        p: da.Array,
        q: da.Array,
        p_stats: RowStats | None = None,
        q_stats: RowStats | None = None,
        *,
        transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
        divergences: Sequence[str] = DIVERGENCES,
    ) -> Divergences:
        def sums(backend: Any, p: Any, _labels: Any, _start: int, q: Any, *stats: Any) -> Any:
            found = backend.divergence_sums(p, q, *stats, transforms=transforms, divergences=divergences)
            return tuple(getattr(found, name) for name in divergences)

        totals = self._sums(sums, p, None, q, _needed(p_stats), _needed(q_stats), outputs=len(divergences))
        return Divergences(**dict(zip(divergences, totals, strict=True)))

    def cross_sums(self, weights: da.Array, probs: da.Array, *, scale: np.ndarray | float = 1.0) -> da.Array:
        def sums(backend: Any, probs: Any, _labels: Any, _start: int, weights: Any, scale: Any) -> Any:
            return (backend.cross_sums(weights, probs, scale=scale),)

        return self._sums(sums, probs, None, weights, _columns(scale, probs), outputs=1)[0]

    def row_sums(self, rows: da.Array, *, high: float = np.inf, ignore: float | None = None) -> tuple[da.Array, ...]:
        def sums(backend: Any, rows: Any, _labels: Any, _start: int) -> Any:
            return backend.row_sums(rows, high=high, ignore=ignore)

        return self._sums(sums, rows, None, outputs=2)

    def onehot_sums(self, rows: da.Array, vocab_start: int = 0) -> tuple[da.Array, ...]:
        def sums(backend: Any, rows: Any, _labels: Any, start: int) -> Any:
            return backend.onehot_sums(rows, start)

        return self._sums(sums, rows, None, outputs=3)

    def take_label(self, rows: da.Array, labels: da.Array, vocab_start: int = 0) -> da.Array:
        def take(backend: Any, rows: Any, labels: Any, start: int) -> Any:
            return (backend.take_label(rows, labels, start),)

        return self._sums(take, rows, labels, outputs=1)[0]

    # ---- independent sigmoids ----

    def binary_losses(self, scores: da.Array, targets: da.Array, **how: Any) -> da.Array:
        dtype = np.float64 if scores.dtype.itemsize == 8 else np.float32
        return self._rowwise(*self._binary("binary_losses", scores, how), targets, dtype=dtype)

    def binary_sums(self, scores: da.Array, targets: da.Array, **how: Any) -> tuple[da.Array, ...]:
        return self._sums(*self._binary("binary_sums", scores, how), targets, outputs=2)

    def binary_grad(self, scores: da.Array, targets: da.Array, scale: Any, *, out: None = None, **how: Any) -> da.Array:
        return self._rowwise(*self._binary("binary_grad", scores, how), targets, scale)

    def _binary(self, name: str, scores: da.Array, how: dict[str, Any]) -> tuple[Any, ...]:
        """A block's function and its first arguments; the two weights may run along the columns."""
        how = dict(how)
        weights = [_columns(how.pop(weight), scores) for weight in ("pos_weight", "class_weight")]

        def call(
            backend: Any, scores: Any, _labels: Any, _start: int, pos_weight: Any, class_weight: Any, *others: Any
        ) -> Any:
            function = getattr(backend, name)
            return function(scores, *others, pos_weight=pos_weight, class_weight=class_weight, **how)

        return call, scores, None, *weights

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
        ndim = max(_ndim(a) for a in flat)
        like = next((a for a in flat if isinstance(a, da.Array) and a.ndim == ndim), None)
        bound = [*function.args, *function.keywords.values()] if isinstance(function, partial) else []
        gpu = None if dtype is object else _first_on_gpu([*flat, *bound])
        if like is None:  # nothing is lazy
            owner = _numpy if gpu is None else backend_of(gpu)
            return owner.map_rows(function, *arguments, outputs=outputs, dtype=dtype, at=at)
        flat = [_chunked(a, like.chunks) if _ndim(a) == ndim > 0 else a for a in flat]
        starts = [_starts(sizes) for sizes in like.chunks] if at else []
        count = len(flat)  # and not `flat`: the arrays and their graphs would travel with the function

        def on_block(*block: Any) -> Any:
            values, corner = block[:count], block[count:]
            start = tuple(int(c[0]) for c in corner) if at else None
            gpu = None if dtype is object else _first_on_gpu([*values, *bound])
            own = rebuild([on_host(v) for v in values] if gpu is None else _beside(gpu, values))
            result = _mapped(function, own, start, gpu, outputs=outputs, dtype=dtype)
            return _as_dtype(result, dtype) if outputs == 1 else _stacked(result)

        index = tuple(range(ndim))
        pairs = [_indexed(a) for a in flat]
        pairs += [(start, (axis,)) for axis, start in enumerate(starts)]
        if outputs == 1:
            return _blockwise(on_block, index, pairs, dtype, gpu)
        states = _blockwise(on_block, (*index, ndim), pairs, np.float64, gpu, new_axes={ndim: outputs})
        return tuple(states[..., i] for i in range(outputs))

    def total(self, values: da.Array, denominator: Any = 1.0) -> da.Array:
        """The exact sum of all entries over the denominator: an integer per block, added up in one small task."""
        if values.dtype.kind in "biu":
            return values.sum(dtype=np.int64) / denominator
        sums = self.map_rows(lambda block: _one(ExactSum.of(block), block.ndim), values, dtype=object)
        return _blockwise(_merged, (), [_indexed(sums), _indexed(denominator)], np.float64, concatenate=True)

    def laid_out_as(self, logits: da.Array, values: Any) -> da.Array:
        return _chunked(values, logits.chunks[: values.ndim])

    def unlabelled(self, rows: da.Array) -> da.Array:
        return da.full(rows.shape[:-1], NO_LABEL, dtype=np.int64, chunks=rows.chunks[:-1])

    def after(self, guard: da.Array, rows: da.Array) -> da.Array:
        return self._rowwise(lambda _backend, rows, _labels, _start, _guard: rows, rows, None, guard)

    # ---- blockwise over (rows..., vocab) ----

    def _rowwise(
        self, function: BlockFunction, logits: da.Array, labels: Any, *others: Any, dtype: Any = None
    ) -> da.Array:
        """A block for every block of logits."""
        call, pairs = self._block_call(function, logits, labels, others)
        dtype = logits.dtype if dtype is None else dtype
        return _blockwise(call, tuple(range(logits.ndim)), pairs, dtype, _first_on_gpu([logits]))

    def _states(self, function: BlockFunction, logits: da.Array, labels: Any, *others: Any, outputs: int) -> da.Array:
        """The vectors that the function gives for each block, as states (rows, slices, outputs)."""
        call, pairs = self._block_call(function, logits, labels, others)
        vocab, fields = logits.ndim - 1, logits.ndim
        return _blockwise(
            partial(_state, call),
            (*range(vocab), vocab, fields),
            pairs,
            np.float64,
            _first_on_gpu([logits]),
            new_axes={fields: outputs},
            adjust_chunks={vocab: lambda _: 1},
        )

    def _sums(
        self, function: BlockFunction, logits: da.Array, labels: Any, *others: Any, outputs: int
    ) -> tuple[da.Array, ...]:
        sums = _contract(self._states(function, logits, labels, *others, outputs=outputs), _add_in_order)
        return tuple(sums[..., i] for i in range(outputs))

    def _block_call(
        self, function: BlockFunction, logits: da.Array, labels: Any, others: Sequence[Any]
    ) -> tuple[Any, Any]:
        """What runs on a block, and the arguments of a blockwise: logits, labels, first column, the others' fields."""
        flat, rebuild = _flatten(others)
        vocab = logits.ndim - 1
        pairs = [_indexed(logits), _indexed(labels), (_starts(logits.chunks[-1]), (vocab,))]
        for value in flat:
            pairs.append((value.array, (vocab,)) if isinstance(value, _Columns) else _indexed(value))
        return partial(_on_block, function, self.block_backend, rebuild), pairs


def _on_block(
    function: BlockFunction, name: str | None, rebuild: Any, logits: Any, labels: Any, start: Any, *flat: Any
) -> Any:
    """One thread per task: Dask runs as many tasks as there are cores."""
    gpu = _first_on_gpu([logits])
    labels, *others = (labels, *flat) if gpu is None else _beside(gpu, (labels, *flat))
    with threads(1), np.errstate(all="ignore"):
        return function(backend_of(logits, name), logits, labels, int(start[0]), *rebuild(others))


def _mapped(
    function: Callable[..., Any], values: list[Any], start: tuple[int, ...] | None, gpu: Any, **how: Any
) -> Any:
    """The function of a block's vectors and records, which is told where the block begins if it wants to know."""
    if gpu is None:
        return _numpy.map_rows(function if start is None else partial(function, start=start), *values)
    try:
        return backend_of(gpu).map_rows(function, *values, at=start is not None, **how)
    except (IndexError, ValueError):
        if start is None:
            raise
        return function(*map(on_host, values), start=start)  # the same error, at its place in the whole array


def _first_on_gpu(values: Sequence[Any]) -> Any:
    """A CuPy array: one of the values, or what blocks of a Dask array among them are like. None if there is none."""
    return next((v for v in (getattr(v, "_meta", v) for v in values) if is_cupy(v)), None)


def _beside(gpu: Any, values: Sequence[Any]) -> list[Any]:
    """A task's arguments with the NumPy arrays (chunks of labels and weights) moved to where a CuPy array is."""
    return [(to_gpu(v, gpu) if v.ndim else v[()]) if isinstance(v, np.ndarray) else v for v in values]


def _as_dtype(values: Any, dtype: Any) -> Any:
    return values.astype(dtype, copy=False) if hasattr(values, "astype") else np.asarray(values, dtype)


def _state(call: Callable[..., Any], *block: Any) -> np.ndarray:
    return _stacked(call(*block))[..., None, :]


@dataclass(frozen=True)
class _Columns:
    """A Dask vector that runs along the vocabulary."""

    array: da.Array


def _blockwise(
    function: Callable[..., Any],
    index: tuple[int, ...],
    pairs: Sequence[Pair],
    dtype: Any,
    gpu: Any = None,
    **how: Any,
) -> da.Array:
    """`da.blockwise` with a meta of our own, like the CuPy array `gpu` if there is one: Dask would find it by calling
    the function with empty arrays."""
    flat = [part for pair in pairs for part in pair]
    meta = np.empty((0,) * len(index), dtype)
    if gpu is not None:
        meta, function = to_gpu(meta, gpu), partial(_on_its_device, function)
    return da.blockwise(function, index, *flat, dtype=dtype, meta=meta, align_arrays=False, **how)


def _on_its_device(function: Callable[..., Any], *block: Any) -> Any:
    gpu = _first_on_gpu(block)
    with nullcontext() if gpu is None else gpu.device:
        return function(*block)


def _contract(states: da.Array, merge: Callable[[np.ndarray], np.ndarray]) -> da.Array:
    """States (rows, slices, fields) merged over the slices, in column order."""
    *rows, slices, fields = range(states.ndim)
    pairs = [(states, (*rows, slices, fields))]
    return _blockwise(merge, (*rows, fields), pairs, np.float64, _first_on_gpu([states]), concatenate=True)


def _indexed(value: Any) -> Pair:
    """A Dask array runs along the leading axes of the output; anything else goes to every block as it is."""
    return (value, tuple(range(value.ndim))) if isinstance(value, da.Array) else (value, None)


def _columns(values: Any, logits: da.Array) -> Any:
    """A vector of length vocab, cut up as the logits' last axis; a number stays one."""
    return _Columns(_chunked(values, logits.chunks[-1:])) if _ndim(values) else values


def _cut(spread: Spread | None, logits: da.Array) -> Spread | None:
    if spread is None:
        return None
    return Spread(spread.soft, _columns(spread.scale, logits), _columns(spread.base, logits))


def _ndim(value: Any) -> int:
    """np.ndim, which Dask's expression arrays do not support."""
    return value.ndim if hasattr(value, "ndim") else np.ndim(value)


def _chunked(values: Any, chunks: tuple[tuple[int, ...], ...]) -> da.Array:
    """NumPy or Dask values as a Dask array with these chunks."""
    if isinstance(values, da.Array):
        return values if values.chunks == chunks else values.rechunk(chunks)
    return da.from_array(values if is_cupy(values) else np.asarray(values), chunks=chunks)


def chunked_as_rows(rows: da.Array, values: Any) -> da.Array:
    """Values (n, ...) with the chunks that `rows` has along n, and one along each other axis."""
    return _chunked(values, (rows.chunks[0], *((size,) for size in values.shape[1:])))


def _starts(sizes: tuple[int, ...]) -> da.Array:
    """Where each chunk of an axis begins: one chunk of one entry for each of its chunks."""
    return da.from_array(np.cumsum((0, *sizes[:-1])), chunks=1)


def _stacked(vectors: Any) -> Any:
    return np.stack([_as_dtype(v, np.float64) for v in vectors], axis=-1)


def _merge_row_states(states: np.ndarray) -> np.ndarray:
    return RowStats.merge_all(RowStats.unstacked(states[..., i, :]) for i in range(states.shape[-2])).stacked()


def _add_in_order(states: np.ndarray) -> np.ndarray:
    total = states[..., 0, :].copy()
    for i in range(1, states.shape[-2]):
        total += states[..., i, :]
    return total


def _needed(stats: RowStats | None) -> RowStats | None:
    """Only what a second read of the rows uses: the other fields need not travel."""
    if stats is None:
        return None
    needed = {name: getattr(stats, name) for name in ("max", "rest", "label_logit", "spread_weight")}
    return RowStats(**vars(RowStats.identity()) | needed)


def _flatten(arguments: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """The arguments with records opened into their fields, and the way back."""
    kinds = [type(a) if isinstance(a, (RowStats, GradWeights, Spread)) else None for a in arguments]
    sizes = [1 if kind is None else len(fields(kind)) for kind in kinds]
    flat = [
        part for a, kind in zip(arguments, kinds, strict=True) for part in ([a] if kind is None else vars(a).values())
    ]
    return flat, partial(_rebuild, kinds, sizes)


def _rebuild(kinds: list[Any], sizes: list[int], flat: Sequence[Any]) -> list[Any]:
    rest = iter(flat)
    parts = [list(islice(rest, size)) for size in sizes]
    return [part[0] if kind is None else kind(*part) for kind, part in zip(kinds, parts, strict=True)]


def _one(value: Any, ndim: int) -> np.ndarray:
    """An array of one Python object."""
    box = np.empty((1,) * ndim, object)
    box.flat[0] = value
    return box


def _merged(sums: np.ndarray, denominator: Any) -> np.ndarray:
    return np.array(reduce(ExactSum.merge, sums.ravel(), ExactSum()).divided_by(float(denominator)))


def computed(*arrays: Any, scheduler: str | None) -> tuple[Any, ...]:
    """In one pass over what they share."""
    return dask.compute(*arrays, scheduler=scheduler)
