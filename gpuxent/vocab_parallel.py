"""Cross-entropy over a vocabulary that is split among ranks, each of which holds a shard of the logits (or of the
classifier that makes them) for all rows.

A rank reads its shard once and leaves a record of eight numbers per row. The records, 64 bytes per row and rank, are
all that ranks exchange: gathered and merged in the order of the shards they give every rank the same loss, and with it
each makes the gradient of its own shard. How records travel is the caller's affair:

    record = shard_stats(logits, labels, start, vocab)                    # on every rank, of its own columns
    every = [torch.empty_like(t) for _ in range(ranks)]                   # t = torch.from_numpy(record)
    torch.distributed.all_gather(every, t)                                # mpi4py: comm.allgather(record)
    record = merge([t.numpy() for t in every])                            # CuPy and NCCL: communicator.allGather
    loss = loss_of(record, labels, vocab)                                 # the same bits on every rank
    dlogits = shard_grad(logits, labels, record, start, vocab)            # of its own columns

With `linear_shard_stats` and `linear_shard_grad` a rank has the hidden states and its rows of the classifier. What its
shard adds to the gradient of the hidden states is then to be summed over the ranks (an all-reduce).

The options are those of `gpuxent.cross_entropy` and must be the same in every call: class_weight (of the whole
vocabulary), ignore_index, label_smoothing, z_loss, softcap, temperature, reduction, check_labels, backend. Labels are
classes of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._records import ROW_FIELDS, Array, GradWeights, LinearGrad, RowStats, Spread
from gpuxent._rows import Rows
from gpuxent.backends import backend_of, is_dask, linear_logits, unread


def shard_stats(logits: Array, labels: Array, start: int, vocab: int, **options: Any) -> Array:
    """The record of a shard: what one read of its columns leaves behind.

    Args:
        logits: (..., columns), of the classes from `start` on; NumPy or CuPy, of any dtype that `cross_entropy` takes.
        labels: (...) integers, classes of the whole vocabulary.
        start: the class of the first column.
        vocab: classes in the whole vocabulary.

    Returns: float64 (..., 8), the fields of the record of each row.

    Raises: as `cross_entropy`; ValueError: a shard that does not lie in the vocabulary, soft labels.

    >>> import numpy as np
    >>> logits, labels = np.array([[2.0, 0.0, 1.0, -1.0]]), np.array([2])
    >>> shards = [(logits[:, :3], 0), (logits[:, 3:], 3)]
    >>> record = merge([shard_stats(x, labels, start, 4) for x, start in shards])
    >>> float(loss_of(record, labels, 4).round(4))
    1.4402
    >>> [shard_grad(x, labels, record, start, 4).round(3).tolist() for x, start in shards]
    [[[0.644, 0.087, -0.763]], [[0.032]]]
    """
    return _stats(arguments.rows(logits, "logits"), labels, start, vocab, options)


def linear_shard_stats(
    hidden: Array,
    classifier: Array,
    labels: Array,
    start: int,
    vocab: int,
    *,
    bias: Array | None = None,
    **options: Any,
) -> Array:
    """`shard_stats` of hidden @ classifier.T + bias, whose logits are made tile by tile; see `linear_cross_entropy`.

    Args:
        hidden: (..., features), the same on every rank.
        classifier: (columns, features), of the classes from `start` on; `bias` (columns,) likewise.
    """
    return _stats(linear_logits(*arguments.parameters(hidden, classifier, bias)), labels, start, vocab, options)


def merge(records: Sequence[Array]) -> Array:
    """The record of shards together. The order is that of the columns: then all ranks have the same bits."""
    found = list(records)
    if not found or any(record.shape != (*found[0].shape[:-1], len(ROW_FIELDS)) for record in found):
        shapes = ", ".join(str(record.shape) for record in found)
        raise ValueError(
            f"records must be those of shards of the same rows, (..., 8), got shapes {shapes or 'of none'}"
        )
    return RowStats.merge_all(map(RowStats.unstacked, found)).stacked()


def loss_of(record: Array, labels: Array, vocab: int, **options: Any) -> Any:
    """The loss of whole rows from their merged record, reduced as `cross_entropy` does; float64 per row."""
    rows = _whole(record, record.shape[:-1], labels, vocab, options)
    return rows.reduced(*rows.losses(RowStats.unstacked(record)), *rows.denominators(None))


def shard_grad(
    logits: Array,
    labels: Array,
    record: Array,
    start: int,
    vocab: int,
    *,
    grad_output: Any = 1.0,
    denominator: Any = None,
    out: Array | None = None,
    **options: Any,
) -> Array:
    """The gradient of a shard of logits, in its dtype, given the merged record; `grad_output`, `denominator` and `out`
    as in `cross_entropy_and_grad`."""
    shard = arguments.rows(logits, "logits")
    rows, spread = _opened(shard, labels, start, vocab, options)
    out = arguments.output(out, shard, labels)
    weights = _weights(rows, grad_output, denominator)
    how = {"spread": spread, "transform": rows.options.transform, "out": out}
    return rows.backend.logit_grad(shard, rows.labels, RowStats.unstacked(record), weights, start, **how)


def linear_shard_grad(
    hidden: Array,
    classifier: Array,
    labels: Array,
    record: Array,
    start: int,
    vocab: int,
    *,
    bias: Array | None = None,
    grad_output: Any = 1.0,
    denominator: Any = None,
    **options: Any,
) -> LinearGrad:
    """Gradients given the merged record: those of the shard's classifier and bias, and what the shard adds to that of
    the hidden states (to be summed over the ranks)."""
    shard = linear_logits(*arguments.parameters(hidden, classifier, bias))
    rows, spread = _opened(shard, labels, start, vocab, options)
    weights = _weights(rows, grad_output, denominator)
    wrt = ("hidden", "classifier") if bias is None else ("hidden", "classifier", "bias")
    how = {"spread": spread, "transform": rows.options.transform, "wrt": wrt}
    owner = backend_of(shard, options.get("backend"))
    return owner.parameter_grad(shard, rows.labels, RowStats.unstacked(record), weights, start, **how)


def _stats(shard: Array, labels: Any, start: int, vocab: int, options: dict[str, Any]) -> Array:
    rows, spread = _opened(shard, labels, start, vocab, options)
    owner = backend_of(shard, options.get("backend"))
    also = {"spread": spread, "transform": rows.options.transform, "also": ("argmax",)}
    return owner.row_stats(shard, rows.labels, start, **also).stacked()


def _opened(shard: Array, labels: Any, start: int, vocab: int, options: dict[str, Any]) -> tuple[Rows, Spread | None]:
    """The whole rows as far as they are known here, and the shard's part of the spread row."""
    if is_dask(shard):
        raise TypeError("logits must be a NumPy or CuPy array; of Dask arrays the vocabulary may be chunked")
    vocab = arguments.positive(vocab, "vocab")
    start, columns = arguments.integer(start, "start", 0), shard.shape[-1]
    if start + columns > vocab:
        raise ValueError(f"a shard of {columns} columns from class {start} on does not lie in vocab={vocab} classes")
    rows = _whole(shard, shard.shape[:-1], labels, vocab, options)
    spread = rows.spread
    if spread is not None and np.ndim(spread.base):
        base: Any = spread.base
        spread = Spread(None, spread.scale, base[start : start + columns])
    return rows, spread


def _whole(like: Array, shape: tuple[int, ...], labels: Any, vocab: int, options: dict[str, Any]) -> Rows:
    """Rows of the whole vocabulary that have passed the door, but for logits that nobody reads."""
    rows = Rows.open(unread(like, (*shape, vocab)), labels, **options)
    if rows.label_weight is None:
        raise ValueError("labels must be integers, classes of the whole vocabulary, got soft labels")
    return rows


def _weights(rows: Rows, grad_output: Any, denominator: Any) -> GradWeights:
    reduction = rows.options.reduction
    grad_output = arguments.grad_output(grad_output, rows.logits, rows.logits.shape[:-1], reduction)
    return rows.weights(grad_output, *rows.denominators(arguments.denominator(denominator, reduction)))
