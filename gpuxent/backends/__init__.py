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
    row_stats_and_grad(logits, labels, weights, *, spread, transform, also, out) -> (RowStats, dlogits)
        both, for rows with the whole vocabulary
    log_probs(logits, stats) -> log softmax, in the logits' dtype
    pair_stats(base, other, labels, *, transforms, divergences, also) -> PairStats
        two models' rows with the whole vocabulary: the statistics of both and how far they diverge, in one read;
        `transforms` is one for each, `divergences` names the fields of Divergences that are wanted
    divergence_sums(p, q, p_stats, q_stats, *, transforms, divergences) -> Divergences
        what (a slice of) two rows of logits adds to them, given the stats of the whole rows; of rows of probabilities,
        without
    cross_sums, row_sums, onehot_sums, take_label, binary_losses, binary_sums, binary_grad
        see `_numpy_pairs` and `_numpy_binary`; every sum over a slice adds up to that of the row

And what lets one piece of code serve arrays in memory and lazy ones:

    map_rows(function, *arguments, outputs, dtype, at): apply a function of vectors and records to the rows; with `at`
        it is told the index of its first row as `start`
    total(values, denominator) -> the exact sum of all entries over the denominator, rounded once
        (an array of shape () where the values are on a GPU)
    laid_out_as(logits, values): labels or other rows cut up as the logits are
    unlabelled(rows): NO_LABEL for each row
    after(guard, rows): the rows, but not before the guard (which raises for bad values) has been computed
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from gpuxent.backends import _cupy_found

BACKENDS = ("numba", "numpy")  # for arrays in the CPU's memory
NAMES = (*BACKENDS, "cupy")  # what `backend=` can name


def backend_of(array: Any, name: str | None = None) -> Any:
    """The backend that owns the array's type; `name` picks among those that can work on it.

    Each is imported only when an array of its kind turns up. NumPy arrays go to Numba where it is installed, else to
    NumPy; "cupy" brings them to the GPU and the results back. CuPy arrays stay on theirs. For a Dask array the name is
    that of the backend of its blocks.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name in BACKENDS and on_gpu(array):
        raise ValueError(
            f"backend must be None or 'cupy' for CuPy arrays, got {name!r}; cupy.asnumpy makes NumPy arrays"
        )
    if is_linear(array):
        return import_module("gpuxent.backends._linear").LinearBackend(array, name)
    if is_dask(array):
        from gpuxent.backends._dask import DaskBackend

        return DaskBackend(name)
    return _in_gpu_memory() if is_cupy(array) else _in_memory(name)


@cache
def _in_gpu_memory() -> Any:
    _cupy_found.cupy()
    return import_module("gpuxent.backends._cupy")


@cache
def _in_memory(name: str | None) -> Any:
    if name == "cupy":
        _cupy_found.cupy()
        return import_module("gpuxent.backends._cupy_host")
    if name == "numba" and not has_numba():
        raise ModuleNotFoundError("backend 'numba' needs Numba, which is not installed: pip install 'gpuxent[cpu]'")
    if name == "numba" or (name is None and has_numba()):
        try:
            return import_module("gpuxent.backends._numba")
        except ImportError as error:  # a version that does not go with this NumPy, say
            if name == "numba":
                raise
            warnings.warn(f"Numba is installed but cannot be loaded ({error}); using NumPy", RuntimeWarning, 2)
    return import_module("gpuxent.backends._numpy")


def limb_sums(values: np.ndarray, groups: np.ndarray, size: int, squared: bool = False) -> Any:
    """Exact sums by group in the CPU's memory, the same from either backend; see `_numpy_sums`."""
    owner = _in_memory(None if values.size else "numpy")  # nothing to add up is no reason to load Numba
    return owner.limb_sums(values, groups, size, squared)


def has_numba() -> bool:
    return find_spec("numba") is not None


def linear_logits(hidden: Any, classifier: Any, bias: Any = None, tile_bytes: int | None = None) -> Any:
    """hidden @ classifier.T + bias as rows of logits that are made when they are read: `LinearLogits`, or a Dask array
    with such blocks."""
    if is_dask(hidden):
        return import_module("gpuxent.backends._dask_linear").linear_logits(hidden, classifier, bias, tile_bytes)
    return import_module("gpuxent.backends._linear").LinearLogits(hidden, classifier, bias, tile_bytes)


def tile_rows(vocab: int, dtype: np.dtype) -> int:
    """How many rows of such logits in the CPU's memory are multiplied at once."""
    return import_module("gpuxent.backends._linear").tile_rows(vocab, dtype)


def made(logits: Any) -> Any:
    """Logits that are products as an array, others as they are."""
    return import_module("gpuxent.backends._linear").made(logits) if is_linear(logits) else logits


def is_linear(array: Any) -> bool:
    """Logits that are products, in memory; see `_linear`."""
    return _of_linear(type(array))  # type: ignore[arg-type]  # types are hashable


@cache
def _of_linear(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("gpuxent.backends._linear", "LinearLogits")


def is_dask(array: Any) -> bool:
    """By the modules of its type, so that Dask is not imported to find out; and so with CuPy."""
    return _of_dask(type(array))  # type: ignore[arg-type]  # types are hashable


@cache
def _of_dask(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "dask" for base in kind.__mro__)


def is_cupy(array: Any) -> bool:
    return _of_cupy(type(array))  # type: ignore[arg-type]


@cache
def _of_cupy(kind: type) -> bool:
    return any((base.__module__, base.__name__) == ("cupy", "ndarray") for base in kind.__mro__)


def on_gpu(array: Any) -> bool:
    """A CuPy array, or a Dask array of them."""
    return is_cupy(getattr(array, "_meta", array))


def on_host(array: Any) -> Any:
    """A CuPy array as a NumPy array, which waits for the GPU; any other as it is."""
    return array.get() if is_cupy(array) else array


def to_gpu(array: np.ndarray, beside: Any = None) -> Any:
    """A NumPy array as a CuPy array on the current device or `beside` another one; waits for nothing."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    with nullcontext() if beside is None else beside.device:
        return _cupy_found.cupy().asarray(native)


def beside_rows(rows: Any, values: Any) -> Any:
    """NumPy, CuPy or Dask values (n, ...) in the memory of `rows` (n, ...), or chunked along n as these are."""
    if is_dask(rows):
        return import_module("gpuxent.backends._dask").chunked_as_rows(rows, values)
    return to_gpu(values, rows) if is_cupy(rows) and not is_cupy(values) else values


def unread(like: Any, shape: tuple[int, ...]) -> Any:
    """An array of the dtype and kind of another one, and next to no memory, for checks that read no entries."""
    library: Any = _cupy_found.cupy() if on_gpu(like) else np
    return library.broadcast_to(library.zeros((), like.dtype), shape)


def computed(*arrays: Any, scheduler: str | None = "synchronous") -> tuple[Any, ...]:
    """Arrays of Dask computed together, by the calling thread or (None) by whom Dask is set to; others as they are."""
    if any(map(is_dask, arrays)):
        return import_module("gpuxent.backends._dask").computed(*arrays, scheduler=scheduler)
    return arrays
