"""The scales and biases that make the loss smallest, by L-BFGS over passes over the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from gpuxent import _optimizers
from gpuxent._records import IGNORED, NOTHING, Array, ExactSum
from gpuxent._rows import Rows
from gpuxent.backends import computed, is_cupy, to_gpu
from gpuxent.evaluation.calibration.held_out import PartJob, check_losses
from gpuxent.evaluation.calibration.scaling import Scaling, ScalingFit
from gpuxent.evaluation.job import Labelled
from gpuxent.evaluation.statistics.sums import exact_sum
from gpuxent.evaluation.statistics.tokens import BlockResult
from gpuxent.evaluation.statistics.totals import NO_BAD_ROWS, BadRows

TOLERANCE = 1e-5  # of the gradient where all curvatures are about 1: the objective is then good to about 1e-8
TILE, GPU_TILE = 2**18, 2**25  # logits that are scaled at once, in float64: few enough for the CPU's cache


@dataclass(frozen=True)
class ScalingScores:
    """What one pass measures of a block."""

    loss: Array  # (rows that count,) nats
    gradient: Array  # of the summed losses by `Scaling.parameters`
    moments: Array  # sums over the rows of the products of two inputs, a logit or 1, for `Units`; or nothing
    squares: Array  # (classes,) sums of squared slopes; or nothing


@dataclass(frozen=True)
class ScalingSums:
    """Counts and the exact sum of losses; sums of gradients, which differ in their last bits in other blocks."""

    scored: int = 0
    ignored: int = 0
    loss: ExactSum = NOTHING
    nan: BadRows = NO_BAD_ROWS
    infinite: BadRows = NO_BAD_ROWS
    gradient: Any = 0.0
    moments: Any = 0.0
    squares: Any = 0.0

    def merge(self, other: ScalingSums) -> ScalingSums:
        return ScalingSums(
            self.scored + other.scored,
            self.ignored + other.ignored,
            self.loss.merge(other.loss),
            self.nan.merge(other.nan),
            self.infinite.merge(other.infinite),
            self.gradient + other.gradient,
            self.moments + other.moments,
            self.squares + other.squares,
        )

    @property
    def mean_loss(self) -> float:
        return self.loss.divided_by(self.scored)


@dataclass(frozen=True, kw_only=True)
class ScalingJob(PartJob):
    """A job whose passes leave ScalingSums behind."""

    scaling: Scaling
    curved: bool = False  # are moments and squares wanted?

    @property
    def has_products(self) -> bool:
        return super().has_products or self.scaling.method == "matrix"

    def identity(self) -> ScalingSums:
        return ScalingSums()

    def row_scores(self, logits: Any, classes: np.ndarray) -> ScalingScores:
        (logits,) = computed(logits)  # of Dask: a block, now
        logits, labels, options = self.opened(logits, classes)
        on, step = np.flatnonzero(classes != IGNORED), max(1, TILE // logits.shape[-1])
        if is_cupy(logits):
            on, step = to_gpu(on, logits), max(1, GPU_TILE // logits.shape[-1])
        tiles = [on[first : first + step] for first in range(0, max(1, on.size), step)]
        losses, *sums = zip(
            *(self._tile(logits[rows], labels[rows], options["backend"]) for rows in tiles), strict=True
        )
        return ScalingScores(np.concatenate(losses), *(reduce(add, parts) for parts in sums))

    def _tile(self, logits: Array, labels: Array, backend: str | None) -> tuple[Array, Array, Array, Array]:
        """The fields of ScalingScores of some rows."""
        z = self.scaling.of(logits, np.float64)
        rows = Rows.open(z, labels, ignore_index=IGNORED, check_labels=False, backend=backend)
        stats, slope = rows.stats_and_gradient(np.float64(1.0), 1.0, 1.0, out=z)
        x, of = self.scaling.capped(logits, np.float64), (by_class if self.scaling.method == "vector" else by_pair)
        with np.errstate(invalid="ignore", over="ignore"):  # of rows without a loss, which are an error soon
            return rows.losses(stats)[0], *of(slope, x, self.curved)

    def block_result(self, first: int, labelled: Labelled, scores: ScalingScores, kind: str) -> BlockResult:
        rows = labelled.classes.size
        on = np.flatnonzero(labelled.classes != IGNORED)
        sums = ScalingSums(
            on.size,
            rows - on.size,
            exact_sum(scores.loss),
            BadRows.of(np.isnan(scores.loss), on + first),
            BadRows.of(np.isinf(scores.loss), on + first),
            scores.gradient,
            scores.moments,
            scores.squares,
        )
        return BlockResult(first, rows, sums, None, kind)


def by_class(slope: Array, x: Array, curved: bool) -> tuple[Array, Array, Array]:
    """(gradient, moments, squares) of vector scaling: moments (classes, 2, 2), with squared slopes as their weights."""
    x = np.where(x == -np.inf, 0.0, x)  # of probability 0, whatever the scale: its slope is 0
    gradient = np.stack([(slope * x).sum(axis=0), slope.sum(axis=0)], axis=-1)
    if not curved:
        return gradient, gradient[:0], gradient[:0]
    square = slope * slope
    ones, scales = square.sum(axis=0), (square * x * x).sum(axis=0)
    both = (square * x).sum(axis=0)
    moments = np.stack([scales, both, both, ones], axis=-1).reshape(-1, 2, 2)
    return gradient, moments, np.ones_like(ones)


def by_pair(slope: Array, x: Array, curved: bool) -> tuple[Array, Array, Array]:
    """The same of matrix scaling: moments (classes + 1, classes + 1), which all classes have in common."""
    inputs = np.concatenate([x, np.ones_like(x[:, :1])], axis=1)
    gradient = slope.T @ inputs
    if not curved:
        return gradient, gradient[:0], gradient[:0]
    return gradient, inputs.T @ inputs, (slope * slope).sum(axis=0)


@dataclass(frozen=True)
class Units:
    """Coordinates in which the objective has a curvature of about 1 in every direction, guessed at the start from
    moments of the inputs and squares of the slopes: biases of rare classes and scales of large logits differ by orders
    of magnitude, and logits that rise and fall together leave long valleys. Without, L-BFGS takes up to twenty times as
    many passes.

    What all classes share is left out, as it is 0 of the best parameters: only the penalty sees it, and as many passes
    again would go after that.
    """

    axes: np.ndarray  # (inputs, inputs), or of each class (classes, inputs, inputs), orthonormal
    length: np.ndarray  # (classes, inputs): of a unit along each

    @classmethod
    def of(cls, sums: ScalingSums, pull: float) -> Units:
        along, axes = np.linalg.eigh(sums.moments / sums.scored)
        weight = sums.squares[:, None] / (1 if along.ndim == 2 else sums.scored)
        curvature = np.maximum(weight * along, 0.0) + pull
        return cls(axes, 1 / np.sqrt(np.maximum(curvature, 1e-12 * curvature.max() or 1.0)))

    def away(self, vector: np.ndarray) -> np.ndarray:
        """How far from the start the parameters are there."""
        steps = vector.reshape(self.length.shape) * self.length
        return self._centred(steps @ self.axes.T if self.axes.ndim == 2 else np.einsum("cij,cj->ci", self.axes, steps))

    def slope(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient by these coordinates, of that by the parameters."""
        own = self._centred(gradient)
        turned = own @ self.axes if self.axes.ndim == 2 else np.einsum("cij,ci->cj", self.axes, own)
        return (turned * self.length).ravel()

    def _centred(self, values: np.ndarray) -> np.ndarray:
        """Of vector scaling only biases are added to the same input, which is 1."""
        means = values.mean(axis=0)
        if self.axes.ndim == 3:
            means[0] = 0.0
        return values - means


def best_scaling(at: Callable[[Scaling, bool], ScalingSums], start: Scaling, C: float, max_iter: int) -> ScalingFit:
    """Of `at(scaling, curved)`, a pass over all rows; `start` leaves the logits as they are."""
    first, passes = at(start, True), 2  # this and the last one
    check_losses(first, "scale", _MIXED if start.method == "matrix" else "")
    pull = 1 / (C * first.scored)
    units = Units.of(first, pull)

    def value_and_grad(vector: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal passes
        away, sums = units.away(vector), first
        if vector.any():
            sums, passes = at(start.moved(away), False), passes + 1
        value = sums.mean_loss + pull / 2 * float((away * away).sum())
        return value, units.slope(sums.gradient / sums.scored + pull * away)

    best, unfinished = _optimizers.lbfgs(value_and_grad, np.zeros(units.length.size), max_iter, TOLERANCE)
    found = start.moved(units.away(best))
    last = at(found, False)
    return ScalingFit(
        **vars(found),
        C=C,
        cross_entropy=last.mean_loss,
        cross_entropy_before=first.mean_loss,
        scored=first.scored,
        ignored=first.ignored,
        passes=passes,
        converged=not unfinished,
    )


_MIXED = "; a logit of -inf has no place in matrix scaling, which mixes the classes: vector scaling leaves it -inf"
