"""The contract of a backend, and which one an array belongs to.

A backend offers these functions, with the same arguments in the same order everywhere. `logits` has shape (...,
vocab) and may be a slice of the vocabulary that begins at `vocab_start`; records and vectors have shape (...).
`labels` is int64 as the door (`_arguments`) leaves it: a class, `IGNORED` or `NO_LABEL`. Backends know nothing of
losses.

    row_stats(logits, labels, vocab_start=0, *, spread, transform, label_logit, also) -> RowStats
        one read; `also` names the fields of RowStats that cost extra: "argmax", "moment", "rank" (which needs
        `label_logit` where the slice is not the whole vocabulary)
    logit_grad(logits, labels, stats, weights, vocab_start=0, *, spread, transform, out) -> dlogits
        one read, one write, in the logits' dtype; `out` may be `logits`
    log_probs(logits, stats) -> log softmax, in the logits' dtype
    pair_stats(p, q, p_stats, q_stats, *, divergence) -> PairStats
        sums over two models' rows: logits with their stats, or probabilities without
    cross_sums, row_sums, onehot_sums, take_label, binary_losses, binary_sums, binary_grad
        see `_numpy_pairs` and `_numpy_binary`; every sum over a slice adds up to that of the row

And what lets one piece of code serve arrays in memory and lazy ones:

    map_rows(function, *arguments, outputs, dtype, at): apply a function of vectors and records to the rows; with `at`
    it is
        told the index of its first row as `start`
    total(values, denominator) -> the exact sum of all entries over the denominator, rounded once
    laid_out_as(logits, values): labels or other rows cut up as the logits are
    unlabelled(rows): NO_LABEL for each row
    after(guard, rows): the rows, but not before the guard (which raises for bad values) has been computed
"""

from __future__ import annotations

from typing import Any

BACKENDS = ("numpy",)  # what `backend=` can name


def backend_of(array: Any, name: str | None = None) -> Any:
    """The backend that owns the array's type; `name` picks among those that can work on it.

    Each is imported only when an array of its kind turns up. For a Dask array the name is that of the backend of its
    blocks.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if is_dask(array):
        from gpuxent.backends._dask import DaskBackend

        return DaskBackend(name)
    from gpuxent.backends import _numpy

    return _numpy


def is_dask(array: Any) -> bool:
    """By the modules of its type, so that Dask is not imported to find out."""
    return any(kind.__module__.partition(".")[0] == "dask" for kind in type(array).__mro__)
