"""Entropy and divergences, from logits and from probabilities, against the oracle."""

import numpy as np
import oracle
import pytest
from makers import FLOAT_DTYPES, logits, soft_labels
from oracle import assert_close

import gpuxent as gx

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
PAIRS = ("kl_divergence", "js_divergence", "cross_entropy_between")


def work_dtype(dtype):
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


@DTYPES
@pytest.mark.parametrize("vocab", [2, 300, 17000])
def test_entropy(dtype, vocab, home):
    x = logits(16, vocab, dtype, seed=1)
    actual = home.compute(gx.entropy(home.put(x)))
    assert actual.dtype == work_dtype(dtype)
    assert_close(actual, oracle.entropy(x), 16, work_dtype(dtype))


@DTYPES
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_from_logits(name, dtype, home):
    p, q = logits(16, 300, dtype, seed=1), logits(16, 300, dtype, seed=2)
    actual = home.compute(getattr(gx, name)(home.put(p), home.put(q)))
    truth = getattr(oracle, name)(p, q)
    assert actual.dtype == work_dtype(dtype)
    assert np.isinf(truth).any() or name == "js_divergence"
    assert_close(actual, truth, 32, work_dtype(dtype), floor=1e-3)


@DTYPES
def test_pairs_from_probs(dtype, home):
    p, q = soft_labels(20, 200, dtype, seed=1), soft_labels(20, 200, dtype, seed=2)
    assert_close(
        home.compute(gx.entropy_from_probs(home.put(p))), oracle.entropy_from_probs(p), 4, work_dtype(dtype), floor=1e-3
    )
    # sum p ln(p/q) - p + q is the divergence of the normalized rows; the oracle takes them as they are
    slack = np.abs(p.astype(np.float64).sum(1) - 1).max() + np.abs(q.astype(np.float64).sum(1) - 1).max()
    for name in PAIRS:
        actual = home.compute(getattr(gx, name + "_from_probs")(home.put(p), home.put(q)))
        truth = getattr(oracle, name + "_from_probs")(p, q).astype(np.float64)
        assert actual.dtype == work_dtype(dtype)
        finite = np.isfinite(truth)
        assert np.array_equal(actual[~finite], truth[~finite])
        assert (np.abs(actual[finite] - truth[finite]) <= 4 * slack + 1e-6 * np.abs(truth[finite])).all()


def test_models_that_nearly_agree_are_told_apart(home):
    """Summed naively in float32, a divergence of 1e-9 drowns and half of them come out negative."""
    rng = np.random.default_rng(0)
    p = rng.normal(0, 3, (8, 20000)).astype(np.float32)
    q = p + rng.normal(0, 1e-4, p.shape).astype(np.float32)
    truth = oracle.kl_divergence(p, q)
    assert truth.max() < 1e-8
    actual = home.compute(gx.kl_divergence(home.put(p), home.put(q)))
    assert (actual >= 0).all()
    assert_close(actual, truth, 64)
    assert (home.compute(gx.kl_divergence(home.put(p), home.put(p))) < 1e-13).all()


def test_cross_entropy_is_entropy_plus_divergence(home):
    p, q = logits(16, 200, np.float64, kinds="ordinary"), logits(16, 200, np.float64, seed=3, kinds="ordinary")
    for pair, make in (((p, q), ""), ((gx.softmax(p), gx.softmax(q)), "_from_probs")):
        a, b = map(home.put, pair)
        between = home.compute(getattr(gx, "cross_entropy_between" + make)(a, b))
        parts = home.compute(getattr(gx, "entropy" + make)(a) + getattr(gx, "kl_divergence" + make)(a, b))
        assert_close(between, parts, 2, np.float64)
        direct = -(gx.softmax(p) * gx.log_softmax(q)).sum(axis=1)
        assert_close(between, direct, 32, np.float64)


def test_js_is_symmetric_and_at_most_ln_2():
    p, q = logits(32, 100, np.float64, seed=1), logits(32, 100, np.float64, seed=2)
    js = gx.js_divergence(p, q)
    assert_close(js, gx.js_divergence(q, p), 4, np.float64, floor=1e-3)
    assert (js <= np.log(2) * (1 + 1e-14)).all()
    assert js.max() > 0.6


INF = np.inf


@pytest.mark.parametrize(
    ("p", "q", "kl", "js"),
    [
        ([0.0, -INF], [0.0, -INF], 0.0, 0.0),
        ([0.0, 0.0], [0.0, -INF], INF, 0.75 * np.log(4 / 3)),  # (ln(2/3)/2 + ln(2)/2 + ln(4/3)) / 2
        ([0.0, -INF], [0.0, 0.0], np.log(2), 0.75 * np.log(4 / 3)),
        ([0.0, -INF], [-INF, 0.0], INF, np.log(2)),
        ([-INF, -INF], [0.0, 0.0], np.nan, np.nan),
        ([np.nan, 0.0], [0.0, 0.0], np.nan, np.nan),
        ([0.0, 0.0], [np.nan, 0.0], np.nan, np.nan),
        ([INF, 0.0], [0.0, 0.0], np.nan, np.nan),
    ],
)
def test_special_values(p, q, kl, js, home):
    p, q = np.array([p]), np.array([q])
    assert_close(home.compute(gx.kl_divergence(home.put(p), home.put(q))), np.array([kl]), 4, np.float64)
    assert_close(home.compute(gx.js_divergence(home.put(p), home.put(q))), np.array([js]), 8, np.float64)


def test_two_dtypes_give_the_wider():
    p, q = logits(4, 20, np.float32), logits(4, 20, np.float64)
    assert gx.kl_divergence(p, q).dtype == np.float64
    assert gx.kl_divergence(p, p).dtype == np.float32


def test_errors(home):
    with pytest.raises(ValueError, match=r"q must have the shape of p, \(2, 3\), got \(2, 4\)"):
        gx.kl_divergence(home.put(np.zeros((2, 3))), home.put(np.zeros((2, 4))))
    good, bad = np.full((3, 4), 0.25), np.full((3, 4), 0.25)
    for value, found in ((0.3, "sums to 1.05"), (-0.25, "has 1 entry negative"), (np.nan, "has a NaN")):
        bad[2, 1] = value
        with pytest.raises(ValueError, match=rf"q\[2, :\] {found}, expected probabilities that sum to 1 within 0.0001"):
            home.compute(gx.kl_divergence_from_probs(home.put(good), home.put(bad)))
        gx.kl_divergence_from_probs(good, bad, check_probs=False)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_close_models_in_float64(distance, home):
    rng = np.random.default_rng(0)
    p = rng.normal(0, 4, (4, 300))
    q = p + distance * rng.normal(0, 1, p.shape)
    for name in ("kl_divergence", "js_divergence"):
        actual = home.compute(getattr(gx, name)(home.put(p), home.put(q)))
        truth = getattr(oracle, name)(p, q)
        assert (np.abs(actual - truth) < 1e-14 / distance * truth).all()


def test_entropy_of_a_row_masked_with_the_least_float():
    masked = np.array([[0, *[np.finfo(np.float32).min] * 3]], np.float32)
    assert gx.entropy(masked) == 0
