"""logsumexp, softmax and log_softmax along any axis, against the oracle."""

import numpy as np
import pytest
from makers import FLOAT_DTYPES, logits
from oracle import assert_close, log_softmax_rows, logsumexp_rows, softmax_rows

import gpuxent as gx

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)


@DTYPES
@pytest.mark.parametrize("vocab", [1, 2, 5, 1000, 40000])
def test_normalizers(dtype, vocab, home):
    x = logits(16, vocab, dtype, seed=vocab) if vocab > 1 else np.linspace(-500, 500, 16)[:, None].astype(dtype)
    work = np.float64 if dtype is np.float64 else np.float32
    lse, p, log_p = (home.compute(f(home.put(x))) for f in (gx.logsumexp, gx.softmax, gx.log_softmax))
    assert lse.dtype == work
    assert p.dtype == log_p.dtype == dtype
    # lse near 0 is a difference of large numbers: its error is relative to the largest logit
    assert_close(lse, logsumexp_rows(x), 4, work, floor=float(np.abs(x[np.isfinite(x)].astype(np.float64)).max()))
    # the exponent of a class far below the maximum is rounded: judged against a probability of 1 %
    assert_close(p, softmax_rows(x), 8, dtype, floor=1e-2)
    assert_close(log_p, log_softmax_rows(x), 4, dtype)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis_equals_the_last(axis, home):
    x = logits(60, 7, np.float32).reshape(4, 15, 7)
    moved = np.moveaxis(x, axis, -1)
    for function in (gx.softmax, gx.log_softmax):
        actual = home.compute(function(home.put(x), axis=axis))
        assert_close(actual, np.moveaxis(function(np.ascontiguousarray(moved)), -1, axis), 4, floor=1e-2)
    lse = home.compute(gx.logsumexp(home.put(x), axis=axis))
    assert lse.shape == moved.shape[:-1]
    assert_close(lse, gx.logsumexp(np.ascontiguousarray(moved)), 4, floor=1.0)


def test_confident_log_softmax_keeps_its_digits():
    x = np.array([[30.0, 0.0, 1.0]], np.float32)
    assert_close(gx.log_softmax(x), log_softmax_rows(x), 4)
    assert gx.log_softmax(x)[0, 0] < -1e-13


def test_softmax_rows_sum_to_1():
    p = gx.softmax(logits(32, 5000, np.float64))
    assert np.abs(p.sum(axis=1) - 1).max() < 1e-14


def test_zero_rows():
    assert gx.logsumexp(np.empty((0, 5))).shape == (0,)
    assert gx.softmax(np.empty((3, 0, 5))).shape == (3, 0, 5)


def test_errors():
    with pytest.raises(ValueError, match=r"axis must be in \[-2, 2\) for logits of shape \(2, 3\), got 2"):
        gx.softmax(np.zeros((2, 3)), axis=2)
    with pytest.raises(ValueError, match="at least one class"):
        gx.logsumexp(np.zeros((2, 0)))
    with pytest.raises(TypeError, match="logits must be float16, bfloat16, float32 or float64, got int64"):
        gx.logsumexp(np.zeros((2, 3), np.int64))
