"""Softmax regression's objective over examples of any kind, and the two ways down: L-BFGS and mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from math import fsum
from typing import Any, Protocol

import numpy as np

from gpuxent import _optimizers
from gpuxent._examples import Examples
from gpuxent._optimizers import SCHEDULES, Arrays
from gpuxent._records import Array
from gpuxent._rows import Rows
from gpuxent.backends import computed, is_cupy, linear_logits, on_gpu, on_host, to_gpu
from gpuxent.backends._threads import one_blas_thread, run, threads

FEATURE_BYTES, TILE_BYTES = 8 * 2**20, 64 * 2**20  # of a tile's features, and most of its logits


@dataclass(frozen=True)
class Parameters:
    """`coef` (K, features) and `intercept` (K,) or None. For two classes there is one row: the logit of the second, the
    first having 0."""

    coef: Array
    intercept: Array | None

    @property
    def classifier(self) -> tuple[Array, Array | None]:
        """Of all classes."""
        return _all_rows(self.coef), None if self.intercept is None else _all_rows(self.intercept)

    def beside(self, features: Any) -> Parameters:
        """In the memory and dtype of the features, or of their blocks."""
        sample = getattr(features, "_meta", features)

        def moved(array: Array) -> Array:
            if is_cupy(array) and not is_cupy(sample):
                array = on_host(array)
            array = array.astype(features.dtype, copy=False)
            return to_gpu(array, sample) if is_cupy(sample) and not is_cupy(array) else array

        return Parameters(moved(self.coef), None if self.intercept is None else moved(self.intercept))

    def named(self) -> Arrays:
        return {name: array for name, array in vars(self).items() if array is not None}

    def vector(self) -> np.ndarray:
        return np.concatenate([on_host(array).ravel() for array in self.named().values()], dtype=np.float64)

    def with_vector(self, vector: np.ndarray) -> Parameters:
        coef, intercept = np.split(vector, [self.coef.size])
        return Parameters(coef.reshape(self.coef.shape), intercept if intercept.size else None)

    def plus(self, other: Parameters) -> Parameters:
        intercept = None if self.intercept is None else self.intercept + other.intercept
        return Parameters(self.coef + other.coef, intercept)

    def copy(self) -> Parameters:
        return Parameters(**{name: None if array is None else array.copy() for name, array in vars(self).items()})


def _all_rows(rows: Array) -> Array:
    return np.concatenate([np.zeros_like(rows), rows]) if len(rows) == 1 else rows


def logits(features: Any, parameters: Parameters) -> Any:
    """Of all classes, made when they are read; a tile's features stay in the CPU's cache between its two products."""
    classifier, bias = parameters.classifier
    itemsize, width = features.dtype.itemsize, max(1, features.shape[1])
    rows = max(1, FEATURE_BYTES // (width * itemsize))
    tile_bytes = None if on_gpu(features) else min(TILE_BYTES, rows * len(classifier) * itemsize)
    return linear_logits(features, classifier, bias, tile_bytes)


@dataclass(frozen=True)
class Objective:
    """(sum of weight * loss + |coef|**2 / (2 C)) / (sum of weight), in nats; the loss is that of `cross_entropy`."""

    class_weight: np.ndarray | None
    label_smoothing: float
    weight: float  # of all examples, with that of their classes
    count: int  # of all examples: a part of them stands for the whole
    C: float

    def loss(self, examples: Examples, parameters: Parameters) -> float:
        """Without the penalty."""
        rows = self._rows(examples, parameters)
        mean = self._mean(rows, rows.stats(), examples, examples.count / self.count)
        return float(computed(mean, scheduler=None)[0])

    def loss_and_grad(self, examples: Examples, parameters: Parameters) -> tuple[float, Parameters]:
        """As if there were no others."""
        loss, grad = self._part(examples, parameters, examples.count / self.count)
        return self._with_penalty(loss, grad, parameters)

    def whole_loss_and_grad(self, parts: Sequence[Examples], parameters: Parameters) -> tuple[float, Parameters]:
        """Of all examples, which the parts are; they are worked on side by side, and added up in their order."""
        found: list[Any] = [None] * len(parts)

        def work(places: Sequence[int]) -> None:
            with threads(1) if len(parts) > 1 else nullcontext():
                for i in places:
                    found[i] = self._part(parts[i], parameters, 1.0)

        run(work, range(len(parts)))
        losses, grads = zip(*found, strict=True)
        return self._with_penalty(fsum(losses), reduce(Parameters.plus, grads), parameters)

    def _part(self, examples: Examples, parameters: Parameters, share: float) -> tuple[float, Parameters]:
        """Without the penalty, over this share of the weight of all examples."""
        rows = self._rows(examples, parameters)
        wrt = ("classifier",) if parameters.intercept is None else ("classifier", "bias")
        scale = 1 / (share * self.weight)
        grad_output = np.float64(scale) if examples.weight is None else scale * examples.weight
        which = {"also": (), "wrt": wrt, "features": examples.features.shape[1]}
        stats, grad = rows.stats_and_parameter_grad(grad_output, 1.0, 1.0, **which)
        mean = self._mean(rows, stats, examples, share)
        mean, coef, intercept = computed(mean, grad.classifier, grad.bias, scheduler=None)
        kept = slice(-len(parameters.coef), None)
        return float(mean), Parameters(coef[kept], None if intercept is None else intercept[kept])

    def _with_penalty(self, loss: float, grad: Parameters, parameters: Parameters) -> tuple[float, Parameters]:
        strength, coef = 1 / (self.C * self.weight), parameters.coef
        wide = coef.astype(np.float64, copy=False)
        pull = (strength * coef).astype(coef.dtype, copy=False)
        penalty = float(strength / 2 * (wide * wide).sum())
        return loss + penalty, Parameters(grad.coef + pull, grad.intercept)

    def _rows(self, examples: Examples, parameters: Parameters) -> Rows:
        return Rows.open(
            logits(examples.features, parameters),
            examples.targets,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            reduction="none",
            check_labels=False,
        )

    def _mean(self, rows: Rows, stats: Any, examples: Examples, share: float) -> Any:
        losses, _ = rows.losses(stats)
        weighted = losses if examples.weight is None else losses * examples.weight
        return rows.backend.total(weighted, self.weight * share)


Report = Callable[[float], None]  # told the objective of an iteration


def lbfgs(
    objective: Objective, examples: Examples, start: Parameters, max_iter: int, tol: float | None, report: Report
) -> tuple[Parameters, str]:
    """(parameters, "" or why it stopped before the gradient's largest entry was at most `tol`).

    The whole gradient in each evaluation.
    """
    parts = examples.parts()

    def value_and_grad(vector: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = start.with_vector(vector).beside(examples.features)
        value, grad = objective.whole_loss_and_grad(parts, parameters)
        if np.isnan(value):
            raise ValueError("the objective is nan: X holds NaN or infinity")
        return value, grad.vector()

    # Threads of BLAS wait for each other in every tile: parts that go side by side need not.
    with one_blas_thread() if len(parts) > 1 else nullcontext():
        best, unfinished = _optimizers.lbfgs(value_and_grad, start.vector(), max_iter, tol, report)
    return start.with_vector(best).beside(examples.features), unfinished


class Optimizer(Protocol):
    def step(self, parameters: Arrays, gradients: Arrays, rate: float) -> None: ...


@dataclass(frozen=True)
class MiniBatches:
    """How one epoch goes: chunks in random order, their examples in random order, a step for each batch."""

    optimizer: Optimizer
    batch_size: int
    shuffle: bool
    learning_rate: float
    schedule: str
    epochs: int  # that the schedule is made for

    @np.errstate(all="ignore")  # what leads to infinity is found at the end
    def epoch(
        self, objective: Objective, examples: Examples, parameters: Parameters, number: int, rng: np.random.RandomState
    ) -> float:
        """Steps in place; the objective averaged over the batches, each before its step."""
        order = rng.permutation if self.shuffle else np.arange
        total, seen = 0.0, 0
        for chunk in examples.chunks(order(examples.chunk_count)):
            rows = order(chunk.count)
            for first in range(0, chunk.count, self.batch_size):
                batch = chunk.take(rows[first : first + self.batch_size])
                value, grad = objective.loss_and_grad(batch, parameters)
                share = SCHEDULES[self.schedule](number + seen / examples.count, self.epochs)
                self.optimizer.step(parameters.named(), grad.named(), self.learning_rate * share)
                total, seen = total + value * batch.count, seen + batch.count
        return total / seen
