"""Linear cross-entropy of Dask arrays: logits whose blocks are `LinearLogits`, and gradients as sums over the blocks.

A block belongs to a chunk of rows and a chunk of the vocabulary. Its task makes its tiles, and leaves what it adds to
the gradients of its rows' hidden states and of its classes: these are added up along the other axis, in an order that
the chunks fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np

from gpuxent._records import IDENTITY, ROW_FIELDS, GradWeights, LinearGrad, RowStats, Spread, Transform
from gpuxent.backends import _dask
from gpuxent.backends._linear import LinearLogits, computed_dtype


def linear_logits(hidden: da.Array, classifier: Any, bias: Any, tile_bytes: int | None) -> da.Array:
    """hidden @ classifier.T + bias, chunked as the rows of `hidden` and the classes of `classifier` are."""
    hidden = hidden.rechunk({hidden.ndim - 1: -1})
    if not isinstance(classifier, da.Array):
        classifier = da.from_array(classifier, chunks=-1)
    classifier = classifier.rechunk({1: -1})
    vocab, features = hidden.ndim - 1, hidden.ndim
    rows = tuple(range(vocab))
    of_bias = (None, None) if bias is None else (_dask._chunked(bias, classifier.chunks[:1]), (vocab,))
    pairs: list[_dask.Pair] = [(hidden, (*rows, features)), (classifier, (vocab, features)), of_bias]
    gpu = _dask._first_on_gpu([hidden])
    return _dask._blockwise(partial(_block, tile_bytes), (*rows, vocab), pairs, hidden.dtype, gpu)


def _block(tile_bytes: int | None, hidden: Any, classifier: Any, bias: Any) -> LinearLogits:
    (hidden,), (classifier,) = hidden, classifier  # the axis of the features is one chunk
    return LinearLogits(hidden, classifier, bias, tile_bytes)


def row_stats_and_parameter_grad(
    backend: _dask.DaskBackend,
    logits: da.Array,
    labels: da.Array | None,
    weights: GradWeights,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    also: Sequence[str] = (),
    wrt: Sequence[str],
    features: int,
) -> tuple[RowStats, LinearGrad]:
    """Where the vocabulary is one chunk a row's logits are made once, else once more for its statistics."""
    how: dict[str, Any] = {"spread": spread, "transform": transform, "also": also}
    stats = None if logits.numblocks[-1] == 1 else backend.row_stats(logits, labels, **how)
    options: dict[str, Any] = {"transform": transform, "wrt": wrt, "dtype": computed_dtype(logits.dtype)}

    def work(rows: Any, logits: Any, labels: Any, start: int, stats: Any, weights: Any, spread: Any) -> Any:
        if stats is not None:
            return None, rows.parameter_grad(logits, labels, stats, weights, start, spread=spread, **options)
        return rows.row_stats_and_parameter_grad(logits, labels, weights, spread=spread, also=also, **options)

    others = (_dask._needed(stats), weights, _dask._cut(spread, logits))
    call, pairs = backend._block_call(work, logits, labels, others)
    axes = tuple(range(logits.ndim))
    boxes = _dask._blockwise(
        partial(_dask._on_its_device, partial(_boxed, call, logits.ndim)),
        axes,
        pairs,
        object,
        adjust_chunks=dict.fromkeys(axes, _one_entry),
    )
    if stats is None:
        stats = RowStats.unstacked(_opened(boxes, logits, _state_of, rows=True, width=len(ROW_FIELDS))[..., 0, :])
    return stats, _gradients(boxes, logits, wrt, features)


def _gradients(boxes: da.Array, logits: da.Array, wrt: Sequence[str], features: int) -> LinearGrad:
    """The parts of each block added up: of hidden states over the vocabulary, of the others over the rows."""
    dtype, rows = computed_dtype(logits.dtype), tuple(range(logits.ndim - 1))
    found: dict[str, Any] = {}
    if "hidden" in wrt:
        found["hidden"] = _opened(boxes, logits, partial(_part, "hidden"), rows=True, width=features).sum(-2, dtype)
    if "classifier" in wrt:
        parts = _opened(boxes, logits, partial(_part, "classifier"), rows=False, width=features)
        found["classifier"] = parts.sum(rows, dtype)
    if "bias" in wrt:
        found["bias"] = _opened(boxes, logits, partial(_part, "bias"), rows=False, width=1).sum(rows, np.float64)[:, 0]
    return LinearGrad(
        **{
            name: found[name].astype(logits.dtype) if name in found else None
            for name in ("hidden", "classifier", "bias")
        }
    )


def _opened(boxes: da.Array, logits: da.Array, part: Any, *, rows: bool, width: int) -> da.Array:
    """Of every block an array with these axes: its rows (or 1), 1 (or its classes), `width`."""
    axes, last = tuple(range(logits.ndim)), logits.ndim
    sizes = {axis: logits.chunks[axis] for axis in (axes[:-1] if rows else axes[-1:])}
    shape = partial(_shaped, part, rows)
    dtype = computed_dtype(logits.dtype)
    return _dask._blockwise(shape, (*axes, last), [(boxes, axes)], dtype, new_axes={last: width}, adjust_chunks=sizes)


def _shaped(part: Any, rows: bool, box: np.ndarray) -> Any:
    values = part(*box.item())
    return values[..., None, :] if rows else values.reshape((1,) * (box.ndim - 1) + values.shape)


def _state_of(stats: RowStats, _grad: LinearGrad) -> Any:
    return stats.stacked()


def _part(name: str, _stats: RowStats | None, grad: LinearGrad) -> Any:
    values = getattr(grad, name)
    return values[:, None] if values.ndim == 1 else values


def _boxed(call: Any, ndim: int, *block: Any) -> np.ndarray:
    return _dask._one(call(*block), ndim)


def _one_entry(_size: int) -> int:
    return 1
