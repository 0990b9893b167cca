"""Temperatures against grids, roots in 50 digits and loops; bins and scores against fractions and scikit-learn;
invariances; what is refused and why."""

import json
import math
import re
from dataclasses import replace
from fractions import Fraction

import dask.array as da
import distributed
import ml_dtypes
import mpmath
import numpy as np
import oracle
import pytest
from makers import logits as peaked
from test_cli import gpuxent, strict_json

import gpuxent as gx
from gpuxent.calibration import (
    check_temperature,
    classwise_reliability,
    fit_temperature,
    reliability,
    reliability_of_run,
)
from gpuxent.evaluation import driver
from gpuxent.evaluation.calibration import report as calibration_report
from gpuxent.evaluation.calibration.forecasts import Forecasts
from gpuxent.evaluation.calibration.held_out import drawn
from gpuxent.evaluation.calibration.reliability import Resampling, measure, statistics
from gpuxent.evaluation.calibration.sigmoids import RepeatedSource, pairs
from gpuxent.evaluation.calibration.temperature import MOST_PASSES
from gpuxent.evaluation.sources import ArraySource, DaskSource


def sampled(rows, vocab, sharpness, dtype=np.float64, seed=0):
    """(logits, labels): drawn from the softmax of logits that are then made so many times as sharp."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.standard_normal((rows, vocab))
    y = (x + rng.gumbel(size=x.shape)).argmax(axis=1)
    return (sharpness * x).astype(dtype), y


def row_slopes(x, y, temperature, number=float):
    """E[x] - x_label of each row at the temperature, one number at a time."""
    exp = mpmath.exp if number is mpmath.mpf else math.exp
    found = []
    for row, label in zip(np.asarray(x, np.float64).tolist(), y.tolist(), strict=True):
        row = [number(value) for value in row if value != -math.inf or label is None]
        weights = [exp((value - max(row)) / temperature) for value in row]
        mean = sum(w * value for w, value in zip(weights, row, strict=True)) / sum(weights)
        found.append(mean - number(float(x[len(found)][label])))
    return found


# ---- the temperature ----


@pytest.mark.parametrize("sharpness", [1e-8, 0.3, 1.0, 1.5, 30.0, 1e4])
def test_no_temperature_of_a_dense_grid_is_better(sharpness):
    x, y = sampled(300, 30, sharpness)
    fit = fit_temperature(x, y)
    best = float(oracle.cross_entropy(x, y, temperature=fit.temperature))
    assert abs(fit.cross_entropy / best - 1) < 1e-14
    assert abs(fit.cross_entropy_before / float(oracle.cross_entropy(x, y)) - 1) < 1e-14
    for factor in np.concatenate([np.geomspace(0.01, 100, 41), 1 + np.linspace(-1e-5, 1e-5, 20)]):
        assert oracle.cross_entropy(x, y, temperature=fit.temperature * factor) >= best * (1 - 1e-15)
    assert fit.passes <= 16


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_slope_in_50_digits_changes_sign_there(backend, dtype):
    x, y = sampled(40, 9, 2.0, dtype, seed=3)
    x[:, 4] = -np.inf  # a class with probability 0
    y[y == 4] = -100
    fit = fit_temperature(x, y)
    on = y != -100
    digits = 1e-9 if dtype is np.float64 or backend != "cupy" else 1e-6  # a GPU divides float32 in float32
    with mpmath.workdps(50):
        below, above = (
            sum(row_slopes(x[on], y[on], fit.temperature * factor, mpmath.mpf)) for factor in (1 - digits, 1 + digits)
        )
    assert below > 0 > above
    assert (fit.scored, fit.ignored) == (on.sum(), (~on).sum())


def test_sharper_logits_have_a_higher_temperature_and_constants_do_not_matter():
    x, y = sampled(200, 12, 1.7)
    fit = fit_temperature(x, y)
    for factor in (2.0**-20, 0.5, 8.0):
        assert abs(fit_temperature(x * factor, y).temperature / fit.temperature / factor - 1) < 1e-9
    moved = fit_temperature(x + np.arange(200)[:, None] * 1024.0, y)
    assert abs(moved.temperature / fit.temperature - 1) < 1e-9
    assert abs(fit_temperature(x / fit.temperature, y).temperature - 1) < 1e-9


def test_at_the_best_temperature_the_loss_is_the_entropy():
    x, y = sampled(500, 30, 2.5)
    fit = fit_temperature(x, y, softcap=4.0)
    result = gx.evaluate(x, y, softcap=4.0, temperature=fit.temperature)
    assert result.cross_entropy == fit.cross_entropy
    assert abs(result.entropy / result.cross_entropy - 1) < 1e-9


def test_hand_computed():
    """ln 9 apart and right three times of four: the sigmoid of ln 9 / T is 3 / 4 at T = ln 9 / ln 3 = 2, and half of
    that at half the logits."""
    x = np.log([[9.0, 1.0]] * 3 + [[1.0, 9.0]])
    y = np.array([0, 0, 1, 1])
    assert abs(fit_temperature(x, y).temperature - 2) < 1e-9
    assert abs(fit_temperature(x / 2, y).temperature - 1) < 1e-9
    assert abs(fit_temperature(x / 2, y).cross_entropy - (math.log(4) - 0.75 * math.log(3))) < 1e-15


# ---- its standard error ----


def test_standard_errors_against_loops():
    x, y = sampled(400, 6, 1.4, seed=5)
    names = np.random.default_rng(6).integers(0, 60, 400) * 7
    fit = fit_temperature(x, y, documents=names)
    b, h = 1 / fit.temperature, 1e-6
    own = row_slopes(x, y, 1 / b)
    bend = (sum(row_slopes(x, y, 1 / (b + h))) - sum(row_slopes(x, y, 1 / (b - h)))) / (2 * h)
    by_name = [sum(s for s, name in zip(own, names, strict=True) if name == one) for one in sorted(set(names.tolist()))]
    iid = math.sqrt(sum(s * s for s in own) * 400 / 399) / bend / b**2
    clustered = math.sqrt(sum(s * s for s in by_name) * len(by_name) / (len(by_name) - 1)) / bend / b**2
    assert abs(fit.stderr_iid / iid - 1) < 1e-3
    assert abs(fit.stderr_cluster / clustered - 1) < 1e-3
    assert fit.documents == len(by_name)
    assert fit_temperature(x, y).stderr_cluster is None


def test_standard_error_is_the_spread_of_temperatures():
    fits = [fit_temperature(*sampled(300, 8, 1.5, seed=seed)) for seed in range(60)]
    found = np.array([fit.temperature for fit in fits])
    errors = np.array([fit.stderr_iid for fit in fits])
    assert abs(found.mean() - 1.5) < 3 * found.std() / math.sqrt(60)
    assert 0.7 < found.std() / errors.mean() < 1.4


# ---- the same from anywhere ----


def test_the_same_bits_from_any_source_and_in_any_blocks(tmp_path, monkeypatch):
    x, y = sampled(211, 33, 1.6, np.float32)
    y[::7] = -100
    names = np.arange(211) // 10
    expected = fit_temperature(x, y, documents=names)
    for name, array in (("x", x), ("y", y), ("names", names)):
        np.save(tmp_path / f"{name}.npy", array)
    paths = [tmp_path / f"{name}.npy" for name in ("x", "y", "names")]
    order = np.random.default_rng(0).permutation(211)
    assert fit_temperature(paths[0], paths[1], documents=paths[2]) == expected
    assert fit_temperature(da.from_array(x, chunks=(50, -1)), y, documents=names) == expected
    assert fit_temperature(np.asfortranarray(x), y.astype(np.int16), documents=names) == expected
    assert fit_temperature(x[order], y[order], documents=names[order]) == expected
    monkeypatch.setattr(driver, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(driver.ThreadWorkers, "read_bytes", 4000)
    assert fit_temperature(x, y, documents=names) == expected
    split = fit_temperature(da.from_array(x, chunks=(50, 10)), y, documents=names)
    assert abs(split.temperature / expected.temperature - 1) < 1e-8


def test_hidden_states_and_a_classifier():
    rng = np.random.default_rng(1)
    hidden, classifier = rng.standard_normal((100, 5)), rng.standard_normal((12, 5))
    x = hidden @ classifier.T
    y = (x / 2 + rng.gumbel(size=x.shape)).argmax(axis=1)
    fit = fit_temperature(gx.linear_logits(hidden, classifier), y)
    assert abs(fit.temperature / fit_temperature(x, y).temperature - 1) < 1e-9


def test_the_same_bits_on_a_cluster(tmp_path):
    x, y = sampled(211, 33, 1.6, np.float32)
    names = np.arange(211) // 10
    np.save(tmp_path / "x.npy", x)
    lazy = da.from_array(x, chunks=(50, -1))
    fit, found = fit_temperature(x, y, documents=names), reliability(x, y, documents=names, resamples=10)
    check = check_temperature(x, y, resamples=10)
    bits = sampled_bits((60, 3), 1.5)
    sigmoids = reliability(*bits, kind="sigmoid", resamples=10)
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        assert fit_temperature(tmp_path / "x.npy", y, documents=names, client=client) == fit
        assert fit_temperature(lazy, y, documents=names) == fit
        again = reliability(tmp_path / "x.npy", y, documents=names, resamples=10, client=client)
        assert again.to_dict() == found.to_dict()
        assert reliability(lazy, y, documents=names, resamples=10).to_dict() == found.to_dict()
        assert check_temperature(lazy, y, resamples=10).to_dict() == check.to_dict()
        again = reliability(da.from_array(bits[0], chunks=(25, -1)), bits[1], kind="sigmoid", resamples=10)
        assert again.to_dict() == sigmoids.to_dict()
        with pytest.raises(TypeError, match="an array in memory"):
            fit_temperature(x, y, client=client)


def test_rows_that_do_not_count():
    x, y = sampled(120, 7, 2.0)
    x, y = x.reshape(3, 40, 7), y.reshape(3, 40)
    shifted = fit_temperature(x[:, :-1], y[:, 1:], mask=np.arange(39) % 3 * np.ones((3, 1), int))
    assert fit_temperature(x, y, shift=1, mask=np.arange(-1, 39) % 3 * np.ones((3, 1), int)).scored == shifted.scored
    few = fit_temperature(x, y, limit=50)
    assert (few.scored, few.temperature) == (50, fit_temperature(x.reshape(-1, 7)[:50], y.ravel()[:50]).temperature)
    x[y == 3] = np.nan
    y[y == 3] = -100
    assert math.isfinite(fit_temperature(x, y).temperature)


def test_confident_rows():
    x = peaked(64, 50, np.float32, seed=2, kinds=["ordinary", "peak", "tie of two", "masked", "offset"])
    y = np.asarray(x, np.float64).argmax(axis=1)
    rng = np.random.default_rng(0)
    wrong = rng.random(64) < 0.3
    y[wrong] = np.where(np.isfinite(x[wrong, 7]), 7, y[wrong])
    fit = fit_temperature(x, y)
    assert fit.passes < MOST_PASSES
    assert sum(row_slopes(x, y, fit.temperature * (1 - 1e-8))) > 0 > sum(row_slopes(x, y, fit.temperature * (1 + 1e-8)))


# ---- what is refused ----


def test_no_best_temperature():
    x = sampled(50, 6, 1.0)[0]
    right = x.argmax(axis=1)
    with pytest.raises(ValueError, match=r"in all 50 rows the label has the largest logit.*temperature goes to 0"):
        fit_temperature(x, right)
    with pytest.raises(ValueError, match=r"labels' logits are on average [\d.]+ below .* to infinity; .*shift"):
        fit_temperature(x, x.argmin(axis=1))
    x[:, 2] = -np.inf
    with pytest.raises(ValueError, match="to infinity"):
        fit_temperature(x, np.where(np.isfinite(x), x, np.inf).argmin(axis=1))
    with pytest.raises(ValueError, match="all classes are as probable"):
        fit_temperature(np.ones((5, 3)), np.array([0, 1, 2, 0, 1]))
    tied = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    with pytest.raises(ValueError, match="goes to 0"):
        fit_temperature(tied, np.array([0, 1]))


def test_nearly_none_is_found():
    """One label of ten thousand is wrong by a little: the temperature is small, and finite."""
    x = np.full((10000, 2), 4.0)
    x[:, 0] = 5.0
    y = np.zeros(10000, int)
    y[17] = 1
    fit = fit_temperature(x, y)
    assert abs(fit.temperature * math.log(9999) - 1) < 1e-9
    x = np.tile([0.001, 0.0], (1000, 1))
    y = np.arange(1000) % 2
    y[0] = 1
    with pytest.raises(ValueError, match="to infinity"):
        fit_temperature(x, y)
    y[:3] = 0
    assert abs(fit_temperature(x, y).temperature * math.log(501 / 499) / 0.001 - 1) < 1e-8


def test_bad_rows():
    x, y = sampled(50, 6, 1.0)
    with pytest.raises(ValueError, match=r"of 0 rows none counts"):
        fit_temperature(x[:0], y[:0])
    with pytest.raises(ValueError, match="of 50 rows none counts"):
        fit_temperature(x, np.full(50, -100))
    bad = x.copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 50 rows have a loss of NaN, first row 3"):
        fit_temperature(bad, y)
    bad = x.copy()
    bad[[4, 6], y[[4, 6]]] = -np.inf
    with pytest.raises(ValueError, match="2 of 50 rows have a loss of infinity, first row 4"):
        fit_temperature(bad, y)
    with pytest.raises(IndexError, match=r"labels\[0\] is 9"):
        fit_temperature(x, np.full(50, 9))
    with pytest.raises(TypeError, match="logits"):
        fit_temperature(x.astype(int), y)


# ---- reliability ----


def softmax_loops(x, temperature=1.0):
    """Probabilities of rows, in long double."""
    return np.asarray(oracle.softmax_rows(np.asarray(x, np.float64) / temperature), np.float64)


def scores_by_fractions(p, event, edges):
    """Every statistic of forecasts, one at a time and exactly; the bins are (edge, edge]."""
    bins = [[] for _ in range(len(edges) + 1)]
    for forecast, came in zip(p.tolist(), event.tolist(), strict=True):
        bins[sum(edge < forecast for edge in edges)].append((Fraction(forecast), int(came)))
    n, rate = len(p), Fraction(int(event.sum()), len(p))
    found = dict.fromkeys(("ece", "reliability", "resolution", "within_bin_variance", "within_bin_covariance"), 0)
    gaps, table = [], []
    for group in bins:
        if not group:
            table.append((0, math.nan, math.nan))
            continue
        size = len(group)
        mean, share = sum(f for f, _ in group) / size, Fraction(sum(o for _, o in group), size)
        gaps.append(abs(mean - share))
        table.append((size, float(mean), float(share)))
        found["ece"] += Fraction(size, n) * gaps[-1]
        found["reliability"] += Fraction(size, n) * gaps[-1] ** 2
        found["resolution"] += Fraction(size, n) * (share - rate) ** 2
        found["within_bin_variance"] += sum((f - mean) ** 2 for f, _ in group) / n
        found["within_bin_covariance"] += 2 * sum((f - mean) * (o - share) for f, o in group) / n
    found |= {"mce": max(gaps), "ace": sum(gaps) / len(gaps), "uncertainty": rate * (1 - rate), "accuracy": rate}
    found["brier"] = sum((f - o) ** 2 for group in bins for f, o in group) / n
    found["confidence"] = sum(f for group in bins for f, _ in group) / n
    return found, table


def mass_edges(p, bins):
    """Of bins that end after ceil(k n / bins) forecasts, in order, and never between equal ones."""
    ranked = sorted(p.tolist())
    ends = {ranked[math.ceil(Fraction(k * len(ranked), bins)) - 1] for k in range(1, bins)}
    return sorted(end for end in ends if end < ranked[-1])


def assert_statistics(found, p, event, edges):
    expected, table = scores_by_fractions(p, event, edges)
    for name, value in expected.items():
        assert abs(getattr(found, name).value - float(value)) < 4e-16, name
    assert [b.count for b in found.bins] == [size for size, _, _ in table]
    assert np.allclose([b.confidence for b in found.bins], [mean for _, mean, _ in table], 1e-15, 0, equal_nan=True)
    shares = [share for _, _, share in table]
    assert np.allclose([b.accuracy.value for b in found.bins], shares, 1e-15, 0, equal_nan=True)
    assert [b.upper for b in found.bins] == [*edges, 1.0]
    assert [b.lower for b in found.bins] == [0.0, *edges]


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_every_statistic_against_fractions(backend, binning, temperature):
    x, y = sampled(250, 6, 1.5)
    y[::9] = -100
    on = y != -100
    found = reliability(x, y, bins=10, binning=binning, temperature=temperature, resamples=0)
    result = gx.evaluate(x, y, bins=10, temperature=temperature)
    truth = softmax_loops(x[on], temperature)
    event = truth.argmax(axis=1) == y[on]
    p = truth.max(axis=1)
    edges = [k / 10 for k in range(1, 10)] if binning == "width" else None
    expected, table = scores_by_fractions(p, event, edges or mass_edges(p, 10))
    for name, value in expected.items():
        assert abs(getattr(found, name).value - float(value)) < 1e-14, name
    assert [b.count for b in found.bins] == [size for size, _, _ in table]
    squares = ((truth - np.eye(6)[y[on]]) ** 2).sum(axis=1)
    assert abs(found.brier_all_classes.value / squares.mean() - 1) < 1e-14
    assert found.nll.value == result.cross_entropy
    assert (found.scored, found.ignored) == (on.sum(), (~on).sum())
    if binning == "width":
        assert found.ece.value == result.ece


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_probabilities_against_fractions(bins, binning):
    """Of which the largest are known to the bit: on edges, twice, and of 1."""
    rng = np.random.default_rng(4)
    high = rng.choice([1.0, 0.5, 0.6, 0.7, 0.8, 14 / 15, rng.random() / 2 + 0.5, *(rng.random(40) / 2 + 0.5)], 300)
    probs = np.stack([high, 1 - high], axis=1)
    y = (rng.random(300) > high * 0.9).astype(np.int64)
    edges = np.linspace(0, 1, bins + 1)[1:-1].tolist() if binning == "width" else mass_edges(high, bins)
    found = reliability(probs, y, given="probs", bins=bins, binning=binning, resamples=0)
    assert_statistics(found, high, y == 0, edges)
    assert binning == "mass" or abs(found.ece.value - oracle.ece(high, y == 0, bins)) < 1e-16
    with np.errstate(divide="ignore"):
        assert found.nll.value == math.fsum(-np.log(np.where(y == 0, high, 1 - high))) / 300
    assert abs(found.brier_all_classes.value - 2 * found.brier.value) < 1e-15
    parts = found.reliability.value - found.resolution.value + found.uncertainty.value
    parts += found.within_bin_variance.value - found.within_bin_covariance.value
    assert abs(parts - found.brier.value) < 1e-15


def test_hand_computed_reliability():
    """Two bins: 0.6, 0.7 with one of two right in the upper one, none in the lower one; 0.5 belongs below."""
    probs = np.array([[0.6, 0.4], [0.3, 0.7], [0.5, 0.5]])
    found = reliability(probs, np.array([0, 0, 1]), given="probs", bins=2, resamples=0)
    assert [(b.lower, b.upper, b.count) for b in found.bins] == [(0.0, 0.5, 1), (0.5, 1.0, 2)]
    assert [b.accuracy.value for b in found.bins] == [0.0, 0.5]
    assert abs(found.ece.value - (0.5 + 2 * 0.15) / 3) < 1e-15
    assert (round(found.mce.value, 12), round(found.ace.value, 12)) == (0.5, 0.325)
    assert abs(found.brier.value - (0.16 + 0.49 + 0.25) / 3) < 1e-15
    assert abs(found.brier_all_classes.value - 2 * (0.16 + 0.49 + 0.25) / 3) < 1e-15


def test_against_scikit_learn():
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss, log_loss

    x, y = sampled(2000, 2, 2.0)
    probs = gx.softmax(x)
    high, event = probs.max(axis=1), probs.argmax(axis=1) == y
    for binning, strategy in (("width", "uniform"), ("mass", "quantile")):
        found = reliability(probs, y, given="probs", bins=10, binning=binning, resamples=0)
        share, mean = calibration_curve(event, high, n_bins=10, strategy=strategy)
        filled = [b for b in found.bins if b.count]
        assert np.allclose([b.accuracy.value for b in filled], share, 1e-14 if binning == "width" else 0.02, 0)
        assert np.allclose([b.confidence for b in filled], mean, 1e-14 if binning == "width" else 0.002, 0)
    assert abs(found.brier.value / brier_score_loss(event, high) - 1) < 1e-14
    assert abs(found.nll.value / log_loss(y, probs) - 1) < 1e-14


@pytest.mark.parametrize("bins", [10, 15])
@pytest.mark.parametrize("vocab", [5, 30])
def test_against_netcal(vocab, bins):
    """Which has bins of its own where there are two classes (it then bins the second one), and of equal mass where
    their number does not divide that of the rows."""
    metrics = pytest.importorskip("netcal.metrics")
    x, y = sampled(3000, vocab, 1.8)
    probs = gx.softmax(x)
    for binning in ("width", "mass"):
        found = reliability(probs, y, given="probs", bins=bins, binning=binning, resamples=0)
        for name in ("ECE", "MCE", "ACE"):
            other = getattr(metrics, name)(bins, equal_intervals=binning == "width").measure(probs, y)
            assert abs(getattr(found, name.lower()).value / other - 1) < 1e-12, (binning, name)
    bits, ones = sampled_bits(3000, 1.8)
    p = sigmoid(bits)
    found = reliability(p, ones, kind="sigmoid", given="probs", bins=bins, resamples=0)
    for name in ("ECE", "MCE", "ACE"):
        other = getattr(metrics, name)(bins).measure(p, ones)
        assert abs(getattr(found, name.lower()).value / other - 1) < 1e-12, name


def test_against_torchmetrics():
    """Whose sums are float32, and whose last bin is of p = 1 alone."""
    torch = pytest.importorskip("torch")
    calibration_error = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    x, y = sampled(2000, 6, 1.8)
    probs = gx.softmax(x)
    for bins in (10, 15):
        found = reliability(probs, y, given="probs", bins=bins, resamples=0)
        for norm, name in (("l1", "ece"), ("max", "mce")):
            other = calibration_error(torch.from_numpy(probs), torch.from_numpy(y), 6, n_bins=bins, norm=norm)
            assert abs(getattr(found, name).value / float(other) - 1) < 1e-5, (bins, name)


def test_equal_masses_are_equal():
    x, y = sampled(1000, 5, 1.0)
    assert {b.count for b in reliability(x, y, binning="mass", bins=8, resamples=0).bins} == {125}
    counts = [b.count for b in reliability(x, y, binning="mass", bins=7, resamples=0).bins]
    assert set(counts) == {142, 143}
    few = reliability(np.zeros((9, 4)), np.arange(9) % 4, binning="mass", resamples=0)  # all forecasts are equal
    assert [(b.lower, b.upper, b.count) for b in few.bins] == [(0.0, 1.0, 9)]


def test_reliability_is_the_same_from_any_source_and_in_any_blocks(tmp_path, monkeypatch):
    x, y = sampled(211, 33, 1.6, np.float32)
    y[::7] = -100
    names = np.arange(211) // 10
    expected = reliability(x, y, documents=names)
    whole = expected.to_dict()  # in which what is NaN is equal
    np.save(tmp_path / "x.npy", x)
    assert reliability(tmp_path / "x.npy", y, documents=names).to_dict() == whole
    assert reliability(da.from_array(x, chunks=(50, -1)), y, documents=names).to_dict() == whole
    reversed_ = reliability(x[::-1], y[::-1], documents=names[::-1], resamples=0)
    assert reversed_.bins[10].count == expected.bins[10].count
    assert [e.value for e in reversed_.intervals.values()] == [e.value for e in expected.intervals.values()]
    gx.evaluate(x, y, documents=names, run=tmp_path / "run")
    of_run = reliability_of_run(tmp_path / "run")
    assert of_run.brier_all_classes is None
    assert of_run.to_dict() == whole | {"brier_all_classes": None}
    monkeypatch.setattr(driver.ThreadWorkers, "read_bytes", 4000)
    assert reliability(x, y, documents=names).to_dict() == whole
    assert reliability(x, y, documents=names, memory=10000).to_dict() == whole
    assert reliability(x, y, memory=10000).to_dict() == reliability(x, y, memory=10**9).to_dict()


def test_a_run_that_is_not_finished(tmp_path):
    with pytest.raises((OSError, ValueError), match="run"):
        reliability_of_run(tmp_path)


def test_counts_beyond_float32():
    """Of a billion forecasts one more or less shows, where a float32 counter stays at 2**24."""
    counts, events = np.array([10**9 + 1, 0, 2**53 // 10**6]), np.array([10**9, 0, 17])
    sums = dict.fromkeys(("away", "away_squared", "away_events"), np.zeros(3))
    found = statistics(counts, events, np.array([1.0, 0.0, 0.5]), sums)
    assert found["accuracy"] == float(Fraction(int(events.sum()), int(counts.sum())))
    assert found["bin_accuracy"][0] == float(Fraction(10**9, 10**9 + 1)) < 1
    n = 2**21 + 1
    p, event = np.full(n, 0.75), np.arange(n) % 4 != 0
    many = Forecasts(np.arange(n), p, event, np.zeros(n))
    measured = measure(many, 15, "width", Resampling(resamples=0))
    assert measured.counts.tolist() == [0] * 11 + [n] + [0] * 3
    assert measured.values["ece"] == abs(int(event.sum()) - 0.75 * n) / n


# ---- intervals ----


def test_intervals_of_means_have_the_width_of_standard_errors():
    x, y = sampled(5000, 10, 1.3)
    names = np.repeat(np.arange(250), 20)
    x[names % 2 == 0] *= 3  # documents differ
    for documents in (None, names):
        result = gx.evaluate(x, y, documents=documents)
        found = reliability(x, y, documents=documents, level=0.9, resamples=4000)
        stderr = result.stderr_iid if documents is None else result.stderr_cluster
        assert abs((found.nll.high - found.nll.low) / (2 * 1.6449 * stderr) - 1) < 0.08
        assert found.nll.low < found.nll.value < found.nll.high
    assert found.documents == 250


def test_intervals_against_a_loop():
    """Of so few rows that each is drawn by itself."""
    x, y = sampled(60, 4, 1.5)
    found = reliability(x, y, bins=5, resamples=3000, level=0.8)
    probs = gx.softmax(x)
    high, event = probs.max(axis=1), probs.argmax(axis=1) == y
    rng = np.random.default_rng(7)
    again = []
    for _ in range(3000):
        drawn = rng.integers(0, 60, 60)
        place = np.ceil(high[drawn] * 5) - 1
        gaps = [abs((event[drawn][place == k] - high[drawn][place == k]).sum()) for k in range(5)]
        again.append((sum(gaps) / 60, ((event[drawn] - high[drawn]) ** 2).mean()))
    low, high_ = np.quantile(again, [0.1, 0.9], axis=0)
    for i, one in enumerate((found.ece, found.brier)):
        width = one.high - one.low
        assert abs(one.low - (2 * one.value - high_[i])) < 0.06 * width
        assert abs(one.high - (2 * one.value - low[i])) < 0.06 * width


def test_intervals_are_drawn_from_the_seed():
    x, y = sampled(2500, 5, 1.3)
    assert reliability(x, y).to_dict() == reliability(x, y).to_dict()
    assert reliability(x, y).ece != reliability(x, y, seed=1).ece
    none = reliability(x, y, resamples=0)
    assert all(math.isnan(one.low) and math.isnan(one.high) for one in none.intervals.values())
    assert none.to_dict()["ece"] == {"value": none.ece.value, "low": None, "high": None}
    assert math.isnan(reliability(x, y, documents=np.zeros(2500, int)).ece.low)


# ---- what reliability refuses ----


def test_reliability_refuses():
    x, y = sampled(20, 4, 1.0)
    with pytest.raises(ValueError, match="of 20 rows none counts"):
        reliability(x, np.full(20, -100))
    with pytest.raises(ValueError, match="binning must be one of 'width', 'mass', got 'even'"):
        reliability(x, y, binning="even")
    with pytest.raises(ValueError, match="given must be one of 'logits', 'probs'"):
        reliability(x, y, given="logprobs")
    with pytest.raises(ValueError, match="temperature and softcap"):
        reliability(gx.softmax(x), y, given="probs", temperature=2.0)
    with pytest.raises(ValueError, match="level"):
        reliability(x, y, level=1)
    with pytest.raises(ValueError, match=r"logits\[0, :\] has 1 entry negative, expected probabilities"):
        reliability(np.array([[1.5, -0.5]]), np.array([0]), given="probs")
    probs = gx.softmax(x)
    probs[13] *= 0.9
    with pytest.raises(ValueError, match=r"logits\[13, :\] sums to 0.9"):
        reliability(probs, y, given="probs", memory=200)
    y[13] = -100
    assert reliability(probs, y, given="probs").scored == 19
    x[5, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 19 rows have a loss of NaN, first row 5"):
        reliability(x, y)
    x[5] = 0
    x[5, y[5]] = -np.inf
    impossible = reliability(x, y)
    assert impossible.nll.value == math.inf
    assert math.isnan(impossible.nll.low)
    assert math.isfinite(impossible.ece.high)


def test_statistics_do_not_depend_on_the_centres():
    """As those of resamples must not, whose means are others."""
    rng = np.random.default_rng(0)
    p, event = rng.random(50), rng.random(50) < 0.4
    place = np.minimum((p * 3).astype(int), 2)
    found = []
    for centres in (np.array([0.2, 0.5, 0.9]), np.zeros(3)):
        away = p - centres[place]
        columns = {"away": away, "away_squared": away**2, "away_events": away * event}
        sums = {name: np.bincount(place, values, 3) for name, values in columns.items()}
        found.append(statistics(np.bincount(place), np.bincount(place[event]), centres, sums))
    expected, _ = scores_by_fractions(p, event, [1 / 3, 2 / 3])
    for one in found:
        for name, value in expected.items():
            assert abs(one[name] - float(value)) < 1e-14, name


# ---- independent sigmoids, and class by class ----


def sampled_bits(shape, sharpness, seed=0):
    rng = np.random.default_rng(seed)
    x = 2 * rng.standard_normal(shape)
    y = (x + rng.logistic(size=shape) > 0).astype(np.int64)
    return sharpness * x, y


def sigmoid(x):
    return np.asarray(oracle.softmax_rows(np.stack([np.zeros(x.size), x.ravel()], axis=1)), np.float64)[:, 1]


@pytest.mark.parametrize("shape", [(400,), (100, 4), (20, 5, 4)])
def test_temperature_of_sigmoids(shape):
    x, y = sampled_bits(shape, 1.8)
    fit = fit_temperature(x, y, kind="sigmoid")
    loss = float(gx.binary_cross_entropy(x / fit.temperature, y))
    assert abs(fit.cross_entropy / loss - 1) < 1e-14
    assert abs(fit.cross_entropy_before / float(gx.binary_cross_entropy(x, y)) - 1) < 1e-14
    flat = x.ravel()
    below, above = (
        ((sigmoid(flat / t) - y.ravel()) * flat).sum() for t in fit.temperature * (1 + np.array([-1e-8, 1e-8]))
    )
    assert below > 0 > above
    assert (fit.scored, fit.documents) == (400, None if len(shape) == 1 else 400 // 4)
    assert fit_temperature(x, y.astype(bool), kind="sigmoid", memory=5000) == fit


@pytest.mark.parametrize(("first", "stop"), [(0, 35), (5, 11), (7, 14), (9, 10), (34, 35), (3, 3)])
def test_any_elements_are_read_as_pairs(first, stop):
    x = np.random.default_rng(0).standard_normal((7, 5))
    x[2, 3] = -np.inf
    flat, names = x.ravel()[first:stop], np.arange(7) * 3
    for source in (ArraySource(x), DaskSource(da.from_array(x, chunks=(3, 2)))):
        for probs, other in ((False, np.zeros(flat.size)), (True, 1 - flat)):
            found = np.asarray(pairs(source, probs).read(slice(first, stop)))
            assert np.array_equal(found, np.stack([other, flat], axis=1))
    repeated = RepeatedSource((7,), 5, ArraySource(names))
    assert np.array_equal(repeated.read(slice(first, stop)), np.repeat(names, 5)[first:stop])
    assert np.array_equal(RepeatedSource((7,), 5).read(slice(first, stop)), (np.arange(35) // 5)[first:stop])


def test_documents_of_sigmoids_are_those_of_rows(tmp_path):
    x, y = sampled_bits((90, 3), 1.5)
    names = np.arange(90) // 6
    y[4, 1] = -100
    fit = fit_temperature(x, y, kind="sigmoid", documents=names)
    flat = fit_temperature(x.ravel(), y.ravel(), kind="sigmoid", documents=np.repeat(names, 3))
    assert fit == flat
    np.save(tmp_path / "names.npy", names)
    np.save(tmp_path / "x.npy", x)
    assert fit_temperature(tmp_path / "x.npy", y, kind="sigmoid", documents=tmp_path / "names.npy") == fit
    lazy = da.from_array(x, chunks=(20, 2))
    assert fit_temperature(lazy, da.from_array(y, chunks=(30, 3)), kind="sigmoid", documents=names) == fit
    rows = fit_temperature(x, y, kind="sigmoid", documents=np.arange(90))
    assert rows == fit_temperature(x, y, kind="sigmoid")
    assert fit_temperature(x, y, kind="sigmoid", limit=30).scored == 89


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_reliability_of_sigmoids(backend, binning):
    x, y = sampled_bits((70, 3), 1.5)
    y[11, 2] = -100
    on = y.ravel() != -100
    found = reliability(x, y, kind="sigmoid", binning=binning, bins=8)
    p, event = sigmoid(x)[on], y.ravel()[on] == 1
    edges = np.linspace(0, 1, 9)[1:-1].tolist() if binning == "width" else mass_edges(p, 8)
    expected, table = scores_by_fractions(p, event, edges)
    for name, value in expected.items():
        assert abs(getattr(found, name).value - float(value)) < 1e-14, name
    assert [b.count for b in found.bins] == [size for size, _, _ in table]
    assert abs(found.nll.value / float(gx.binary_cross_entropy(x, y, ignore_index=-100)) - 1) < 1e-14
    assert (found.brier_all_classes, found.ignored, found.documents) == (None, 1, 70)
    given = reliability(1 / (1 + np.exp(-x)), y, kind="sigmoid", given="probs", binning=binning, bins=8)
    for name, one in found.intervals.items():
        assert abs(getattr(given, name).value - one.value) < 1e-12, name


def test_each_column_of_sigmoids_by_itself():
    x, y = sampled_bits((120, 3), 1.5)
    names = np.arange(120) // 4
    found = classwise_reliability(x, y, kind="sigmoid", documents=names)
    for column, one in enumerate(found.by_class):
        alone = reliability(x[:, column], y[:, column], kind="sigmoid", documents=names)
        assert one.to_dict() == alone.to_dict()
    assert abs(found.ece.value - np.mean([one.ece.value for one in found.by_class])) < 1e-15
    assert found.max_ece.value == max(one.ece.value for one in found.by_class)
    (last,) = classwise_reliability(x, y, kind="sigmoid", documents=names, classes=[2]).by_class
    assert last.to_dict() == found.by_class[2].to_dict()


@pytest.mark.parametrize("given", ["logits", "probs"])
def test_each_class_by_itself(backend, given):
    x, y = sampled(150, 5, 1.4)
    y[::13] = -100
    on = y != -100
    probs = softmax_loops(np.tanh(x / 6) * 6, 1.2)
    options = {"softcap": 6.0, "temperature": 1.2} if given == "logits" else {"given": given}
    found = classwise_reliability(x if given == "logits" else probs, y, bins=6, resamples=50, **options)
    assert found.classes == (0, 1, 2, 3, 4)
    squares = ((probs[on] - np.eye(5)[y[on]]) ** 2).sum(axis=1).mean()
    assert abs(found.by_class[0].brier_all_classes.value / squares - 1) < 1e-13
    for label, one in enumerate(found.by_class):
        expected, table = scores_by_fractions(probs[on, label], y[on] == label, np.linspace(0, 1, 7)[1:-1].tolist())
        for name, value in expected.items():
            assert abs(getattr(one, name).value - float(value)) < 1e-13, name
        assert [b.count for b in one.bins] == [size for size, _, _ in table]
    some = classwise_reliability(x if given == "logits" else probs, y, bins=6, resamples=50, classes=(3, 1), **options)
    assert [one.to_dict() for one in some.by_class] == [found.by_class[3].to_dict(), found.by_class[1].to_dict()]
    assert found.ece.low <= found.ece.high <= 1


def test_classes_of_dask_arrays():
    x, y = sampled(150, 5, 1.4)
    found = classwise_reliability(x, y, classes=[4, 0], resamples=0)
    lazy = classwise_reliability(da.from_array(x, chunks=(40, -1)), y, classes=[4, 0], resamples=0)
    assert lazy.to_dict() == found.to_dict()


def test_products_class_by_class(tmp_path):
    rng = np.random.default_rng(3)
    hidden, classifier, bias = rng.standard_normal((150, 4)), rng.standard_normal((6, 4)), rng.standard_normal(6)
    x = hidden @ classifier.T + bias
    y = (x + rng.gumbel(size=x.shape)).argmax(axis=1)
    bits = (x > rng.logistic(size=x.shape)).astype(int)
    np.save(tmp_path / "hidden.npy", hidden)
    for states in (hidden, tmp_path / "hidden.npy", da.from_array(hidden, chunks=(40, -1))):
        products = gx.linear_logits(states, classifier, bias)
        for options in ({"classes": [4, 0]}, {"softcap": 5.0, "temperature": 1.5}):
            found = classwise_reliability(products, y, resamples=0, **options)
            expected = classwise_reliability(x, y, resamples=0, **options)
            assert found.classes == expected.classes
            for one, other in zip(found.by_class, expected.by_class, strict=True):
                assert abs(one.nll.value / other.nll.value - 1) < 1e-12
                assert abs(one.ece.value - other.ece.value) < 1e-12
                assert [b.count for b in one.bins] == [b.count for b in other.bins]
        fit = fit_temperature(products, bits, kind="sigmoid")
        assert abs(fit.temperature / fit_temperature(x, bits, kind="sigmoid").temperature - 1) < 1e-9
        found = classwise_reliability(products, bits, kind="sigmoid", classes=[5], resamples=0)
        expected = classwise_reliability(x, bits, kind="sigmoid", classes=[5], resamples=0)
        assert abs(found.ece.value - expected.ece.value) < 1e-12
        found = reliability(products, bits, kind="sigmoid", resamples=0, memory=3000)
        assert abs(found.nll.value / reliability(x, bits, kind="sigmoid", resamples=0).nll.value - 1) < 1e-12


def test_narrow_products_class_by_class():
    hidden, classifier = np.eye(5, dtype=np.float16), np.arange(15).reshape(3, 5).astype(np.float16) / 8
    found = classwise_reliability(gx.linear_logits(hidden, classifier), np.arange(5) % 3, resamples=0)
    expected = classwise_reliability(classifier.T.astype(np.float32), np.arange(5) % 3, resamples=0)
    assert found.to_dict() == expected.to_dict()


def test_kinds_refused():
    x, y = sampled_bits((20, 3), 1.0)
    with pytest.raises(ValueError, match="kind must be one of 'softmax', 'sigmoid', got 'binary'"):
        fit_temperature(x, y, kind="binary")
    with pytest.raises(ValueError, match="shift must be 0 with kind='sigmoid', got 1"):
        fit_temperature(x, y, kind="sigmoid", shift=1)
    with pytest.raises(IndexError, match=r"labels\[0, 0\] is 2"):
        reliability(x, y * 0 + 2, kind="sigmoid")
    with pytest.raises(ValueError, match=r"labels .* must have shape \(20, 3\)"):
        reliability(x, y[:, 0], kind="sigmoid")
    with pytest.raises(IndexError, match=r"classes has 3, expected classes in \[0, 3\)"):
        classwise_reliability(x, y[:, 0], classes=[3])
    with pytest.raises(ValueError, match=r"logits\[0, :\] has 1 entry negative"):
        reliability(x + 10, y, kind="sigmoid", given="probs")


def test_no_rows_and_no_classes():
    rows, labels = np.zeros((4, 3)), np.zeros(4, int)
    for function in (reliability, classwise_reliability):
        with pytest.raises(ValueError, match="no row to measure: of 0 rows none counts"):
            function(rows[:0], labels[:0])
    with pytest.raises(TypeError, match="classes must be a sequence of integers, got 1"):
        classwise_reliability(rows, labels, classes=1)
    with pytest.raises(ValueError, match=r"classes must name one class or more, got \(\)"):
        classwise_reliability(rows, labels, classes=())


# ---- checked on rows held out ----


def test_fitted_on_some_documents_and_checked_on_the_others():
    x, y = sampled(3000, 6, 2.0)
    names = np.random.default_rng(1).integers(-(2**62), 2**62, 150).repeat(20)
    order = np.random.default_rng(2).permutation(3000)
    x, y, names = x[order], y[order], names[order]
    check = check_temperature(x, y, documents=names, held_out=0.3, seed=4)
    inside = drawn(names, 0.3, 4)
    assert 0.2 < inside.mean() < 0.4
    assert not set(names[inside]) & set(names[~inside])
    assert check.fit == replace(fit_temperature(x[~inside], y[~inside], documents=names[~inside]), ignored=inside.sum())
    for part, temperature in ((check.before, 1.0), (check.after, check.fit.temperature)):
        alone = reliability(x[inside], y[inside], documents=names[inside], temperature=temperature, seed=4)
        assert part.to_dict() == alone.to_dict() | {"ignored": (~inside).sum()}
    assert check.helps
    assert check.after.nll.value < check.before.nll.value
    assert check_temperature(x, y, documents=names, held_out=0.3, seed=4, memory=30000).to_dict() == check.to_dict()
    assert check_temperature(x, y, documents=names, held_out=0.3, seed=5).fit != check.fit


def test_what_does_not_help():
    x, y = sampled(600, 6, 1.0)
    check = check_temperature(2 * x, y, seed=3)
    assert check.helps
    for name in ("nll", "ece"):  # one of them did not fall
        worse = replace(check, after=replace(check.after, **{name: getattr(check.before, name)}))
        assert not worse.helps
        (said,) = calibration_report.warnings(worse)
        assert said == f"on the rows held out the temperature does not lower {name.upper()}"
    assert not list(calibration_report.warnings(check))
    assert check_temperature(2 * x, y, seed=3, memory=5000).to_dict() == check.to_dict()
    x[drawn(np.arange(600), 0.5, 0)] /= 4
    assert not check_temperature(x * 4, y).helps  # the rows held out are as they should be, the others too sure
    with pytest.raises(ValueError, match="no row to fit a temperature to"):
        check_temperature(x, y, held_out=1)
    with pytest.raises(ValueError, match="held_out must be a number above 0 and at most 1, got 0"):
        check_temperature(x, y, held_out=0)


def test_sigmoids_are_held_out_by_rows():
    x, y = sampled_bits((400, 3), 2.0)
    check = check_temperature(x, y, kind="sigmoid")
    inside = drawn(np.arange(400), 0.5, 0)
    assert check.fit.temperature == fit_temperature(x[~inside], y[~inside], kind="sigmoid").temperature
    assert (check.before.scored, check.before.documents) == (3 * inside.sum(), inside.sum())


def test_matrix_scaling_mends_what_no_temperature_can():
    x, y = sampled(4000, 5, 1.0)
    mixed = x @ (2 * np.eye(5) + np.random.default_rng(3).standard_normal((5, 5))) + np.arange(5.0)
    model = gx.SoftmaxRegression().fit(mixed[:2000], y[:2000])
    probs = model.predict_proba(mixed[2000:])
    scaled = reliability(probs, y[2000:], given="probs")
    fit = fit_temperature(mixed[:2000], y[:2000])
    heated = reliability(mixed[2000:], y[2000:], temperature=fit.temperature)
    best = reliability(x[2000:], y[2000:])
    assert best.nll.value < scaled.nll.value < best.nll.value + 0.02 < heated.nll.value
    assert scaled.ece.value < heated.ece.value


def test_drawn_evenly():
    for seed in range(3):
        inside = drawn(np.arange(100000), 0.25, seed)
        assert abs(inside.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 100000)
        assert abs((inside[1:] & inside[:-1]).mean() - 0.0625) < 0.005
    assert (drawn(np.arange(1000), 0.25, 0) != drawn(np.arange(1000), 0.25, 1)).any()
    assert not (drawn(np.arange(1000), 0.25, 0) & ~drawn(np.arange(1000), 0.5, 0)).any()


# ---- what looks like something else ----


def test_probabilities_as_logits_are_warned_of():
    x, y = sampled(200, 8, 1.5, np.float32)
    probs = gx.softmax(x)
    for function in (reliability, fit_temperature, check_temperature, classwise_reliability):
        with pytest.warns(UserWarning, match="in \\[0, 1\\] and sum to 1: if they are probabilities") as caught:
            function(probs, y)
        assert caught[0].filename == __file__


def test_softmax_twice_is_warned_of(tmp_path):
    x, y = sampled(200, 8, 1.5)
    twice = gx.softmax(gx.softmax(x))
    with pytest.warns(UserWarning, match="softmax applied twice"):
        reliability(twice, y, given="probs")
    np.save(tmp_path / "x.npy", np.log(twice))
    with pytest.warns(UserWarning, match="softmax applied twice"):
        fit_temperature(tmp_path / "x.npy", y)


def test_log_probabilities_are_logits():
    x, y = sampled(200, 8, 1.5)  # a warning would be an error
    again = reliability(gx.log_softmax(x), y)
    for name, one in reliability(x, y).intervals.items():
        assert abs(getattr(again, name).value - one.value) < 1e-12, name
    fit = fit_temperature(gx.log_softmax(x), y)
    assert abs(fit.temperature / fit_temperature(x, y).temperature - 1) < 1e-9


# ---- the command ----


def calibrate(*arguments, **environment):
    done = gpuxent("calibrate", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def files(tmp_path):
    x, y = sampled(600, 8, 2.0, np.float32)
    names = np.arange(600) // 5
    arrays = {"x": x, "y": y, "names": names, "probs": gx.softmax(x)}
    paths = {name: tmp_path / f"{name}.npy" for name in arrays}
    for name, array in arrays.items():
        np.save(paths[name], array)
    return arrays, paths


def test_the_command_is_check_temperature(files, tmp_path):
    arrays, paths = files
    options = {"documents": arrays["names"], "held_out": 0.4, "bins": 12, "binning": "mass", "resamples": 200}
    options["backend"] = "numpy"
    expected = check_temperature(arrays["x"], arrays["y"], **options)
    where = ("--labels", paths["y"], "--documents", paths["names"], "--memory", "1MB")
    how = ("--held-out", 0.4, "--bins", 12, "--binning", "mass", "--resamples", 200, "--backend", "numpy")
    out = tmp_path / "out.json"
    calibrate(paths["x"], *where, *how, "--format", "json", "--output", out)
    found = strict_json(out.read_text())
    run = found.pop("run")
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert (run["kind"], run["held_out"], run["logits"]) == ("softmax", 0.4, str(paths["x"]))
    table = calibrate(paths["x"], *where, *how).stdout
    assert f"temperature {expected.fit.temperature:.6g} ±" in table
    assert re.search(r"^ECE +[\d.]+ +[\d.]+ - [\d.]+ +[\d.]+ +[\d.]+ - [\d.]+$", table, re.MULTILINE)
    assert "Bins, after" in table
    assert "| NLL, nats |" in calibrate(paths["x"], *where, *how, "--format", "markdown").stdout


def test_the_command_on_probabilities_and_on_a_run(files, tmp_path):
    arrays, paths = files
    where = ("--labels", paths["y"], "--format", "json", "--resamples", 20)
    found = strict_json(calibrate(paths["probs"], "--from", "probs", *where).stdout)
    expected = reliability(arrays["probs"], arrays["y"], given="probs", resamples=20)
    assert found["ece"] == json.loads(json.dumps(expected.to_dict()["ece"]))
    warned = calibrate(paths["probs"], "--no-fit", *where)
    assert "gpuxent: warning: logits" in warned.stderr
    assert "--from probs" in warned.stderr
    gx.evaluate(arrays["x"], arrays["y"], run=tmp_path / "run")
    found = strict_json(calibrate("--run", tmp_path / "run", "--format", "json", "--resamples", 20).stdout)
    assert found["nll"]["value"] == reliability(arrays["x"], arrays["y"], resamples=0).nll.value


def test_the_command_on_hidden_states(files, tmp_path):
    arrays, paths = files
    classifier = np.random.default_rng(9).standard_normal((8, 8), dtype=np.float32) / 4 + np.eye(8, dtype=np.float32)
    np.save(tmp_path / "classifier.npy", classifier)
    where = ("--labels", paths["y"], "--format", "json", "--resamples", 20)
    parts = ("--hidden", paths["x"], "--classifier", tmp_path / "classifier.npy")
    found = strict_json(calibrate(*parts, *where).stdout)
    expected = check_temperature(arrays["x"] @ classifier.T, arrays["y"], resamples=20)
    assert abs(found["fit"]["temperature"] / expected.fit.temperature - 1) < 1e-6
    assert abs(found["after"]["nll"]["value"] / expected.after.nll.value - 1) < 1e-6


def test_the_command_refuses(files):
    paths = files[1]
    for arguments, code, message in (
        ((), 2, "give either logits, or"),
        ((paths["x"], "--run", "run"), 2, "give either logits, or"),
        (("--hidden", paths["x"], "--labels", paths["y"]), 2, "give either logits, or"),
        ((paths["x"],), 2, "only a .kld file has its own"),
        ((paths["x"], "--labels", paths["x"]), 3, "must be integers"),
        ((paths["x"], "--labels", paths["y"], "--level", 1), 3, "level must be below 1"),
        (("--run", paths["x"].parent), 3, "run"),
    ):
        done = gpuxent("calibrate", *arguments)
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr
