"""NumPy: independent sigmoids, element by element in float64 (the loss of an element is a recorded value, as a
row's is)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxent._records import IDENTITY
from gpuxent.backends._tiles import SMALL_BLOCK, load, over_tiles, sum_tiles

Weight = np.ndarray | float


def binary_losses(
    scores: np.ndarray,
    targets: np.ndarray,
    *,
    pos_weight: Weight,
    class_weight: Weight,
    ignore_index: float | None,
    from_probs: bool,
) -> np.ndarray:
    """The loss of every element, float64 for float64 scores and float32 otherwise; 0 where ignored."""
    out = np.empty(scores.shape, np.float64 if scores.dtype.itemsize == 8 else np.float32)

    def work(_at: slice, _columns: slice, views: list[Any], buffers: list[np.ndarray]) -> None:
        views[4][...] = _tile_losses(views, buffers, ignore_index, from_probs)

    over_tiles(work, [scores, targets, *_like(scores, pos_weight, class_weight), out], [np.float64] * 2, SMALL_BLOCK)
    return out


def binary_sums(
    scores: np.ndarray,
    targets: np.ndarray,
    *,
    pos_weight: Weight,
    class_weight: Weight,
    ignore_index: float | None,
    from_probs: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the losses over the last axis, and the number of elements that count; float64."""

    def sums(views: list[Any], buffers: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        losses = _tile_losses(views, buffers, ignore_index, from_probs)
        return losses.sum(axis=1), (~_ignored(views[1], ignore_index)).sum(axis=1)

    losses, counts = sum_tiles(
        sums, [scores, targets, *_like(scores, pos_weight, class_weight)], [np.float64] * 2, outputs=2
    )
    return losses, counts


def binary_grad(
    logits: np.ndarray,
    targets: np.ndarray,
    scale: Weight,
    *,
    pos_weight: Weight,
    class_weight: Weight,
    ignore_index: float | None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """scale * class_weight * ((1 - y) sigmoid(x) - pos_weight y sigmoid(-x)), in the logits' dtype; 0 where ignored."""
    out = np.empty(logits.shape, logits.dtype) if out is None else out

    def work(_at: slice, _columns: slice, views: list[Any], buffers: list[np.ndarray]) -> None:
        x, y = buffers
        load(views[0], x, IDENTITY)
        np.copyto(y, views[1])
        small = np.exp(-np.abs(x))
        grad = (1.0 - y) * np.where(x >= 0, 1.0, small) - views[2] * y * np.where(x >= 0, small, 1.0)
        grad /= 1.0 + small
        grad *= views[3]
        grad *= views[4]
        grad[_ignored(views[1], ignore_index)] = 0.0
        views[5][...] = grad

    weights = _like(logits, pos_weight, class_weight, scale)
    over_tiles(work, [logits, targets, *weights, out], [np.float64] * 2, SMALL_BLOCK)
    return out


def _tile_losses(
    views: list[Any], buffers: list[np.ndarray], ignore_index: float | None, from_probs: bool
) -> np.ndarray:
    """class_weight * (pos_weight y * -ln p + (1 - y) * -ln(1 - p)); a term of weight 0 is 0 even where its log is
    infinite."""
    scores, targets, pos_weight, class_weight, *_ = views
    x, y = buffers
    load(scores, x, IDENTITY)
    np.copyto(y, targets)
    if from_probs:
        positive, negative = -np.log(x), -np.log1p(-x)
    else:  # softplus(-x) and softplus(x)
        tail = np.log1p(np.exp(-np.abs(x)))
        positive, negative = np.maximum(-x, 0.0) + tail, np.maximum(x, 0.0) + tail
    losses = np.where((y == 0) | (pos_weight == 0), 0.0, pos_weight * y * positive)
    losses += np.where(y == 1, 0.0, (1.0 - y) * negative)
    losses = np.where(class_weight == 0, 0.0, class_weight * losses)
    losses[np.isnan(x)] = np.nan
    losses[_ignored(targets, ignore_index)] = 0.0
    return losses


def _ignored(targets: np.ndarray, ignore_index: float | None) -> np.ndarray:
    return np.zeros(targets.shape, bool) if ignore_index is None else targets == ignore_index


def _like(logits: np.ndarray, *weights: Weight) -> list[np.ndarray]:
    """Weights as views of the logits' shape, of which no memory is made."""
    return [np.broadcast_to(np.asarray(weight, np.float64), logits.shape) for weight in weights]
