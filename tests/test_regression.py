"""SoftmaxRegression against scikit-learn, torch's optimizers and an objective written out in float64."""

import copy
import pickle
import re
import sys
import tracemalloc

import dask.array as da
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import gpuxent as gx
from gpuxent import _examples, _training
from gpuxent._optimizers import SCHEDULES, Adam, Momentum
from gpuxent.regression import SoftmaxRegression

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@parametrize_with_checks([SoftmaxRegression(), SoftmaxRegression(solver="sgd"), SoftmaxRegression(solver="adam")])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


# ---- the optimum ----


def objective(X, y, coef, intercept, *, weight=None, C=1.0, smoothing=0.0):
    """Written out in float64. y is classes from 0, or soft targets."""
    coef, intercept = np.atleast_2d(coef), np.atleast_1d(intercept)
    if len(coef) == 1:
        coef, intercept = np.stack([0 * coef[0], coef[0]]), np.array([0.0, intercept[0]])
        penalty = (coef[1] ** 2).sum()
    else:
        penalty = (coef**2).sum()
    x = np.asarray(X, np.float64) @ coef.T + intercept
    top = x.max(axis=1, keepdims=True)
    log_p = x - top - np.log(np.exp(x - top).sum(axis=1, keepdims=True))
    soft = np.eye(x.shape[1])[y] if np.ndim(y) == 1 else y
    soft = (1 - smoothing) * soft + smoothing / x.shape[1]
    weight = np.ones(len(x)) if weight is None else weight
    return ((weight * -(soft * log_p).sum(axis=1)).sum() + penalty / (2 * C)) / weight.sum()


def small(classes=3, n=60, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 4))
    y = (X[:, :classes] + rng.gumbel(size=(n, classes))).argmax(axis=1)
    return X, y


@pytest.mark.parametrize(("load", "scale"), [(load_digits, 16.0), (load_breast_cancer, 1.0)], ids=["digits", "cancer"])
def test_the_loss_of_logistic_regression(load, scale):
    X, y = load(return_X_y=True)
    X = X / scale
    how = {"max_iter": 10000, "tol": 1e-6}
    ours, theirs = SoftmaxRegression(**how).fit(X, y), LogisticRegression(**how).fit(X, y)
    found, expected = (objective(X, y, m.coef_, m.intercept_) for m in (ours, theirs))
    assert found == pytest.approx(expected, abs=1e-6)
    assert ours.loss_curve_[-1] == pytest.approx(found, rel=1e-12)
    assert (ours.predict(X) == theirs.predict(X)).mean() > 0.999
    assert ours.coef_.shape == theirs.coef_.shape


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"C": 0.01},
        {"C": np.inf},
        {"fit_intercept": False},
        {"class_weight": "balanced"},
        {"class_weight": {1: 3.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_options_mean_what_logistic_regression_means(how, classes, weighted):
    X, y = small(classes)
    weight = np.random.default_rng(1).integers(0, 4, len(y)) / 2 if weighted else None
    how = {**how, "tol": 1e-9, "max_iter": 1000}
    ours, theirs = (m(**how).fit(X, y, sample_weight=weight) for m in (SoftmaxRegression, LogisticRegression))
    np.testing.assert_allclose(_centred(ours.coef_), _centred(theirs.coef_), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(_centred(ours.intercept_), _centred(theirs.intercept_), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-5)


def _centred(rows):
    """Without what softmax does not see."""
    return rows if len(rows) == 1 else rows - rows.mean(axis=0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_and_smoothing_at_their_optimum(classes, smoothing):
    X, _ = small(classes)
    soft = np.random.default_rng(2).dirichlet(np.ones(classes), len(X))
    model = SoftmaxRegression(label_smoothing=smoothing, tol=1e-9, max_iter=1000).fit(X, soft)
    assert model.classes_.tolist() == list(range(classes))
    best = objective(X, soft, model.coef_, model.intercept_, smoothing=smoothing)
    assert model.loss_curve_[-1] == pytest.approx(best, rel=1e-12)
    for _ in range(20):  # a step in any direction leads up
        away = np.random.default_rng(_).normal(size=model.coef_.shape)
        for step in (1e-3, -1e-3):
            assert objective(X, soft, model.coef_ + step * away, model.intercept_, smoothing=smoothing) > best
    smoothed = (1 - smoothing) * soft + smoothing / classes
    np.testing.assert_allclose(
        model.coef_, SoftmaxRegression(tol=1e-9, max_iter=1000).fit(X, smoothed).coef_, atol=1e-7
    )


def test_one_hot_targets_are_classes():
    X, y = small()
    weight = np.random.default_rng(3).random(len(y))
    for how in ({}, {"class_weight": "balanced"}, {"class_weight": {0: 2.0}, "label_smoothing": 0.1}):
        by_class = SoftmaxRegression(**how).fit(X, y, sample_weight=weight)
        by_row = SoftmaxRegression(**how).fit(X, np.eye(3)[y], sample_weight=weight)
        np.testing.assert_allclose(by_row.coef_, by_class.coef_, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "soft"])
def test_parts_side_by_side_are_the_whole(weighted, soft, monkeypatch):
    X, y = small(n=500)
    y = np.eye(3)[y] * 0.7 + 0.1 if soft else y
    weight = np.random.default_rng(1).random(len(y)) if weighted else None
    whole = SoftmaxRegression(tol=1e-8).fit(X, y, sample_weight=weight)
    monkeypatch.setattr(_examples, "LARGE", 1)
    parts = SoftmaxRegression(tol=1e-8).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(parts.coef_, whole.coef_, rtol=1e-7, atol=1e-9)
    assert parts.loss_curve_ == pytest.approx(whole.loss_curve_, rel=1e-12)
    with gx.threads(1):
        alone = SoftmaxRegression(tol=1e-8).fit(X, y, sample_weight=weight)
    np.testing.assert_array_equal(alone.coef_, parts.coef_)


# ---- mini-batches ----


def test_the_textbook_set():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(centre, 0.2, (60, 2)) for centre in ((2, 2), (-2, 0), (0, -2))])
    y = np.repeat([0, 1, 2], 60)
    how = {"learning_rate": 0.1, "momentum": 0.0, "batch_size": 1, "init_scale": 0.01, "C": np.inf, "tol": None}
    model = SoftmaxRegression(solver="sgd", max_iter=50, random_state=0, **how).fit(X, y)
    assert model.score(X, y) > 0.99
    losses = np.array(model.loss_curve_)
    assert len(losses) == model.n_iter_ == 50
    assert (np.diff(losses) < 0.02 * losses[:-1]).all()  # but for noise
    assert losses[-1] < losses[0] / 50


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adam with decay"])
def test_steps_are_those_of_torch(name):
    rng = np.random.default_rng(0)
    start = {"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=3)}
    theirs = {key: torch.tensor(value, requires_grad=True) for key, value in start.items()}
    ours = copy.deepcopy(start)
    make = {
        "sgd": lambda p: (Momentum(), torch.optim.SGD(p, lr=0.1)),
        "momentum": lambda p: (Momentum(0.9), torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        "adam": lambda p: (Adam(), torch.optim.Adam(p, lr=0.1)),
        "adam with decay": lambda p: (
            Adam(0.3, undecayed=("bias",)),
            torch.optim.AdamW([{"params": p[:1], "weight_decay": 0.3}, {"params": p[1:], "weight_decay": 0.0}], lr=0.1),
        ),
    }[name]
    own, rival = make(list(theirs.values()))
    for _ in range(5):
        gradients = {key: rng.normal(size=value.shape) for key, value in start.items()}
        own.step(ours, gradients, 0.1)
        for key, value in theirs.items():
            value.grad = torch.tensor(gradients[key])
        rival.step()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value.detach().numpy(), rtol=1e-9)


def test_schedules():
    expected = {
        "constant": [1, 1, 1],
        "inverse": [1, 1 / np.sqrt(6), 1 / np.sqrt(11)],
        "linear": [1, 0.5, 0],
        "cosine": [1, 0.5, 0],
    }
    assert {
        name: pytest.approx([rule(t, 10) for t in (0, 5, 10)], abs=1e-12) for name, rule in SCHEDULES.items()
    } == expected


@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_a_call_of_partial_fit_is_an_epoch(solver):
    X, y = small()
    how = {"solver": solver, "shuffle": False, "init_scale": 0.0, "C": np.inf, "batch_size": 7, "schedule": "inverse"}
    whole = SoftmaxRegression(max_iter=4, tol=None, **how).fit(X, y)
    parts = SoftmaxRegression(**how)
    for _ in range(4):
        parts.partial_fit(X, y, classes=[0, 1, 2])
    np.testing.assert_array_equal(parts.coef_, whole.coef_)
    assert parts.loss_curve_ == whole.loss_curve_
    assert parts.n_iter_ == 4
    again = pickle.loads(pickle.dumps(parts)).partial_fit(X, y)
    np.testing.assert_array_equal(again.coef_, parts.partial_fit(X, y).coef_)


def gradient(X, y, coef, intercept):
    """Of the mean loss over the rows, written out."""
    push = np.exp(X @ coef.T + intercept)
    push = push / push.sum(axis=1, keepdims=True) - np.eye(len(coef))[y]
    return push.T @ X / len(X), push.mean(axis=0)


def test_the_rate_falls_with_every_batch():
    X, y = small()
    how = {"momentum": 0.0, "init_scale": 0.0, "C": np.inf, "shuffle": False, "tol": None}
    model = SoftmaxRegression(solver="sgd", schedule="linear", learning_rate=0.5, batch_size=30, max_iter=2, **how)
    model.fit(X, y)
    coef, intercept = np.zeros((3, 4)), np.zeros(3)
    for share, rows in zip((1, 0.75, 0.5, 0.25), (slice(0, 30), slice(30, 60)) * 2, strict=True):
        pushes = gradient(X[rows], y[rows], coef, intercept)
        coef, intercept = coef - 0.5 * share * pushes[0], intercept - 0.5 * share * pushes[1]
    np.testing.assert_allclose(model.coef_, coef, rtol=1e-9)
    np.testing.assert_allclose(model.intercept_, intercept, rtol=1e-9)


def test_partial_fit_weighs_the_penalty_against_all_examples_so_far():
    X, y = small()
    n = len(y)
    how = {"momentum": 0.0, "batch_size": n, "learning_rate": 1.0, "init_scale": 0.5, "random_state": 0}
    model = SoftmaxRegression(solver="sgd", C=0.1, **how).partial_fit(X, y, classes=[0, 1, 2])
    for call in (2, 3):
        coef, intercept = model.coef_, model.intercept_
        pushes = gradient(X, y, coef, intercept)
        model.partial_fit(X, y)
        np.testing.assert_allclose(model.coef_, coef - pushes[0] - coef / (0.1 * call * n), rtol=1e-9)
        np.testing.assert_allclose(model.intercept_, intercept - pushes[1], rtol=1e-9)


def test_early_stopping_keeps_the_best_held_out_parameters(capsys):
    X, y = small(n=80)
    X = np.concatenate([X, np.random.default_rng(5).normal(size=(80, 60))], axis=1)  # enough to overfit
    how = {"solver": "adam", "early_stopping": True, "validation_fraction": 0.25, "C": np.inf, "learning_rate": 0.05}
    model = SoftmaxRegression(random_state=0, max_iter=200, n_iter_no_change=15, verbose=True, **how).fit(X, y)
    held_out = model.validation_loss_curve_
    best = int(np.argmin(held_out))
    assert model.n_iter_ == len(held_out) < 200
    assert best < model.n_iter_ - 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == model.n_iter_
    assert re.fullmatch(r"epoch 1: objective \d\.\d{6} nats, held-out loss \d\.\d{6}", lines[0])
    short = SoftmaxRegression(random_state=0, max_iter=best + 1, n_iter_no_change=15, **how).fit(X, y)
    np.testing.assert_array_equal(model.coef_, short.coef_)


def test_it_ends_when_the_objective_no_longer_falls():
    X, y = small()
    with pytest.warns(ConvergenceWarning, match="sgd has not converged: the loss was still falling after 3 epochs"):
        SoftmaxRegression(solver="sgd", max_iter=3).fit(X, y)
    model = SoftmaxRegression(solver="sgd", max_iter=500, n_iter_no_change=3, tol=1e-3, learning_rate=0.05).fit(X, y)
    assert model.n_iter_ < 500
    with pytest.warns(ConvergenceWarning, match="lbfgs has not converged: STOP: TOTAL NO. OF ITERATIONS"):
        SoftmaxRegression(max_iter=2).fit(X, y)


def test_seeds_and_warm_starts():
    X, y = small()
    fit = lambda seed: SoftmaxRegression(solver="sgd", max_iter=3, random_state=seed).fit(X, y).coef_  # noqa: E731
    np.testing.assert_array_equal(fit(0), fit(0))
    assert (fit(0) != fit(1)).any()
    model = SoftmaxRegression(tol=1e-8, warm_start=True).fit(X, y)
    assert model.n_iter_ > 3
    assert model.fit(X, y).n_iter_ <= 1


# ---- other kinds of data ----


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "soft"])
def test_sparse_features(solver, soft, monkeypatch):
    monkeypatch.setattr(_training, "FEATURE_BYTES", 1)  # several tiles
    X, y = small(n=300)
    X[np.random.default_rng(0).random(X.shape) < 0.6] = 0
    y = np.eye(3)[y] * 0.7 + 0.1 if soft else y
    how = {"solver": solver, "random_state": 0, "max_iter": 30}
    dense = SoftmaxRegression(**how).fit(X, y)
    for kind in (sp.csr_array, sp.csc_matrix, sp.coo_array):
        model = SoftmaxRegression(**how).fit(kind(X), y)
        np.testing.assert_allclose(model.coef_, dense.coef_, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(model.predict_proba(kind(X)), dense.predict_proba(X), rtol=1e-6)
        np.testing.assert_array_equal(model.predict(kind(X)), dense.predict(X))


@pytest.mark.parametrize("labels", ["numpy", "dask"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "soft"])
def test_dask_features(labels, classes, soft):
    X, y = small(classes, n=97)
    targets = np.eye(classes)[y] * 0.7 + 0.3 / classes if soft else np.array(["a", "b", "c"])[y]
    weight = np.random.default_rng(1).random(len(y))
    lazy = da.from_array(X, chunks=(20, 3))
    lazy_targets, lazy_weight = targets, weight
    if labels == "dask":
        lazy_targets = da.from_array(targets, chunks=(31, *targets.shape[1:]))
        lazy_weight = da.from_array(weight, chunks=50)
    model = SoftmaxRegression(tol=1e-8).fit(lazy, lazy_targets, sample_weight=lazy_weight)
    whole = SoftmaxRegression(tol=1e-8).fit(X, targets, sample_weight=weight)
    np.testing.assert_allclose(model.coef_, whole.coef_, rtol=1e-7, atol=1e-9)
    for name in ("predict", "predict_proba", "predict_log_proba", "decision_function"):
        found = getattr(model, name)(lazy)
        assert isinstance(found, da.Array)
        expected = getattr(model, name)(X)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(found.compute(), expected, rtol=1e-12)
        else:
            np.testing.assert_array_equal(found.compute(), expected)
    if not soft:
        score = model.score(lazy, lazy_targets, sample_weight=lazy_weight)
        assert score == pytest.approx(model.score(X, targets, sample_weight=weight), rel=1e-12)
        assert model.score(lazy, lazy_targets) == pytest.approx(model.score(X, targets), rel=1e-12)


def test_mini_batches_of_dask_chunks():
    X, y = small(n=200)
    lazy = da.from_array(X, chunks=(50, -1))
    how = {"solver": "sgd", "learning_rate": 0.05, "tol": None, "max_iter": 20}
    model = SoftmaxRegression(random_state=0, **how).fit(lazy, y)
    reference = SoftmaxRegression(random_state=0, **how).fit(X, y)
    assert model.loss_curve_[-1] == pytest.approx(reference.loss_curve_[-1], rel=0.02)
    assert (model.coef_ != reference.coef_).any()  # another order
    in_order = [SoftmaxRegression(shuffle=False, init_scale=0, batch_size=25, **how).fit(x, y).coef_ for x in (X, lazy)]
    np.testing.assert_allclose(*in_order, rtol=1e-12)
    stopped = SoftmaxRegression(random_state=0, early_stopping=True, solver="sgd", max_iter=5).fit(lazy, y)
    assert len(stopped.validation_loss_curve_) == stopped.n_iter_


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_dask_chunks_are_never_gathered(solver):
    chunk, chunks = (4000, 50), 16

    def made(block_info=None):
        seed = block_info[None]["chunk-location"][0]
        return np.random.default_rng(seed).normal(size=chunk)

    X = da.map_blocks(made, chunks=((chunk[0],) * chunks, (chunk[1],)), dtype=np.float64, meta=np.empty((0, 0)))
    y = np.arange(chunk[0] * chunks) % 3
    model = SoftmaxRegression(solver=solver, max_iter=1, batch_size=1000)
    tracemalloc.start()
    try:
        with __import__("dask").config.set(scheduler="synchronous"):
            model.fit(X, y)
            model.score(X, y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.5 * X.nbytes


def test_predict_makes_no_array_of_logits():
    rng = np.random.default_rng(0)
    model = SoftmaxRegression()
    model.classes_, model.n_features_in_ = np.arange(5000), 2
    model.coef_, model.intercept_ = rng.normal(size=(5000, 2)), rng.normal(size=5000)
    X = rng.normal(size=(8000, 2))
    tracemalloc.start()
    try:
        found = model.predict(X)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.3 * 8 * len(X) * 5000
    np.testing.assert_array_equal(found[:500], model.decision_function(X[:500]).argmax(axis=1))


def test_float32_stays_float32():
    X, y = small()
    model = SoftmaxRegression(solver="sgd", max_iter=5).fit(X.astype(np.float32), y)
    assert model.coef_.dtype == model.predict_proba(X.astype(np.float32)).dtype == np.float32
    assert SoftmaxRegression(tol=1e-3).fit(X.astype(np.float32), y).score(X, y) == SoftmaxRegression().fit(X, y).score(
        X, y
    )


def test_in_a_grid_search():
    X, y = small()
    search = GridSearchCV(SoftmaxRegression(), {"C": [0.01, 1.0]}, scoring="neg_log_loss", cv=3).fit(X, y)
    assert search.best_score_ > -1.1


# ---- errors ----

X, Y = small()
SETTINGS = [
    ({"solver": "newton"}, ValueError, "solver must be one of 'lbfgs', 'sgd', 'adam', got 'newton'"),
    ({"C": 0.0}, ValueError, "C must be a number above 0, got 0.0"),
    ({"C": "1"}, TypeError, "C must be a number above 0, got '1'"),
    ({"schedule": "warm"}, ValueError, "schedule must be one of 'constant', 'inverse', 'linear', 'cosine', got 'warm'"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number of at least 0 and at most 1, got 1.5"),
    ({"momentum": 1.0}, ValueError, "momentum must be in [0, 1), got 1.0"),
    ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
    ({"fit_intercept": "no"}, TypeError, "fit_intercept must be True or False, got 'no'"),
    ({"early_stopping": 1}, TypeError, "early_stopping must be True or False, got 1"),
    ({"max_iter": 2.5}, TypeError, "max_iter must be a positive integer, got 2.5"),
    ({"tol": -1.0}, ValueError, "tol must be a number of at least 0, got -1.0"),
    ({"validation_fraction": 1.0}, ValueError, "validation_fraction must be between 0 and 1, got 1.0"),
    ({"class_weight": {7: 1.0}}, ValueError, "class_weight has 7, which is not among the classes [0, 1, 2]"),
    ({"class_weight": {1: -1.0}}, ValueError, "class_weight must hold finite weights of at least 0, got {1: -1.0}"),
    (
        {"class_weight": [1, 2, 3]},
        ValueError,
        "class_weight must be None, 'balanced' or {class: weight}, got [1, 2, 3]",
    ),
]


@pytest.mark.parametrize(("how", "kind", "message"), SETTINGS, ids=lambda value: str(value)[:40])
def test_bad_settings(how, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        SoftmaxRegression(**how).fit(X, Y)


DATA = [
    (X, Y[:, None] * np.ones((1, 3), int), "y must be classes (n,), or floats (n, K) whose rows sum to 1, got int64"),
    (X, np.full((60, 3), 0.5), "y[0, :] sums to 1.5, expected probabilities that sum to 1"),
    (X, Y[:-1], "y must have 60 rows as X has, got shape (59,)"),
    (X, np.zeros(60, int), "needs two or more classes, got one class: [0]"),
    (da.from_array(X, chunks=(20, -1))[:, 0], Y, "X must hold numbers in two dimensions, (n, features)"),
    (da.from_array(np.where(X > 2, np.nan, X), chunks=(20, -1)), Y, "the objective is nan: X holds NaN or infinity"),
]


@pytest.mark.parametrize(
    ("X", "y", "message"), DATA, ids=lambda value: str(value)[:30] if isinstance(value, str) else ""
)
def test_bad_data(X, y, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SoftmaxRegression().fit(X, y)


def test_other_errors():
    model = SoftmaxRegression(solver="sgd")
    with pytest.raises(NotFittedError):
        model.predict(X)
    with pytest.raises(ValueError, match="classes must be given in the first call"):
        model.partial_fit(X, Y)
    model.partial_fit(X, Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match=re.escape("y holds 7, which is not among the classes [0, 1, 2]")):
        model.partial_fit(X, np.where(Y == 1, 7, Y))
    with pytest.raises(ValueError, match=re.escape("classes must be those of the first call, [0, 1, 2], got [0, 1]")):
        model.partial_fit(X, Y, classes=[0, 1])
    with pytest.raises(AttributeError, match="partial_fit"):
        SoftmaxRegression().partial_fit(X, Y)
    with pytest.raises(ValueError, match="schedule must be one of"):
        SoftmaxRegression(solver="sgd", schedule="cosine").partial_fit(X, Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="sample_weight and class_weight leave no example with a weight above 0"):
        SoftmaxRegression(class_weight={0: 0.0, 1: 0.0, 2: 0.0}).fit(X, Y)
    with pytest.raises(TypeError, match="y is a Dask array but X is not"):
        SoftmaxRegression().fit(X, da.from_array(Y))
    lazy = da.from_array(X, chunks=(20, -1))
    with pytest.raises(ValueError, match="sample_weight must hold finite numbers of at least 0, got -1"):
        SoftmaxRegression().fit(lazy, Y, sample_weight=np.full(60, -1.0))
    with pytest.raises(ValueError, match=r"validation_fraction=0\.9 of 3 chunks leaves none"):
        SoftmaxRegression(solver="sgd", early_stopping=True, validation_fraction=0.9).fit(lazy, Y)
    with pytest.raises(ValueError, match="learning_rate is too high"):
        SoftmaxRegression(solver="sgd", learning_rate=1e300, C=np.inf, max_iter=30).fit(1e10 * X, Y)


def test_without_scikit_learn(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "gpuxent.regression")
    monkeypatch.delitem(sys.modules, "gpuxent._examples")
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'gpuxent[sklearn]'")):
        gx.SoftmaxRegression  # noqa: B018
    with pytest.raises(AttributeError, match="module 'gpuxent' has no attribute 'SoftMaxRegression'"):
        gx.SoftMaxRegression  # noqa: B018
