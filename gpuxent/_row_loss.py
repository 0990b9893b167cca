"""The loss algebra on vectors with one entry per row. It sees no logits, and does not know who owns the arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxent._records import IDENTITY, IGNORED, NO_LABEL, Array, RowStats, Spread, Transform


@dataclass(frozen=True)
class LossOptions:
    """The options of cross-entropy, checked."""

    class_weight: np.ndarray | None = None
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    transform: Transform = IDENTITY
    reduction: str = "mean"

    def spread(self, soft: Array | None, vocab: int) -> Spread | None:
        """The spread row: None for plain index labels."""
        weight = 1.0 if self.class_weight is None else self.class_weight
        base = weight * (self.label_smoothing / vocab) if self.label_smoothing else 0.0
        if soft is not None:
            return Spread(soft, weight * (1.0 - self.label_smoothing), base)
        return Spread(None, 1.0, base) if self.label_smoothing else None


@dataclass(frozen=True)
class RowSummary:
    """What `return_stats=True` adds, per row: log-sum-exp in nats, the most probable class, and its probability."""

    lse: Array
    argmax: Array
    p_max: Array


def take_class_weight(class_weight: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class weight of each row's label; 0 for a row that has none."""
    return np.where(labels >= 0, class_weight[np.maximum(labels, 0)], 0.0)


def row_losses(
    stats: RowStats,
    labels: Array,
    label_weight: Array | float | None,
    *,
    smoothing: float,
    z_loss: float,
    has_spread: bool,
) -> tuple[Array, Array]:
    """(cross-entropy, z-loss term) of each row, float64; 0 where ignored.

    cross-entropy = (1 - smoothing) * label_weight * (lse - label_logit) + sum of s * (lse - logit) over the spread
    row s, as torch.nn.functional.cross_entropy; the z-loss term is z_loss * lse**2 (PaLM, arXiv 2204.02311, section 5).
    `label_weight` is None for soft labels.
    """
    log_sum = log_of_sum(stats)  # lse - max
    loss: Array = 0.0
    if label_weight is not None:
        loss = log_sum + (stats.max - stats.label_logit)
        share = (1.0 - smoothing) * label_weight
        if np.ndim(share) or share != 1.0:
            # the label of a class at -inf has loss +inf; weight 0 makes even that 0
            loss = np.where(np.isnan(log_sum), np.nan, np.where(share == 0, 0.0, share * loss))
    if has_spread:
        spread = np.where(stats.spread_weight == 0, 0.0, stats.spread_weight * log_sum)
        loss = np.where(np.isnan(log_sum), np.nan, loss + stats.spread_gap + spread)
    z = z_loss * (stats.max + log_sum) ** 2 if z_loss else np.zeros(np.shape(log_sum))
    if label_weight is not None and np.count_nonzero(labels < 0):
        loss = np.where(labels == NO_LABEL, loss + np.inf, loss)  # an unchecked label is never a plausible loss
        loss, z = (np.where(labels == IGNORED, 0.0, values) for values in (loss, z))
    return loss, z


def losses_from_probs(p_label: Array, labels: Array, label_weight: Array) -> Array:
    """-label_weight * ln(probability of the label); 0 where ignored, +inf for an unchecked label outside the
    vocabulary."""
    return np.where(
        (labels == IGNORED) | ((label_weight == 0) & (labels >= 0)),
        0.0,
        -np.log(p_label) * np.where(labels >= 0, label_weight, 1.0),
    )


def log_of_sum(stats: RowStats) -> Array:
    """lse - max = log1p(rest); NaN for a row that is all -inf, or has a NaN or +inf."""
    return np.log1p(stats.rest) + 0.0 * stats.max  # 0 * -inf is the NaN that is wanted


def grad_weights(
    labels: Array,
    label_weight: Array | float | None,
    grad_output: Array | float,
    denominator: Array | float,
    z_denominator: Array | float,
    *,
    smoothing: float,
    z_loss: float,
) -> tuple[Array, Array, Array]:
    """The three entries of GradWeights for d(grad_output * loss) / d logits; a denominator of 0 gives 0."""
    counted = labels != IGNORED
    push = np.where(counted, over(grad_output, denominator), 0.0)
    label = np.zeros_like(push) if label_weight is None else push * ((1.0 - smoothing) * label_weight)
    z_push = np.where(counted, over(grad_output, z_denominator), 0.0) if z_loss else np.zeros_like(push)
    return label, push, z_push * (2.0 * z_loss)


def over(value: Any, denominator: Any) -> Any:
    """value / denominator, and 0 where the denominator is: nothing counted, so nothing moves."""
    return np.where(denominator == 0, 0.0, value / np.where(denominator == 0, 1.0, denominator))


def summary(stats: RowStats) -> tuple[Array, Array, Array]:
    """The three entries of RowSummary; a row without a distribution has p_max NaN, and one with a NaN argmax -1."""
    lse = np.where(stats.max == np.inf, np.inf, stats.max + np.log1p(stats.rest))
    p_max = np.where(np.isnan(log_of_sum(stats)), np.nan, 1.0 / (1.0 + stats.rest))
    return lse, np.where(np.isnan(lse), -1, stats.argmax), p_max


def entropy(stats: RowStats) -> Array:
    """-sum of p ln p = log1p(rest) - moment / (1 + rest): two terms that are never negative."""
    return log_of_sum(stats) - stats.moment / (1.0 + stats.rest)
