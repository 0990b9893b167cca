"""Temperatures against grids, roots in 50 digits and loops; invariances; what is refused and why."""

import math

import dask.array as da
import ml_dtypes
import mpmath
import numpy as np
import oracle
import pytest
from makers import logits as peaked

import gpuxent as gx
from gpuxent.calibration import fit_temperature
from gpuxent.evaluation import driver
from gpuxent.evaluation.temperature import MOST_PASSES


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
    x = np.zeros((10000, 2))
    x[:, 0] = 1.0
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
