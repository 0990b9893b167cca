"""The matrix products of linear cross-entropy, through BLAS (cuBLAS for CuPy arrays, SciPy where hidden is sparse).

16-bit parameters are widened to float32 piece by piece: BLAS has no 16-bit products, and NumPy's own take hundreds of
times as long. A GPU with tensor cores multiplies them as they are and adds up in float32. For that the gradient of the
logits is rounded to bfloat16, but not to float16, in which that of a mean over many rows would be 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from gpuxent._records import Array
from gpuxent.backends import _cublas, _cupy_found, is_cupy

PIECE_BYTES = 16 * 2**20  # of a classifier that is widened, or of its gradient before it is added
LEAST_CLASSES = 256  # in a piece


def library(array: Array) -> Any:
    """NumPy or CuPy, as the array is."""
    return _cupy_found.cupy() if is_cupy(array) else np


def factor(matrix: Array, dtype: np.dtype) -> Array:
    """Hidden states as they are multiplied: in `dtype`, or as they are on tensor cores."""
    return matrix if _on_tensor_cores(matrix) else matrix.astype(dtype, copy=False)


def gradient_factor(dlogits: Array, classifier: Array) -> Array:
    """The gradient of the logits as it is multiplied."""
    narrow = _on_tensor_cores(classifier) and classifier.dtype == ml_dtypes.bfloat16
    return dlogits.astype(classifier.dtype) if narrow else dlogits


def logits_of(hidden: Array, classifier: Array, bias: Array | None, out: Array) -> None:
    """out = hidden @ classifier.T + bias; hidden (rows, features) is a `factor`."""
    if hidden.dtype == out.dtype:
        matmul = library(out).matmul
        for classes in _pieces(classifier, out.dtype):
            columns = classifier[classes].astype(out.dtype, copy=False).T
            if _is_sparse(hidden):
                out[:, classes] = hidden @ columns
            else:
                matmul(hidden, columns, out=out[:, classes])
    else:
        _cublas.product(hidden, classifier.T, out)
    if bias is not None:
        out += bias.astype(out.dtype, copy=False)


def hidden_grad(dlogits: Array, classifier: Array) -> Array:
    """dlogits @ classifier; dlogits is a `gradient_factor`."""
    if dlogits.dtype.itemsize == 2:
        total = library(dlogits).empty((dlogits.shape[0], classifier.shape[1]), np.float32)
        _cublas.product(dlogits, classifier, total)
        return total
    parts = (
        dlogits[:, classes] @ classifier[classes].astype(dlogits.dtype, copy=False)
        for classes in _pieces(classifier, dlogits.dtype)
    )
    total = next(parts)
    for part in parts:
        total += part
    return total


def add_classifier_grad(dlogits: Array, hidden: Array, total: Array, first: bool) -> None:
    """total += dlogits.T @ hidden, both factors; the `first` one overwrites what is there."""
    if dlogits.dtype.itemsize == 2:
        _cublas.product(dlogits.T, hidden, total, add=not first)
        return
    hidden = hidden.astype(dlogits.dtype, copy=False)
    if _is_sparse(hidden):
        total += (hidden.T @ dlogits).T
        return
    if first:
        library(total).matmul(dlogits.T, hidden, out=total)
        return
    for classes in _in_pieces(total):
        total[classes] += dlogits[:, classes].T @ hidden


def add_bias_grad(dlogits: Array, total: Array) -> None:
    """total (float64) += the sum of dlogits over the rows."""
    total += dlogits.sum(axis=0, dtype=np.float64)


def _pieces(classifier: Array, dtype: np.dtype) -> Iterator[slice]:
    """All of it at once where there is nothing to widen."""
    return iter([slice(None)]) if classifier.dtype == dtype else _in_pieces(classifier)


def _in_pieces(classifier: Array) -> Iterator[slice]:
    classes, features = classifier.shape
    step = max(LEAST_CLASSES, PIECE_BYTES // (4 * features))
    return (slice(start, min(start + step, classes)) for start in range(0, classes, step))


def _on_tensor_cores(matrix: Array) -> bool:
    return matrix.dtype.itemsize == 2 and is_cupy(matrix) and _cublas.has_tensor_cores(matrix)


def _is_sparse(hidden: Any) -> bool:
    return type(hidden).__module__.startswith("scipy.sparse")
