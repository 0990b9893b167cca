"""Functions of vectors and exact sums as CUDA kernels: what NumPy makes of the same function, on emulated CUDA."""

import ctypes
import importlib
import itertools
import math
from functools import partial

import emulation
import numpy as np
import pytest
from conftest import ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuxent import _arguments, _row_loss, normalizers
from gpuxent._records import NO_CLASS, ExactSum, RowStats
from gpuxent.backends import _numpy
from gpuxent.evaluation.statistics import totals

pytestmark = pytest.mark.skipif(ON_GPU, reason="compares bits with the C library's functions, which the emulation uses")

INTEGERS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)


@pytest.fixture(scope="module")
def cupy():
    return importlib.import_module("cupy")


@pytest.fixture(scope="module")
def rules(cupy):
    return importlib.import_module("gpuxent.backends._cupy_rules")


@pytest.fixture(autouse=True)
def nothing_written_beside_an_array(cupy):
    yield
    emulation.check_canaries()


def moved(cupy, value):
    """Arrays to the GPU, in records too; numbers as they are."""
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(*(moved(cupy, field) for field in vars(value).values()))
    return cupy.asarray(value) if isinstance(value, np.ndarray) and value.ndim else value


def assert_same(found, expected):
    """Shape, type, and every bit but those of a NaN."""
    expected = np.broadcast_to(expected, found.shape)
    assert found.dtype == expected.dtype
    found = found.get()
    assert np.array_equal(found, expected, equal_nan=found.dtype.kind == "f")
    if found.dtype.kind == "f":
        numbers = ~np.isnan(found)
        assert np.array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


@pytest.fixture
def on_cpu(monkeypatch):
    """`_numpy.map_rows` with the C library's functions, which the emulation has too: NumPy's differ in the last bit."""
    library = ctypes.CDLL(None)

    def call(*arguments, **options):
        with monkeypatch.context() as patch:
            for name in ("exp", "log", "log1p"):
                function = getattr(library, name)
                function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
                patch.setattr(np, name, np.vectorize(function, otypes=[np.float64]))
            return _numpy.map_rows(*arguments, **options)

    return call


SPECIAL = np.array([-np.inf, -1e308, -2.5, -0.0, 0.0, 5e-324, 1e-300, 0.3, 1.0, 700.0, 1e308, np.inf, np.nan])


def vector(seed, rows=300):
    """Special values and others in equal parts."""
    random = np.random.default_rng(seed)
    return np.where(random.random(rows) < 0.5, random.choice(SPECIAL, rows), random.normal(0, 3, rows))


def statistics(seed=0, rows=300):
    random = np.random.default_rng(seed)
    rest = np.where(random.random(rows) < 0.7, np.abs(vector(seed + 1, rows)), random.choice([-1.0, np.nan], rows))
    values = [vector(seed, rows), rest, *(vector(seed + i, rows) for i in range(2, 5))]
    return RowStats(*values, random.integers(0, 9, rows), -np.abs(vector(seed + 5, rows)), random.integers(0, 9, rows))


def row_labels(seed=0, rows=300):
    return np.random.default_rng(seed).integers(-2, 9, rows)


STATS, LABELS, WEIGHTS = statistics(), row_labels(), np.where(row_labels(1) < 3, 0.0, np.abs(vector(9)))


def losses_rule(smoothing=0.0, z_loss=0.0, has_spread=False):
    return partial(_row_loss.row_losses, smoothing=smoothing, z_loss=z_loss, has_spread=has_spread)


CASES = {
    "losses": (losses_rule(), (STATS, LABELS, 1.0), 2),
    "losses, z": (losses_rule(z_loss=1e-4), (STATS, LABELS, 1.0), 2),
    "losses, smoothing": (losses_rule(0.1, 0.01, True), (STATS, LABELS, 1.0), 2),
    "losses, smoothing 1": (losses_rule(1.0, 0.0, True), (STATS, LABELS, 1.0), 2),
    "losses, weights": (losses_rule(), (STATS, LABELS, WEIGHTS), 2),
    "losses, all": (losses_rule(0.3, 2.0, True), (STATS, LABELS, WEIGHTS), 2),
    "losses, soft": (losses_rule(has_spread=True), (STATS, LABELS, None), 2),
    "no losses": (losses_rule(), (STATS, LABELS, None), 2),
    "weights": (partial(_row_loss.grad_weights, smoothing=0.0, z_loss=0.0), (LABELS, 1.0, 1.0, 1.0, 1.0), 3),
    "weights, all": (
        partial(_row_loss.grad_weights, smoothing=0.2, z_loss=0.3),
        (LABELS, WEIGHTS, vector(4), np.float64(3.0), np.array(0.0)),
        3,
    ),
    "weights, soft": (
        partial(_row_loss.grad_weights, smoothing=0.2, z_loss=0.0),
        (LABELS, None, np.float64(2.5), 7, 0),
        3,
    ),
    "summary": (_row_loss.summary, (STATS,), 3),
    "summary, no argmax": (
        _row_loss.summary,
        (RowStats(**vars(STATS) | {"argmax": np.full((), NO_CLASS), "rank": np.zeros((), np.int64)}),),
        3,
    ),
    "entropy": (_row_loss.entropy, (STATS,), 1),
    "from probs": (_row_loss.losses_from_probs, (np.abs(vector(6)), LABELS, WEIGHTS), 1),
    "over": (_row_loss.over, (vector(7), vector(8)), 1),
    "over a number": (_row_loss.over, (vector(7), np.float64(0.0)), 1),
    "class weights": (partial(_row_loss.take_class_weight, np.linspace(0, 2, 9)), (LABELS,), 1),
    "evaluation": (totals.measures, (STATS, LABELS), 5),
    "ones": (np.ones_like, (vector(3),), 1),
    "softmax alone": (normalizers._softmax_alone, (LABELS,), 3),
}


@pytest.mark.parametrize(("function", "arguments", "outputs"), CASES.values(), ids=CASES)
def test_rules(function, arguments, outputs, rules, cupy, on_cpu):
    before = cupy.synchronisations
    found = rules.map_rows(function, *(moved(cupy, a) for a in arguments), outputs=outputs)
    assert cupy.synchronisations == before
    expected = on_cpu(function, *arguments, outputs=outputs)
    for a, b in zip(*((found, expected) if outputs > 1 else ([found], [expected])), strict=True):
        assert a.shape == LABELS.shape
        assert_same(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("given", [np.float32, np.float64])
def test_values_in_the_dtype_of_results(dtype, given, rules, cupy):
    values = np.concatenate([vector(0), [1e-40, 1e39, 2.0**-149, 2.0**-150]])
    with np.errstate(all="ignore"):
        values = values.astype(given)
        expected = values.astype(dtype)
    found = rules.map_rows(partial(np.asarray, dtype=dtype), cupy.asarray(values), dtype=dtype)
    assert_same(found, expected)


# ---- checks ----


def class_check(ignore=-100, check=True, vocab=9, **how):
    return partial(_arguments.class_labels, vocab=vocab, ignore=ignore, check=check, **how)


IGNORE = (None, -100, -1, 3, 200, 255, -(2**63), 2**63 - 1, 2**64 - 1, 2**70, -(2**70))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_unchecked_labels(dtype, rules, cupy):
    info = np.iinfo(dtype)
    labels = np.array([info.min, info.max, 0, 8, 9, 3, *range(100, 128), *({-100, -1, 200, 254, 255})])
    labels = labels.astype(dtype) if info.max < 2**63 else np.array([0, 8, 9, 3, 2**63, 2**64 - 1, 2**64 - 2], dtype)
    before = cupy.synchronisations
    for ignore in IGNORE:
        for vocab in (9, 255, 2**40):
            check = class_check(ignore, check=False, vocab=vocab)
            found = rules.map_rows(check, cupy.asarray(labels), dtype=np.int64, at=True)
            expected = [-1 if label == ignore else label if 0 <= label < vocab else -2 for label in map(int, labels)]
            assert found.dtype == np.int64
            assert cupy.synchronisations == before
            assert found.get().tolist() == expected == _numpy.map_rows(check, labels, at=True).tolist()
            before = cupy.synchronisations


@pytest.mark.parametrize("dtype", INTEGERS)
def test_checked_labels(dtype, rules, cupy):
    ignore = -100 if np.iinfo(dtype).min < 0 else 100
    labels = np.array([[0, 8, 3], [ignore, 5, 8]]).astype(dtype)
    before = cupy.synchronisations
    found = rules.map_rows(class_check(ignore), cupy.asarray(labels), dtype=np.int64, at=True)
    assert cupy.synchronisations == before + 1
    assert found.get().tolist() == [[0, 8, 3], [-1, 5, 8]]


def counts(*values):
    return np.array(values, np.int64)


GOOD_SUMS = np.array([1.0, 0.99995, 1.00005])
distributions = partial(_arguments.distributions, name="probs", tolerance=1e-4)
in_unit_interval = partial(_arguments.unit_interval, name="targets", ignore=None, single=False)

BAD = {
    "a label": (class_check(), np.array([3, -100, 9, -1]), "labels[2] is 9, expected a class in [0, 9)"),
    "uint64": (class_check(None), np.array([3, 2**64 - 1], np.uint64), "labels[1] is 18446744073709551615"),
    "uint8": (class_check(-100), np.array([156], np.uint8), "labels[0] is 156"),
    "2-d": (class_check(), np.array([[0, 1], [2, -7]]), "labels[1, 1] is -7"),
    "0-d": (class_check(), np.array(9), "labels is 9"),
    "negative": (distributions, (counts(0, 2, 0), GOOD_SUMS), "probs[1, :] has 2 entries negative"),
    "NaN": (distributions, (counts(0, 0, 0), np.array([1, 1, np.nan])), "probs[2, :] has a NaN"),
    "sum": (distributions, (counts(0, 0, 0), np.array([1, 1.1, np.inf])), "probs[1, :] sums to 1.1"),
    "one-hot": (
        _arguments.onehot_labels,
        (counts(1, 0), counts(0, 1), counts(2, 0)),
        "labels[1, :] has 0 entries equal to 1 and 1 entry other than 0 and 1",
    ),
    "outside": (in_unit_interval, counts(0, 3), "targets[1, :] has 3 entries outside, expected numbers in [0, 1]"),
}


@pytest.mark.parametrize(("check", "vectors", "message"), BAD.values(), ids=BAD)
def test_a_bad_value_raises_as_on_the_cpu(check, vectors, message, rules, cupy):
    vectors = vectors if isinstance(vectors, tuple) else (vectors,)
    with pytest.raises((IndexError, ValueError)) as on_cpu:
        _numpy.map_rows(check, *vectors, at=True)
    with pytest.raises(on_cpu.type) as on_gpu:
        rules.map_rows(check, *map(cupy.asarray, vectors), dtype=np.int64, at=True)
    assert str(on_gpu.value) == str(on_cpu.value)
    assert message in str(on_gpu.value)


GOOD = {
    "distributions": (distributions, (counts(0, 0, 0), GOOD_SUMS), [-2, -2, -2]),
    "one-hot": (_arguments.onehot_labels, (counts(1, 1), counts(0, 0), np.array([2.0, 5.0])), [2, 5]),
    "unit interval": (in_unit_interval, (counts(0, 0),), [0, 0]),
}


@pytest.mark.parametrize(("check", "vectors", "expected"), GOOD.values(), ids=GOOD)
def test_good_values_pass(check, vectors, expected, rules, cupy):
    found = rules.map_rows(check, *map(cupy.asarray, vectors), dtype=np.int64, at=True)
    assert found.dtype == np.int64
    assert found.get().tolist() == expected


def test_a_doubt_that_only_the_gpu_has(rules, cupy):
    def check(values, *, start):
        return values if isinstance(values, np.ndarray) else np.where((values > 1).any(), 0, values)

    with pytest.raises(RuntimeError, match="check finds a bad value on the GPU and none on the CPU"):
        rules.map_rows(check, cupy.asarray([0, 1, 2]), at=True)


# ---- arguments ----


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 3), (129,)])
def test_any_shape(shape, rules, cupy):
    values = np.random.default_rng(0).normal(0, 1, shape)
    number = cupy.asarray(np.array(0.5))  # of shape (): one for all rows
    found = rules.map_rows(_row_loss.over, cupy.asarray(values), number)
    assert found.shape == shape
    assert np.array_equal(found.get(), values / 0.5)
    first, second = rules.map_rows(lambda x: (x + 1.0, 0), cupy.asarray(values), outputs=2)
    assert (first.shape, second.shape, second.dtype) == (shape, shape, np.int64)


def test_any_layout(rules, cupy):
    values = np.arange(12.0).reshape(3, 4)
    for view in (lambda a: a.T, lambda a: a[:, ::2], lambda a: a[::-1], lambda a: a[:, 1]):
        given = view(cupy.asarray(values))
        ones = cupy.ones(given.shape)
        assert np.array_equal(rules.map_rows(_row_loss.over, given, ones).get(), view(values))


def test_numbers_alone_stay_where_they_are(rules):
    found = rules.map_rows(_row_loss.over, np.array(3.0), np.float64(4.0))
    assert type(found) is np.ndarray
    assert found == 0.75


def test_numpy_vectors_beside_others_are_moved(rules, cupy):
    values = vector(1)
    found = rules.map_rows(_row_loss.over, values, cupy.asarray(vector(2)))
    assert_same(found, _numpy.map_rows(_row_loss.over, values, vector(2)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.bool_])
def test_tables(dtype, rules, cupy):
    table = np.array([1, 0, 3]).astype(dtype)
    for there in (table, cupy.asarray(table), table[::-1].copy()[::-1]):
        found = rules.map_rows(partial(_row_loss.take_class_weight, there), cupy.asarray(counts(2, -1, 0, 1, -2)))
        assert found.get().tolist() == [float(table[2]), 0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [*INTEGERS, np.float32, np.bool_])
def test_narrow_numbers_are_widened(dtype, rules, cupy):
    info = None if np.dtype(dtype).kind in "fb" else np.iinfo(dtype)
    values = np.array([0, 1, 1] if info is None else [info.min, info.max, 1], dtype)
    assert rules.map_rows(lambda x: x, cupy.asarray(values)).get().tolist() == values.astype(float).tolist()


NUMBERS = (-(2**70), -(2**63) - 1, -(2**63), -1, 0, 1, 127, 255, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_compared_as_integers(dtype, rules, cupy):
    info = np.iinfo(dtype)
    values = np.array([info.min, info.max, 0, 1], dtype)

    def compared(x):
        pairs = [(x == n, x != n, x < n, x <= n, x > n, x >= n, n > x) for n in NUMBERS]
        return tuple(itertools.chain(*pairs))

    outputs = 7 * len(NUMBERS)
    found = rules.map_rows(compared, cupy.asarray(values), outputs=outputs)
    expected = _numpy.map_rows(compared, values, outputs=outputs)
    assert [a.get().tolist() for a in found] == [b.tolist() for b in expected]


def test_arithmetic_as_in_numpy(rules, cupy, on_cpu):
    def everything(x, y, i, b):
        return (
            *(x + y, x - y, x * y, x / y, -x, 2 - x, x**2, i + 1, i - 2.5, i / 2, i * i, b * x),
            *(np.maximum(x, y), np.minimum(x, y), np.maximum(i, 3), np.abs(x), np.exp(x), np.log(x)),
            *(x == y, x != y, x < y, (x > 0) & b, (x > 0) | ~b, np.logical_not(b), np.isnan(x), np.full((), np.nan)),
            *(np.where(b, i, x), np.where(b, 1, 0), np.where(b, i, -1), np.zeros_like(i), np.ones_like(b)),
            *(i.astype(np.float64), x.astype(np.float32).astype(np.float64), b.astype(np.int64), np.where(b, b, False)),
        )

    arguments = vector(1), vector(2), row_labels(), vector(3) > 0
    with np.errstate(all="ignore"):
        outputs = len(everything(*arguments))
    found = rules.map_rows(everything, *map(cupy.asarray, arguments), outputs=outputs)
    for a, b in zip(found, on_cpu(everything, *arguments, outputs=outputs), strict=True):
        assert_same(a, b)


# ---- what is compiled ----


def test_other_numbers_compile_no_other_kernel(rules, cupy):
    labels, stats = cupy.asarray(LABELS), moved(cupy, STATS)

    def calls(smoothing, z_loss, vocab, denominator):
        rules.map_rows(losses_rule(smoothing, z_loss, True), stats, labels, 1.0, outputs=2)
        rules.map_rows(class_check(vocab=vocab, check=False), labels, dtype=np.int64, at=True)
        rule = partial(_row_loss.grad_weights, smoothing=smoothing, z_loss=z_loss)
        rules.map_rows(rule, labels, 1.0, np.float64(denominator), cupy.asarray(denominator), 1.0, outputs=3)

    calls(0.1, 0.01, 1000, 5.0)
    kernels = rules._kernel.cache_info().misses
    calls(0.2, 0.03, 2000, 6.0)
    assert rules._kernel.cache_info().misses == kernels
    traces = rules._rule.cache_info().misses
    calls(0.2, 0.03, 2000, 7.0)
    assert rules._rule.cache_info().misses == traces


def test_what_is_not_used_is_not_read(rules, cupy, on_cpu):
    stats = RowStats(**vars(moved(cupy, STATS)) | {"moment": cupy.ones((7, 2)), "argmax": None, "rank": 1.0})
    found, _ = rules.map_rows(losses_rule(), stats, cupy.asarray(LABELS), 1.0, outputs=2)
    assert_same(found, on_cpu(losses_rule(), STATS, LABELS, 1.0, outputs=2)[0])


UNTRACEABLE = {
    "decides": (lambda x: 1.0 if x > 0 else x, "decides by values of rows"),
    "sorts": (np.sort, "numpy.sort has no rule"),
    "sums": (lambda x: np.add.reduce(x), "numpy.add has no rule"),
    "rounds": (lambda x: np.floor(x), "numpy.floor has no rule"),
    "attribute": (lambda x: x.real, "no attribute 'real'"),
    "number": (lambda x: float(x), "float"),
    "array": (lambda x: np.asarray(x) + 1, "a row alone is no array"),
    "captured": (lambda x: x + np.arange(3.0), "it meets array"),
    "power": (lambda x: x**3, "only squares"),
    "mask": (lambda x: np.where(x, 1.0, 0.0), "takes numbers for bool"),
    "two": (lambda x: (x, x), "it meets"),
    "text": (lambda x: "x", "it meets 'x'"),
    "type": (lambda x: x.astype(np.int16), "no values of dtype int16"),
}


@pytest.mark.parametrize(("function", "message"), UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_what_cannot_be_made_a_kernel(function, message, rules, cupy):
    name = function.__name__.replace("<", r"\<")
    with pytest.raises(TypeError, match=f"^{name} cannot be made a kernel: .*{message}"):
        rules.map_rows(function, cupy.ones(3))


def test_vectors_that_do_not_fit(rules, cupy):
    add = np.add
    with pytest.raises(TypeError, match=r"an array of shape \(4,\) among rows of shape \(3,\)"):
        rules.map_rows(add, cupy.ones(3), cupy.ones(4))
    with pytest.raises(TypeError, match="no arrays of dtype float16"):
        rules.map_rows(add, cupy.ones(3), cupy.ones(3, np.float16))
    with pytest.raises(TypeError, match="mixes uint64 and int64"):
        rules.map_rows(add, cupy.ones(3, np.uint64), cupy.ones(3, np.int64))
    with pytest.raises(TypeError, match="has 1 outputs, expected 2"):
        rules.map_rows(lambda x: (x,), cupy.ones(3), outputs=2)
    with pytest.raises(TypeError, match="over cannot be made a kernel: unhashable"):
        rules.map_rows(_row_loss.over, cupy.ones(3), [1.0])


# ---- exact sums ----

finite = st.floats(allow_nan=False, allow_infinity=False)
tiny = st.integers(-40, 40).map(lambda n: n * 5e-324)
powers = st.integers(-1074, 1023).map(lambda e: 2.0**e)


def assert_total(rules, cupy, values, denominator=1.0):
    before = cupy.synchronisations
    found = rules.total(cupy.asarray(values), denominator)
    assert cupy.synchronisations == before
    assert (found.shape, found.dtype) == ((), np.float64)
    expected = _numpy.total(values, float(denominator))
    assert found.get().tobytes() == expected.tobytes() or (np.isnan(found.get()) and np.isnan(expected))


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.one_of(finite, tiny, powers, st.sampled_from([1.7976931348623157e308, 2.0**-1022])), max_size=40),
    st.one_of(st.integers(1, 2**40).map(float), finite.map(abs).filter(bool), powers),
    st.booleans(),
)
def test_totals(rules, cupy, values, denominator, cancelling):
    values = np.array(values + [-v for v in values[1:]] * cancelling, np.float64)
    assert_total(rules, cupy, values, denominator)
    assert_total(rules, cupy, -values, cupy.asarray(np.float64(denominator)))


@settings(deadline=None, max_examples=200)
@given(
    st.integers(2**52, 2**53 - 1),
    st.integers(1, 2**52).map(lambda n: 2 * n - 1),
    st.integers(-1180, 900),
    st.integers(-60, 60),
    st.sampled_from([0.0, 5e-324, -5e-324]),
)
def test_halfway_between_two_numbers(rules, cupy, quotient, denominator, exponent, scale, beside):
    """(2 quotient + 1) * denominator / 2, exactly: rounded to even, but not if there is anything beside."""
    product, pieces = (2 * quotient + 1) * denominator, [beside]
    for shift in range(0, 120, 40):
        piece = product >> shift & (2**40 - 1)
        if shift + exponent >= -1074:
            pieces.append(math.ldexp(float(piece), shift + exponent))
    assert_total(rules, cupy, np.array(pieces), math.ldexp(float(denominator), scale))


@pytest.mark.parametrize("exponent", range(0, 32, 3))
def test_whatever_lies_beside_the_middle_counts(exponent, rules, cupy):
    for distance in range(1, 140):
        for beside in (2.0**-distance, -(2.0**-distance)):
            values = np.array([2.0**53, 1.0, beside]) * 2.0**exponent
            assert_total(rules, cupy, values)
            assert_total(rules, cupy, 3 * values, 3.0)


LARGEST, SMALLEST = 1.7976931348623157e308, 5e-324
EDGES = [
    ([LARGEST, LARGEST], (1.0, 2.0, 4.0, 0.5)),
    ([LARGEST, 2.0**970], (1.0,)),  # in the middle between the largest and 2**1024
    ([LARGEST, 2.0**970, -SMALLEST], (1.0, 1 - 2.0**-53, 1 + 2.0**-52)),
    ([SMALLEST], (1.0, 1.5, 2.0, 2 - 2.0**-52, 2 + 2.0**-51, 3.0, SMALLEST, LARGEST)),
    ([SMALLEST] * 3, (2.0, 4.0, 6.0, 6 - 2.0**-50, 7.0, 2.0**-1022)),
    ([2.0**-1022, -SMALLEST], (1.0, 2.0, 2.0**-1074)),
    ([2.0**-1021, -SMALLEST], (2.0,)),  # rounds to the smallest that is normal
]


@pytest.mark.parametrize(("values", "denominators"), EDGES)
def test_totals_at_the_edges(values, denominators, rules, cupy):
    for denominator in denominators:
        assert_total(rules, cupy, np.array(values), denominator)
        assert_total(rules, cupy, -np.array(values), denominator)


@pytest.mark.parametrize("order", emulation.ORDERS)
@pytest.mark.parametrize("rows", [0, 1, 33, 2048, 2049, 5000])
def test_totals_of_many(order, rows, rules, cupy):
    random = np.random.default_rng(rows)
    values = random.normal(0, 1, rows) * 2.0 ** random.integers(-60, 60, rows)
    with emulation.schedule(order):
        assert_total(rules, cupy, values, float(max(rows, 1)))
        assert_total(rules, cupy, random.exponential(3, rows), np.float64(0.1))
        assert_total(rules, cupy, random.random(rows) < 0.3, 7.0)


@pytest.mark.parametrize("rows", [3, 4000])
def test_totals_of_what_is_not_finite(rows, rules, cupy):
    for special in ([np.inf], [-np.inf], [np.nan], [np.inf, -np.inf], [np.inf, np.inf, 1e308]):
        values = np.ones(rows)
        values[-len(special) :] = special
        assert_total(rules, cupy, values, 3.0)
        assert_total(rules, cupy, values, 0.0)


@pytest.mark.parametrize("denominator", [0.0, -0.0, 2, np.float32(2), -4.0])
def test_any_denominator(denominator, rules, cupy):
    for values in (np.array([]), np.array([1.0, 2.5]), np.array([-1.0])):
        assert_total(rules, cupy, values, denominator)
        assert_total(rules, cupy, values, cupy.asarray(denominator))


def test_totals_of_any_layout_and_type(rules, cupy):
    values = np.random.default_rng(0).normal(0, 1, (50, 60))
    for view in (values.T, values[:, ::2], values[::-1], values[0, 0]):
        assert rules.total(cupy.asarray(view)).item() == _numpy.total(np.asarray(view))
    given = cupy.asarray(values)
    assert rules.total(given.T[::2, 1:]).item() == _numpy.total(values.T[::2, 1:])
    for dtype in (np.float32, np.int32, np.uint8):
        other = (values * 50).astype(dtype)
        assert rules.total(cupy.asarray(other)).item() == ExactSum.of(other.astype(np.float64)).value
