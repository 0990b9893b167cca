"""The contenders on a CPU, in the order in which tables list them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bench import ours, torch_rivals
from bench.cases import OURS, OURS_NUMPY
from bench.contenders import Contenders, Prepared, Refused, both, mean_and_gradient, mean_and_rows, normalizer
from bench.problems import Problem

SCIPY_ELEMENTS = 1 << 25  # scipy.special.logsumexp takes about a second for so many
SKLEARN_ELEMENTS = 1 << 24  # log_loss makes a one-hot int64 matrix, and copies of it

CONTENDERS = Contenders()
CONTENDERS.include(ours.contenders(OURS))
CONTENDERS.include(ours.contenders(OURS_NUMPY, backend="numpy"))
CONTENDERS.include(torch_rivals.TORCH)


def forget_compiled() -> None:
    """Drop what was compiled for the last case."""
    torch_rivals.forget_compiled()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


# ---- JAX ----


def jax_call(function: Callable[..., Any], *arrays: np.ndarray) -> Callable[[], Any]:
    """The function compiled by XLA, on copies of the arrays; waits for the result."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    compiled, data = jax.jit(function), [jax.numpy.asarray(array) for array in arrays]
    return lambda: jax.block_until_ready(compiled(*data))


@CONTENDERS.add("jax/optax", "loss", "soft", "binary")
def optax_loss(problem: Problem) -> Prepared:
    row_losses = optax_row_losses(problem.case.task)

    def mean_and_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
        losses = row_losses(logits, labels)
        return losses.mean(), losses

    if problem.case.task != "binary":
        return both(jax_call(mean_and_losses, problem.logits, problem.labels), problem.sample)
    return mean_and_rows(
        jax_call(lambda x, y: row_losses(x, y).mean(), problem.logits, problem.labels),
        jax_call(row_losses, problem.logits[problem.sample], problem.labels[problem.sample]),
    )


@CONTENDERS.add("jax/optax", "grad", "inplace")
def optax_gradient(problem: Problem) -> Prepared:
    import jax

    row_losses = optax_row_losses("loss")
    function = jax.value_and_grad(lambda logits, labels: row_losses(logits, labels).mean())
    return mean_and_gradient(jax_call(function, problem.logits, problem.labels), problem.sample)


def optax_row_losses(task: str) -> Callable[..., Any]:
    import optax

    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels,
        "soft": optax.softmax_cross_entropy,
        "binary": optax.sigmoid_binary_cross_entropy,
    }[task]


@CONTENDERS.add("jax/optax", "logsumexp", "softmax")
def jax_normalizer(problem: Problem) -> Prepared:
    import jax

    function = jax.nn.logsumexp if problem.case.task == "logsumexp" else jax.nn.softmax
    return normalizer(jax_call(partial(function, axis=1), problem.logits), problem)


# ---- SciPy and scikit-learn: one thread ----


@CONTENDERS.add("scipy", "loss")
def scipy_loss(problem: Problem) -> Prepared:
    logsumexp = scipy_function("logsumexp", problem)
    logits, labels = problem.logits, problem.labels

    def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return logsumexp(logits, axis=1) - np.take_along_axis(logits, labels[:, None], 1)[:, 0]

    sample = problem.sample
    return mean_and_rows(lambda: losses(logits, labels).mean(), lambda: losses(logits[sample], labels[sample]))


@CONTENDERS.add("scipy", "logsumexp", "softmax")
def scipy_normalizer(problem: Problem) -> Prepared:
    return normalizer(partial(scipy_function(problem.case.task, problem), problem.logits, axis=1), problem)


def scipy_function(name: str, problem: Problem) -> Callable[..., Any]:
    import scipy.special

    if problem.case.dtype == "bf16":
        raise Refused("does not take bfloat16")
    if problem.logits.size > SCIPY_ELEMENTS:
        raise Refused(f"takes seconds above {SCIPY_ELEMENTS >> 20} Mi logits")
    return getattr(scipy.special, name)


@CONTENDERS.add("scikit-learn", "loss")
def sklearn_loss(problem: Problem) -> Prepared:
    """log_loss takes probabilities, so their softmax is part of the work."""
    from sklearn.metrics import log_loss

    softmax = scipy_function("softmax", problem)
    if problem.case.dtype != "f32" or problem.logits.size > SKLEARN_ELEMENTS:
        raise Refused(f"makes one-hot matrices: only float32, up to {SKLEARN_ELEMENTS >> 20} Mi logits")
    logits, labels, sample = problem.logits, problem.labels, problem.sample
    classes = np.arange(problem.case.vocab)

    def rows() -> list[float]:
        probabilities = softmax(logits[sample], axis=1)
        return [log_loss([y], p[None], labels=classes) for p, y in zip(probabilities, labels[sample], strict=True)]

    return mean_and_rows(lambda: log_loss(labels, softmax(logits, axis=1), labels=classes), rows)
