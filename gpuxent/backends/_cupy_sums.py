"""CuPy: sums over rows, independent sigmoids, and rows along any axis, as kernels that take any shape and stride.

The kernels are CuPy's ReductionKernel and ElementwiseKernel around the functions of `terms.cu`. Every one has two
inputs or two outputs: with one of each, CuPy may rewrite a reduction for CUB, renaming parameters by text replacement
and dropping the options. In a map, `_J` is the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import cupy
import numpy as np

from gpuxent._records import DIVERGENCES, Divergences, RowStats
from gpuxent.backends._cupy_core import OPTIONS, source

Array = Any  # cupy.ndarray
Weight = Any  # a number, or an array that broadcasts to the scores

# ---- arrays as kernels see them ----

_SIXTEEN_BITS = ("float16", "bfloat16")
_READ = {"float16": "from_half", "bfloat16": "from_bfloat16", "float32": "from_float"}
_WRITE = {"float16": "to_half", "bfloat16": "to_bfloat16", "float32": "to_float"}


def _bits(array: Array) -> Array:
    """A view of 16-bit floats as integers, which every version of CuPy and its headers can pass to a kernel."""
    return array.view(np.uint16) if array.dtype.name in _SIXTEEN_BITS else array


def _reader(array: Array) -> str:
    """The function of `terms.cu` that makes a double of an entry."""
    return _READ.get(array.dtype.name, "double")


def _writer(array: Array) -> str:
    return _WRITE.get(array.dtype.name, "double")


def _weight(weight: Weight) -> Array | float:
    """A float, or float64 on the device: a scalar there stays there."""
    if isinstance(weight, cupy.ndarray) or np.ndim(weight):
        return cupy.asarray(weight, np.float64)
    return float(weight)


def _elementwise(inputs: str, outputs: str, operation: str, name: str) -> Any:
    return cupy.ElementwiseKernel(inputs, outputs, operation, name, preamble=source("terms"), options=OPTIONS)


def _reduction(inputs: str, outputs: str, term: str, name: str, **how: str) -> Any:
    """A kernel that adds terms up to one output, unless told how else."""
    store = f"{outputs.split()[-1]} = a.total()"
    how = {"reduce": "added(a, b)", "store": store, "identity": "Sum()", "state": "Sum"} | how
    return cupy.ReductionKernel(
        inputs,
        outputs,
        term,
        how["reduce"],
        how["store"],
        how["identity"],
        name,
        reduce_type=how["state"],
        preamble=source("terms"),
        options=OPTIONS,
    )


def _sums(inputs: str, outputs: str, term: str, name: str) -> Any:
    """A kernel that fills two or three outputs with the sums of a `Sums`."""
    names = [output.split()[-1] for output in outputs.split(",")]
    fields = ("first", "second", "third")
    store = ", ".join(f"{name} = a.{field}.total()" for name, field in zip(names, fields, strict=False))
    return _reduction(inputs, outputs, term, name, store=store, identity="Sums()", state="Sums")


def _summed(kernel: Any, arrays: Sequence[Array | float], *dtypes: Any) -> list[Array]:
    """The sums of a kernel over the last axis; the first array has the full shape."""
    outputs = [cupy.empty(arrays[0].shape[:-1], dtype) for dtype in dtypes]  # type: ignore[union-attr]
    kernel(*arrays, *outputs, axis=-1)  # would return the first alone
    return outputs


# ---- two models' rows, and rows of probabilities ----


def divergence_sums(p: Array, q: Array, *, divergences: Sequence[str] = DIVERGENCES) -> Divergences:
    """The divergences that are named, of rows of probabilities. A read of both for each."""
    return Divergences(**{name: _divergence(name, p, q) for name in divergences})


def _divergence(name: str, p: Array, q: Array) -> Array:
    if name == "reverse_kl":
        return _divergence("kl", q, p)
    return _summed(_divergence_kernel(name, _reader(p), _reader(q)), [_bits(p), _bits(q)], np.float64)[0]


@cache
def _divergence_kernel(divergence: str, read_p: str, read_q: str) -> Any:
    term = f"{divergence}_term(pair_of_probs({read_p}(p), {read_q}(q)))"
    return _reduction("P p, Q q", "float64 total", term, f"gpuxent_{divergence}_probs")


def cross_sums(weights: Array, probs: Array, *, scale: Weight = 1.0) -> Array:
    """-sum of scale * weights * ln(probs) per row, float64; a weight of 0 counts 0 even where the probability is 0.

    `scale` is a number or one per class.
    """
    kernel = _cross_kernel(_reader(weights), _reader(probs))
    return _summed(kernel, [_bits(weights), _bits(probs), _weight(scale)], np.float64)[0]


@cache
def _cross_kernel(read_weight: str, read_prob: str) -> Any:
    term = f"cross_term({read_weight}(weight) * scale, {read_prob}(prob))"
    return _reduction("W weight, P prob, float64 scale", "float64 total", term, "gpuxent_cross")


def row_sums(rows: Array, *, high: float = np.inf, ignore: float | None = None) -> tuple[Array, Array]:
    """(how many entries are not in [0, high], the sum of all) per row: what a check of probabilities needs.

    An entry equal to `ignore` is no fault.
    """
    arrays = [_bits(rows), float(high), _ignored(ignore, rows.dtype)]
    outside, total = _summed(_range_kernel(_reader(rows)), arrays, np.int64, np.float64)
    return outside, total


@cache
def _range_kernel(read: str) -> Any:
    term = f"range_term({read}(x), high, ignored)"
    return _sums("X x, float64 high, float64 ignored", "int64 outside, float64 total", term, "gpuxent_range")


def onehot_sums(rows: Array, vocab_start: int = 0) -> tuple[Array, Array, Array]:
    """(number of ones, number of entries other than 0 and 1, sum of the indices of the ones) per row."""
    kernel = _onehot_kernel(_reader(rows))
    ones, others, classes = _summed(kernel, [_bits(rows), int(vocab_start)], *[np.float64] * 3)
    return ones, others, classes


@cache
def _onehot_kernel(read: str) -> Any:
    outputs = "float64 ones, float64 others, float64 classes"
    return _sums("X x, int64 start", outputs, f"onehot_term({read}(x), double(start + _J))", "gpuxent_onehot")


def take_label(rows: Array, labels: Array, vocab_start: int = 0) -> Array:
    """The entry at each row's label, float64; 0 where the label is not in this slice."""
    return _label_kernel(_reader(rows))(_bits(rows), labels, int(vocab_start), rows.shape[-1])


@cache
def _label_kernel(read: str) -> Any:
    operation = f"""
        const ptrdiff_t column = label - start, size = vocab;
        entry = column >= 0 && column < size ? {read}(rows[i * size + column]) : 0;
    """
    return _elementwise("raw X rows, int64 label, int64 start, int64 vocab", "float64 entry", operation, "gpuxent_take")


# ---- independent sigmoids ----


def binary_losses(
    scores: Array,
    targets: Array,
    *,
    pos_weight: Weight,
    class_weight: Weight,
    ignore_index: float | None,
    from_probs: bool,
) -> Array:
    """The loss of every element, float64 for float64 scores and float32 otherwise; 0 where ignored."""
    out = cupy.empty(scores.shape, np.float64 if scores.dtype.itemsize == 8 else np.float32)
    kernel = _binary_kernel(_loss_of(scores, targets, from_probs), _writer(out))
    return kernel(*_binary_inputs(scores, targets, pos_weight, class_weight, ignore_index), out)


def binary_sums(
    scores: Array,
    targets: Array,
    *,
    pos_weight: Weight,
    class_weight: Weight,
    ignore_index: float | None,
    from_probs: bool,
) -> tuple[Array, Array]:
    """Sum of the losses over the last axis, and the number of elements that count; float64."""
    kernel = _binary_sum_kernel(_loss_of(scores, targets, from_probs), _reader(targets))
    inputs = _binary_inputs(scores, targets, pos_weight, class_weight, ignore_index)
    losses, counts = _summed(kernel, inputs, np.float64, np.float64)
    return losses, counts


def binary_grad(
    logits: Array,
    targets: Array,
    scale: Weight,
    *,
    pos_weight: Weight,
    class_weight: Weight,
    ignore_index: float | None,
    out: Array | None = None,
) -> Array:
    """scale * class_weight * ((1 - y) sigmoid(x) - pos_weight y sigmoid(-x)), in the logits' dtype; 0 where ignored."""
    out = cupy.empty(logits.shape, logits.dtype) if out is None else out
    kernel = _binary_kernel(_binary_term("slope_of_logit", logits, targets), _writer(out))
    kernel(*_binary_inputs(logits, targets, pos_weight, class_weight, ignore_index, scale), _bits(out))
    return out


_BINARY_INPUTS = "X x, Y y, float64 pos_weight, float64 class_weight, float64 scale, float64 ignored"


def _binary_inputs(
    scores: Array,
    targets: Array,
    pos_weight: Weight,
    class_weight: Weight,
    ignore_index: float | None,
    scale: Weight = 1.0,
) -> list[Array | float]:
    weights = [_weight(pos_weight), _weight(class_weight), _weight(scale)]
    return [_bits(scores), _bits(targets), *weights, _ignored(ignore_index, targets.dtype)]


def _loss_of(scores: Array, targets: Array, from_probs: bool) -> str:
    return _binary_term("loss_of_prob" if from_probs else "loss_of_logit", scores, targets)


def _binary_term(function: str, scores: Array, targets: Array) -> str:
    return f"{function}({_reader(scores)}(x), {_reader(targets)}(y), pos_weight, class_weight * scale, ignored)"


@cache
def _binary_kernel(term: str, write: str) -> Any:
    return _elementwise(_BINARY_INPUTS, "Z out", f"out = {write}({term})", "gpuxent_binary")


@cache
def _binary_sum_kernel(term: str, read_target: str) -> Any:
    term = f"counted({term}, {read_target}(y), ignored)"
    return _sums(_BINARY_INPUTS, "float64 losses, float64 counts", term, "gpuxent_binary_sums")


def _ignored(value: float | None, dtype: np.dtype) -> float:
    """What an ignored entry of the dtype is as a double; NaN, which equals nothing, for none."""
    if value is None:
        return np.nan
    if dtype.kind in "biu":
        return float(value)
    with np.errstate(over="ignore"):
        return float(np.asarray(value, np.float64).astype(dtype))


# ---- rows along any axis ----


def strided_row_stats(logits: Array, also: Sequence[str] = ()) -> tuple[Array, Array, Array, Array]:
    """(max, rest, argmax, moment) of `RowStats`, in one read at any stride; the moment is 0 unless `also` names it."""
    kernel = _row_kernel(_reader(logits), "moment" in also)
    top, rest, argmax, moment = _summed(kernel, [_bits(logits)], np.float64, np.float64, np.int64, np.float64)
    return top, rest, argmax, moment


@cache
def _row_kernel(read: str, with_moment: bool) -> Any:
    return _reduction(
        "X x",
        "float64 top, float64 rest, int64 argmax, float64 moment",
        f"one_class({read}(x), _J)",
        "gpuxent_strided_rows",
        reduce=f"merged<{str(with_moment).lower()}>(a, b)",
        store="store_row(a, top, rest, argmax, moment)",
        identity="no_class()",
        state="RowState",
    )


def strided_log_probs(logits: Array, stats: RowStats, out: Array | None = None) -> Array:
    """log softmax in the logits' dtype: (logit - max) - log1p(rest)."""
    out = cupy.empty(logits.shape, logits.dtype) if out is None else out
    log_sum = cupy.log1p(stats.rest)[..., None]
    kernel = _normal_kernel(f"{_reader(logits)}(x) - top - normalizer", _writer(out))
    kernel(_bits(logits), stats.max[..., None], log_sum, 1.0, _bits(out))
    return out


def strided_softmax(logits: Array, stats: RowStats, weight: Array | float = 1.0, out: Array | None = None) -> Array:
    """weight * exp(logit - max) / (1 + rest) in the logits' dtype; `weight` is a number or one per row."""
    out = cupy.empty(logits.shape, logits.dtype) if out is None else out
    kernel = _normal_kernel(f"weight * softmax_term({_reader(logits)}(x), top, normalizer)", _writer(out))
    weight = _weight(weight)
    weight = weight if isinstance(weight, float) else weight[..., None]
    kernel(_bits(logits), stats.max[..., None], stats.rest[..., None], weight, _bits(out))
    return out


@cache
def _normal_kernel(value: str, write: str) -> Any:
    inputs = "X x, float64 top, float64 normalizer, float64 weight"
    return _elementwise(inputs, "Z out", f"out = {write}({value})", "gpuxent_strided_map")
