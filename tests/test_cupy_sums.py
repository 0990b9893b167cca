"""Sums over rows, independent sigmoids and rows along any axis on the GPU's kernels, against NumPy and the oracle."""

import dataclasses

import cupy  # the emulation, where there is no GPU: conftest sees to it
import emulation
import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import ON_GPU
from makers import (
    FLOAT_DTYPES,
    SPECIAL_BINARY,
    SPECIAL_ROWS,
    binary_logits,
    binary_targets,
    class_weight,
    labels,
    logits,
    probabilities,
    soft_labels,
)
from oracle import assert_close

from gpuxent._records import DIVERGENCES, NO_CLASS, RowStats
from gpuxent.backends import _cupy_sums as sums
from gpuxent.backends import _numpy

pytestmark = [pytest.mark.gpu] if ON_GPU else []

DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True)
def nothing_written_beside_an_array():
    yield
    emulation.check_canaries()


def put(array, how="C"):
    """To the device, in the layout `how`; the same values."""
    return LAYOUTS[how](np.asarray(array))


def _every_second_column(array):
    wide = np.repeat(array, 2, axis=-1)
    wide[..., ::2] = np.nan if array.dtype.kind in "fV" else 77  # where nothing may be read
    return cupy.asarray(wide)[..., 1::2]


LAYOUTS = {
    "C": cupy.asarray,
    "transposed": lambda array: cupy.asarray(np.ascontiguousarray(array.T)).T,
    "reversed": lambda array: cupy.asarray(np.ascontiguousarray(array[..., ::-1]))[..., ::-1],
    "rows reversed": lambda array: cupy.asarray(np.ascontiguousarray(array[::-1]))[::-1],
    "every second column": _every_second_column,
}


def get(value):
    """Arrays and records back to NumPy."""
    if dataclasses.is_dataclass(value):
        return type(value)(**{name: get(field) for name, field in vars(value).items()})
    return tuple(map(get, value)) if isinstance(value, tuple) else value.get()


def stats_of(rows):
    """The RowStats of host rows, on the device."""
    return RowStats(**{name: put(values) for name, values in vars(_numpy.row_stats(rows)).items()})


def work_dtype(dtype):
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


# ---- numbers as they are stored ----


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_every_16_bit_number_is_read_and_written(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    read = get(sums.take_label(put(every[:, None]), put(np.zeros(2**16, np.int64))))
    with np.errstate(invalid="ignore"):
        assert np.array_equal(read, every.astype(np.float64), equal_nan=True)

    to = "to_half" if dtype is np.float16 else "to_bfloat16"
    write = sums._elementwise("float64 x", "uint16 out", f"out = {to}(x)", "write")
    finite = read[np.isfinite(read)]
    assert np.array_equal(get(write(put(finite))).view(dtype), finite.astype(dtype))
    low = np.unique(np.abs(finite))
    middle = (low[:-1] + low[1:]) / 2
    for sign in (1, -1):
        for x, nearest in ((np.nextafter(middle, 0), low[:-1]), (np.nextafter(middle, INF), low[1:])):
            assert np.array_equal(get(write(put(sign * x))).view(dtype), (sign * nearest).astype(dtype))
        ties = get(write(put(sign * middle)))
        assert (ties % 2 == 0).all()
        assert np.isin(ties, [(sign * low).astype(dtype).view(np.uint16)]).all()
    beyond = low[-1] + (low[-1] - low[-2]) * np.array([0.49, 0.5, 1e9])
    assert np.array_equal(get(write(put(beyond))).view(dtype).astype(np.float64), [low[-1], INF, INF])
    assert np.isnan(get(write(put(np.array([NAN, -NAN])))).view(dtype).astype(np.float64)).all()


def test_float32_is_read_and_written():
    rng = np.random.default_rng(0)
    bits = np.concatenate([rng.integers(0, 2**32, 20000), np.arange(100), 0x7F7FFF00 + np.arange(500)])
    every = bits.astype(np.uint32).view(np.float32)
    read = get(sums.take_label(put(every[:, None]), put(np.zeros(every.size, np.int64))))
    write = sums._elementwise("float64 x", "float32 out", "out = to_float(x)", "write")
    with np.errstate(all="ignore"):
        assert np.array_equal(read, every.astype(np.float64), equal_nan=True)
        for x in (read, read * (1 + 2**-24), read * (1 - 2**-25), read * 1e-30, rng.normal(0, 1e-44, 5000)):
            assert np.array_equal(get(write(put(x))), x.astype(np.float32), equal_nan=True)


# ---- divergences ----


def divergence_of(name, *rows, owner=sums):
    return getattr(owner.divergence_sums(*rows, divergences=(name,)), name)


@DTYPES
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_pairs_of_probs(divergence, dtype):
    p, q = soft_labels(20, 200, dtype, seed=1), soft_labels(20, 200, dtype, seed=2)
    slack = np.abs(p.astype(np.float64).sum(1) - 1).max() + np.abs(q.astype(np.float64).sum(1) - 1).max()
    reference = divergence_of(divergence, p, q, owner=_numpy)
    truth = TRUTH[divergence](p, q).astype(np.float64)
    finite = np.isfinite(truth)
    for how in LAYOUTS:
        actual = get(divergence_of(divergence, put(p), put(q, how)))
        assert_close(actual, reference, 8, np.float64, floor=1e-3)
        assert np.array_equal(np.isfinite(actual), finite)
        assert (np.abs(actual[finite] - truth[finite]) <= 4 * slack + 1e-13).all()


TRUTH = {
    "kl": oracle.kl_divergence_from_probs,
    "reverse_kl": lambda p, q: oracle.kl_divergence_from_probs(q, p),
    "js": oracle.js_divergence_from_probs,
    "tv": oracle.total_variation_from_probs,
}


def test_equal_probabilities_diverge_by_0():
    probs = soft_labels(10, 50, np.float32)
    for divergence in DIVERGENCES:
        assert (get(divergence_of(divergence, put(probs), put(probs))) == 0).all()


def test_probabilities_that_are_close():
    rng = np.random.default_rng(0)
    p = soft_labels(10, 50, np.float64)
    q = p * (1 + 1e-7 * rng.normal(0, 1, p.shape))
    assert_close(get(divergence_of("js", put(p), put(q))), oracle.js_divergence_from_probs(p, q), 32, np.float64)


@pytest.mark.parametrize("tiny", [1e-8, 1e-17, 1e-40, 1e-320, 0])
def test_probabilities_far_apart(tiny):
    """log1p((p - q) / q) has lost such a p: the term would be -inf and then 0, where it is q."""
    p, q = np.array([[tiny, 1 - tiny], [0.5, 0.5]]), np.array([[0.5, 0.5], [tiny, 1 - tiny]])
    for divergence in DIVERGENCES:
        assert_close(get(divergence_of(divergence, put(p), put(q))), TRUTH[divergence](p, q), 4, np.float64)


# ---- sums over rows of probabilities and labels ----


@DTYPES
def test_cross_sums(dtype):
    weights, probs = soft_labels(15, 130, np.float32, seed=1), soft_labels(15, 130, dtype, seed=2)
    scale = class_weight(130)
    for one in (1.0, np.float64(2.5), scale, put(scale), put(np.array(0.5))):
        host = one if np.isscalar(one) or isinstance(one, np.ndarray) else get(one)
        expected = _numpy.cross_sums(weights, probs, scale=host)
        for how in LAYOUTS:
            assert_close(get(sums.cross_sums(put(weights), put(probs, how), scale=one)), expected, 8, np.float64)
    assert_close(get(sums.cross_sums(put(probs), put(probs))), oracle.entropy_from_probs(probs), 8, np.float64)


def test_cross_sums_of_special_values():
    p = np.array([[0, 1], [0, 0.5], [1e-40, 1], [NAN, 1]], np.float32)
    weights = np.array([[0, 1], [1, 0], [1, 0], [1, 0]], np.float32)
    actual = get(sums.cross_sums(put(weights), put(p)))
    assert_close(actual, np.array([0, INF, -np.log(p[2, 0].astype(float)), NAN]), 2, np.float64)
    assert not np.signbit(actual[0])


@DTYPES
def test_row_sums(dtype):
    p = probabilities(20, 70, dtype).astype(np.float64)
    p[3, 5], p[4, 0], p[5, 69], p[6, 6] = -0.25, NAN, 1.5, -1
    p = p.astype(dtype)
    for options in ({}, {"high": 1.0}, {"high": 1.0, "ignore": -1.0}):
        expected, _ = _numpy.row_sums(p, **options)
        for how in LAYOUTS:
            outside, total = get(sums.row_sums(put(p, how), **options))
            assert outside.dtype == np.int64
            assert np.array_equal(outside, expected)
            assert_close(total, p.astype(np.longdouble).sum(1), 8, np.float64, floor=1.0)


def test_more_equal_float16_than_float16_can_count():
    """Summed in float16, 1 + ... stops at 2048 and exp(0) + ... overflows above 65504."""
    vocab = 70000
    ones = put(np.ones((vocab, 2), np.float16)).T
    outside, total = get(sums.row_sums(ones))
    assert (total == vocab).all()
    assert (outside == 0).all()
    top, rest, argmax, _ = get(sums.strided_row_stats(ones))
    assert (top == 1).all()
    assert (argmax == 0).all()
    assert_close(rest, np.full(2, vocab - 1.0), 4, np.float64)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint64, np.float16, np.float64], ids=lambda d: np.dtype(d).name)
def test_labels_as_rows(dtype):
    rng = np.random.default_rng(0)
    rows = np.eye(9, 30, 4)[rng.permutation(9)]
    rows[2] = 0
    rows[4, 7:9] = 1
    rows = rows.astype(dtype)
    if dtype is not bool:
        rows[5, 3] = 3
    if np.dtype(dtype).kind == "f":
        rows[6, :2] = -1, NAN
    for how in LAYOUTS:
        found = get(sums.onehot_sums(put(rows, how), 11))
        for actual, expected in zip(found, _numpy.onehot_sums(rows, 11), strict=True):
            assert actual.dtype == np.float64
            assert np.array_equal(actual, expected)
        outside, total = get(sums.row_sums(put(rows, how), high=1.0, ignore=3))
        assert np.array_equal(outside, _numpy.row_sums(rows, high=1.0, ignore=3)[0])
        assert np.array_equal(total, rows.sum(axis=1, dtype=float), equal_nan=True)


@DTYPES
def test_take_label(dtype):
    x = logits(12, 40, dtype)
    at = np.array([0, 39, 5, -1, -2, 17, 3, 22, 40, 41, 2**40, 8])
    for start in (0, 5):
        inside = (at >= start) & (at - start < 40)
        expected = np.where(inside, x[np.arange(12), np.where(inside, at - start, 0)].astype(float), 0)
        for how in LAYOUTS:
            assert np.array_equal(get(sums.take_label(put(x, how), put(at), start)), expected)
    assert get(sums.take_label(put(x[2]), put(np.array(4)))) == x[2, 4]


# ---- independent sigmoids ----

WEIGHTS = {
    "none": {"pos_weight": 1.0, "class_weight": 1.0},
    "vectors": {"pos_weight": np.linspace(0, 3, 30), "class_weight": np.linspace(1, 2, 30)},
}


@DTYPES
@pytest.mark.parametrize("from_probs", [False, True], ids=["logits", "probs"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_binary_losses_and_sums(weights, from_probs, dtype):
    x, y = binary_logits((12, 30), dtype), binary_targets((12, 30), np.float32, ignore_index=-1)
    options = WEIGHTS[weights] | {"ignore_index": -1.0}
    if from_probs:
        x = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(dtype)
    truth = (oracle.binary_losses_from_probs if from_probs else oracle.binary_losses)(x, y, **options)
    expected, expected_counts = _numpy.binary_sums(x, y, from_probs=from_probs, **options)
    for how in LAYOUTS:
        losses = get(sums.binary_losses(put(x, how), put(y), from_probs=from_probs, **options))
        assert losses.dtype == work_dtype(dtype)
        assert_close(losses, truth, 4, work_dtype(dtype))
        total, counts = get(sums.binary_sums(put(x), put(y, how), from_probs=from_probs, **options))
        assert_close(total, expected, 8, np.float64)
        assert np.array_equal(counts, expected_counts)


@DTYPES
def test_binary_grad(dtype):
    x, y = binary_logits((12, 30), dtype), binary_targets((12, 30), np.float32, ignore_index=-1)
    options = WEIGHTS["vectors"] | {"ignore_index": -1.0}
    truth = oracle.binary_cross_entropy_grad(x, y, reduction="sum", **options).reshape(12, 30)
    whole = np.linspace(-1, 1, 360).reshape(12, 30)
    for scale in (0.25, put(np.array(0.25)), whole, put(whole)):
        host = scale if np.isscalar(scale) or isinstance(scale, np.ndarray) else get(scale)
        for how in LAYOUTS:
            in_place = put(x, how)
            for out in (None, put(np.zeros_like(x), how), in_place):
                actual = sums.binary_grad(in_place, put(y), scale, out=out, **options)
                assert out is None or actual is out
                assert actual.dtype == dtype
                # soft targets: (1 - y) sigmoid(x) and y sigmoid(-x) may cancel
                assert_close(get(actual), truth * host, 2, dtype, floor=float(np.abs(truth).max()) / 8)


@DTYPES
@pytest.mark.parametrize("case", SPECIAL_BINARY, ids=lambda case: case.name)
def test_special_binary_values(case, dtype):
    x, y = put(np.array([[case.logit]]).astype(dtype)), put(np.array([[case.target]]))
    options = {"pos_weight": 1.0, "class_weight": 1.0, "ignore_index": None} | case.options
    losses = sums.binary_losses(x, y, from_probs=False, **options)
    total, _ = sums.binary_sums(x, y, from_probs=False, **options)
    assert_close(get(losses).astype(np.float64), np.array([[case.loss]]), 1, np.float32)
    assert_close(get(total), np.array([case.loss]), 4, np.float64)
    assert_close(get(sums.binary_grad(x, y, 1.0, **options)), np.array([[case.gradient]]), 1, dtype)


def test_a_nan_counts_whatever_its_weight():
    x, y, options = put(np.array([[NAN, 0.5]])), put(np.array([[1.0, 1.0]])), {"pos_weight": 1.0, "ignore_index": None}
    for from_probs in (False, True):
        total, _ = sums.binary_sums(x, y, class_weight=np.array([0.0, 1.0]), from_probs=from_probs, **options)
        assert np.isnan(get(total)).all()
    assert np.isnan(get(sums.binary_grad(x, y, 1.0, class_weight=np.array([0.0, 1.0]), **options))[0, 0])


@pytest.mark.parametrize("dtype", [bool, np.int16, np.uint64, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_targets_of_any_dtype(dtype):
    x, y = binary_logits((6, 5), np.float32), binary_targets((6, 5), np.int64, soft=False)
    options = {"pos_weight": 2.0, "class_weight": 1.0, "ignore_index": None, "from_probs": False}
    expected = sums.binary_losses(put(x), put(y), **options)
    assert np.array_equal(get(sums.binary_losses(put(x), put(y.astype(dtype)), **options)), get(expected))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("ignore", [0.1, 2.1, -1, 1e300])
def test_ignore_index_is_what_it_would_be_among_the_targets(ignore, dtype):
    with np.errstate(over="ignore"):
        y = np.array([[ignore, 1]]).astype(dtype)
    options = {"pos_weight": 1.0, "class_weight": 1.0, "ignore_index": ignore, "from_probs": False}
    total, counts = get(sums.binary_sums(put(np.array([[1.0, 2.0]])), put(y), **options))
    assert counts == 1
    assert_close(total, np.log1p(np.exp([-2.0])), 4, np.float64)


# ---- rows along any axis ----


@DTYPES
@pytest.mark.parametrize("vocab", [1, 2, 37, 5000])
def test_strided_row_stats(vocab, dtype):
    x = logits(32, vocab, dtype, seed=vocab) if vocab > 1 else np.linspace(-500, 500, 16)[:, None].astype(dtype)
    label = labels(x, ignore=False, on_masked=True)
    label_logit = x[np.arange(len(x)), label].astype(np.float64)
    losses, entropies, argmaxes = oracle.row_losses(x, label)[0], oracle.entropy(x), oracle.argmax_rows(x)
    cases = [("forward", how) for how in LAYOUTS] + [(order, "transposed") for order in emulation.ORDERS[1:]]
    for order, how in cases:
        with emulation.schedule(order):
            top, rest, argmax, moment = get(sums.strided_row_stats(put(x, how), also=("moment",)))
        assert np.array_equal(top, x.astype(np.float64).max(axis=1))
        assert np.array_equal(argmax, argmaxes)
        assert_close(np.log1p(rest) + (top - label_logit), losses, 4, np.float64)
        assert_close(np.log1p(rest) - moment / (1 + rest), entropies, 8, np.float64)


def test_thousands_of_equal_logits_and_a_maximum_after_them():
    """Every addition of the same number to a sum may be rounded the same way."""
    x = np.full((2, 40000), -1.5)
    x[0, -1], x[1, [-300, -1]] = 9.25, (9.0, 9.25)
    _, rest, _, moment = get(sums.strided_row_stats(put(x, "transposed"), also=("moment",)))
    assert_close(np.log1p(rest), oracle.row_losses(x, np.array([39999, 39999]))[0], 4, np.float64)
    assert_close(np.log1p(rest) - moment / (1 + rest), oracle.entropy(x), 4, np.float64)


@pytest.mark.parametrize("case", SPECIAL_ROWS, ids=lambda case: case.name)
def test_strided_row_stats_of_special_values(case):
    x = np.array([case.logits, case.logits], np.float64)
    expected = _numpy.row_stats(x, also=("moment",))
    top, rest, argmax, moment = get(sums.strided_row_stats(put(x, "transposed"), also=("moment",)))
    assert np.array_equal(top, expected.max, equal_nan=True)
    assert_close(rest, expected.rest, 4, np.float64)
    if not np.isnan(rest).any():
        assert np.array_equal(argmax, expected.argmax)
        assert_close(moment, expected.moment, 4, np.float64)


def test_an_argmax_is_the_lowest_class_and_no_moment_is_computed_unasked():
    x = np.zeros((3, 1000))
    x[0, [400, 17, 999]] = 5
    x[1] = -INF
    _, rest, argmax, moment = get(sums.strided_row_stats(put(x, "reversed")))
    assert np.array_equal(argmax, [17, 0, 0])
    assert np.array_equal(rest[1:], [-1, 999])
    assert (moment == 0).all()


def test_states_merge_as_row_stats_do():
    """Two classes, and one that has not been seen yet: whatever they are, and in any order."""
    values = [-INF, -1e300, -100.0, -32.0, 0.0, 5e-324, 31.9, 32.1, 709.0, 1e300, INF, NAN]
    pairs = np.array([[a, b] for a in values for b in values])
    records = [
        RowStats.identity((len(pairs),)),
        *(_numpy.row_stats(pairs[:, [i]]) for i in range(2)),
    ]
    merged = RowStats.merge_all(records)
    top, rest, argmax, _ = get(sums.strided_row_stats(put(pairs, "transposed")))
    assert np.array_equal(top, merged.max, equal_nan=True)
    assert_close(rest, merged.rest, 2, np.float64)
    assert (argmax[~np.isnan(rest)] < NO_CLASS).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_of_three(axis):
    x = logits(60, 7, np.float32).reshape(4, 15, 7)
    rows = np.moveaxis(x, axis, -1)
    device = put(x).transpose([i for i in range(3) if i != axis] + [axis])
    top, rest, _, _ = sums.strided_row_stats(device)
    stats = RowStats(top, rest, *[None] * 6)  # all that they look at
    flat = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
    assert_close((get(top) + np.log1p(get(rest))).ravel(), oracle.logsumexp_rows(flat), 4, np.float64, floor=1.0)
    log_p, p = sums.strided_log_probs(device, stats), sums.strided_softmax(device, stats)
    assert_close(get(log_p).reshape(flat.shape), oracle.log_softmax_rows(flat), 1, np.float32)
    assert_close(get(p).reshape(flat.shape), oracle.softmax_rows(flat), 1, np.float32)


@DTYPES
def test_log_probs_and_softmax(dtype):
    x, weight = logits(32, 200, dtype), np.linspace(-1, 2, 32)
    true_log_p, true_p = oracle.log_softmax_rows(x), oracle.softmax_rows(x)
    for how in LAYOUTS:
        device = put(x, how)
        top, rest, _, _ = sums.strided_row_stats(device)
        stats = RowStats(top, rest, *[None] * 6)  # all that they look at
        p, weighted = sums.strided_softmax(device, stats), sums.strided_softmax(device, stats, put(weight))
        log_p = sums.strided_log_probs(device, stats, out=device)
        assert log_p is device
        assert p.dtype == dtype
        assert_close(get(log_p), true_log_p, 1, dtype)
        assert_close(get(p), true_p, 4, dtype)
        assert_close(get(weighted), true_p * weight[:, None], 4, dtype)


# ---- everywhere ----


def test_views_of_one_number():
    rows = cupy.broadcast_to(cupy.asarray(np.array(0.25, np.float32)), (3, 4))
    outside, total = get(sums.row_sums(rows))
    assert (total == 1).all()
    assert (outside == 0).all()
    _, rest, _, _ = get(sums.strided_row_stats(rows))
    assert_close(rest, np.full(3, 3.0), 2, np.float64)
    assert (get(divergence_of("kl", rows, rows)) == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_zero_rows(shape):
    x, y = put(np.empty(shape, np.float16)), put(np.empty(shape))
    stats = RowStats(*[put(np.empty(shape[:-1]))] * 8)
    binary = {"pos_weight": 1.0, "class_weight": np.ones(5), "ignore_index": None}
    rows = [
        *(divergence_of(name, x, y) for name in DIVERGENCES),
        sums.cross_sums(x, y),
        *sums.row_sums(x),
        *sums.onehot_sums(x),
        sums.take_label(x, put(np.empty(shape[:-1], np.int64))),
        *sums.binary_sums(x, y, from_probs=True, **binary),
        *sums.strided_row_stats(x),
    ]
    assert all(values.shape == shape[:-1] for values in rows)
    wholes = [
        sums.binary_losses(x, y, from_probs=False, **binary),
        sums.binary_grad(x, y, 1.0, **binary),
        sums.strided_log_probs(x, stats),
        sums.strided_softmax(x, stats),
    ]
    assert all(values.shape == shape for values in wholes)


def test_nothing_waits_for_the_device():
    x, y, at = put(logits(4, 30)), put(binary_targets((4, 30))), put(np.zeros(4, np.int64))
    stats, weight = stats_of(logits(4, 30)), put(np.ones(30))
    binary = {"pos_weight": weight, "class_weight": 1.0, "ignore_index": -1.0}
    before = emulation.arrays.Counter.synchronisations
    sums.divergence_sums(y, y)
    sums.cross_sums(y, y, scale=weight)
    sums.row_sums(y, high=1.0)
    sums.onehot_sums(y)
    sums.take_label(x, at)
    sums.binary_losses(x, y, from_probs=False, **binary)
    sums.binary_sums(x, y, from_probs=False, **binary)
    sums.binary_grad(x, y, put(np.array(0.5)), **binary)
    sums.strided_row_stats(x)
    sums.strided_log_probs(x, stats)
    sums.strided_softmax(x, stats, put(np.ones(4)))
    assert emulation.arrays.Counter.synchronisations == before
