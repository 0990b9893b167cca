"""The truth that gpuxent's tests compare with: plain, slow, and sharing no code with the library.

Every formula is written once, over one row (or one array of sigmoids), and runs in one of two number systems:

* mpmath with 50 digits, for inputs of at most MPMATH_SIZE elements;
* np.longdouble (x86 80 bit, 64 bits of mantissa) above that, where mpmath would take minutes.

Inputs may be float16, bfloat16 (ml_dtypes), float32 or float64 of any strides; each is converted exactly.
Leading axes are flattened: row functions return shape (rows,) or (rows, vocab). Results are np.longdouble, so
a float64 result of the library can be judged as well as a float32 one. Everything is in nats.

PyTorch's formulas, with eps = label_smoothing, w = class_weight, nll_c = lse(z) - z_c:

    index label y       main = (1 - eps) * w_y * nll_y + eps / V * sum_c w_c * nll_c
    soft labels s       main = sum_c w_c * ((1 - eps) * s_c + eps / V) * nll_c
    z-loss              z    = z_loss * lse(z)**2
    softcap c           z    = c * tanh(x / c) / temperature

Both kinds of label are `main = sum_c t_c * nll_c` with *target weights* t >= 0, and a class with t_c = 0
contributes nothing, even where nll_c is infinite.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from typing import Any

import ml_dtypes
import mpmath
import numpy as np

MPMATH_SIZE = 8192
REMEMBERED_BYTES = 400 << 20  # of results, in each process

# ----------------------------------------------------------------------
# Remembering: most of a test's time would go into the same truth for another backend
# ----------------------------------------------------------------------

_remembered: dict[tuple, Any] = {}


def _identity(value):
    """What tells an argument from others: of an array its dtype, shape and elements."""
    if value is None or isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"oracle: expected numbers, found {value!r}")
    return str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest()


def remembered(function):
    """The same result, read-only, for the same arguments. It returns an array or a tuple of arrays."""

    @wraps(function)
    def call(*args, **options):
        named = sorted(options.items())
        key = function.__name__, *map(_identity, args), *((name, _identity(value)) for name, value in named)
        if key not in _remembered:
            if sum(array.nbytes for known in _remembered.values() for array in known) > REMEMBERED_BYTES:
                _remembered.clear()
            found = function(*args, **options)
            arrays = found if isinstance(found, tuple) else (found,)
            for array in arrays:
                array.flags.writeable = False
            _remembered[key] = arrays
        arrays = _remembered[key]
        return arrays if len(arrays) > 1 else arrays[0]

    return call


# ----------------------------------------------------------------------
# Numbers: exact inputs, two number systems, one kind of result
# ----------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """Elementary functions on arrays of one kind of number, and the way in from float64."""

    convert: Callable
    exp: Callable
    log: Callable
    log1p: Callable
    tanh: Callable
    cosh: Callable


def _mpmath_numbers(digits):
    """Object arrays of mpf, in a context of our own so that nobody's global precision changes."""
    context = mpmath.mp.clone()
    context.dps = digits

    def lift(function):
        elementwise = np.frompyfunc(function, 1, 1)

        def quiet(values):
            with np.errstate(all="ignore"):  # mpmath touches the FPU on its way past NaN and inf
                return elementwise(values)

        return quiet

    return Numbers(
        convert=lift(lambda value: context.mpf(float(value))),
        exp=lift(context.exp),
        log=lift(context.log),
        log1p=lift(context.log1p),
        tanh=lift(context.tanh),
        cosh=lift(context.cosh),
    )


MPMATH = _mpmath_numbers(50)
LONGDOUBLE = Numbers(np.longdouble, np.exp, np.log, np.log1p, np.tanh, np.cosh)


def _numbers_for(size):
    # Where long double is no wider than double (Windows, macOS on ARM), only mpmath is good enough.
    wide = np.finfo(np.longdouble).nmant >= 63
    return LONGDOUBLE if size > MPMATH_SIZE and wide else MPMATH


def _exact(array):
    """The same values as float64: exact for every dtype that the library takes."""
    array = np.asarray(array)
    if array.dtype != ml_dtypes.bfloat16 and (array.dtype.kind not in "fiub" or array.dtype.itemsize > 8):
        raise TypeError(f"oracle: cannot convert {array.dtype} exactly")
    return array.astype(np.float64)


def _rows(array):
    """(rows, vocab) in float64, leading axes flattened."""
    array = _exact(array)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"oracle: expected (..., vocab) with vocab > 0, found shape {array.shape}")
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])  # -1 fails when there are no rows


def _longdouble(value):
    """Nearest np.longdouble: 25 digits are more than its mantissa holds; 0 below its range of exponents."""
    value = mpmath.mpmathify(value)
    if mpmath.isfinite(value) and value != 0 and mpmath.mag(value) < -16500:
        return np.longdouble(0)
    return np.longdouble(mpmath.nstr(value, 25))


def _result(values, shape):
    """np.longdouble of the given shape, from mpf, longdouble or Python numbers."""
    flat = np.asarray(values).reshape(-1)
    if flat.dtype == object:
        flat = [_longdouble(value) for value in flat]
    return np.asarray(flat, dtype=np.longdouble).reshape(shape)


# ----------------------------------------------------------------------
# One row
# ----------------------------------------------------------------------


@dataclass
class Row:
    """A row as a distribution: p, 1 - p and nll = -log p per class, and lse where it came from logits.

    A `bad` row (a NaN or +inf logit, or -inf in every class) has no distribution: p, complement, nll are NaN.
    """

    p: np.ndarray
    complement: np.ndarray
    nll: np.ndarray
    lse: Any
    bad: bool


def _final_logits(logits, softcap, temperature, numbers):
    """What the softmax sees, z = c * tanh(x / c) / temperature, and dz/dx = 1 / cosh(x / c)**2 / temperature.

    1 / cosh**2 is 1 - tanh**2 without the cancellation. The formula is taken literally at infinity: a -inf
    logit is capped to -c like any other, with slope 0.
    """
    x = numbers.convert(logits)
    temperature = numbers.convert(temperature)
    if softcap is None:
        return x / temperature, numbers.convert(np.ones(len(logits))) / temperature
    cap = numbers.convert(softcap)
    with np.errstate(over="ignore"):
        slope = 1 / numbers.cosh(x / cap) ** 2
    return cap * numbers.tanh(x / cap) / temperature, slope / temperature


def _row_without_distribution(z, lse):
    nan = np.full(len(z), np.nan)
    return Row(p=nan, complement=nan, nll=nan, lse=lse, bad=True)


def _row_from_logits(z, numbers):
    """Softmax of one row; `rest` leaves out one maximal class, so that confident rows keep their digits.

    lse = z_top + log1p(rest); nll_c = (z_top - z_c) + log1p(rest); p_c = exp(z_c - z_top) / (1 + rest)
    """
    if np.any(z != z):
        return _row_without_distribution(z, np.nan)
    if np.any(z == np.inf):
        return _row_without_distribution(z, np.inf)
    if np.all(z == -np.inf):
        return _row_without_distribution(z, -np.inf)
    top = int(np.argmax(z))
    rest = np.sum(numbers.exp(np.delete(z, top) - z[top]))
    log_total = numbers.log1p(rest)
    p = numbers.exp(z - z[top]) / (1 + rest)
    complement = 1 - p  # p <= 1/2 here, so nothing cancels, except at the top:
    complement[top] = rest / (1 + rest)
    return Row(p, complement, nll=(z[top] - z) + log_total, lse=z[top] + log_total, bad=False)


def _row_from_probs(probs, numbers):
    """One row of probabilities, taken as they are (not normalised): nll_c = -log p_c, +inf where p_c = 0."""
    p = numbers.convert(probs)
    if np.any(np.isnan(probs)):
        return _row_without_distribution(p, np.nan)
    with np.errstate(divide="ignore"):
        return Row(p, 1 - p, nll=-numbers.log(p), lse=np.nan, bad=False)


def _rows_from_logits(logits, softcap=None, temperature=1.0):
    """Yield (Row, slope, numbers) for each row."""
    logits = _rows(logits)
    numbers = _numbers_for(logits.size)
    for x in logits:
        z, slope = _final_logits(x, softcap, temperature, numbers)
        yield _row_from_logits(z, numbers), slope, numbers


def _rows_from_probs(probs):
    """Yield (Row, None, numbers) for each row, like _rows_from_logits."""
    probs = _rows(probs)
    numbers = _numbers_for(probs.size)
    for p in probs:
        yield _row_from_probs(p, numbers), None, numbers


def _expectation(weights, values):
    """sum_c weights_c * values_c, where a weight of 0 silences an infinite value."""
    live = weights != 0
    return np.sum(weights[live] * values[live])


# ----------------------------------------------------------------------
# Normalizers
# ----------------------------------------------------------------------


@remembered
def logsumexp_rows(logits):
    """log sum_c exp(logit_c), shape (rows,): +inf with a +inf logit, -inf if all are -inf, NaN with a NaN."""
    values = [row.lse for row, _, _ in _rows_from_logits(logits)]
    return _result(np.array(values), (len(values),))


@remembered
def softmax_rows(logits):
    """exp(logit_c - lse), shape (rows, vocab); NaN rows where there is no distribution."""
    return _result(np.array([row.p for row, _, _ in _rows_from_logits(logits)]), _rows(logits).shape)


@remembered
def log_softmax_rows(logits):
    """logit_c - lse, shape (rows, vocab); NaN rows where there is no distribution."""
    return _result(np.array([-row.nll for row, _, _ in _rows_from_logits(logits)]), _rows(logits).shape)


# ----------------------------------------------------------------------
# Cross-entropy: target weights, losses, reductions, gradient
# ----------------------------------------------------------------------


def is_soft(labels):
    """True for float labels (..., vocab), False for integer labels (...)."""
    return np.asarray(labels).dtype.kind not in "iu"


def _index_labels(labels):
    # Python ints: nothing wraps, and uint8 never meets -100.
    return [int(y) for y in np.asarray(labels).reshape(-1)]


def counted_rows(labels, ignore_index=-100):
    """Which rows count, shape (rows,): index labels other than ignore_index; every row of soft labels."""
    if is_soft(labels):
        return np.ones(len(_rows(labels)), dtype=bool)
    return np.array([y != ignore_index for y in _index_labels(labels)], dtype=bool)


def mean_denominator(labels, class_weight=None, ignore_index=-100):
    """What the mean of the main loss divides by: sum of w[y] over rows that count, or number of soft rows."""
    if is_soft(labels) or class_weight is None:
        return np.longdouble(np.sum(counted_rows(labels, ignore_index)))
    weight = _exact(class_weight)
    of_rows = [weight[y] for y in _index_labels(labels) if y != ignore_index]
    return np.sum(of_rows, dtype=np.longdouble)


def _target_weights(label, vocab, class_weight, label_smoothing, numbers):
    """t in `main = sum_c t_c * nll_c` for one row; label is a class or a row of soft labels."""
    weight = numbers.convert(np.ones(vocab) if class_weight is None else _exact(class_weight).reshape(vocab))
    eps = numbers.convert(label_smoothing)
    if isinstance(label, int):
        if not 0 <= label < vocab:
            raise IndexError(f"oracle: label {label} is outside [0, {vocab})")
        target = eps / vocab * weight
        target[label] += (1 - eps) * weight[label]
        return target
    return weight * ((1 - eps) * numbers.convert(label) + eps / vocab)


def _labels_by_row(labels, rows, ignore_index):
    """One entry per row: a class, a row of soft labels, or None for a row that is ignored."""
    entries = list(_rows(labels)) if is_soft(labels) else _index_labels(labels)
    if len(entries) != rows:
        raise ValueError(f"oracle: {len(entries)} labels for {rows} rows")
    counted = counted_rows(labels, ignore_index)
    return [entry if keep else None for entry, keep in zip(entries, counted, strict=True)]


def _main_loss(row, target):
    return np.nan if row.bad else _expectation(target, row.nll)


@remembered
def row_losses(
    logits,
    labels,
    class_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    temperature=1.0,
):
    """(main, z), each of shape (rows,): a row's loss is main + z, but their means divide differently.

    main = sum_c t_c * nll_c and z = z_loss * lse**2 (see the module's docstring). Ignored rows are 0 in both.
    """
    shape = _rows(logits).shape
    main, z = [], []
    by_row = _labels_by_row(labels, shape[0], ignore_index)
    for (row, _, numbers), label in zip(_rows_from_logits(logits, softcap, temperature), by_row, strict=True):
        if label is None:
            main.append(0.0)
            z.append(0.0)
            continue
        main.append(_main_loss(row, _target_weights(label, shape[1], class_weight, label_smoothing, numbers)))
        z.append(numbers.convert(z_loss) * row.lse**2 if z_loss else 0.0)
    return _result(np.array(main), shape[:1]), _result(np.array(z), shape[:1])


def _ratio(total, denominator):
    return total / np.longdouble(denominator) if denominator != 0 else np.longdouble(np.nan)


def cross_entropy(logits, labels, *, reduction="mean", denominator=None, z_loss=0.0, **options):
    """Loss under a reduction: "none" gives shape (rows,), "sum" and "mean" a scalar; options of row_losses.

    mean = sum(main) / mean_denominator + sum(z) / (number of rows that count); NaN where a denominator is 0.
    `denominator` replaces both.
    """
    main, z = row_losses(logits, labels, z_loss=z_loss, **options)
    if reduction == "none":
        return main + z
    if reduction == "sum":
        return np.sum(main) + np.sum(z)
    main_denominator, z_denominator = _denominators(labels, reduction, denominator, options)
    loss = _ratio(np.sum(main), main_denominator)
    return loss + _ratio(np.sum(z), z_denominator) if z_loss else loss


def _denominators(labels, reduction, denominator, options):
    """(of the main loss, of the z-loss)."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"oracle: unknown reduction {reduction!r}")
    if reduction != "mean":
        return np.longdouble(1), np.longdouble(1)
    if denominator is not None:
        return np.longdouble(denominator), np.longdouble(denominator)
    ignore_index = options.get("ignore_index", -100)
    counted = np.longdouble(np.sum(counted_rows(labels, ignore_index)))
    return mean_denominator(labels, options.get("class_weight"), ignore_index), counted


def _main_gradient(row, target):
    """d main / dz_j = T * p_j - t_j with T = sum_c t_c, written so that nothing cancels on a confident row.

    T * p_j - t_j = (T - t_j) * p_j - t_j * (1 - p_j); without smoothing T - t_y is exactly 0.
    """
    return (np.sum(target) - target) * row.p - target * row.complement


@remembered
def cross_entropy_grad(
    logits, labels, *, reduction="mean", grad_output=1.0, denominator=None, class_weight=None,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, temperature=1.0,
):  # fmt: skip
    """dlogits (rows, vocab), the gradient of cross_entropy times grad_output (scalar, or one per row).

    dx_j = slope_j * (d main / dz_j / main_denominator + 2 * z_loss * lse * p_j / z_denominator) * grad_output

    Ignored rows are exactly 0, whatever their logits. A part whose denominator is 0 is exactly 0. A row that
    counts and has no distribution is NaN.
    """
    shape = _rows(logits).shape
    options = {"class_weight": class_weight, "ignore_index": ignore_index}
    main_denominator, z_denominator = _denominators(labels, reduction, denominator, options)
    upstream = np.broadcast_to(_exact(grad_output).reshape(-1), shape[:1])
    by_row = _labels_by_row(labels, shape[0], ignore_index)
    dlogits = np.zeros(shape, dtype=np.longdouble)
    for i, (row, slope, numbers) in enumerate(_rows_from_logits(logits, softcap, temperature)):
        if by_row[i] is None or not (main_denominator != 0 or (z_loss and z_denominator != 0)):
            continue
        if row.bad:
            dlogits[i] = np.nan
            continue
        gradient = numbers.convert(np.zeros(shape[1]))
        if main_denominator != 0:
            target = _target_weights(by_row[i], shape[1], class_weight, label_smoothing, numbers)
            gradient = gradient + _main_gradient(row, target) / _number(main_denominator, numbers)
        if z_loss and z_denominator != 0:
            push = 2 * numbers.convert(z_loss) * row.lse * row.p
            gradient = gradient + push / _number(z_denominator, numbers)
        dlogits[i] = _result(slope * gradient * numbers.convert(upstream[i]), shape[1:])
    return dlogits


def _number(value, numbers):
    """A longdouble in the number system: two float64 halves hold all of its 64 bits."""
    high = np.float64(value)
    return numbers.convert(high) + numbers.convert(np.float64(value - np.longdouble(high)))


@remembered
def row_losses_from_probs(probs, labels, class_weight=None, ignore_index=-100, label_smoothing=0.0):
    """Main loss of shape (rows,) with nll_c = -log p_c: no normalisation, no clamp, p = 0 gives +inf."""
    shape = _rows(probs).shape
    by_row = _labels_by_row(labels, shape[0], ignore_index)
    main = []
    for (row, _, numbers), label in zip(_rows_from_probs(probs), by_row, strict=True):
        if label is None:
            main.append(0.0)
        else:
            target = _target_weights(label, shape[1], class_weight, label_smoothing, numbers)
            main.append(_main_loss(row, target))
    return _result(np.array(main), shape[:1])


def cross_entropy_from_probs(probs, labels, *, reduction="mean", **options):
    """row_losses_from_probs under a reduction, with the denominators of cross_entropy."""
    main = row_losses_from_probs(probs, labels, **options)
    if reduction == "none":
        return main
    return _ratio(np.sum(main), _denominators(labels, reduction, None, options)[0])


# ----------------------------------------------------------------------
# Independent sigmoids
# ----------------------------------------------------------------------


@dataclass
class Sigmoids:
    """Flat arrays: -log sigmoid(x), -log(1 - sigmoid(x)), their weights (0 where ignored), where NaN."""

    positive_nll: np.ndarray
    negative_nll: np.ndarray
    positive_weight: np.ndarray
    negative_weight: np.ndarray
    counted: np.ndarray
    nan: np.ndarray
    shape: tuple


def _softplus(x, numbers):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), which overflows nowhere."""
    return np.where(x > 0, x, numbers.convert(0.0)) + numbers.log1p(numbers.exp(-abs(x)))


def binary_counted(targets, ignore_index=None):
    """Which elements count: all, or those whose target is not ignore_index."""
    targets = _exact(targets)
    return np.ones(targets.shape, dtype=bool) if ignore_index is None else targets != float(ignore_index)


def _sigmoids(nlls, values, targets, pos_weight, class_weight, ignore_index, numbers):
    """Weights: w * pos_weight * y for -log sigmoid(x), w * (1 - y) for -log(1 - sigmoid(x))."""
    shape = values.shape

    def spread(weight):
        return numbers.convert(np.broadcast_to(_exact(1.0 if weight is None else weight), shape).reshape(-1))

    if np.shape(targets) != shape:
        raise ValueError(f"oracle: targets of shape {np.shape(targets)} for values of shape {shape}")
    y = numbers.convert(_exact(targets).reshape(-1))
    counted = binary_counted(targets, ignore_index).reshape(-1)
    zero = numbers.convert(np.zeros(len(y)))
    weight = spread(class_weight)
    return Sigmoids(
        *nlls,
        positive_weight=np.where(counted, weight * spread(pos_weight) * y, zero),
        negative_weight=np.where(counted, weight * (1 - y), zero),
        counted=counted,
        nan=np.isnan(values.reshape(-1)) & counted,
        shape=shape,
    )


def _weighted(weight, values):
    """weight * values with 0 * inf = 0."""
    return np.where(weight != 0, weight * np.where(weight != 0, values, 0 * weight), 0 * weight)


def _sigmoid_losses(sigmoids):
    loss = _weighted(sigmoids.positive_weight, sigmoids.positive_nll)
    loss = loss + _weighted(sigmoids.negative_weight, sigmoids.negative_nll)
    return _result(np.where(sigmoids.nan, np.nan, loss), sigmoids.shape)


@remembered
def binary_losses(logits, targets, *, pos_weight=None, class_weight=None, ignore_index=None):
    """-[pos_weight * y * log sigmoid(x) + (1 - y) * log(1 - sigmoid(x))] * class_weight, shaped like logits.

    Weights broadcast over the last axis. Ignored elements are 0, and so is a term of weight 0 at an infinity.
    """
    x = _exact(logits)
    numbers = _numbers_for(x.size)
    z = numbers.convert(x.reshape(-1))
    nlls = _softplus(-z, numbers), _softplus(z, numbers)
    return _sigmoid_losses(_sigmoids(nlls, x, targets, pos_weight, class_weight, ignore_index, numbers))


@remembered
def binary_losses_from_probs(probs, targets, *, pos_weight=None, class_weight=None, ignore_index=None):
    """-[pos_weight * y * log p + (1 - y) * log(1 - p)] * class_weight: no clamp, so log 0 is -inf."""
    p = _exact(probs)
    numbers = _numbers_for(p.size)
    flat = numbers.convert(p.reshape(-1))
    with np.errstate(divide="ignore"):
        nlls = -numbers.log(flat), -numbers.log1p(-flat)
    return _sigmoid_losses(_sigmoids(nlls, p, targets, pos_weight, class_weight, ignore_index, numbers))


def _binary_reduced(losses, targets, reduction, ignore_index):
    if reduction == "none":
        return losses
    count = np.sum(binary_counted(targets, ignore_index)) if reduction == "mean" else 1
    return _ratio(np.sum(losses), count)


def binary_cross_entropy(logits, targets, *, reduction="mean", ignore_index=None, **options):
    """binary_losses under a reduction; the mean divides by the number of elements that count."""
    losses = binary_losses(logits, targets, ignore_index=ignore_index, **options)
    return _binary_reduced(losses, targets, reduction, ignore_index)


def binary_cross_entropy_from_probs(probs, targets, *, reduction="mean", ignore_index=None, **options):
    """binary_losses_from_probs under a reduction, like binary_cross_entropy."""
    losses = binary_losses_from_probs(probs, targets, ignore_index=ignore_index, **options)
    return _binary_reduced(losses, targets, reduction, ignore_index)


@remembered
def binary_cross_entropy_grad(
    logits,
    targets,
    *,
    pos_weight=None,
    class_weight=None,
    ignore_index=None,
    reduction="mean",
    grad_output=1.0,
):
    """class_weight * [(1 - y) * sigmoid(x) - pos_weight * y * sigmoid(-x)] * grad_output / denominator.

    Shaped like logits; grad_output broadcasts to that. sigmoid(-x) is 1 - sigmoid(x) without cancellation.
    """
    x = _exact(logits)
    numbers = _numbers_for(x.size)
    z = numbers.convert(x.reshape(-1))
    nlls = _softplus(-z, numbers), _softplus(z, numbers)
    sigmoids = _sigmoids(nlls, x, targets, pos_weight, class_weight, ignore_index, numbers)
    denominator = int(np.sum(sigmoids.counted)) if reduction == "mean" else 1
    if denominator == 0:
        return np.zeros(x.shape, dtype=np.longdouble)
    positive, negative = numbers.exp(-sigmoids.positive_nll), numbers.exp(-sigmoids.negative_nll)
    gradient = _weighted(sigmoids.negative_weight, positive) - _weighted(sigmoids.positive_weight, negative)
    upstream = numbers.convert(np.broadcast_to(_exact(grad_output), x.shape).reshape(-1))
    return _result(np.where(sigmoids.nan, np.nan, gradient * upstream / denominator), x.shape)


# ----------------------------------------------------------------------
# Information
# ----------------------------------------------------------------------


def _entropy(p):
    """sum_c p_c * nll_c, with 0 * log 0 = 0."""
    return np.nan if p.bad else _expectation(p.p, p.nll)


def _cross_entropy_between(p, q):
    """sum_c p_c * nll(q)_c: +inf where p_c > 0 and q_c = 0."""
    return np.nan if p.bad or q.bad else _expectation(p.p, q.nll)


def _kl(p, q):
    """sum_c p_c * (nll(q)_c - nll(p)_c) over the classes with p_c > 0."""
    if p.bad or q.bad:
        return np.nan
    live = p.p != 0
    return np.sum(p.p[live] * (q.nll[live] - p.nll[live]))


def _js(p, q, numbers):
    """[KL(p || m) + KL(q || m)] / 2 with m = (p + q) / 2, where log(p / m) = log1p((p - q) / (p + q))."""
    if p.bad or q.bad:
        return np.nan

    def half(a, b):
        live = a != 0
        a, b = a[live], b[live]
        ratio = (a - b) / (a + b)
        # log(1 + ratio): log1p for close a and b; for a tiny a, ratio rounds to -1 and 2a / (a + b) does not.
        with np.errstate(divide="ignore"):  # log1p(-1), computed but not chosen
            log = np.where(abs(ratio) < 0.5, numbers.log1p(ratio), numbers.log(2 * a / (a + b)))
        return np.sum(a * log) / 2

    return half(p.p, q.p) + half(q.p, p.p)


def _tv(p, q):
    return np.nan if p.bad or q.bad else np.sum(abs(p.p - q.p)) / 2


def _per_row(function, *inputs):
    """function(Row, ..., numbers) over rows read side by side."""
    values = [function(*(row for row, _, _ in group), group[0][2]) for group in zip(*inputs, strict=True)]
    return _result(np.array(values), (len(values),))


@remembered
def entropy(logits):
    """H(p) = -sum_c p_c log p_c of softmax(logits), shape (rows,)."""
    return _per_row(lambda p, _: _entropy(p), _rows_from_logits(logits))


@remembered
def entropy_from_probs(probs):
    """H(p) of rows of probabilities."""
    return _per_row(lambda p, _: _entropy(p), _rows_from_probs(probs))


@remembered
def kl_divergence(p_logits, q_logits):
    """KL(p || q) = sum_c p_c log(p_c / q_c) of two softmaxes, shape (rows,); +inf if p_c > 0 and q_c = 0."""
    return _per_row(lambda p, q, _: _kl(p, q), _rows_from_logits(p_logits), _rows_from_logits(q_logits))


@remembered
def kl_divergence_from_probs(p, q):
    """KL(p || q) of rows of probabilities."""
    return _per_row(lambda a, b, _: _kl(a, b), _rows_from_probs(p), _rows_from_probs(q))


@remembered
def js_divergence(p_logits, q_logits):
    """JS(p, q) = [KL(p || m) + KL(q || m)] / 2 with m = (p + q) / 2, of two softmaxes, shape (rows,)."""
    return _per_row(_js, _rows_from_logits(p_logits), _rows_from_logits(q_logits))


@remembered
def js_divergence_from_probs(p, q):
    """JS(p, q) of rows of probabilities."""
    return _per_row(_js, _rows_from_probs(p), _rows_from_probs(q))


@remembered
def total_variation(p_logits, q_logits):
    """TV(p, q) = sum_c |p_c - q_c| / 2 of two softmaxes, shape (rows,)."""
    return _per_row(lambda p, q, _: _tv(p, q), _rows_from_logits(p_logits), _rows_from_logits(q_logits))


@remembered
def total_variation_from_probs(p, q):
    """TV(p, q) of rows of probabilities."""
    return _per_row(lambda a, b, _: _tv(a, b), _rows_from_probs(p), _rows_from_probs(q))


@remembered
def cross_entropy_between(p_logits, q_logits):
    """H(p, q) = -sum_c p_c log q_c of two softmaxes, shape (rows,)."""
    between = _rows_from_logits(p_logits), _rows_from_logits(q_logits)
    return _per_row(lambda p, q, _: _cross_entropy_between(p, q), *between)


@remembered
def cross_entropy_between_from_probs(p, q):
    """H(p, q) of rows of probabilities."""
    return _per_row(lambda a, b, _: _cross_entropy_between(a, b), _rows_from_probs(p), _rows_from_probs(q))


# ----------------------------------------------------------------------
# Ranking and calibration
# ----------------------------------------------------------------------


def argmax_rows(logits):
    """Lowest class that has the largest logit, int64 (rows,); -1 for a row with a NaN."""
    best = [-1 if np.any(np.isnan(x)) else list(x).index(max(x)) for x in _rows(logits)]
    return np.array(best, dtype=np.int64)


def label_ranks(logits, labels, ignore_index=-100):
    """Classes that come before the label, int64 (rows,): a larger logit, or an equal logit and a lower index.

    0 means that the label is the argmax. -1 for an ignored row and for a row with a NaN.
    """
    logits = _rows(logits)
    ranks = []
    for x, y in zip(logits, _labels_by_row(labels, len(logits), ignore_index), strict=True):
        if y is None or np.any(np.isnan(x)):
            ranks.append(-1)
        else:
            ranks.append(int(np.sum(x > x[y])) + int(np.sum(x[:y] == x[y])))
    return np.array(ranks, dtype=np.int64)


@remembered
def p_max_rows(logits):
    """Probability of the most likely class, shape (rows,); NaN where there is no distribution."""
    return _per_row(lambda row, _: row.p[0] if row.bad else max(row.p), _rows_from_logits(logits))


def ece(confidences, corrects, bins):
    """Expected calibration error, sum over bins of |number correct - sum of confidences| / N, a float.

    Bins are ((k - 1) / bins, k / bins] for k = 1..bins, with the edges rounded to float64: 1.0 is in the last
    bin and a confidence written 0.1 is on the edge 0.1; a confidence of 0 joins the first. Sums are exact.
    """
    confidences, corrects = _exact(confidences).reshape(-1), np.asarray(corrects).reshape(-1)
    if len(confidences) != len(corrects):
        raise ValueError(f"oracle: {len(confidences)} confidences for {len(corrects)} corrects")
    if len(confidences) == 0:
        return float("nan")
    gaps = [Fraction(0)] * bins
    for confidence, correct in zip(confidences, corrects, strict=True):
        k = sum(edge / bins < confidence for edge in range(1, bins))
        gaps[k] += int(correct) - Fraction(float(confidence))
    return float(sum(abs(gap) for gap in gaps) / len(confidences))


# ----------------------------------------------------------------------
# Comparing
# ----------------------------------------------------------------------


def _real(name, values):
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" and array.dtype != ml_dtypes.bfloat16:
        raise AssertionError(f"{name} is {array.dtype}, expected real numbers")
    return (array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array).astype(np.longdouble)


def errors_in_eps(actual, expected, dtype=np.float32, floor=0.0):
    """|actual - expected| / (eps(dtype) * max(|expected|, floor, smallest normal of dtype)), elementwise.

    0 where both are NaN or the same infinity, +inf where only one is. `floor` is the size below which errors
    are taken as absolute. Below the smallest normal number a dtype has no relative precision to ask for.
    """
    actual, expected = _real("actual", actual), _real("expected", expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    finfo = ml_dtypes.finfo(dtype)
    scale = np.maximum(abs(expected), np.longdouble(max(floor, float(finfo.smallest_normal))))
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    finite = np.isfinite(actual) & np.isfinite(expected)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = abs(actual - expected) / (np.longdouble(float(finfo.eps)) * scale)
    return np.where(same, 0, np.where(finite, errors, np.inf))


def assert_close(actual, expected, eps_count, dtype=np.float32, floor=0.0):
    """Raise AssertionError, with the worst element, unless every error is at most eps_count eps of dtype.

    Shapes must be equal (no broadcasting; a scalar is not an array of one). See errors_in_eps for the unit.
    """
    if not (np.isfinite(eps_count) and eps_count >= 0 and np.isfinite(floor) and floor >= 0):
        raise ValueError(f"eps_count and floor must be finite and >= 0, found {eps_count} and {floor}")
    errors = errors_in_eps(actual, expected, dtype, floor)
    if errors.size == 0 or np.max(errors) <= eps_count:
        return
    worst = np.unravel_index(np.argmax(errors), errors.shape)
    found, wanted = _real("actual", actual)[worst], _real("expected", expected)[worst]
    where = tuple(int(i) for i in worst)
    count = int(np.sum(errors > eps_count))
    raise AssertionError(
        f"{count} of {errors.size} elements are off by more than {eps_count} eps of {np.dtype(dtype)}; "
        f"worst at {where}: actual {found!r}, expected {wanted!r}, error {float(errors[worst]):.4g} eps"
    )
