"""Vector and matrix scaling against torch's L-BFGS and autograd, from every kind of source; what is refused and why."""

import json
import math
import re
from dataclasses import replace

import dask.array as da
import distributed
import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from test_calibration import calibrate
from test_cli import gpuxent, strict_json

import gpuxent as gx
from gpuxent.calibration import (
    check_scaling,
    classwise_reliability,
    fit_matrix_scaling,
    fit_vector_scaling,
    reliability,
)
from gpuxent.evaluation.calibration import report as calibration_report
from gpuxent.evaluation.calibration.held_out import drawn
from gpuxent.evaluation.calibration.passes import in_order
from gpuxent.evaluation.statistics.tokens import BlockResult

FITS = {"vector": fit_vector_scaling, "matrix": fit_matrix_scaling}


def spoiled(rows, vocab, dtype=np.float64, seed=0, matrix=False):
    """(logits, labels): logits drawn from, each class then scaled and moved by its own; the first is rarely a label."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.standard_normal((rows, vocab)) - 3 * (np.arange(vocab) == 0)
    y = (x + rng.gumbel(size=x.shape)).argmax(axis=1)
    mixed = x @ (np.eye(vocab) + rng.standard_normal((vocab, vocab)) / 4) if matrix else x
    return (mixed * rng.uniform(0.5, 4, vocab) + rng.standard_normal(vocab)).astype(dtype), y


def penalized(scale, bias, x, y, C, library=np):
    """The objective, by the formula of the docstring."""
    origin = library.ones(bias.shape) if scale.ndim == 1 else library.eye(len(bias))
    z = (x * scale if scale.ndim == 1 else x @ scale.T) + bias
    on = y != -100
    loss = torch.nn.functional.cross_entropy(z, y) if library is torch else float(oracle.cross_entropy(z[on], y[on]))
    return loss + (((scale - origin) ** 2).sum() + (bias**2).sum()) / (2 * C * int(on.sum()))


def least(method, x, y, C):
    """The least objective that torch's L-BFGS finds, in float64."""
    x, y = torch.from_numpy(x.astype(np.float64)), torch.from_numpy(y)
    vocab = x.shape[1]
    scale = (torch.ones(vocab) if method == "vector" else torch.eye(vocab)).double().requires_grad_()
    bias = torch.zeros(vocab, dtype=torch.float64, requires_grad=True)
    limits = {"max_iter": 2000, "max_eval": 10**5, "tolerance_grad": 1e-9, "tolerance_change": 1e-15}
    solver = torch.optim.LBFGS([scale, bias], history_size=50, line_search_fn="strong_wolfe", **limits)

    def closure():
        solver.zero_grad()
        loss = penalized(scale, bias, x, y, C, torch)
        loss.backward()
        return loss

    solver.step(closure)
    return float(closure().detach())


# ---- the fit ----


@pytest.mark.parametrize("C", [1.0, 0.01, math.inf])
@pytest.mark.parametrize("method", FITS)
def test_the_objective_is_as_small_as_torch_finds(method, C):
    x, y = spoiled(300, 4, matrix=method == "matrix")
    y[::9] = -100
    fit = FITS[method](x, y, C=C)
    found, best = penalized(fit.scale, fit.bias, x, y, C), least(method, x, y, C)
    assert best - 1e-10 < found < best + 1e-7
    on = y != -100
    z = (x * fit.scale if method == "vector" else x @ fit.scale.T) + fit.bias
    assert abs(fit.cross_entropy / float(oracle.cross_entropy(z[on], y[on])) - 1) < 1e-13
    assert abs(fit.cross_entropy_before / float(oracle.cross_entropy(x[on], y[on])) - 1) < 1e-14
    assert (fit.method, fit.scored, fit.ignored, fit.converged) == (method, on.sum(), (~on).sum(), True)
    assert fit.cross_entropy < fit.cross_entropy_before - 0.1


@pytest.mark.parametrize("method", FITS)
def test_every_backend_finds_it(backend, method):
    x, y = spoiled(60, 4)
    fit = FITS[method](x, y, C=0.1)
    assert penalized(fit.scale, fit.bias, x, y, 0.1) < least(method, x, y, 0.1) + 1e-7


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_narrow_logits_are_fitted_in_float64(dtype):
    x, y = spoiled(400, 6, dtype)
    wide = np.asarray(x, np.float64)
    assert fit_vector_scaling(x, y).to_dict() == fit_vector_scaling(wide, y).to_dict()


def test_what_was_done_to_each_class_is_found():
    rng = np.random.default_rng(5)
    x = 2 * rng.standard_normal((40000, 4))
    y = (x + rng.gumbel(size=x.shape)).argmax(axis=1)
    fit = fit_vector_scaling(x / [0.5, 1, 2, 4] - [0, 1, 0, 0], y)
    assert np.abs(fit.scale / [0.5, 1, 2, 4] - 1).max() < 0.05
    assert np.abs(fit.bias - fit.bias[0] - [0, 1, 0, 0]).max() < 0.1
    mix = np.eye(4) + rng.standard_normal((4, 4)) / 3
    fit = fit_matrix_scaling(x @ np.linalg.inv(mix).T, y)
    centred = mix - mix.mean(axis=0)
    assert np.abs(fit.scale - fit.scale.mean(axis=0) - centred).max() < 0.1


def test_strength_of_the_penalty():
    x, y = spoiled(500, 5)
    for method, fit in FITS.items():
        still = fit(x, y, C=1e-9)
        assert np.abs(still.scale - (np.ones(5) if method == "vector" else np.eye(5))).max() < 1e-4
        assert np.abs(still.bias).max() < 1e-4
        assert fit(x, y, C=1.0).cross_entropy > fit(x, y, C=100.0).cross_entropy


def test_classes_that_are_never_the_label():
    """Without a penalty their biases would have no end."""
    x, y = spoiled(3000, 60)
    seen = y % 3 != 0
    fit = fit_vector_scaling(x[seen], y[seen])
    assert fit.converged
    assert np.isfinite(fit.bias).all()
    assert fit.bias[3::3].max() < np.delete(fit.bias, np.s_[::3]).min()


@pytest.mark.parametrize("sharpness", [0.03, 30.0])
def test_large_and_small_logits(sharpness):
    x, y = spoiled(200, 4)
    fit = fit_vector_scaling(sharpness * x, y, C=100.0)
    found = penalized(fit.scale, fit.bias, sharpness * x, y, 100.0)
    assert found < least("vector", sharpness * x, y, 100.0) + 1e-6


def test_few_passes_are_needed():
    """Where L-BFGS in the parameters as they are takes hundreds."""
    x, y = spoiled(4000, 30, matrix=True)
    assert fit_matrix_scaling(x, y).passes < 100
    x, y = spoiled(4000, 100)
    assert fit_vector_scaling(x - 4.0 * (np.arange(100) % 10), y).passes < 65


def test_classes_of_probability_0():
    x, y = spoiled(500, 6)
    kept = [0, 1, 2, 4, 5]
    hole = x.copy()
    hole[:, 3] = -np.inf
    on = y != 3
    fit, without = fit_vector_scaling(hole[on], y[on]), fit_vector_scaling(x[on][:, kept], np.searchsorted(kept, y[on]))
    assert abs(fit.cross_entropy / without.cross_entropy - 1) < 1e-7
    assert (fit.scale[3], abs(fit.bias[3]) < 1e-3) == (1.0, True)
    assert (fit.apply(hole)[:, 3] == -np.inf).all()
    some = x.copy()
    some[on & (np.arange(500) % 2 == 0), 3] = -np.inf
    fit = fit_vector_scaling(some, y)
    z = np.where(np.isfinite(some), some, 0) * fit.scale + np.where(np.isfinite(some), fit.bias, -np.inf)
    assert abs(fit.cross_entropy / float(oracle.cross_entropy(z, y)) - 1) < 1e-13
    with pytest.raises(
        ValueError, match=r"rows have a loss of NaN, first row \d+; a logit of -inf has no place in matrix"
    ):
        fit_matrix_scaling(some, y)
    some[7, y[7]] = -np.inf
    with pytest.raises(ValueError, match="1 of 500 rows have a loss of infinity, first row 7"):
        fit_vector_scaling(some, y)
    y[7] = -100
    assert fit_vector_scaling(some, y).scored == 499


def test_a_negative_scale_keeps_probability_0():
    fit = fit_vector_scaling(*spoiled(60, 3))
    turned = replace(fit, scale=np.array([-1.0, 0.0, 2.0]), bias=np.ones(3))
    rows = np.array([[-np.inf, -np.inf, -np.inf], [1.0, 2.0, 3.0]])
    assert turned.apply(rows).tolist() == [[-np.inf] * 3, [0.0, 1.0, 7.0]]


def test_softcap_comes_first():
    x, y = spoiled(400, 5)
    for method, fit in FITS.items():
        found = fit(x, y, softcap=3.0)
        capped = fit(3 * np.tanh(x / 3), y)
        assert abs(found.cross_entropy / capped.cross_entropy - 1) < 1e-8, method
        assert np.allclose(found.apply(x), capped.apply(3 * np.tanh(x / 3)), rtol=1e-3, atol=1e-3)


# ---- from anywhere ----


@pytest.mark.parametrize("method", FITS)
def test_the_same_from_any_source_and_in_any_blocks(tmp_path, method):
    x, y = spoiled(330, 9, np.float32, matrix=method == "matrix")
    y[::7] = -100
    expected = FITS[method](x, y)
    for name, array in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", array)
    same = expected.to_dict()
    assert FITS[method](tmp_path / "x.npy", tmp_path / "y.npy").to_dict() == same
    assert FITS[method](np.asfortranarray(x), y.astype(np.int16)).to_dict() == same
    assert FITS[method](x.reshape(3, 110, 9), y.reshape(3, 110)).to_dict() == same
    blocks = FITS[method](x, y, memory=8000)
    for _ in range(3):
        assert FITS[method](x, y, memory=8000).to_dict() == blocks.to_dict()
    lazy = FITS[method](da.from_array(x, chunks=(50, 4)), y)
    for other in (blocks, lazy):
        assert abs(other.cross_entropy / expected.cross_entropy - 1) < 1e-6
        assert np.abs(other.scale - expected.scale).max() < 0.01
    assert FITS[method](da.from_array(x, chunks=(50, -1)), y).to_dict() == lazy.to_dict()


def test_on_a_cluster(tmp_path):
    x, y = spoiled(330, 9, np.float32)
    np.save(tmp_path / "x.npy", x)
    lazy = da.from_array(x, chunks=(50, -1))
    fits = [fit(lazy, y).to_dict() for fit in FITS.values()]
    check = check_scaling(lazy, y, method="matrix", resamples=10, classes=[1, 4])
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        found = fit_vector_scaling(tmp_path / "x.npy", y, client=client)
        assert abs(found.cross_entropy / fit_vector_scaling(x, y).cross_entropy - 1) < 1e-6  # in other blocks
        assert found.to_dict() == fit_vector_scaling(tmp_path / "x.npy", y, client=client).to_dict()
        assert [fit(lazy, y).to_dict() for fit in FITS.values()] == fits
        again = check_scaling(lazy, y, method="matrix", resamples=10, classes=[1, 4])
        assert again.to_dict() == check.to_dict()
        with pytest.raises(TypeError, match="an array in memory"):
            fit_vector_scaling(x, y, client=client)


def test_hidden_states_and_a_classifier(tmp_path):
    rng = np.random.default_rng(1)
    hidden, classifier, bias = rng.standard_normal((400, 5)), rng.standard_normal((8, 5)), rng.standard_normal(8)
    x = hidden @ classifier.T + bias
    y = (x / 2 + rng.gumbel(size=x.shape)).argmax(axis=1)
    for name, array in (("h", hidden), ("w", classifier)):
        np.save(tmp_path / f"{name}.npy", array)
    for products in (
        gx.linear_logits(hidden, classifier, bias),
        gx.linear_logits(tmp_path / "h.npy", tmp_path / "w.npy", bias),
        gx.linear_logits(da.from_array(hidden, chunks=(100, -1)), classifier, bias),
    ):
        found = fit_vector_scaling(products, y)
        assert abs(found.cross_entropy / fit_vector_scaling(x, y).cross_entropy - 1) < 1e-9
        check, stored = check_scaling(products, y, resamples=0), check_scaling(x, y, resamples=0)
        assert abs(check.after.nll.value / stored.after.nll.value - 1) < 1e-6
        assert check.after.scored == stored.after.scored


def test_on_a_gpu():
    cupy = pytest.importorskip("cupy")
    x, y = spoiled(300, 6)
    for fit in FITS.values():
        found, expected = fit(cupy.asarray(x), cupy.asarray(y)), fit(x, y)
        assert abs(found.cross_entropy / expected.cross_entropy - 1) < 1e-8
        scaled = found.apply(cupy.asarray(x))
        assert type(scaled) is cupy.ndarray
        assert np.allclose(cupy.asnumpy(scaled), expected.apply(x), atol=1e-2)


def test_results_in_the_order_of_the_rows():
    blocks = [BlockResult(first, 3, None, None, "") for first in (6, 0, 9, 3)]
    assert [block.first for block in in_order(iter(blocks))] == [0, 3, 6, 9]


# ---- applied ----


@pytest.mark.parametrize("method", FITS)
def test_applied_to_whatever_holds_logits(tmp_path, method):
    x, y = spoiled(330, 9, np.float32, matrix=method == "matrix")
    fit = FITS[method](x, y)
    assert fit.cross_entropy < fit.cross_entropy_before - 1
    wide = x.astype(np.float64)
    truth = (wide * fit.scale if method == "vector" else wide @ fit.scale.T) + fit.bias
    made = fit.apply(x)
    assert made.dtype == np.float32
    assert np.abs(made - truth).max() < 1e-4
    assert fit.apply(wide).dtype == np.float64
    assert np.allclose(fit.apply(wide), truth, rtol=1e-13, atol=1e-13)
    assert fit.apply(x.astype(np.float16)).dtype == np.float32
    lazy = fit.apply(da.from_array(x.reshape(3, 110, 9), chunks=(1, 50, 4)))
    assert isinstance(lazy, da.Array)
    assert np.allclose(lazy.compute(), made.reshape(3, 110, 9), rtol=1e-5, atol=1e-5)
    np.save(tmp_path / "x.npy", wide)
    source = fit.apply(tmp_path / "x.npy")
    assert abs(gx.evaluate(source, y).cross_entropy / fit.cross_entropy - 1) < 1e-13
    assert np.array_equal(source.read(slice(5, 9), slice(2, 4)), fit.apply(wide)[5:9, 2:4])
    products = fit.apply(gx.linear_logits(x, np.eye(9, dtype=np.float32)))
    assert abs(gx.evaluate(products, y).cross_entropy / fit.cross_entropy - 1) < 1e-6
    assert reliability(source, y, resamples=0).nll.value == gx.evaluate(source, y).cross_entropy


def test_what_apply_refuses(tmp_path):
    x, y = spoiled(100, 4)
    fit = fit_vector_scaling(x, y)
    with pytest.raises(
        ValueError, match=r"logits \(array\) must have shape \(..., 4\), as those that were fitted, got"
    ):
        fit.apply(x[:, :3])
    np.save(tmp_path / "x.npy", x[:, :3])
    with pytest.raises(ValueError, match=r"x.npy\) must have shape \(..., 4\)"):
        fit.apply(tmp_path / "x.npy")
    with pytest.raises(TypeError, match="logits"):
        fit.apply(np.zeros((3, 4), int))


# ---- checked on rows held out ----


@pytest.mark.parametrize("method", FITS)
def test_fitted_on_some_documents_and_checked_on_the_others(method):
    x, y = spoiled(3000, 6, matrix=method == "matrix")
    names = np.random.default_rng(1).permutation(150).repeat(20)
    how = {"documents": names, "seed": 4, "resamples": 50}
    check = check_scaling(x, y, method=method, held_out=0.3, classes=[5, 0], **how)
    inside = drawn(names, 0.3, 4)
    fit = FITS[method](x[~inside], y[~inside])
    assert abs(check.fit.cross_entropy / fit.cross_entropy - 1) < 1e-12
    assert (check.fit.scored, check.fit.ignored) == ((~inside).sum(), inside.sum())
    how["documents"] = names[inside]
    for logits, whole, classes in (
        (x, check.before, check.classes_before),
        (check.fit.apply(x), check.after, check.classes_after),
    ):
        alone = reliability(logits[inside], y[inside], **how)
        assert whole.to_dict() == alone.to_dict() | {"ignored": (~inside).sum()}
        each = classwise_reliability(logits[inside], y[inside], classes=[5, 0], **how)
        assert classes.ece == each.ece
    assert check.helps
    assert check_scaling(x, y, method=method, **how | {"documents": names}).classes_after is None


def test_a_scaling_helps_where_no_temperature_does():
    x, y = spoiled(6000, 5)
    heated = gx.calibration.check_temperature(x, y, resamples=0)
    scaled = check_scaling(x, y, resamples=0)
    mixed = check_scaling(x, y, method="matrix", resamples=0)
    assert scaled.after.nll.value < heated.after.nll.value - 0.05
    assert scaled.after.ece.value < heated.after.ece.value
    assert abs(mixed.after.nll.value - scaled.after.nll.value) < 0.02


# ---- what is refused ----


def test_refused(monkeypatch):
    x, y = spoiled(50, 6)
    with pytest.raises(ValueError, match="method must be one of 'vector', 'matrix', got 'scalar'"):
        check_scaling(x, y, method="scalar")
    with pytest.raises(ValueError, match="C must be a number above 0, got 0"):
        fit_vector_scaling(x, y, C=0)
    with pytest.raises(ValueError, match="max_iter must be"):
        fit_matrix_scaling(x, y, max_iter=0)
    with pytest.raises(ValueError, match="no row to scale: of 50 rows none counts"):
        fit_vector_scaling(x, np.full(50, -100))
    with pytest.raises(ValueError, match="of 0 rows none counts"):
        fit_matrix_scaling(x[:0], y[:0])
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 50 rows have a loss of NaN, first row 3"):
        fit_vector_scaling(x, y)
    many = np.zeros((5, 1001), np.float32)
    with pytest.raises(
        ValueError, match=r"at most 1,000 classes for matrix scaling.*got 1,001; vector scaling has two"
    ):
        fit_matrix_scaling(many, np.zeros(5, int))
    monkeypatch.setattr("gpuxent.evaluation.calibration.checking.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"vector scaling needs SciPy: pip install 'gpuxent\[sklearn\]'"):
        fit_vector_scaling(x, y)


def test_too_few_iterations_are_told_of():
    x, y = spoiled(300, 6)
    for function, options in ((fit_vector_scaling, {}), (fit_matrix_scaling, {}), (check_scaling, {"resamples": 0})):
        with pytest.warns(UserWarning, match=r"has not converged in \d+ passes; raise max_iter") as caught:
            found = function(x, y, max_iter=2, **options)
        assert caught[0].filename == __file__
    assert "vector scaling has not converged" in next(calibration_report.warnings(found))


# ---- the command ----


@pytest.fixture
def files(tmp_path):
    x, y = spoiled(900, 8, np.float32)
    paths = {"x": tmp_path / "x.npy", "y": tmp_path / "y.npy"}
    np.save(paths["x"], x)
    np.save(paths["y"], y)
    return x, y, paths


def test_the_command_is_check_scaling(files):
    x, y, paths = files
    where = (paths["x"], "--labels", paths["y"], "--resamples", 50, "--classes", "3,0", "--backend", "numpy")
    for method in FITS:
        expected = check_scaling(x, y, method=method, C=2.0, classes=[3, 0], resamples=50, backend="numpy")
        found = strict_json(calibrate(*where, "--method", method, "--C", 2, "--format", "json").stdout)
        run = found.pop("run")
        assert found == json.loads(json.dumps(expected.to_dict()))
        assert (run["method"], run["C"]) == (method, 2.0)
    done = calibrate(*where, "--method", "vector", COLUMNS="80")
    fit = check_scaling(x, y, resamples=0, backend="numpy").fit
    assert f"vector scaling, C = 1, of {fit.scored:,} other rows, in {fit.passes} passes" in done.stdout
    assert re.search(r"^scales [\d.]+ to [\d.]+, biases -[\d.]+ to [\d.]+$", done.stdout, re.MULTILINE)
    assert re.search(r"Classes, after\nclass .*\n3 +[\d.]+ % .*\n0 +[\d.]+ % ", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert re.search(r"gpuxent: 900/900 rows \(100%\), pass \d+: classes after, [\d.]+ s taken", done.stderr)


def test_the_command_on_processes(files):
    x, y, paths = files
    where = ("--labels", paths["y"], "--resamples", 20, "--format", "json", "--classes", "1", "--no-fit")
    found = strict_json(calibrate(paths["x"], *where, "--workers", 1, "--backend", "numpy").stdout)
    expected = classwise_reliability(x, y, classes=[1], resamples=20, backend="numpy")
    assert found["classes"] == json.loads(json.dumps(expected.to_dict()))
    assert found["nll"]["value"] == reliability(x, y, resamples=0, backend="numpy").nll.value


def test_the_command_refuses(files):
    paths = files[2]
    logits = (paths["x"], "--labels", paths["y"])
    for arguments, code, message in (
        ((*logits, "--method", "scalar"), 2, "'scalar' is not one of 'temperature', 'vector', 'matrix'"),
        ((*logits, "--no-fit", "--method", "vector"), 2, "goes with a fit, of logits and without --no-fit"),
        ((*logits, "--C", 2), 2, "goes with --method vector or matrix"),
        (("--run", "run", "--labels", paths["y"]), 2, "goes with logits, not with --run"),
        (("--run", "run", "--classes", "1"), 2, "goes with logits, not with --run"),
        ((*logits, "--classes", "9"), 3, "classes has 9, expected classes in [0, 8)"),
        ((*logits, "--memory", "0"), 3, "memory must be a positive integer, got 0"),
        ((*logits, "--classes", "a"), 3, "--classes must be integers with commas between, got 'a'"),
        ((*logits, "--kind", "sigmoid", "--method", "vector"), 2, "vector and matrix go with --kind softmax"),
        ((*logits, "--workers", 1, "--scheduler", "tcp://x:1"), 3, "exclude each other"),
    ):
        done = gpuxent("calibrate", *arguments)
        assert (done.returncode, message in " ".join(done.stderr.replace("│", " ").split())) == (code, True), (
            done.stderr
        )
