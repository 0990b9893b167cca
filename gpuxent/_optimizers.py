"""Steps down a gradient, taken in place on arrays of any library, how the rate of the steps falls; and L-BFGS."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import cos, pi, sqrt
from typing import Any

import numpy as np

from gpuxent._records import Array

Arrays = dict[str, Array]

SCHEDULES = {
    "constant": lambda done, epochs: 1.0,
    "inverse": lambda done, epochs: 1 / sqrt(1 + done),
    "linear": lambda done, epochs: max(0.0, 1 - done / epochs),
    "cosine": lambda done, epochs: (1 + cos(pi * min(1.0, done / epochs))) / 2,
}
"""The share of the learning rate that is left when so many epochs (with a fraction) of so many are done."""


class Momentum:
    """velocity = momentum * velocity + gradient; parameter -= rate * velocity: `torch.optim.SGD`. 0 is plain SGD."""

    def __init__(self, momentum: float = 0.0) -> None:
        self._momentum = momentum
        self._velocity: dict[str, Array] = {}

    def step(self, parameters: Arrays, gradients: Arrays, rate: float) -> None:
        for name, gradient in gradients.items():
            if self._momentum:
                gradient = gradient + self._momentum * self._velocity.get(name, 0.0)
                self._velocity[name] = gradient
            parameters[name] -= rate * gradient


class Adam:
    """Adam with decoupled weight decay: a parameter loses the share rate * decay of itself in each step, but not those
    named `undecayed` (Loshchilov & Hutter, arXiv 1711.05101; Kingma & Ba, arXiv 1412.6980)."""

    def __init__(self, decay: float = 0.0, undecayed: Collection[str] = ()) -> None:
        self._decay, self._undecayed = decay, undecayed
        self._mean: dict[str, Array] = {}
        self._square: dict[str, Array] = {}
        self._steps = 0

    def step(self, parameters: Arrays, gradients: Arrays, rate: float) -> None:
        self._steps += 1
        mean_scale, square_scale = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        for name, gradient in gradients.items():
            if name not in self._mean:
                self._mean[name], self._square[name] = np.zeros_like(gradient), np.zeros_like(gradient)
            mean, square = self._mean[name], self._square[name]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            change: Any = square / square_scale
            np.sqrt(change, out=change)  # CuPy's own, for its arrays
            change += 1e-8
            np.divide(mean, change, out=change)
            change *= rate / mean_scale
            if self._decay and name not in self._undecayed:
                parameters[name] *= 1 - rate * self._decay
            parameters[name] -= change


def lbfgs(
    value_and_grad: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    max_iter: int,
    tol: float | None,
    report: Callable[[float], None] = lambda value: None,
) -> tuple[np.ndarray, str]:
    """(where the value is least, "" or why it stopped before the gradient's largest entry was at most `tol`); `report`
    is told the value of each iteration.

    SciPy's L-BFGS-B with the settings of scikit-learn's LogisticRegression.
    """
    from scipy.optimize import minimize

    def callback(intermediate_result: Any) -> None:
        report(float(intermediate_result.fun))

    ftol = 0.0 if tol is None else 64 * np.finfo(float).eps
    options = {"maxiter": max_iter, "maxls": 50, "gtol": tol or 0.0, "ftol": ftol}
    how = {"method": "L-BFGS-B", "jac": True, "callback": callback, "options": options}
    result = minimize(value_and_grad, start, **how)
    return result.x, "" if result.status == 0 else str(result.message)
