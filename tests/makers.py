"""Inputs that can fail: rows on which a wrong cross-entropy shows, and tables of special and known values.

With plain random logits a wrong softmax term passes at V = 128k. So a batch cycles through KINDS of rows:
peaks that are confident to 1 - 1e-12, ties at the maximum, -inf columns, offsets, ascending rows that make a
running maximum move at every step. Everything is reproducible from its seed.
"""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

INF, NAN = math.inf, math.nan

FLOAT_DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)

# ----------------------------------------------------------------------
# Logits
# ----------------------------------------------------------------------

# The loss of a peak's own class is about exp(-gap): 1e-12, then from 0.14 to below float32's smallest normal.
PEAK_GAPS = (27.7, 7.0, 14.0, 2.0, 21.0, 60.0, 95.0)


def _ordinary(vocab, count, dtype, rng):
    return rng.normal(0, 3, vocab)


def _peak(vocab, count, dtype, rng):
    """One lone high column, in the first, the last or any place, PEAK_GAPS above the lse of the others."""
    row = rng.normal(0, 3, vocab)
    place = (0, vocab - 1, int(rng.integers(vocab)))[count % 3]
    others = np.delete(row, place)  # empty at vocab 1, where any value will do
    lse = np.log(np.sum(np.exp(others))) if vocab > 1 else 0.0
    row[place] = lse + PEAK_GAPS[count % len(PEAK_GAPS)]
    return row


def _tie(ways):
    def make(vocab, count, dtype, rng):
        """`ways` columns share the maximum, half a nat or 10 nats above the rest."""
        row = rng.normal(0, 3, vocab)
        places = rng.choice(vocab, size=min(ways, vocab), replace=False)
        row[places] = np.max(row) + (0.5, 10.0)[count % 2]
        return row

    return make


def _masked(vocab, count, dtype, rng):
    """-inf in the first column and in a quarter of the others; at least one class stays."""
    row = rng.normal(0, 3, vocab)
    hidden = rng.random(vocab) < 0.25
    hidden[0], hidden[-1] = vocab > 1, False
    row[hidden] = -np.inf
    return row


def _masked_head(vocab, count, dtype, rng):
    """The first half -inf: whole tiles of a blocked reduction are empty before the first class."""
    row = rng.normal(0, 3, vocab)
    row[: vocab // 2] = -np.inf
    return row


def _masked_tail(vocab, count, dtype, rng):
    """The second half -inf, as in a vocabulary padded to a round size."""
    row = rng.normal(0, 3, vocab)
    row[(vocab + 1) // 2 :] = -np.inf
    return row


def _only_one(vocab, count, dtype, rng):
    """Every class but one -inf: p = 1 and loss 0 exactly."""
    row = np.full(vocab, -np.inf)
    row[int(rng.integers(vocab))] = rng.normal(0, 3)
    return row


def _offset(vocab, count, dtype, rng):
    """+10000 on every logit: exp overflows without the maximum, float32 keeps 3 decimals."""
    return rng.normal(0, 3, vocab) + 10000.0


def _low(vocab, count, dtype, rng):
    """Around -50: a maximum that starts at 0, or a zero in padding, wins wrongly."""
    return rng.normal(0, 1, vocab) - 50.0


def _two_high(vocab, count, dtype, rng):
    """All equal but two: the gradient of every other class is one and the same number."""
    row = np.full(vocab, -1.5)
    first, second = rng.choice(vocab, size=2, replace=False) if vocab > 1 else (0, 0)
    row[first], row[second] = 9.0, 9.25
    return row


def _near_zero(vocab, count, dtype, rng):
    return rng.normal(0, 1e-3, vocab)


def _all_equal(vocab, count, dtype, rng):
    """Uniform: loss log V, and every class has the maximum."""
    return np.full(vocab, (0.0, 2.5, -7.0)[count % 3])


def _ascending(vocab, count, dtype, rng):
    """Sorted upwards: a running maximum moves, and its sum is rescaled, at every step."""
    return np.sort(rng.normal(0, 3, vocab))


def _wide(vocab, count, dtype, rng):
    """Sigma 60: exp of the logits themselves overflows and underflows float32."""
    return rng.normal(0, 60, vocab)


def _subnormal(vocab, count, dtype, rng):
    """A few multiples of the dtype's smallest subnormal: the loss is log V, with flushing or without."""
    return rng.integers(-9, 10, vocab) * float(ml_dtypes.finfo(dtype).smallest_subnormal)


_MAKERS = {
    "peak": _peak,
    "ordinary": _ordinary,
    "masked": _masked,
    "tie of two": _tie(2),
    "offset": _offset,
    "masked head": _masked_head,
    "ascending": _ascending,
    "two high": _two_high,
    "tie of three": _tie(3),
    "low": _low,
    "only one": _only_one,
    "wide": _wide,
    "near zero": _near_zero,
    "masked tail": _masked_tail,
    "all equal": _all_equal,
    "subnormal": _subnormal,
}

KINDS = tuple(_MAKERS)
KINDS_WITH_INF = ("masked", "masked head", "masked tail", "only one")
FINITE_KINDS = tuple(kind for kind in KINDS if kind not in KINDS_WITH_INF)


def kinds_for(dtype):
    """KINDS that the dtype can hold: at 10000 the 16-bit dtypes are 8 or 64 apart."""
    return KINDS if np.dtype(dtype).itemsize >= 4 else tuple(kind for kind in KINDS if kind != "offset")


def row_kinds(rows, dtype=np.float32, seed=0, kinds=None):
    """The kind of each row of logits(rows, vocab, dtype, seed, kinds), a list of names; seed turns the cycle.

    `kinds` is a name or several; one that the dtype cannot hold is an error, not a silent omission.
    """
    allowed = kinds_for(dtype)
    cycle = (kinds,) if isinstance(kinds, str) else tuple(allowed if kinds is None else kinds)
    unknown = [kind for kind in cycle if kind not in allowed]
    if unknown or not cycle:
        raise ValueError(f"makers: no such kinds for {np.dtype(dtype)}: {unknown}; there are {allowed}")
    return [cycle[(row + seed) % len(cycle)] for row in range(rows)]


def logits(rows, vocab, dtype=np.float32, seed=0, kinds=None):
    """(rows, vocab) logits of mixed kinds (see row_kinds), or of the given `kinds`.

    Every row has a distribution: no NaN, no +inf, and at least one class that is not -inf.
    """
    rng = np.random.default_rng(seed)
    made = np.zeros((rows, vocab))
    seen: dict[str, int] = {}
    for row, kind in enumerate(row_kinds(rows, dtype, seed, kinds)):
        count = seen.get(kind, seed)  # so that one row with another seed is another peak, another place
        seen[kind] = count + 1
        made[row] = _MAKERS[kind](vocab, count, dtype, rng)
    return made.astype(dtype)


# ----------------------------------------------------------------------
# Labels and weights
# ----------------------------------------------------------------------


def labels(logits, seed=0, ignore=True, dtype=np.int64, ignore_index=-100, on_masked=False):
    """Index labels, shape logits.shape[:-1]: first or last argmax, any class that is not -inf, a few ignored.

    With on_masked, a row in three gets a -inf class where it has one (loss +inf). At least one row counts.
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(logits).astype(np.float64).reshape(int(np.prod(logits.shape[:-1])), logits.shape[-1])
    made = [_label(row, i, rng, on_masked) for i, row in enumerate(values)]
    if ignore:
        for i in np.flatnonzero(rng.random(len(made)) < 0.15):
            made[i] = ignore_index
        _ignore_one_but_not_all(made, values, ignore_index, rng)
    _check_labels_fit(made, dtype)
    return np.array(made, dtype=dtype).reshape(logits.shape[:-1])


def _label(row, i, rng, on_masked):
    masked = np.flatnonzero(row == -np.inf)
    if on_masked and len(masked) and i % 3 == 0:
        return int(rng.choice(masked))
    best = np.flatnonzero(row == np.max(row))
    choices = (best[0], best[-1], rng.choice(np.flatnonzero(row != -np.inf)))
    return int(choices[rng.integers(3)])


def _ignore_one_but_not_all(made, values, ignore_index, rng):
    """Two rows or more: at least one is ignored. Any number of rows: at least one is not."""
    ignored = [label == ignore_index for label in made]
    if len(made) >= 2 and not any(ignored):
        made[int(rng.integers(len(made)))] = ignore_index
    if made and all(ignored):
        made[0] = int(np.argmax(values[0]))


def _check_labels_fit(made, dtype):
    limits = np.iinfo(dtype)
    if made and not (limits.min <= min(made) and max(made) <= limits.max):
        raise ValueError(f"makers: labels from {min(made)} to {max(made)} do not fit {np.dtype(dtype)}")


def soft_labels(rows, vocab, dtype=np.float32, seed=0):
    """(rows, vocab) non-negative rows that sum to 1 within the dtype's rounding of their largest entry.

    In turn: Dirichlet, half exact zeros, one-hot, uniform, and one class with almost everything.
    """
    rng = np.random.default_rng(seed)
    made = np.zeros((rows, vocab), dtype=dtype)
    for i in range(rows):
        made[i] = _round_to_sum_1(_soft_row((i + seed) % 5, vocab, rng), dtype)
    return made


def _round_to_sum_1(row, dtype):
    """Round every entry towards 0 and give the rest to the largest: 1/V rounds the same way V times."""
    rounded = row.astype(dtype)
    above = rounded.astype(np.float64) > row
    rounded[above] = np.nextafter(rounded[above], np.zeros(1, dtype))
    values = rounded.astype(np.float64)
    largest = int(np.argmax(values))
    values[largest] += 1 - np.sum(values)
    return values.astype(dtype)


def _soft_row(kind, vocab, rng):
    place = int(rng.integers(vocab))
    if kind == 2:
        return np.eye(1, vocab, place)[0]
    if kind == 3:
        return np.full(vocab, 1 / vocab)
    row = rng.exponential(size=vocab) + 1e-3
    if kind == 1:
        row[rng.random(vocab) < 0.5] = 0
        row[place] = 1.0
    if kind == 4:
        row[place] = 999 * np.sum(row)
    return row / np.sum(row)


def class_weight(vocab, dtype=np.float64, seed=0):
    """(vocab,) weights between 0.2 and 3, with exact zeros in about one class of eight but never in all."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.2, 3, vocab)
    weight[rng.random(vocab) < 0.125] = 0
    weight[int(rng.integers(vocab))] = 1.5
    return weight.astype(dtype)


def probabilities(rows, vocab, dtype=np.float32, seed=0, kinds=None):
    """(rows, vocab) softmax of logits(...), rounded to dtype: exact zeros, exact ones, sums near 1."""
    z = logits(rows, vocab, np.float64, seed, kinds)
    p = np.exp(z - np.max(z, axis=-1, keepdims=True))
    return (p / np.sum(p, axis=-1, keepdims=True)).astype(dtype)


def binary_logits(shape, dtype=np.float32, seed=0):
    """Independent logits: N(0, 3), with zeros, +-30, +-200 and near-zero values mixed in."""
    rng = np.random.default_rng(seed)
    made = rng.normal(0, 3, shape)
    rare = rng.choice([0.0, 30.0, -30.0, 200.0, -200.0, 1e-4], shape)
    return np.where(rng.random(shape) < 0.3, rare, made).astype(dtype)


def binary_targets(shape, dtype=np.float32, seed=0, soft=True, ignore_index=None):
    """Targets 0 and 1, soft ones between if asked, and ignore_index (where given) in about one of six."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 2, shape).astype(np.float64)
    if soft:
        made = np.where(rng.random(shape) < 0.3, rng.random(shape), made)
    if ignore_index is not None:
        made = np.where(rng.random(shape) < 0.15, ignore_index, made)
    return made.astype(dtype)


# ----------------------------------------------------------------------
# Memory layouts
# ----------------------------------------------------------------------


def _poison(dtype):
    """A value that shows if it is read: NaN, or the largest integer (a label out of range)."""
    return np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else np.nan


def _inside(array, shape, window):
    """The same values in a window of a larger array of poison."""
    wide = np.full(shape, _poison(array.dtype), dtype=array.dtype)
    view = wide[window]
    view[...] = array
    return view


def _every_second_column(array):
    wide = (*array.shape[:-1], 2 * array.shape[-1] + 1)
    return _inside(array, wide, (..., slice(1, None, 2)))


def _every_second_row(array):
    return _inside(array, (2 * array.shape[0] + 1, *array.shape[1:]), slice(1, None, 2))


def _padded_rows(array):
    wide = (*array.shape[:-1], array.shape[-1] + 5)
    return _inside(array, wide, (..., slice(2, 2 + array.shape[-1])))


def _read_only(array):
    view = array.copy()
    view.flags.writeable = False
    return view


def _unaligned(array):
    """One byte past an aligned address, in a buffer of 0xFF bytes: NaN as a float of any width."""
    buffer = np.full(array.nbytes + 2 * array.itemsize + 64, 0xFF, dtype=np.uint8)
    start = -buffer.ctypes.data % 64 + 1
    view = np.ndarray(array.shape, array.dtype, buffer=buffer, offset=start)
    view[...] = array
    return view


def _swapped(array):
    return array.astype(array.dtype.newbyteorder())


_LAYOUTS = {
    "C": lambda array: np.array(array, order="C"),
    "F": lambda array: np.array(array, order="F"),
    "reversed rows": lambda array: array[::-1].copy()[::-1],
    "reversed columns": lambda array: array[..., ::-1].copy()[..., ::-1],
    "every second row": _every_second_row,
    "every second column": _every_second_column,
    "padded rows": _padded_rows,
    "read-only": _read_only,
    "unaligned": _unaligned,
    "non-native byte order": _swapped,
}

LAYOUTS = tuple(_LAYOUTS)


def layouts_for(dtype):
    """LAYOUTS that a dtype has: bytes and ml_dtypes' bfloat16 come in one byte order only."""
    one_order = np.dtype(dtype) == ml_dtypes.bfloat16 or np.dtype(dtype).itemsize == 1
    return tuple(how for how in LAYOUTS if not (one_order and how == "non-native byte order"))


def strided(array, how):
    """The same values in another memory layout, one of layouts_for(array.dtype); never the array itself.

    Gaps and padding hold NaN (floats) or the largest integer. Only "non-native byte order" changes the dtype.
    """
    if how not in layouts_for(array.dtype):
        raise ValueError(f"makers: no layout {how!r} for {array.dtype}; there are {layouts_for(array.dtype)}")
    if array.ndim == 0:
        raise ValueError("makers: a scalar has no layout")
    return _LAYOUTS[how](array)


# ----------------------------------------------------------------------
# Special values: the contract of section 3, every number from its closed form
# ----------------------------------------------------------------------


class SpecialRow(NamedTuple):
    """One row of 4 classes; `loss` and `gradient` are of reduction "sum"; `label` a class or 4 soft ones."""

    name: str
    logits: list
    label: Any
    loss: float
    logsumexp: float
    gradient: list | None
    options: dict = {}  # noqa: RUF012  (read only)


_LN2, _LN3, _LN4 = math.log(2), math.log(3), math.log(4)
_NANS = [NAN] * 4
_ZEROS = [0.0] * 4
_THIRD = 1 / 3

SPECIAL_ROWS = [
    SpecialRow("uniform", [0, 0, 0, 0], 2, _LN4, _LN4, [0.25, 0.25, -0.75, 0.25]),
    SpecialRow("-inf in the first column", [-INF, 0, 0, 0], 1, _LN3, _LN3, [0, -2 * _THIRD, _THIRD, _THIRD]),
    SpecialRow("-inf in the last column", [0, 0, 0, -INF], 0, _LN3, _LN3, [-2 * _THIRD, _THIRD, _THIRD, 0]),
    SpecialRow("-inf in two columns", [-INF, 1, 1, -INF], 2, _LN2, 1 + _LN2, [0, 0.5, -0.5, 0]),
    SpecialRow("one class left, the label", [-INF, -INF, 5, -INF], 2, 0.0, 5.0, _ZEROS),
    SpecialRow("one class left, not the label", [-INF, -INF, 5, -INF], 0, INF, 5.0, [-1, 0, 1, 0]),
    SpecialRow("label on a -inf class", [0, 0, -INF, 0], 2, INF, _LN3, [_THIRD, _THIRD, -1, _THIRD]),
    SpecialRow("label on -inf, first column", [-INF, 0, 0, 0], 0, INF, _LN3, [-1, _THIRD, _THIRD, _THIRD]),
    SpecialRow("all -inf", [-INF] * 4, 1, NAN, -INF, _NANS),
    SpecialRow("NaN at the label", [0, NAN, 0, 0], 1, NAN, NAN, _NANS),
    SpecialRow("NaN elsewhere", [0, 0, 0, NAN], 1, NAN, NAN, _NANS),
    SpecialRow("NaN in the first column", [NAN, 0, 0, 0], 1, NAN, NAN, _NANS),
    SpecialRow("NaN beside -inf", [-INF, NAN, -INF, -INF], 0, NAN, NAN, _NANS),
    SpecialRow("NaN beside +inf", [INF, NAN, 0, 0], 0, NAN, NAN, _NANS),
    SpecialRow("+inf at the label", [0, INF, 0, 0], 1, NAN, INF, _NANS),
    SpecialRow("+inf elsewhere", [0, INF, 0, 0], 3, NAN, INF, _NANS),
    SpecialRow("+inf in the first column", [INF, 0, 0, 0], 3, NAN, INF, _NANS),
    SpecialRow("two +inf", [INF, 0, INF, 0], 2, NAN, INF, _NANS),
    SpecialRow("+inf beside -inf", [INF, -INF, 0, 0], 2, NAN, INF, _NANS),
    SpecialRow("ignored", [3, 2, 1, 0], -100, 0.0, 3.4401896985611953, _ZEROS),
    SpecialRow("ignored, NaN logits", [NAN, 0, NAN, 0], -100, 0.0, NAN, _ZEROS),
    SpecialRow("ignored, all NaN", [NAN] * 4, -100, 0.0, NAN, _ZEROS),
    SpecialRow("ignored, all -inf", [-INF] * 4, -100, 0.0, -INF, _ZEROS),
    SpecialRow("ignored, +inf", [0, INF, 0, 0], -100, 0.0, INF, _ZEROS),
    SpecialRow("ignored by another index, NaN", [NAN, 0, 0, 0], 1, 0.0, NAN, _ZEROS, {"ignore_index": 1}),
    SpecialRow(
        "-inf with smoothing", [-INF, 0, 0, 0], 1, INF, _LN3,
        [-0.05, _THIRD - 0.85, _THIRD - 0.05, _THIRD - 0.05], {"label_smoothing": 0.2},
    ),
    SpecialRow(
        "-inf with smoothing and weight 0 there", [-INF, 0, 0, 0], 1, 0.95 * _LN3, _LN3,
        [0, 0.95 / 3 - 0.85, 0.95 / 3 - 0.05, 0.95 / 3 - 0.05],
        {"label_smoothing": 0.2, "class_weight": [0.0, 1.0, 1.0, 1.0]},
    ),
    SpecialRow(
        "label of weight 0 on a -inf class", [-INF, 0, 0, 0], 0, 0.0, _LN3, _ZEROS,
        {"class_weight": [0.0, 1.0, 1.0, 1.0]},
    ),
    SpecialRow(
        "NaN logit, label of weight 0", [NAN, 0, 0, 0], 1, NAN, NAN, _NANS,
        {"class_weight": [1.0, 0.0, 1.0, 1.0]},
    ),
    SpecialRow(
        "soft label 0 on a -inf class", [-INF, 0, 0, 0], [0.0, 0.5, 0.5, 0.0], _LN3, _LN3,
        [0, _THIRD - 0.5, _THIRD - 0.5, _THIRD],
    ),
    SpecialRow(
        "soft label above 0 on a -inf class", [-INF, 0, 0, 0], [0.25, 0.75, 0.0, 0.0], INF, _LN3,
        [-0.25, _THIRD - 0.75, _THIRD, _THIRD],
    ),
    SpecialRow(
        "soft label on -inf, weight 0 there", [-INF, 0, 0, 0], [0.25, 0.75, 0.0, 0.0], 0.75 * _LN3, _LN3,
        [0, 0.25 - 0.75, 0.25, 0.25], {"class_weight": [0.0, 1.0, 1.0, 1.0]},
    ),
    SpecialRow("soft labels, all -inf", [-INF] * 4, [0.25, 0.25, 0.25, 0.25], NAN, -INF, _NANS),
    SpecialRow("soft label 0 on a NaN", [NAN, 0, 0, 0], [0.0, 0.5, 0.5, 0.0], NAN, NAN, _NANS),
    SpecialRow("soft label 0 on +inf", [INF, 0, 0, 0], [0.0, 0.5, 0.5, 0.0], NAN, INF, _NANS),
    SpecialRow(
        "z-loss beside a -inf class", [-INF, 0, 0, 0], 1, _LN3 + 0.5 * _LN3**2, _LN3,
        [0, (1 + _LN3) / 3 - 1, (1 + _LN3) / 3, (1 + _LN3) / 3], {"z_loss": 0.5},
    ),
    SpecialRow("z-loss of an ignored NaN row", [NAN, 0, 0, 0], -100, 0.0, NAN, _ZEROS, {"z_loss": 0.5}),
]  # fmt: skip


class SpecialBatch(NamedTuple):
    """Several rows of 4 classes at once: what reductions do. `gradient` is that of the mean."""

    name: str
    logits: list
    labels: list
    losses: list
    sum: float
    mean: float
    gradient: list
    options: dict = {}  # noqa: RUF012  (read only)


_HALF_ROW = [0.125, 0.125, -0.375, 0.125]
_WEIGHT_0 = {"class_weight": [0.0, 0.0, 1.0, 1.0]}

SPECIAL_BATCHES = [
    SpecialBatch("zero rows", [], [], [], 0.0, NAN, []),
    SpecialBatch("all rows ignored", [_ZEROS, _NANS], [-100, -100], [0.0, 0.0], 0.0, NAN, [_ZEROS, _ZEROS]),
    SpecialBatch(
        "ignored NaN row beside a good one", [_NANS, _ZEROS], [-100, 2], [0.0, _LN4], _LN4, _LN4,
        [_ZEROS, [0.25, 0.25, -0.75, 0.25]],
    ),
    SpecialBatch(
        "all class weights 0", [_ZEROS, _ZEROS], [0, 1], [0.0, 0.0], 0.0, NAN, [_ZEROS, _ZEROS], _WEIGHT_0
    ),
    SpecialBatch(
        "all class weights of the labels 0, smoothing", [_ZEROS], [0], [0.25 * _LN4], 0.25 * _LN4, NAN, [_ZEROS],
        _WEIGHT_0 | {"label_smoothing": 0.5},
    ),
    SpecialBatch(
        "one class weight 0", [_ZEROS, _ZEROS], [0, 2], [0.0, _LN4], _LN4, _LN4,
        [_ZEROS, [0.25, 0.25, -0.75, 0.25]], _WEIGHT_0,
    ),
    SpecialBatch(
        "NaN in one row only", [[0, NAN, 0, 0], _ZEROS], [0, 2], [NAN, _LN4], NAN, NAN, [_NANS, _HALF_ROW]
    ),
    SpecialBatch(
        "+inf loss in one row only", [[0, 0, 0, -INF], _ZEROS], [3, 2], [INF, _LN4], INF, INF,
        [[_THIRD / 2, _THIRD / 2, _THIRD / 2, -0.5], _HALF_ROW],
    ),
]  # fmt: skip


class SpecialBinary(NamedTuple):
    """One logit and its target; `loss` and `gradient` are of reduction "sum"."""

    name: str
    logit: float
    target: float
    loss: float
    gradient: float
    options: dict = {}  # noqa: RUF012  (read only)


_SIGMOID_MINUS_100 = 3.720075976020836e-44  # exp(-100) / (1 + exp(-100))

SPECIAL_BINARY = [
    SpecialBinary("zero, target 1", 0.0, 1.0, _LN2, -0.5),
    SpecialBinary("zero, target 0", 0.0, 0.0, _LN2, 0.5),
    SpecialBinary("+inf, target 1", INF, 1.0, 0.0, 0.0),
    SpecialBinary("-inf, target 0", -INF, 0.0, 0.0, 0.0),
    SpecialBinary("+inf, target 0", INF, 0.0, INF, 1.0),
    SpecialBinary("-inf, target 1", -INF, 1.0, INF, -1.0),
    SpecialBinary("+inf, target 1/2", INF, 0.5, INF, 0.5),
    SpecialBinary("-inf, target 1/2", -INF, 0.5, INF, -0.5),
    SpecialBinary("NaN, target 1", NAN, 1.0, NAN, NAN),
    SpecialBinary("NaN, target 0", NAN, 0.0, NAN, NAN),
    SpecialBinary("100, target 0", 100.0, 0.0, 100.0, 1.0),
    SpecialBinary("-100, target 1", -100.0, 1.0, 100.0, -1.0),
    SpecialBinary("100, target 1", 100.0, 1.0, _SIGMOID_MINUS_100, -_SIGMOID_MINUS_100),
    SpecialBinary("-100, target 0", -100.0, 0.0, _SIGMOID_MINUS_100, _SIGMOID_MINUS_100),
    SpecialBinary("ignored NaN", NAN, -1.0, 0.0, 0.0, {"ignore_index": -1}),
    SpecialBinary("ignored +inf", INF, -1.0, 0.0, 0.0, {"ignore_index": -1}),
    SpecialBinary("pos_weight 3", 0.0, 1.0, 3 * _LN2, -1.5, {"pos_weight": 3.0}),
    SpecialBinary("pos_weight 3 leaves target 0 alone", 0.0, 0.0, _LN2, 0.5, {"pos_weight": 3.0}),
    SpecialBinary("pos_weight 3, +inf, target 1", INF, 1.0, 0.0, 0.0, {"pos_weight": 3.0}),
    SpecialBinary("pos_weight 0, -inf, target 1", -INF, 1.0, 0.0, 0.0, {"pos_weight": 0.0}),
    SpecialBinary("class weight 0, +inf, target 0", INF, 0.0, 0.0, 0.0, {"class_weight": [0.0]}),
]

# ----------------------------------------------------------------------
# Known values, of the decimals as written: 0.8 as a float64 is already off, so allow 4 eps of float64
# ----------------------------------------------------------------------


class ReferenceRow(NamedTuple):
    """Probabilities or logits of one row, its label, and the loss."""

    values: list
    label: int
    loss: float


REFERENCE_PROBS = [
    ReferenceRow([0.1, 0.8, 0.1], 1, 0.22314355131420976),  # -ln 0.8
    ReferenceRow([0.98, 0.01, 0.01], 1, 4.605170185988092),  # -ln 0.01
]

# p of the label, and -ln p as a text book prints it, to 3 decimals.
REFERENCE_NLL = [(0.5, 0.693), (0.1, 2.303), (0.001, 6.908)]

REFERENCE_LOGITS = [ReferenceRow([2.3, -1.2, 0.7, 1.1], 0, 0.42741452308500333)]
REFERENCE_LOGITS_GRADIENT = [
    -0.3478068529281596,
    0.019694526527536924,
    0.13167552545378078,
    0.19643680094684188,
]

REFERENCE_BINARY_LOGITS = [5.0, -5.0, 0.0, 2.0, -2.0]
REFERENCE_BINARY_LABELS = [1, 0, 1, 0, 1]
REFERENCE_BINARY_LOSSES = [
    0.006715348489118068,
    0.006715348489118068,
    0.6931471805599453,
    2.1269280110429727,
    2.1269280110429727,
]
# of the sum: sigmoid(z) - y
REFERENCE_BINARY_GRADIENT = [
    -0.0066928509242848554,
    0.0066928509242848554,
    -0.5,
    0.8807970779778824,
    -0.8807970779778824,
]
