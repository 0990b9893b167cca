"""Log-sum-exp, softmax and log-softmax along any axis."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent import _row_loss
from gpuxent._dlpack import returns_own_kind
from gpuxent._records import Array, GradWeights
from gpuxent.backends import backend_of


@returns_own_kind
def logsumexp(logits: Array, *, axis: int = -1, backend: str | None = None) -> Array:
    """ln of the sum of exp(logits) along an axis, in nats, without overflow.

    Args:
        logits: float16, bfloat16, float32 or float64, at least one entry along `axis`; NumPy, CuPy or Dask, or a tensor
            on a GPU.
        axis: the axis that is summed.
        backend: "numba" or "numpy"; "cupy" brings a NumPy array to the GPU; None for the best one where the array is.

    Returns:
        The logits' shape without `axis`; float64 for float64 logits and float32 otherwise. +inf if there is a +inf
        (and no NaN), -inf if every logit is -inf.

    Raises: ValueError, TypeError: no such axis, an empty one, a dtype that is no float.

    >>> import numpy as np
    >>> logsumexp(np.array([[1000.0, 1000.0], [0.0, -np.inf]])).round(4)
    array([1000.6931,    0.    ])
    """
    rows, owner = _rows(logits, axis, backend)
    lse, _, _ = owner.map_rows(_row_loss.summary, owner.row_stats(rows), outputs=3)
    return arguments.as_row_dtype(owner, lse, arguments.row_dtype(rows))


@returns_own_kind
def softmax(logits: Array, *, axis: int = -1, backend: str | None = None) -> Array:
    """exp(logits - logsumexp(logits)) along an axis.

    Arguments and errors as `logsumexp`. Returns an array of the logits' shape and dtype; NaN where every logit is
    -inf, or one is NaN or +inf.

    >>> import numpy as np
    >>> softmax(np.array([2.0, 0.0, -np.inf])).round(4)
    array([0.8808, 0.1192, 0.    ])
    """
    rows, owner = _rows(logits, axis, backend)
    weights = GradWeights(*owner.map_rows(_softmax_alone, owner.unlabelled(rows), outputs=3))
    return _back(owner.row_stats_and_grad(rows, None, weights)[1], axis)


@returns_own_kind
def log_softmax(logits: Array, *, axis: int = -1, backend: str | None = None) -> Array:
    """logits - logsumexp(logits) along an axis, in nats; close to 0 it keeps the digits that a difference would lose.

    Arguments, errors and special values as `softmax`; a -inf logit gives -inf.

    >>> import numpy as np
    >>> log_softmax(np.array([2.0, 0.0, -np.inf])).round(4)
    array([-0.1269, -2.1269,    -inf])
    """
    rows, owner = _rows(logits, axis, backend)
    return _back(owner.log_probs(rows, owner.row_stats(rows)), axis)


def _softmax_alone(labels: Array) -> tuple[Array, Array, Array]:
    """The GradWeights that leave just the softmax of rows without a label."""
    zeros = np.zeros_like(labels) + 0.0  # labels are integers
    return zeros + 1.0, zeros, zeros


def _rows(logits: Any, axis: Any, backend: str | None) -> tuple[Array, Any]:
    logits = arguments.float_array(logits, "logits")
    axis = arguments.axis(axis, logits)
    return arguments.rows(_moveaxis(logits, axis, -1), "logits"), backend_of(logits, backend)


def _back(rows: Array, axis: int) -> Array:
    return _moveaxis(rows, -1, axis)


def _moveaxis(values: Array, source: int, target: int) -> Array:
    """As np.moveaxis, for Dask arrays too."""
    order = list(range(values.ndim))
    order.insert(target % values.ndim, order.pop(source))
    return values.transpose(order)
