"""The door: every check of an argument, and every message. An error names the argument, what was found and what was
expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any

import ml_dtypes
import numpy as np

from gpuxent._records import IGNORED, NO_LABEL, Array, Transform
from gpuxent.backends import is_cupy, is_dask, is_linear, on_gpu, on_host, to_gpu

FLOAT_DTYPES = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
REDUCTIONS = ("mean", "sum", "none")
DEFAULT_IGNORE_INDEX = -100


# ---- arrays ----


def array(value: Any, name: str) -> Array:
    """A NumPy, CuPy or Dask array as it is; a number or a list as NumPy; anything else is an error rather than a
    silent copy."""
    if is_dask(value) and any(math.isnan(size) for size in value.shape):
        raise ValueError(f"{name} has chunks of unknown size; call its compute_chunk_sizes() first")
    if isinstance(_sample(value), np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill it and use ignore_index")
    if isinstance(value, np.ndarray) or is_dask(value) or is_cupy(value) or is_linear(value):
        return value
    if isinstance(value, (list, tuple, Real, np.generic)):
        return np.asarray(value)
    found = "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
    hint = "; convert it, as with .detach().cpu().numpy()" if hasattr(value, "__dlpack__") else ""
    if found.startswith("jax"):
        hint = f"; use gpuxent.jax, whose losses JAX transforms, or numpy.asarray({name})"
    raise TypeError(f"{name} must be a NumPy, CuPy or Dask array, got {found}{hint}")


def float_array(value: Any, name: str) -> Array:
    """Any shape, one of the four float dtypes."""
    value = array(value, name)
    if value.dtype.newbyteorder("=") not in FLOAT_DTYPES:
        hint = "; if it is bfloat16 from a .npy file, use .view(ml_dtypes.bfloat16)" if value.dtype == "V2" else ""
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}{hint}")
    return value


def rows(value: Any, name: str) -> Array:
    """Floats of shape (..., vocab) with vocab > 0."""
    value = float_array(value, name)
    if value.ndim == 0:
        raise ValueError(f"{name} must have shape (..., vocab), got a scalar")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one class on the last axis, got shape {value.shape}")
    return value


def parameters(hidden: Any, classifier: Any, bias: Any) -> tuple[Array, Array, Array | None]:
    """Floats of one dtype and kind: (..., features), (vocab, features), and (vocab,) or None."""
    hidden = float_array(hidden, "hidden")
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape (..., features) with at least one feature, got {hidden.shape}")
    classifier = beside(float_array(classifier, "classifier"), "classifier", hidden, "hidden")
    if classifier.ndim != 2 or classifier.shape[0] == 0 or classifier.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"classifier must have shape (vocab, {hidden.shape[-1]}) for hidden of shape {hidden.shape}, got "
            f"{classifier.shape}"
        )
    if bias is not None:
        bias = beside(float_array(bias, "bias"), "bias", hidden, "hidden")
        if bias.shape != classifier.shape[:1]:
            raise ValueError(f"bias must have shape {classifier.shape[:1]}, one number per class, got {bias.shape}")
    for name, array in (("classifier", classifier), ("bias", bias)):
        if array is not None and array.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {array.dtype}")
    return hidden, classifier, bias


def names_among(value: Any, name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Some of the allowed names, each once; a single one may be given as it is."""
    found = tuple(value) if isinstance(value, (tuple, list, set, frozenset)) else (value,)
    if not found or len(set(found)) < len(found) or not set(found) <= set(allowed):
        raise ValueError(f"{name} must be some of {', '.join(map(repr, allowed))}, each once, got {value!r}")
    return found


def axis(value: Any, logits: Array) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"axis must be an integer, got {value!r}")
    if not -logits.ndim <= value < logits.ndim:
        raise ValueError(
            f"axis must be in [{-logits.ndim}, {logits.ndim}) for logits of shape {logits.shape}, got {value}"
        )
    return int(value)


def beside(value: Any, name: str, logits: Array, logits_name: str = "logits") -> Array:
    """`value` as an array that goes with the logits.

    NumPy goes with NumPy and CuPy with CuPy, whether in memory or as the blocks of a Dask array: nothing large moves
    to or from a GPU unasked. Numbers and lists go with all, and beside a Dask array of CuPy blocks a NumPy array with
    fewer axes than the logits, a chunk of which is small. A Dask array goes only with Dask logits, since it would have
    to be computed.
    """
    found = array(value, name)
    if is_dask(found) and not is_dask(logits):
        raise TypeError(
            f"{name} is a Dask array but {logits_name} is not; make both Dask arrays, or call {name}.compute()"
        )
    if on_gpu(found) == on_gpu(logits):
        _same_device(found, name, logits, logits_name)
        return found
    if on_gpu(found):
        raise TypeError(
            f"{name} is on the GPU but {logits_name} is not; {_brought(found, 'asnumpy', name)} brings it over"
        )
    if is_dask(logits) and found.ndim < logits.ndim:
        return found
    if is_dask(found) or (isinstance(value, np.ndarray) and value.ndim):
        raise TypeError(
            f"{logits_name} is on the GPU but {name} is not; {_brought(found, 'asarray', name)} moves it there"
        )
    return to_gpu(found, _sample(logits))


def _same_device(array: Array, name: str, logits: Array, logits_name: str = "logits") -> None:
    if is_cupy(array) and is_cupy(logits) and array.device != logits.device:
        raise ValueError(
            f"{name} must be on the GPU of {logits_name}, number {logits.device.id}, got number {array.device.id}"
        )


def _sample(array: Array) -> Array:
    """An array of the kind that a Dask array's blocks are of; one in memory itself."""
    return getattr(array, "_meta", array)


def _brought(array: Array, function: str, name: str) -> str:
    return f"{name}.map_blocks(cupy.{function})" if is_dask(array) else f"cupy.{function}({name})"


def pair(p: Any, q: Any, names: tuple[str, str] = ("p", "q")) -> tuple[Array, Array]:
    """Two arrays of rows of one shape and kind."""
    first, second = rows(p, names[0]), rows(q, names[1])
    if first.shape != second.shape:
        raise ValueError(f"{names[1]} must have the shape of {names[0]}, {first.shape}, got {second.shape}")
    second = beside(q, names[1], first, names[0])
    return beside(p, names[0], second, names[1]), second


def labels(value: Any, logits: Array, logits_name: str = "logits") -> tuple[Array, bool]:
    """(labels, are they soft): integers of shape (...), or floats of shape (..., vocab)."""
    value = beside(value, "labels", logits, logits_name)
    if value.dtype.kind in "iu":
        expected = logits.shape[:-1]
        if value.shape != expected:
            hint = "; one-hot rows must be floats" if value.shape == logits.shape else ""
            raise ValueError(
                f"labels of dtype {value.dtype} must have shape {expected} for {logits_name} of shape {logits.shape}, "
                f"got {value.shape}{hint}"
            )
        return value, False
    if value.dtype.newbyteorder("=") in FLOAT_DTYPES:
        if value.shape != logits.shape:
            raise ValueError(
                f"labels of dtype {value.dtype} are soft and must have the shape of {logits_name}, {logits.shape}, "
                f"got {value.shape}; class ids must be integers"
            )
        return value, True
    raise TypeError(f"labels must be integers (classes) or floats (soft rows), got dtype {value.dtype}")


def formatted_labels(value: Any, probs: Array, label_format: Any) -> Array:
    """Labels in the form that the caller names."""
    one_of(label_format, "label_format", ("index", "onehot", "soft"))
    value = beside(value, "labels", probs, "probs")
    if label_format == "index":
        kinds, expected = "integers", probs.shape[:-1]
        good = value.dtype.kind in "iu"
    elif label_format == "soft":
        kinds, expected = "floats", probs.shape
        good = value.dtype.newbyteorder("=") in FLOAT_DTYPES
    else:
        kinds, expected = "real numbers or booleans", probs.shape
        good = value.dtype.kind in "biu" or value.dtype.newbyteorder("=") in FLOAT_DTYPES
    if not good:
        raise TypeError(f"{label_format} labels must be {kinds}, got dtype {value.dtype}")
    if value.shape != expected:
        raise ValueError(
            f"{label_format} labels must have shape {expected} for probs of shape {probs.shape}, got {value.shape}"
        )
    return value


def binary_targets(value: Any, scores: Array, name: str) -> Array:
    value = beside(value, "targets", scores, name)
    if value.dtype.kind not in "biu" and value.dtype.newbyteorder("=") not in FLOAT_DTYPES:
        raise TypeError(f"targets must be booleans, integers or floats, got dtype {value.dtype}")
    if value.shape != scores.shape:
        raise ValueError(f"targets must have the shape of {name}, {scores.shape}, got {value.shape}")
    return value


def output(out: Any, logits: Array, labels: Any) -> Array | None:
    """Where the gradient goes: writable, of the logits' kind, shape and dtype, the logits themselves or apart from the
    inputs."""
    if out is None:
        return None
    if is_dask(logits):
        raise TypeError("out must be None for Dask logits; store the returned array where it should go")
    kind = _kind(logits)
    if _kind(out) != kind or out.shape != logits.shape or out.dtype != logits.dtype:
        found = f"shape {out.shape} and dtype {out.dtype}" if _kind(out) == kind else _type_name(out)
        expected = f"{kind} of shape {logits.shape} and dtype {logits.dtype}"
        raise ValueError(f"out must be {expected}, got {found}")
    _same_device(out, "out", logits)
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    if _overlaps_itself(out):
        raise ValueError(f"out must be an array whose entries share no memory, got strides {out.strides}")
    if (_address(out), out.strides) != (_address(logits), logits.strides) and _may_share_memory(out, logits):
        raise ValueError("out must be logits itself or share no memory with it, got an overlapping view")
    if _kind(labels) == kind and _may_share_memory(out, labels):
        raise ValueError("out must share no memory with the labels or targets, got an overlapping view")
    return out


def _kind(value: Any) -> str:
    return "a CuPy array" if is_cupy(value) else "an array" if isinstance(value, np.ndarray) else ""


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _may_share_memory(a: Array, b: Array) -> bool:
    """As np.may_share_memory, for CuPy arrays too: do the memories from the first to the last byte overlap?"""
    (a_first, a_end), (b_first, b_end) = _extent(a), _extent(b)
    return a.size > 0 and b.size > 0 and a_first < b_end and b_first < a_end


def _extent(array: Array) -> tuple[int, int]:
    steps = [stride * (size - 1) for stride, size in zip(array.strides, array.shape, strict=True)]
    address = _address(array)
    return address + sum(min(s, 0) for s in steps), address + sum(max(s, 0) for s in steps) + array.itemsize


def _address(array: Array) -> int:
    return array.data.ptr if is_cupy(array) else array.__array_interface__["data"][0]


def _overlaps_itself(array: Array) -> bool:
    """Is an axis' step within what the smaller ones cover? (A few arrays for which that is all right are refused.)"""
    covered = array.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if size > 1:
            if stride < covered:
                return True
            covered += stride * (size - 1)
    return False


def row_dtype(logits: Array) -> type:
    """Of per-row results: never 16 bit."""
    return np.float64 if logits.dtype.itemsize == 8 else np.float32


def as_row_dtype(owner: Any, values: Array, dtype: type) -> Array:
    """Per-row results as they are returned; what float32 cannot hold is inf, without a warning."""
    return owner.map_rows(partial(np.asarray, dtype=dtype), values, dtype=dtype)


# ---- options ----


def one_of(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def number(value: Any, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite number in [low, high], or (low, high] with open_low."""
    kind: type[Exception] = TypeError
    if isinstance(value, float) or (isinstance(value, Real) and not isinstance(value, (bool, np.bool_))):
        found, kind = float(value), ValueError
        if math.isfinite(found) and found <= high and (found > low if open_low else found >= low):
            return found
    expected = f"a number {'above' if open_low else 'of at least'} {low:g}"
    if high != math.inf:
        expected += f" and at most {high:g}"
    raise kind(f"{name} must be {expected}, got {value!r}")


def ignore_index(value: Any) -> int | None:
    if value is not None and (isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral)):
        raise TypeError(f"ignore_index must be an integer or None, got {value!r}")
    return None if value is None else int(value)


def binary_ignore_index(value: Any, dtype: np.dtype) -> float | None:
    """Targets may be floats, so this may be too: then it is what it would be among them."""
    if value is not None and (isinstance(value, (bool, np.bool_)) or not isinstance(value, Real)):
        raise TypeError(f"ignore_index must be a number or None, got {value!r}")
    if value is None or dtype.kind in "biu":
        return None if value is None else float(value)
    with np.errstate(over="ignore"):
        return float(np.asarray(value, np.float64).astype(dtype.newbyteorder("=")))


def transform(softcap: Any, temperature: Any) -> Transform:
    cap = None if softcap is None else number(softcap, "softcap", 0, open_low=True)
    return Transform(cap, number(temperature, "temperature", 0, open_low=True))


def class_weight(value: Any, logits: Array, check: bool = True) -> Array | None:
    """A vector of length vocab of finite, non-negative weights, as float64, on the logits' device.

    To `check` weights that are on a GPU is to wait for it.
    """
    if value is None:
        return None
    weight = _weights(value, "class_weight", logits, check)
    if weight.shape != logits.shape[-1:]:
        raise ValueError(f"class_weight must have shape {logits.shape[-1:]}, one weight per class, got {weight.shape}")
    return weight


def binary_weight(value: Any, name: str, logits: Array) -> Array | float:
    """A weight, or one per column of logits (..., K), as float64; None is 1."""
    if value is None:
        return 1.0
    weight = _weights(value, name, logits)
    columns = logits.shape[-1:] if logits.ndim > 1 else ()
    if weight.shape not in ((), columns):
        expected = f"a number or have shape {columns}, one per column" if columns else "a number for logits of one axis"
        raise ValueError(f"{name} must be {expected}, got shape {weight.shape}")
    return weight if weight.ndim else float(weight)


def _weights(value: Any, name: str, logits: Array, check: bool = True) -> Array:
    value = array(value, name)
    if is_dask(value):
        raise TypeError(f"{name} must be a NumPy array or a sequence, got a Dask array")
    if on_gpu(value) and not on_gpu(logits):
        raise TypeError(f"{name} is on the GPU but logits is not; cupy.asnumpy({name}) brings it over")
    if value.dtype.kind not in "iuf" and value.dtype.newbyteorder("=") not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be numbers, got dtype {value.dtype}")
    weight = value.astype(np.float64)
    if check or not is_cupy(weight):
        bad = ~(np.isfinite(weight) & (weight >= 0))
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(on_host(bad))[0])
            found = f"{name}[{place[0]}]" if place else name
            raise ValueError(f"{found} is {float(weight[place]):g}, expected a finite weight of at least 0")
    return to_gpu(weight, _sample(logits)) if on_gpu(logits) and not is_cupy(weight) and weight.ndim else weight


def grad_output(value: Any, logits: Array, shape: tuple[int, ...], reduction: str) -> Array | float:
    """The upstream gradient: a number, or one per loss where the losses are not reduced."""
    found = array(value, "grad_output")
    is_number = isinstance(found, np.ndarray) and found.ndim == 0
    value = found[()] if is_number else beside(value, "grad_output", logits)
    if value.dtype.kind not in "iuf" and value.dtype.newbyteorder("=") not in FLOAT_DTYPES:
        raise TypeError(f"grad_output must be numbers, got dtype {value.dtype}")
    allowed = ((), shape) if reduction == "none" else ((),)
    if value.shape not in allowed:
        expected = (
            f"a number or have shape {shape}" if reduction == "none" else f"a number with reduction={reduction!r}"
        )
        raise ValueError(f"grad_output must be {expected}, got shape {value.shape}")
    return value.astype(np.float64)


def denominator(value: Any, reduction: str) -> np.float64 | None:
    """What the mean divides by instead of its own count. (One that is on a GPU is waited for.)"""
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(f"denominator goes with reduction='mean', got reduction={reduction!r}")
    value = value.item() if _kind(value) and value.ndim == 0 else value
    return np.float64(number(value, "denominator", 0, open_low=True))


# ---- values ----


def class_labels(
    values: np.ndarray,
    *,
    vocab: int,
    ignore: int | None,
    check: bool,
    start: tuple[int, ...],
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Labels as int64: a class, IGNORED, or (unchecked) NO_LABEL. Compared at full width, so 2**32 is not class 0.

    `start` is the index of the first of these labels in the whole array, here and below; given the array's `shape`,
    the labels are a flat piece of it.
    """
    valid = (values >= 0) & (values < vocab)
    if np.count_nonzero(valid) == values.size and not (ignore is not None and 0 <= ignore < vocab):
        return np.array(values, np.int64)  # the common case: nothing is ignored, nothing is wrong
    ignored = np.zeros(values.shape, bool) if ignore is None else values == ignore
    if check:
        expected = f"a class in [0, {vocab})" + ("" if ignore is None else f" or ignore_index={ignore}")
        bad = ~(valid | ignored)
        _raise_first(bad, "labels", start, lambda at: f"is {values[at]}", expected, False, IndexError, shape)
    return np.where(ignored, IGNORED, np.where(valid, values.astype(np.int64), NO_LABEL))  # not -2 as a uint8


def distributions(
    outside: np.ndarray, sums: np.ndarray, *, name: str, tolerance: float, start: tuple[int, ...]
) -> np.ndarray:
    """Check rows by their number of negative or NaN entries and their sum; returns labels for rows without a single
    label."""

    def found(place: tuple[int, ...]) -> str:
        if np.isnan(sums[place]):
            return "has a NaN"
        return f"has {_entries(outside[place], 'negative')}" if outside[place] else f"sums to {sums[place]:.6g}"

    bad = (outside > 0) | ~(np.abs(sums - 1.0) <= tolerance)
    _raise_first(bad, name, start, found, f"probabilities that sum to 1 within {tolerance:.2g}")
    return np.full(sums.shape, NO_LABEL)


def onehot_labels(ones: np.ndarray, others: np.ndarray, classes: np.ndarray, *, start: tuple[int, ...]) -> np.ndarray:
    """The classes of one-hot rows, from the numbers of ones and of entries other than 0 and 1, and the ones'
    indices summed."""

    def found(place: tuple[int, ...]) -> str:
        return f"has {_entries(ones[place], 'equal to 1')} and {_entries(others[place], 'other than 0 and 1')}"

    _raise_first((ones != 1) | (others != 0), "labels", start, found, "one entry of 1 and the rest 0")
    return classes.astype(np.int64)


def unit_interval(
    outside: np.ndarray, *, name: str, ignore: float | None, single: bool, start: tuple[int, ...]
) -> np.ndarray:
    """Check the number of a row's entries outside [0, 1]; `single` rows are the elements of a vector."""
    expected = "numbers in [0, 1]" + ("" if ignore is None else f" or ignore_index={ignore:g}")

    def found(place: tuple[int, ...]) -> str:
        return "is outside" if single else f"has {_entries(outside[place], 'outside')}"

    _raise_first(outside > 0, name, start, found, expected, row=not single)
    return outside


def check_distributions(owner: Any, rows: Array, name: str) -> Array:
    """Raise unless each row is a distribution (with Dask: when computed); returns NO_LABEL for each row."""
    check = partial(distributions, name=name, tolerance=sum_tolerance(rows.dtype))
    return owner.map_rows(check, *owner.row_sums(rows), dtype=np.int64, at=True)


def _entries(count: Any, what: str) -> str:
    return f"{int(count)} {'entry' if count == 1 else 'entries'} {what}"


def _raise_first(
    bad: np.ndarray,
    name: str,
    start: tuple[int, ...],
    found: Callable[[tuple[int, ...]], str],
    expected: str,
    row: bool = True,
    error: type[Exception] = ValueError,
    shape: tuple[int, ...] | None = None,
) -> None:
    """An error about the first bad row, if there is one, under its index in the whole array (see `class_labels`)."""
    if not bad.any():
        return
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    at = tuple(i + s for i, s in zip(place, start, strict=True))
    index = [str(i) for i in (at if shape is None else np.unravel_index(at[0], shape))] + [":"] * row
    where = f"{name}[{', '.join(index)}]" if index else name
    raise error(f"{where} {found(place)}, expected {expected}")


def sum_tolerance(dtype: np.dtype) -> float:
    """How far a row of probabilities may be from 1: its rounding must not make it an error."""
    return max(1e-4, 4 * float(ml_dtypes.finfo(dtype.newbyteorder("=")).eps))


def positive(value: Any, name: str) -> int:
    return integer(value, name, 1, expected="a positive integer")


def integer(value: Any, name: str, low: int, high: float = math.inf, expected: str | None = None) -> int:
    expected = expected or (f"an integer of at least {low}" if high == math.inf else f"an integer from {low} to {high}")
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} must be {expected}, got {value}")
    return int(value)


def topk(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"topk must be a tuple of positive integers, got {value!r}")
    return tuple(positive(k, "topk") for k in value)
