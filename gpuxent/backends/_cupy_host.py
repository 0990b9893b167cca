"""NumPy arrays on the GPU: what `backend="cupy"` does for arrays in memory and for NumPy blocks of a Dask array.

Logits go over for each call of a function, and what comes back are vectors, and the gradient where there is one. The
steps between the calls are made of vectors alone and stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import numpy as np

from gpuxent._records import RowStats
from gpuxent.backends import _cupy, on_host, to_gpu
from gpuxent.backends._numpy import after, laid_out_as, limb_sums, map_rows, total, unlabelled

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


def _over_there(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return _each(on_host, function(*_each(_moved, arguments), **_each(_moved, options)))

    return call


def _gradient_over_there(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient is written over the copy of the logits: the GPU needs room for one of the two."""

    def call(logits: np.ndarray, *arguments: Any, out: np.ndarray | None = None, **options: Any) -> Any:
        moved = to_gpu(logits)
        result = function(moved, *_each(_moved, arguments), out=moved, **_each(_moved, options))
        stats, grad = result if isinstance(result, tuple) else (None, result)
        out = np.empty(logits.shape, logits.dtype) if out is None else out
        out[...] = grad.get()
        return out if stats is None else (_each(on_host, stats), out)

    return call


def log_probs(logits: np.ndarray, stats: RowStats) -> np.ndarray:
    return _log_probs(logits, stats).astype(logits.dtype, copy=False)  # whose bytes may be in the other order


def _moved(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return to_gpu(value) if value.ndim else value[()]


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of every array in tuples, dictionaries and records."""
    if isinstance(value, tuple):
        return tuple(_each(change, item) for item in value)
    if isinstance(value, dict):
        return {name: _each(change, item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**_each(change, vars(value)))
    return change(value)


_log_probs = _over_there(_cupy.log_probs)
row_stats = _over_there(_cupy.row_stats)
label_logits = _over_there(_cupy.label_logits)
take_label = _over_there(_cupy.take_label)
pair_stats = _over_there(_cupy.pair_stats)
divergence_sums = _over_there(_cupy.divergence_sums)
cross_sums = _over_there(_cupy.cross_sums)
row_sums = _over_there(_cupy.row_sums)
onehot_sums = _over_there(_cupy.onehot_sums)
binary_losses = _over_there(_cupy.binary_losses)
binary_sums = _over_there(_cupy.binary_sums)
logit_grad = _gradient_over_there(_cupy.logit_grad)
row_stats_and_grad = _gradient_over_there(_cupy.row_stats_and_grad)
binary_grad = _gradient_over_there(_cupy.binary_grad)
