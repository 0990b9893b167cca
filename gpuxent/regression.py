"""Softmax (multinomial logistic) regression as a scikit-learn estimator, on NumPy, SciPy-sparse, CuPy and Dask data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from warnings import warn

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from gpuxent import _arguments as arguments
from gpuxent import _examples, _training
from gpuxent._examples import Examples
from gpuxent._optimizers import SCHEDULES, Adam, Momentum
from gpuxent._records import Array
from gpuxent._training import MiniBatches, Objective, Parameters
from gpuxent.backends import backend_of, beside_rows, computed, is_cupy, is_dask, on_host, to_gpu
from gpuxent.normalizers import log_softmax, softmax

SOLVERS = ("lbfgs", "sgd", "adam")
ENDLESS = ("constant", "inverse")  # schedules that need no last epoch


def _goes_by_mini_batches(model: SoftmaxRegression) -> bool:
    if model.solver == "lbfgs":
        raise AttributeError("partial_fit goes with solver='sgd' or 'adam', got solver='lbfgs'")
    return True


class SoftmaxRegression(ClassifierMixin, BaseEstimator):
    """Linear model of class probabilities, p = softmax(coef @ x + intercept), fitted by cross-entropy.

    Minimizes what scikit-learn's `LogisticRegression` does, the sum over examples of weight * loss plus |coef|**2 /
    (2 C), divided by the summed weights; the intercept is not penalized. Losses are `gpuxent.cross_entropy`'s, in nats.
    Two classes have one coefficient vector, and the first class the logit 0.

    Data are NumPy arrays or what scikit-learn makes such of, SciPy's sparse matrices, CuPy arrays, or Dask arrays with
    chunks of rows, which are never gathered: "lbfgs" adds up the gradients of the chunks, the others go from chunk to
    chunk. float32 is computed in float32, everything else in float64. Predictions are of the kind of X, lazy for Dask;
    classes that are not numbers stay in the CPU's memory.

    Args:
        solver: "lbfgs": the gradient over all examples in each iteration. "sgd" (with momentum), "adam": a step for
            each mini-batch.
        C: inverse strength of the penalty; infinity for none.
        fit_intercept: False: intercepts are 0.
        class_weight: {class: weight}, others having 1; "balanced": inversely proportional to the classes' weights.
        label_smoothing: as `gpuxent.cross_entropy`.
        max_iter: most iterations, or epochs.
        tol: "lbfgs" ends when no entry of the gradient is larger, the others when the objective (the held-out loss
            with early_stopping) has not fallen by this much in n_iter_no_change epochs. None: not before max_iter.
        learning_rate: of the first step of "sgd" and "adam".
        schedule: the share of learning_rate after t of max_iter epochs: "constant"; "inverse", 1 / sqrt(1 + t);
            "linear", 1 - t / max_iter; "cosine", (1 + cos(pi t / max_iter)) / 2.
        momentum: of "sgd", in [0, 1).
        batch_size: examples in a mini-batch; the last one of an epoch or chunk may be smaller.
        shuffle: in each epoch, chunks and the examples in a chunk; False: as they come.
        init_scale: coefficients of "sgd" and "adam" start uniform in +-init_scale. "lbfgs" starts at 0.
        early_stopping: hold out validation_fraction of the examples (for Dask, of the chunks), and return to the
            parameters whose loss on them was lowest.
        warm_start: `fit` starts from the parameters that there are.
        verbose: print a line for each iteration or epoch.
        random_state: seed of order, start and held-out examples.

    Attributes: `classes_`; `coef_` (K, features), or (1, features) for two classes; `intercept_`; `n_iter_`;
    `loss_curve_`, the objective of each iteration, or averaged over the mini-batches of each epoch;
    `validation_loss_curve_` with early_stopping; `n_features_in_`, and `feature_names_in_` where columns have names.

    >>> import numpy as np
    >>> X, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array(["no", "no", "yes", "yes"])
    >>> model = SoftmaxRegression().fit(X, y)
    >>> model.predict(X), model.predict_proba(X[:1]).round(2)
    (array(['no', 'no', 'yes', 'yes'], dtype='<U3'), array([[0.81, 0.19]]))
    """

    _stream: _Stream | None = None
    loss_curve_: list[float]

    def __init__(
        self,
        *,
        solver: str = "lbfgs",
        C: float = 1.0,
        fit_intercept: bool = True,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        max_iter: int = 100,
        tol: float | None = 1e-4,
        learning_rate: float = 0.01,
        schedule: str = "constant",
        momentum: float = 0.9,
        batch_size: int = 256,
        shuffle: bool = True,
        init_scale: float = 0.01,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        warm_start: bool = False,
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        self.solver = solver
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
        self.max_iter = max_iter
        self.tol = tol
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.momentum = momentum
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.init_scale = init_scale
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.verbose = verbose
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # ---- training ----

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SoftmaxRegression:
        """Fit to classes y (n,), or to soft targets: floats (n, K >= 2) whose rows sum to 1, with classes 0 to K - 1.

        Args:
            X: (n, features). y: NumPy, or of the kind of X.
            sample_weight: (n,) numbers of at least 0.

        Raises: ValueError, TypeError: a parameter, X, y or sample_weight is not as described; fewer than two classes.
        """
        self._check_parameters()
        examples = self._examples(X, y, sample_weight, None)
        rng = check_random_state(self.random_state)
        parameters = self._start(examples, rng)
        self.loss_curve_, self._stream = [], None
        train = self._iterate if self.solver == "lbfgs" else self._descend
        parameters, unfinished = train(examples, parameters, rng)
        self._keep(parameters)
        self.n_iter_ = len(self.loss_curve_)
        if unfinished:
            warn(f"{self.solver} has not converged: {unfinished}", ConvergenceWarning, stacklevel=2)
        return self

    @available_if(_goes_by_mini_batches)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> SoftmaxRegression:
        """One more epoch of mini-batches, over these examples; for solvers "sgd" and "adam".

        `C` weighs the penalty against all examples seen so far. The other arguments and errors are those of `fit`.

        Args:
            classes: all that will ever come; needed in the first call.
        """
        self._check_parameters()
        if self.schedule not in ENDLESS:
            raise ValueError(f"partial_fit has no last epoch: schedule must be one of {ENDLESS}, got {self.schedule!r}")
        first = not hasattr(self, "classes_")
        examples = self._examples(X, y, sample_weight, self._known_classes(classes))
        if self._stream is None:
            self._stream = _Stream(self._mini_batches(), check_random_state(self.random_state))
            self.loss_curve_, self.n_iter_ = [], 0
            if first:
                self._keep(self._start(examples, self._stream.rng))
        stream, objective = self._stream, self._objective(examples)
        stream.seen_weight += objective.weight
        objective = replace(objective, C=self.C * stream.seen_weight / objective.weight)
        parameters = self._parameters.beside(examples.features).copy()
        self._report(stream.batches.epoch(objective, examples, parameters, self.n_iter_, stream.rng))
        self._keep(parameters)
        self.n_iter_ += 1
        return self

    def _iterate(self, examples: Examples, start: Parameters, _rng: Any) -> tuple[Parameters, str]:
        ends = (self.max_iter, self.tol)
        return _training.lbfgs(self._objective(examples), examples, start, *ends, report=self._report)

    def _descend(self, examples: Examples, parameters: Parameters, rng: Any) -> tuple[Parameters, str]:
        """Epochs until the loss that is watched has not fallen for a while."""
        held_out = None
        if self.early_stopping:
            examples, held_out = examples.split(self.validation_fraction, rng)
            watched, self.validation_loss_curve_ = self._objective(held_out), []
        objective, batches = self._objective(examples), self._mini_batches()
        best, best_parameters, since = np.inf, parameters, 0
        for number in range(self.max_iter):
            loss = batches.epoch(objective, examples, parameters, number, rng)
            if held_out is None:
                self._report(loss)
            else:
                train_loss, loss = loss, watched.loss(held_out, parameters)
                self.validation_loss_curve_.append(loss)
                self._report(train_loss, loss)
            since = 0 if self.tol is not None and loss < best - self.tol else since + 1
            if loss < best:
                best, best_parameters = loss, parameters.copy() if held_out is not None else parameters
            if self.tol is not None and since >= self.n_iter_no_change:
                return best_parameters, ""
        return best_parameters, "" if self.tol is None else f"the loss was still falling after {self.max_iter} epochs"

    def _report(self, loss: float, held_out: float | None = None) -> None:
        """Of one more iteration or epoch."""
        _check_finite("objective", loss)
        self.loss_curve_.append(loss)
        if self.verbose:
            unit = "iteration" if self.solver == "lbfgs" else "epoch"
            beside = "" if held_out is None else f", held-out loss {held_out:.6f}"
            print(f"{unit} {len(self.loss_curve_)}: objective {loss:.6f} nats{beside}")

    def _examples(self, X: Any, y: Any, sample_weight: Any, known: np.ndarray | None) -> Examples:
        features = _examples.features(self, X, reset=known is None or not hasattr(self, "classes_"))
        self.classes_, targets = _examples.targets(self, y, features, known)
        return Examples(features, targets, _examples.weights(sample_weight, features))

    def _known_classes(self, classes: Any) -> np.ndarray:
        """Those of an earlier call, with which the ones that are given must agree."""
        if not hasattr(self, "classes_"):
            if classes is None:
                raise ValueError("classes must be given in the first call of partial_fit")
            return _examples.known_classes(classes)
        if classes is not None and not np.array_equal(_examples.known_classes(classes), self.classes_):
            raise ValueError(f"classes must be those of the first call, {self.classes_.tolist()}, got {classes!r}")
        return self.classes_

    def _start(self, examples: Examples, rng: Any) -> Parameters:
        rows, columns = len(self.classes_) if len(self.classes_) > 2 else 1, examples.features.shape[1]
        if self.warm_start and hasattr(self, "coef_"):
            if self.coef_.shape != (rows, columns):
                raise ValueError(f"warm_start needs data for coef_ of shape {self.coef_.shape}, got {(rows, columns)}")
            return self._parameters.beside(examples.features).copy()
        scale = 0.0 if self.solver == "lbfgs" else self.init_scale
        coef = rng.uniform(-scale, scale, (rows, columns))
        return Parameters(coef, np.zeros(rows) if self.fit_intercept else None).beside(examples.features)

    def _objective(self, examples: Examples) -> Objective:
        totals = examples.class_totals(len(self.classes_))
        weight = _class_weight(self.class_weight, self.classes_, totals)
        total = float(totals.sum() if weight is None else totals @ weight)
        if not total > 0:
            raise ValueError("sample_weight and class_weight leave no example with a weight above 0")
        return Objective(weight, self.label_smoothing, total, examples.count, self.C)

    def _mini_batches(self) -> MiniBatches:
        optimizer = Adam() if self.solver == "adam" else Momentum(self.momentum)
        how = (self.batch_size, self.shuffle, self.learning_rate, self.schedule, self.max_iter)
        return MiniBatches(optimizer, *how)

    @property
    def _parameters(self) -> Parameters:
        return Parameters(self.coef_, self.intercept_ if self.fit_intercept else None)

    def _keep(self, parameters: Parameters) -> None:
        _check_finite("sum of coef_", float(parameters.coef.sum()))
        self.coef_ = parameters.coef
        zeros = np.zeros_like(parameters.coef[:, 0])
        self.intercept_ = zeros if parameters.intercept is None else parameters.intercept

    def _check_parameters(self) -> None:
        arguments.one_of(self.solver, "solver", SOLVERS)
        arguments.one_of(self.schedule, "schedule", tuple(SCHEDULES))
        if float("inf") != self.C:
            arguments.number(self.C, "C", 0, open_low=True)
        arguments.number(self.label_smoothing, "label_smoothing", 0, 1)
        arguments.number(self.learning_rate, "learning_rate", 0, open_low=True)
        arguments.number(self.init_scale, "init_scale", 0)
        if self.tol is not None:
            arguments.number(self.tol, "tol", 0)
        if not arguments.number(self.momentum, "momentum", 0) < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 < arguments.number(self.validation_fraction, "validation_fraction", 0) < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        for name in ("fit_intercept", "shuffle", "early_stopping", "warm_start"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("max_iter", "batch_size", "n_iter_no_change"):
            arguments.positive(getattr(self, name), name)

    # ---- predictions ----

    def decision_function(self, X: Any) -> Array:
        """Logits (n, K), or for two classes (n,): that of the second, the first having 0."""
        logits = self._logits(X)
        return logits[:, 1] if len(self.classes_) == 2 else logits

    def predict_log_proba(self, X: Any) -> Array:
        """(n, K) natural logarithms, exact where a probability is too small for its dtype."""
        return log_softmax(self._logits(X))

    def predict_proba(self, X: Any) -> Array:
        """(n, K) rows summing to 1."""
        return softmax(self._logits(X))

    def predict(self, X: Any) -> Array:
        """The most probable class of each row (n,), of equal ones the first. No array of logits is made."""
        logits = _training.logits(*self._beside(X))
        best = backend_of(logits).row_stats(logits, also=("argmax",)).argmax
        take = partial(_taken, self.classes_)
        return best.map_blocks(take, dtype=self.classes_.dtype) if is_dask(best) else take(best)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The (weighted) share of rows whose class is predicted. Dask arrays are computed."""
        predicted = self.predict(X)
        if not is_dask(predicted):
            return float(accuracy_score(on_host(y), on_host(predicted), sample_weight=on_host(sample_weight)))
        right = (predicted.map_blocks(on_host) == beside_rows(predicted, y)).astype(np.float64)
        weight = _examples.weights(sample_weight, predicted)
        mean = right.mean() if weight is None else (right * weight).sum() / weight.sum()
        return float(computed(mean, scheduler=None)[0])

    def _logits(self, X: Any) -> Array:
        """(n, K), in memory for features in memory."""
        features, parameters = self._beside(X)
        classifier, bias = parameters.classifier
        return features @ classifier.T + bias

    def _beside(self, X: Any) -> tuple[Any, Parameters]:
        check_is_fitted(self)
        features = _examples.features(self, X, reset=False)
        return features, Parameters(self.coef_, self.intercept_).beside(features)


@dataclass
class _Stream:
    """What one call of partial_fit leaves for the next."""

    batches: MiniBatches
    rng: np.random.RandomState
    seen_weight: float = 0.0


def _check_finite(name: str, value: float) -> None:
    if not np.isfinite(value):
        raise ValueError(f"the {name} is {value}: X holds NaN or infinity, or learning_rate is too high")


def _taken(classes: np.ndarray, places: Array) -> Array:
    """The classes at these places: beside them if they are numbers."""
    numbers = is_cupy(places) and classes.dtype.kind in "biuf"
    return (to_gpu(classes, places) if numbers else classes)[(places if numbers else on_host(places)).astype(np.int64)]


def _class_weight(given: Any, classes: np.ndarray, totals: np.ndarray) -> np.ndarray | None:
    """(K,), from the weight of each class's examples."""
    if given is None:
        return None
    if isinstance(given, str) and given == "balanced":
        return np.where(totals > 0, totals.sum() / (np.count_nonzero(totals) * np.where(totals > 0, totals, 1.0)), 0.0)
    if not isinstance(given, dict):
        raise ValueError(f"class_weight must be None, 'balanced' or {{class: weight}}, got {given!r}")
    unknown = [name for name in given if name not in classes]
    if unknown:
        raise ValueError(f"class_weight has {unknown[0]!r}, which is not among the classes {classes.tolist()}")
    weights = np.array([given.get(name, 1.0) for name in classes.tolist()], np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"class_weight must hold finite weights of at least 0, got {given!r}")
    return weights
