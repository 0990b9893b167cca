"""Cross-entropy and its gradient against the oracle: precision, options, special values, layouts."""

import ml_dtypes
import numpy as np
import pytest
from makers import (
    FLOAT_DTYPES,
    KINDS_WITH_INF,
    LAYOUTS,
    REFERENCE_LOGITS,
    REFERENCE_LOGITS_GRADIENT,
    SPECIAL_BATCHES,
    SPECIAL_ROWS,
    class_weight,
    kinds_for,
    labels,
    layouts_for,
    logits,
    soft_labels,
    strided,
)
from oracle import assert_close, errors_in_eps
from oracle import cross_entropy as true_cross_entropy
from oracle import cross_entropy_grad as true_grad

import gpuxent as gx

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def work_dtype(dtype):
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def assert_gradient(actual, expected, dtype, scale=1.0):
    """Within rounding of the gradient's dtype, relative where it is large and absolute at eps * scale elsewhere.

    A softmax entry far below the maximum carries the rounding of its exponent, |x - max| eps: it is judged at `scale`.
    """
    assert actual.dtype == dtype
    assert_close(actual.reshape(expected.shape), expected, 8, dtype, floor=scale / 8)


@DTYPES
@pytest.mark.parametrize("vocab", [2, 3, 7, 257, 16384, 16385, 50257])
def test_row_losses_are_within_4_eps_of_the_truth(dtype, vocab, home):
    x = logits(20, vocab, dtype, seed=vocab)
    y = labels(x, seed=1)
    actual = home.compute(gx.cross_entropy(home.put(x), y, reduction="none"))
    assert actual.dtype == work_dtype(dtype)
    assert_close(actual, true_cross_entropy(x, y, reduction="none"), 4, work_dtype(dtype))


@DTYPES
def test_confident_rows_keep_their_digits(dtype, home):
    """p up to 1 - 1e-12, where 1 - p is lost in the dtype itself."""
    x = logits(64, 1000, dtype, kinds="peak")
    y = np.asarray(x, np.float64).argmax(axis=1)
    truth = true_cross_entropy(x, y, reduction="none")
    assert truth.min() < 1e-12
    assert_close(home.compute(gx.cross_entropy(home.put(x), y, reduction="none")), truth, 4, work_dtype(dtype))


@pytest.mark.parametrize("gap", [0.3, 8.05, 33.3, 80.1])
@pytest.mark.parametrize("low", [3, -45, 65, 10000])
def test_rounding_that_all_classes_share_does_not_add_up(gap, low):
    """Thousands of equal logits: a rounding error of x - max would be the same for each, not average out.

    Half an ulp of a gap above 8 is 4 eps, and all of the loss where a tile of such classes outweighs the one above it.
    """
    rng = np.random.default_rng(0)
    seconds = rng.uniform(low, low + 5, 100).astype(np.float32)
    x = np.repeat((seconds - rng.uniform(gap, gap + 0.1, 100)).astype(np.float32)[:, None], 16000, axis=1)
    x[:, 5] = seconds
    x[:, 7] = seconds + np.float32(20)  # a confident row: its loss is what the others leave
    y = np.full(100, 7)
    assert_close(gx.cross_entropy(x, y, reduction="none"), true_cross_entropy(x, y, reduction="none"), 4)


def test_adding_10000_changes_the_loss_by_the_rounding_of_the_logits_alone():
    x = np.random.default_rng(0).integers(-64, 64, (8, 5000)).astype(np.float32) / 8  # exact with 10000 added
    y = np.arange(8)
    options = {"label_smoothing": 0.1, "reduction": "none"}
    assert_close(gx.cross_entropy(x + 10000, y, **options), gx.cross_entropy(x, y, **options), 2)


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"class_weight": True},
    {"class_weight": True, "label_smoothing": 0.3},
    {"z_loss": 1e-3},
    {"softcap": 15.0},
    {"temperature": 0.7},
    {"class_weight": True, "label_smoothing": 0.05, "z_loss": 1e-2, "softcap": 30.0, "temperature": 1.5},
]


def with_weights(options, vocab):
    return options | ({"class_weight": class_weight(vocab)} if "class_weight" in options else {})


def finite_kinds(dtype):
    return [k for k in kinds_for(dtype) if k not in KINDS_WITH_INF and k != "offset"]


@REDUCTIONS
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_options(options, soft, reduction, home):
    vocab = 101
    x = logits(15, vocab, np.float32, seed=3, kinds=finite_kinds(np.float32))
    y = soft_labels(15, vocab, np.float32) if soft else labels(x, seed=2)
    options = with_weights(options, vocab) | {"reduction": reduction}
    loss, dlogits = gx.cross_entropy_and_grad(home.put(x), y, **options)
    truth = true_cross_entropy(x, y, **options)
    # softcap: the conditioning of tanh; a soft label's own float32 rounding is in the oracle's input too
    eps = 16 if "softcap" in options else 4
    loss = home.compute(loss)
    assert_close(loss, truth, eps)
    assert loss.dtype == (np.float32 if reduction == "none" else np.float64)
    truth = true_grad(x, y, **options)
    assert_gradient(home.compute(dlogits), truth, np.float32, float(abs(truth).max()))
    assert np.array_equal(home.compute(gx.cross_entropy(home.put(x), y, **options)), loss)


@DTYPES
@pytest.mark.parametrize("vocab", [2, 16385, 50257])
def test_gradient_keeps_its_digits_at_the_label(dtype, vocab, home):
    x = logits(16, vocab, dtype, seed=5)
    y = labels(x, seed=4)
    dlogits = home.compute(gx.cross_entropy_and_grad(home.put(x), y, reduction="sum")[1])
    truth = true_grad(x, y, reduction="sum")
    assert_gradient(dlogits, truth, dtype)
    here = np.flatnonzero(y >= 0)
    assert_close(dlogits[here, y[here]], truth[here, y[here]], 4, dtype)


@DTYPES
def test_bits_do_not_depend_on_the_rows_around(dtype):
    x = logits(37, 20000, dtype, seed=6)
    y = labels(x, seed=6)
    losses, dlogits = gx.cross_entropy_and_grad(x, y, reduction="none", label_smoothing=0.1)
    for rows in (slice(0, 1), slice(3, 5), slice(20, 37)):
        loss, grad = gx.cross_entropy_and_grad(x[rows], y[rows], reduction="none", label_smoothing=0.1)
        assert np.array_equal(loss, losses[rows], equal_nan=True)
        assert np.array_equal(grad, dlogits[rows], equal_nan=True)


# ---- special values ----


@DTYPES
@pytest.mark.parametrize("row", SPECIAL_ROWS, ids=lambda row: row.name)
def test_special_values(row, dtype, home):
    x = np.array([row.logits], np.float64).astype(dtype)
    soft = isinstance(row.label, list)
    y = np.array([row.label], np.float64 if soft else np.int64)
    loss, dlogits = gx.cross_entropy_and_grad(home.put(x), y, reduction="sum", **row.options)
    assert_close(home.compute(loss), np.float64(row.loss), 4, work_dtype(dtype))
    gradient = np.array([row.gradient])
    assert_gradient(home.compute(dlogits), gradient, dtype)
    zeros = gradient == 0
    assert (home.compute(dlogits)[zeros] == 0).all()
    lse = home.compute(gx.logsumexp(home.put(x)))
    assert_close(lse, np.array([row.logsumexp]), 4, work_dtype(dtype))


@pytest.mark.parametrize("batch", SPECIAL_BATCHES, ids=lambda batch: batch.name)
def test_special_batches(batch, home):
    x = np.array(batch.logits, np.float64).reshape(-1, 4)
    y = np.array(batch.labels, np.int64)
    for reduction, expected in (("none", batch.losses), ("sum", batch.sum), ("mean", batch.mean)):
        loss = home.compute(gx.cross_entropy(home.put(x), y, reduction=reduction, **batch.options))
        assert_close(loss, np.array(expected, np.float64), 4, np.float64)
    gradient = np.array(batch.gradient, np.float64).reshape(-1, 4)
    dlogits = home.compute(gx.cross_entropy_and_grad(home.put(x), y, **batch.options)[1])
    assert_gradient(dlogits, gradient, np.float64)
    assert (dlogits[gradient == 0] == 0).all()


def test_unchecked_bad_label_is_never_a_plausible_loss(home):
    x = np.zeros((3, 4))
    loss = home.compute(gx.cross_entropy(home.put(x), np.array([4, -1, 2**32]), reduction="none", check_labels=False))
    assert (loss == np.inf).all()
    for options in ({"class_weight": np.ones(4)}, {"label_smoothing": 1.0}):
        loss = gx.cross_entropy(home.put(x), np.array([4, 0, 0]), reduction="none", check_labels=False, **options)
        assert np.isinf(home.compute(loss)).tolist() == [True, False, False]


def test_what_float32_cannot_hold_is_inf_without_a_warning(home):
    x = np.array([[3e38, -3e38]], np.float32)
    assert home.compute(gx.cross_entropy(home.put(x), np.array([1]), reduction="none")) == np.inf


def test_summary_of_rows_without_a_distribution(home):
    x = np.zeros((3, 20000), np.float32)
    x[0, 17000], x[1] = np.nan, -np.inf
    stats = gx.cross_entropy_and_grad(home.put(x), np.zeros(3, int), return_stats=True)[2]
    assert home.compute(stats.argmax).tolist() == [-1, 0, 0]
    assert home.compute(stats.argmax).dtype == np.int64
    assert np.isnan(home.compute(stats.p_max)).tolist() == [True, True, False]


# ---- reference values ----


def test_reference_values():
    for row in REFERENCE_LOGITS:
        loss = gx.cross_entropy(np.array(row.values), np.array(row.label))
        assert_close(loss, np.float64(row.loss), 4, np.float64)
    _, dlogits = gx.cross_entropy_and_grad(np.array([REFERENCE_LOGITS[0].values]), np.array([0]))
    assert_close(dlogits[0], np.array(REFERENCE_LOGITS_GRADIENT), 4, np.float64)


# ---- theory ----


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_finite_differences(options, soft):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (3, 6))
    y = soft_labels(3, 6, np.float64) if soft else np.array([2, -100, 5])
    options = with_weights(options, 6)
    _, dlogits = gx.cross_entropy_and_grad(x, y, **options)
    step = 1e-5
    for place in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[place] += step
        below[place] -= step
        slope = (gx.cross_entropy(above, y, **options) - gx.cross_entropy(below, y, **options)) / (2 * step)
        assert abs(slope - dlogits[place]) < 1e-8


def test_rows_of_the_gradient_sum_to_0(home):
    x = logits(16, 3000, np.float64, seed=8)
    y = labels(x)
    dlogits = home.compute(gx.cross_entropy_and_grad(home.put(x), y, class_weight=class_weight(3000))[1])
    assert np.abs(dlogits.sum(axis=1)).max() < 1e-14
    assert np.abs(dlogits).max() > 1e-3


def test_masking_a_row_equals_dropping_it(home):
    x = logits(12, 50, np.float32)
    y = labels(x, ignore=False)
    masked = np.where(np.arange(12) % 3 == 0, -100, y)
    kept = np.arange(12) % 3 != 0
    expected = gx.cross_entropy(x[kept], y[kept])
    loss = home.compute(gx.cross_entropy(home.put(x), masked))
    assert loss == expected if home.same_bits else abs(loss - expected) < 1e-6


def test_one_hot_soft_labels_equal_index_labels(home):
    x = logits(12, 50, np.float64)
    y = labels(x, ignore=False)
    soft = home.compute(gx.cross_entropy(home.put(x), np.eye(50)[y], reduction="none"))
    assert_close(soft, gx.cross_entropy(x, y, reduction="none"), 4, np.float64)


# ---- arguments of the gradient ----


def test_grad_output_and_denominator(home):
    x = logits(9, 40, np.float64, seed=2)
    y = labels(x)
    upstream = np.linspace(-2, 2, 9)
    _, dlogits = gx.cross_entropy_and_grad(home.put(x), y, reduction="none", grad_output=upstream)
    assert_gradient(home.compute(dlogits), true_grad(x, y, reduction="none", grad_output=upstream), np.float64)
    _, dlogits = gx.cross_entropy_and_grad(home.put(x), y, reduction="none", grad_output=upstream[::-1])
    assert_gradient(home.compute(dlogits), true_grad(x, y, reduction="none", grad_output=upstream[::-1]), np.float64)
    options = {"denominator": 7, "z_loss": 0.1, "grad_output": 3.0}
    loss, dlogits = gx.cross_entropy_and_grad(home.put(x), y, **options)
    assert_gradient(home.compute(dlogits), true_grad(x, y, **options), np.float64)
    expected = gx.cross_entropy(x, y, z_loss=0.1, reduction="sum") / 7
    assert_close(home.compute(loss), expected, 4, np.float64)


def test_return_stats(home):
    x = logits(16, 300, np.float32, seed=9)
    y = labels(x)
    _, _, stats = gx.cross_entropy_and_grad(home.put(x), y, return_stats=True)
    stats = gx.RowSummary(*(home.compute(field) for field in vars(stats).values()))
    assert stats.argmax.tolist() == x.argmax(axis=1).tolist()
    assert_close(stats.lse.astype(np.float32), gx.logsumexp(x), 1)
    assert_close(stats.p_max, gx.softmax(x.astype(np.float64)).max(axis=1), 8)


@DTYPES
def test_gradient_in_place_and_into_out(dtype):
    x = logits(20, 999, dtype, seed=3)
    y = labels(x)
    loss, expected = gx.cross_entropy_and_grad(x, y, label_smoothing=0.1)
    for target in (np.empty_like(x), np.empty((20, 1998), dtype)[:, ::2]):
        result = gx.cross_entropy_and_grad(x, y, label_smoothing=0.1, out=target)
        assert result[1] is target
        assert result[0] == loss
        assert np.array_equal(target, expected)
    work = x.copy()
    assert np.array_equal(gx.cross_entropy_and_grad(work, y, label_smoothing=0.1, out=work)[1], expected)


# ---- shapes, layouts, label types ----


@DTYPES
@pytest.mark.parametrize("how", LAYOUTS)
def test_any_layout_gives_the_same_bits_and_is_not_written_to(how, dtype):
    x = logits(18, 501, dtype, seed=4)
    if how not in layouts_for(dtype):
        return  # ml_dtypes has one byte order
    y = strided(labels(x), "every second row")
    view = strided(x, how)
    before = view.copy()
    loss, dlogits = gx.cross_entropy_and_grad(view, y, reduction="none")
    expected, expected_grad = gx.cross_entropy_and_grad(x, np.array(y), reduction="none")
    assert np.array_equal(loss, expected)
    assert np.array_equal(dlogits.astype(np.float64), expected_grad.astype(np.float64))
    assert np.array_equal(np.asarray(view, np.float64), np.asarray(before, np.float64))


def test_leading_axes_and_views_that_cannot_be_flattened(home):
    x = logits(24, 300, np.float32, seed=7).reshape(2, 12, 300)
    y = labels(x)
    flat, flat_grad = gx.cross_entropy_and_grad(x.reshape(24, 300), y.reshape(24))
    loss, dlogits = gx.cross_entropy_and_grad(home.put(x), y)
    if home.same_bits:
        assert home.compute(loss) == flat
        assert np.array_equal(home.compute(dlogits).reshape(24, 300), flat_grad)
    shifted = gx.cross_entropy(home.put(x)[:, :-1], y[:, 1:], reduction="none")  # next-token loss: a view of each
    assert shifted.shape == (2, 11)
    expected = gx.cross_entropy(x[:, :-1].reshape(22, 300), y[:, 1:].reshape(22), reduction="none")
    assert_close(home.compute(shifted).reshape(22), expected, 4)
    assert gx.cross_entropy(x[0, 0], np.int8(3), reduction="none").shape == ()


@pytest.mark.parametrize("dtype", "bhilqBHILQ")
def test_every_integer_label_type(dtype, home):
    x = logits(10, 100, np.float32)
    y = np.arange(10).astype(dtype)
    assert np.array_equal(
        home.compute(gx.cross_entropy(home.put(x), y, reduction="none"))
        if home.same_bits
        else gx.cross_entropy(x, y, reduction="none"),
        gx.cross_entropy(x, np.arange(10), reduction="none"),
    )


def test_labels_are_compared_before_they_are_narrowed():
    x = np.zeros((1, 200))
    assert gx.cross_entropy(x, np.array([156], np.uint8), reduction="none") > 5  # -100 as uint8 is 156
    with pytest.raises(IndexError, match="4294967296"):
        gx.cross_entropy(x, np.array([2**32]))
    with pytest.raises(IndexError, match="18446744073709551516"):
        gx.cross_entropy(x, np.array([2**64 - 100], np.uint64))


def test_soft_labels_may_be_wider_than_the_logits(home):
    x = logits(8, 64, np.float16, kinds=finite_kinds(np.float16))
    s = soft_labels(8, 64, np.float64)
    actual = home.compute(gx.cross_entropy(home.put(x), s, reduction="none"))
    assert_close(actual, true_cross_entropy(x, s, reduction="none"), 4)


def test_lists_are_arrays():
    assert gx.cross_entropy([[0.0, 0.0]], [1]).round(4) == 0.6931


def test_bfloat16_widening_is_exact():
    """The shortcut through integers, for every bfloat16 there is."""
    every = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    finite = every[np.isfinite(every.astype(np.float32))].reshape(-1, 1)
    assert errors_in_eps(gx.logsumexp(finite), finite[:, 0]).max() == 0
