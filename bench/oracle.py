"""The truth that every contender is compared with, in float64: plain, and sharing no code with gpuxent.

A row is summed without its largest class, so that confident rows keep their digits: with m the largest logit and
rest = sum exp(x - m) over the other classes, lse = m + log1p(rest), and the loss is (m - x[y]) + log1p(rest).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from bench.cases import TASKS
from bench.problems import Answer, Problem

ALLOWED = 8 * float(np.finfo(np.float32).eps)  # of our own contenders: losses, and the arithmetic of gradients


# ---- one row ----


def parts(x: np.ndarray) -> tuple[int, np.ndarray, float]:
    """(the largest class, exp(x - m) with 0 there, their sum `rest`)."""
    top = int(np.argmax(x))
    exps = np.exp(x - x[top])
    exps[top] = 0
    return top, exps, float(np.sum(exps))


def lse(x: np.ndarray) -> float:
    top, _, rest = parts(x)
    return float(x[top] + np.log1p(rest))


def loss(x: np.ndarray, label: int) -> float:
    top, _, rest = parts(x)
    return float((x[top] - x[label]) + np.log1p(rest))


def soft_loss(x: np.ndarray, labels: np.ndarray) -> float:
    """sum_c labels[c] * (lse - x[c])."""
    top, _, rest = parts(x)
    return float(np.sum(labels * ((x[top] - x) + np.log1p(rest))))


def js_divergence(x: np.ndarray, y: np.ndarray) -> float:
    """(p ln(p/m) + q ln(q/m)) / 2 with m = (p + q) / 2, which is m (z tanh z - ln cosh z) with z = ln(p/q) / 2: nothing
    cancels between classes."""
    p, q = softmax(x), softmax(y)
    z = np.abs(log_softmax(x) - log_softmax(y)) / 2
    t = np.tanh(z)
    with np.errstate(divide="ignore"):  # not chosen
        log_cosh = np.where(z < 1, -np.log1p(-t * t) / 2, z + np.log1p(np.exp(-2 * z)) - np.log(2))
    return float(np.sum((p + q) / 2 * (z * t - log_cosh)))


def binary_losses(x: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """softplus(-x) where the target is 1, softplus(x) where it is 0; softplus(z) = ln(1 + e**z)."""
    z = np.where(targets == 1, -x, x)
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def softmax(x: np.ndarray) -> np.ndarray:
    top, exps, rest = parts(x)
    exps[top] = 1
    return exps / (1 + rest)


def log_softmax(x: np.ndarray) -> np.ndarray:
    top, _, rest = parts(x)
    return (x - x[top]) - np.log1p(rest)


def gradient(x: np.ndarray, label: int) -> np.ndarray:
    """softmax - onehot. Where the label is the largest class, -(1 - p) is -rest / (1 + rest): nothing cancels."""
    top, _, rest = parts(x)
    result = softmax(x)
    result[label] = -rest / (1 + rest) if label == top else result[label] - 1
    return result


# ---- a problem ----


def answer(problem: Problem) -> Answer:
    """The mean is over all rows; rows and entries are those of `problem.sample`."""
    task, sample = problem.case.task, problem.sample
    if task == "logsumexp":
        return Answer(rows=of_rows(lambda x, _: lse(x), problem, sample))
    if task == "softmax":
        return Answer(entries=of_rows(lambda x, _: softmax(x), problem, sample))
    distinct = len(problem.host[0])
    everywhere = np.arange(distinct)
    times = np.bincount(np.arange(problem.case.rows) % distinct)  # how often each row occurs
    if task == "binary":
        means = of_rows(lambda x, targets: np.mean(binary_losses(x, targets)), problem, everywhere)
        return Answer(float(np.average(means, weights=times)), rows=of_rows(binary_losses, problem, sample))
    per_row = {"soft": soft_loss, "pairs": js_divergence}.get(task, loss)
    losses = of_rows(per_row, problem, everywhere)
    mean = float(np.average(losses, weights=times))
    if TASKS[task].written:
        return Answer(mean, entries=of_rows(gradient, problem, sample) / problem.case.rows)
    return Answer(mean, rows=losses[sample % distinct])


def of_rows(function: Callable[[np.ndarray, Any], Any], problem: Problem, rows: np.ndarray) -> np.ndarray:
    """function(logits of a row in float64, its labels) for each of the rows."""
    logits, labels = problem.host
    labels = labels.astype(np.float64) if problem.case.task == "pairs" else labels
    return np.array([function(logits[i].astype(np.float64), labels[i]) for i in rows % len(logits)])


# ---- comparing ----


@dataclass(frozen=True)
class Errors:
    """Relative errors: of the mean, and of the worst of the sampled rows; None where the task has no such thing.

    An entry of a gradient or softmax counts relative to the largest of its row: -(1 - p) at the label is the largest,
    or as large as all others together, so that a confident row's gradient is judged by its own size, and the many
    classes that hardly matter are not.
    """

    mean: float | None
    worst: float


def errors(found: Answer, truth: Answer, dtype: np.dtype) -> Errors:
    mean = None if truth.value is None else _worst(found.value, truth.value, abs(truth.value))
    if truth.rows is not None:
        return Errors(mean, _worst(found.rows, truth.rows, abs(truth.rows)))
    assert truth.entries is not None
    # A dtype has no relative precision below its smallest normal number, which float16 gradients get to.
    largest = np.max(abs(truth.entries), axis=1, keepdims=True)
    scale = np.maximum(largest, ml_dtypes.finfo(dtype).smallest_normal)
    return Errors(mean, _worst(found.entries, truth.entries, scale))


def _worst(found: Any, truth: Any, scale: Any) -> float:
    """max |found - truth| / scale; inf where something is missing, of another shape or no number."""
    values, expected = np.asarray(found, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if values.shape != expected.shape or not np.all(np.isfinite(values)):
        return float("inf")
    return float(np.max(abs(values - expected) / scale))


def faults(errors: Errors, truth: Answer, dtype: np.dtype) -> list[str]:
    """What is not as exact as ours has to be; entries may be rounded to their dtype on top."""
    rounding = float(ml_dtypes.finfo(dtype).eps) / 2 if truth.entries is not None and dtype.itemsize == 2 else 0.0
    found = []
    if errors.mean is not None and errors.mean > ALLOWED:
        found.append(f"mean off by {errors.mean:.1e}, allowed {ALLOWED:.1e}")
    if errors.worst > ALLOWED + rounding:
        what = "an entry" if truth.entries is not None else "a row"
        found.append(f"{what} off by {errors.worst:.1e}, allowed {ALLOWED + rounding:.1e}")
    return found
