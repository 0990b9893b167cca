"""Independent sigmoids: losses, gradients and probabilities, against the oracle."""

import numpy as np
import oracle
import pytest
from makers import (
    FLOAT_DTYPES,
    REFERENCE_BINARY_GRADIENT,
    REFERENCE_BINARY_LABELS,
    REFERENCE_BINARY_LOGITS,
    REFERENCE_BINARY_LOSSES,
    REFERENCE_NLL,
    SPECIAL_BINARY,
    binary_logits,
    binary_targets,
    strided,
)
from oracle import assert_close

import gpuxent as gx

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def work_dtype(dtype):
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("weights", [{}, {"pos_weight": True}, {"class_weight": True, "pos_weight": True}], ids=str)
def test_multi_label(dtype, reduction, weights, home):
    x, y = binary_logits((12, 30), dtype), binary_targets((12, 30), np.float32, ignore_index=-1)
    options = {name: np.linspace(0, 3, 30) + i for i, name in enumerate(weights)}
    options |= {"reduction": reduction, "ignore_index": -1}
    loss, dlogits = gx.binary_cross_entropy_and_grad(home.put(x), y, **options)
    loss, dlogits = home.compute(loss), home.compute(dlogits)
    assert_close(loss, oracle.binary_cross_entropy(x, y, **options), 4, work_dtype(dtype))
    assert loss.dtype == (work_dtype(dtype) if reduction == "none" else np.float64)
    assert dlogits.dtype == dtype
    truth = oracle.binary_cross_entropy_grad(x, y, **options).reshape(12, 30)
    # soft targets: (1 - y) sigmoid(x) and y sigmoid(-x) may cancel
    assert_close(dlogits, truth, 4, dtype, floor=float(np.abs(truth).max()) / 8)
    assert np.array_equal(home.compute(gx.binary_cross_entropy(home.put(x), y, **options)), loss)


@DTYPES
def test_one_axis(dtype, home):
    x, y = binary_logits((200,), dtype), binary_targets((200,), np.float64)
    for reduction in ("mean", "sum", "none"):
        loss = home.compute(gx.binary_cross_entropy(home.put(x), y, reduction=reduction, pos_weight=2))
        expected = oracle.binary_cross_entropy(x, y, reduction=reduction, pos_weight=2)
        assert_close(loss, expected, 4, work_dtype(dtype))


def test_reference_values():
    x, y = np.array(REFERENCE_BINARY_LOGITS), np.array(REFERENCE_BINARY_LABELS)
    assert_close(gx.binary_cross_entropy(x, y, reduction="none"), np.array(REFERENCE_BINARY_LOSSES), 4, np.float64)
    _, dlogits = gx.binary_cross_entropy_and_grad(x, y, reduction="sum")
    assert_close(dlogits, np.array(REFERENCE_BINARY_GRADIENT), 4, np.float64)
    for p, loss in REFERENCE_NLL:
        assert round(float(gx.binary_cross_entropy_from_probs(np.array([p]), np.array([1]))), 3) == loss


@DTYPES
@pytest.mark.parametrize("case", SPECIAL_BINARY, ids=lambda case: case.name)
def test_special_values(case, dtype, home):
    x, y = np.array([[case.logit]]).astype(dtype), np.array([[case.target]])
    loss, dlogits = gx.binary_cross_entropy_and_grad(home.put(x), y, reduction="sum", **case.options)
    assert_close(home.compute(loss), np.float64(case.loss), 4, np.float64)
    assert_close(home.compute(dlogits), np.array([[case.gradient]]), 2, dtype)


@DTYPES
@REDUCTIONS
def test_from_probs(dtype, reduction, home):
    p = gx.softmax(binary_logits((10, 20), dtype))  # any numbers in [0, 1]
    y = binary_targets((10, 20), np.float32, ignore_index=-1)
    options = {"pos_weight": np.linspace(0.5, 2, 20), "ignore_index": -1, "reduction": reduction}
    loss = home.compute(gx.binary_cross_entropy_from_probs(home.put(p), y, **options))
    assert_close(loss, oracle.binary_cross_entropy_from_probs(p, y, **options), 4, work_dtype(dtype))


def test_no_element_counts(home):
    x, y = home.put(np.zeros((3, 4))), np.full((3, 4), -1)
    loss, dlogits = gx.binary_cross_entropy_and_grad(x, y, ignore_index=-1)
    assert np.isnan(home.compute(loss))
    assert (home.compute(dlogits) == 0).all()
    assert np.isnan(gx.binary_cross_entropy(np.empty(0), np.empty(0)))


def test_bool_and_integer_targets(home):
    x, y = binary_logits((6, 5), np.float32), binary_targets((6, 5), np.int64, soft=False)
    expected = home.compute(gx.binary_cross_entropy(home.put(x), y.astype(np.float32)))
    for dtype in (bool, np.int8, np.uint64):
        assert home.compute(gx.binary_cross_entropy(home.put(x), y.astype(dtype))) == expected


def test_grad_output_denominator_and_out(home):
    x, y = binary_logits((6, 5), np.float64), binary_targets((6, 5), np.float64)
    upstream = np.linspace(-1, 1, 30).reshape(6, 5)
    _, dlogits = gx.binary_cross_entropy_and_grad(home.put(x), y, reduction="none", grad_output=upstream)
    expected = oracle.binary_cross_entropy_grad(x, y, reduction="sum").reshape(6, 5)
    assert_close(home.compute(dlogits), expected * upstream, 4, np.float64)
    loss, dlogits = gx.binary_cross_entropy_and_grad(home.put(x), y, denominator=4, grad_output=2)
    assert_close(home.compute(dlogits), expected / 2, 4, np.float64)
    assert_close(home.compute(loss), oracle.binary_cross_entropy(x, y, reduction="sum") / 4, 4, np.float64)


@pytest.mark.parametrize("how", ["F", "every second column", "read-only", "unaligned"])
def test_layouts(how):
    x, y = binary_logits((6, 40), np.float32), binary_targets((6, 40), np.float32)
    loss, dlogits = gx.binary_cross_entropy_and_grad(x, y)
    moved, moved_grad = gx.binary_cross_entropy_and_grad(strided(x, how), strided(y, how))
    assert moved == loss
    assert np.array_equal(moved_grad, dlogits)
    work = strided(x, how) if how != "read-only" else x.copy()
    assert np.array_equal(gx.binary_cross_entropy_and_grad(work, y, out=work)[1], dlogits)
    assert np.array_equal(work, dlogits)


def test_errors(home):
    x = home.put(np.zeros((3, 4)))
    good = np.zeros((3, 4))
    for value in (1.5, -0.1, np.nan):
        bad = good.copy()
        bad[2, 1] = value
        with pytest.raises(ValueError, match=r"targets\[2, :\] has 1 entry outside, expected numbers in \[0, 1\]"):
            home.compute(gx.binary_cross_entropy(x, bad))
        with pytest.raises(ValueError, match=r"probs\[2, :\] has 1 entry outside"):
            home.compute(gx.binary_cross_entropy_from_probs(home.put(bad), good))
    with pytest.raises(ValueError, match=r"targets\[2\] is outside, expected numbers in \[0, 1\] or ignore_index=-1"):
        home.compute(gx.binary_cross_entropy(home.put(np.zeros(3)), np.array([0, 1, 2]), ignore_index=-1))
    with pytest.raises(ValueError, match=r"targets must have the shape of logits, \(3, 4\), got \(3,\)"):
        gx.binary_cross_entropy(x, np.zeros(3))
    with pytest.raises(ValueError, match=r"pos_weight must be a number or have shape \(4,\), one per column"):
        gx.binary_cross_entropy(x, good, pos_weight=np.ones(3))
    with pytest.raises(ValueError, match=r"class_weight\[1\] is -1, expected a finite weight of at least 0"):
        gx.binary_cross_entropy(x, good, class_weight=[0, -1, 0, 0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("ignore", [0.1, 2.1, -1])
def test_ignore_index_is_what_it_would_be_among_the_targets(ignore, dtype):
    x, y = np.array([[1.0, 2.0]]), np.array([[ignore, 1]], dtype)
    assert_close(gx.binary_cross_entropy(x, y, ignore_index=ignore), np.log1p(np.exp(-2.0)), 4, np.float64)


def test_weights_beyond_float32():
    x, y = np.array([[1.0, 2.0], [-40, -80]], np.float32), np.zeros((2, 2), np.float32)
    expected = gx.binary_cross_entropy(x, y)
    assert gx.binary_cross_entropy(x, y, pos_weight=1e39) == pytest.approx(expected, rel=1e-6)
    assert gx.binary_cross_entropy(x, y, class_weight=1e39) == pytest.approx(1e39 * expected, rel=1e-6)


@pytest.mark.parametrize("size", [1, 8191, 8192, 8193])
def test_a_long_vector(size):
    x, y = binary_logits((size,), np.float32), binary_targets((size,), np.float32, ignore_index=-1)
    losses = gx.binary_cross_entropy(x, y, ignore_index=-1, reduction="none")
    truth = oracle.binary_cross_entropy(x[-3:], y[-3:], ignore_index=-1, reduction="none")
    assert_close(losses[-3:], truth, 4, np.float32)
    assert gx.binary_cross_entropy(x, y, ignore_index=-1, reduction="sum") == pytest.approx(losses.sum(dtype=float))
