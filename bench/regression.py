"""SoftmaxRegression beside scikit-learn's LogisticRegression, on data of MNIST's shape; a part of `bench.linear`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import gpuxent as gx
from bench.clock import rounds
from bench.figures import Figure, Target
from bench.timing import Plan


class Size(NamedTuple):
    rows: int
    features: int
    classes: int
    iterations: int

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.features:,} x {self.classes}, {self.iterations} iterations"


FULL, SMALL = Size(60_000, 784, 10, 20), Size(400, 16, 3, 4)


class DifferentModel(AssertionError):
    """The two have not come as far down."""


class Problem:
    """A fifth of the features is not 0, as of handwritten digits; the classes overlap."""

    def __init__(self, size: Size, dtype: type) -> None:
        rng = np.random.default_rng(0)
        self.size = size
        X = rng.random((size.rows, size.features))
        X[rng.random(X.shape) > 0.2] = 0.0
        noise = 2 * rng.gumbel(size=(size.rows, size.classes))
        self.y = (X @ rng.normal(0, 0.3, (size.features, size.classes)) + noise).argmax(axis=1)
        self.X = X.astype(dtype)

    def fit(self, kind: type) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both say that they have not converged
            return kind(max_iter=self.size.iterations).fit(self.X, self.y)

    def objective(self, model: Any) -> float:
        """Written out in float64."""
        x = self.X.astype(np.float64) @ model.coef_.astype(np.float64).T + model.intercept_
        x -= x.max(axis=1, keepdims=True)
        losses = np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(x)), self.y]
        return float((losses.sum() + (model.coef_.astype(np.float64) ** 2).sum() / 2) / len(x))


def times(size: Size, timing: Plan) -> Iterator[Figure]:
    from sklearn.linear_model import LogisticRegression

    for dtype in (np.float32, np.float64):
        problem = Problem(size, dtype)
        kinds = {"ours": gx.SoftmaxRegression, "theirs": LogisticRegression}
        ours, theirs = (problem.objective(problem.fit(kind)) for kind in kinds.values())
        if not abs(ours - theirs) < 1e-3 * theirs:
            raise DifferentModel(f"the objective of {dtype.__name__} is {ours:.6g}, LogisticRegression's {theirs:.6g}")
        found = rounds({name: partial(problem.fit, kind) for name, kind in kinds.items()}, timing)
        own, rival = found["ours"], found["theirs"]
        beside = {
            "ours s": own.best,
            "theirs s": rival.best,
            "by median": rival.median / own.median,
            "objectives": f"{ours:.6g} and {theirs:.6g}",
            "others": own.others,
        }
        what = f"{size}, {np.dtype(dtype).name}: LogisticRegression / ours"
        yield Figure("softmax regression", what, rival.best / own.best, "x", Target(1.0), beside)
