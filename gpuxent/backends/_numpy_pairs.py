"""NumPy: sums over two models' rows and over rows of probabilities, in float64, since close models differ by little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuxent._records import DIVERGENCES, IDENTITY, Divergences, RowStats, Transform
from gpuxent.backends._tiles import load, sum_tiles, work_dtype


def divergence_sums(
    p: np.ndarray,
    q: np.ndarray,
    p_stats: RowStats | None = None,
    q_stats: RowStats | None = None,
    *,
    transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
    divergences: Sequence[str] = DIVERGENCES,
) -> Divergences:
    """The divergences that are named, of rows of p and q: logits with their stats, or probabilities."""
    arrays = [p, q]
    if p_stats is not None and q_stats is not None:
        with np.errstate(divide="ignore"):  # a row that is all -inf
            vectors = (p_stats.max, np.log1p(p_stats.rest), q_stats.max, np.log1p(q_stats.rest))
        arrays += [np.broadcast_to(v[..., None], p.shape) for v in vectors]

    def sums(views: list[Any], buffers: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        a, b, log_ratio = buffers
        load(views[0], a, transforms[0])
        load(views[1], b, transforms[1])
        if p_stats is None:
            close = np.abs(a - b) < b / 2  # log1p is exact there, and loses a p far below q
            log_ratio[...] = np.where(close, np.log1p((a - b) / b), np.log(a) - np.log(b))
        else:
            for buffer, top, log_sum in ((a, views[2], views[3]), (b, views[4], views[5])):
                buffer -= top
                buffer -= log_sum
            np.subtract(a, b, out=log_ratio)
            np.exp(a, out=a)
            np.exp(b, out=b)
        return tuple(TERMS[name](a, b, log_ratio).sum(axis=1) for name in divergences)

    found = sum_tiles(sums, arrays, [np.float64] * 3, outputs=len(divergences))
    return Divergences(**dict(zip(divergences, found, strict=True)))


def _kl_terms(p: np.ndarray, q: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """p ln(p/q) - p + q: each is non-negative, so no sum of them is ever negative, and an error of the normalizers
    counts only squared. Over rows that sum to 1 the last two terms cancel. Close to 1 the ratio alone says more than
    p - q."""
    close = np.abs(log_ratio) < 1
    far = np.where(p == 0, q, p * log_ratio - (p - q))
    far = np.where(log_ratio == np.inf, np.inf, far)  # q excludes the class: however small p is, or has become
    return np.maximum(np.where(close, p * (log_ratio + np.expm1(-log_ratio)), far), 0.0)


def _reverse_kl_terms(p: np.ndarray, q: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    return _kl_terms(q, p, -log_ratio)


def _js_terms(p: np.ndarray, q: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """(p ln(p/m) + q ln(q/m)) / 2 with m = (p + q) / 2, where ln(p/m) = ln 2 - softplus(-ln(p/q))."""
    from_p = np.where(p == 0, 0.0, p * (np.log(2.0) - np.logaddexp(0.0, -log_ratio)))
    from_q = np.where(q == 0, 0.0, q * (np.log(2.0) - np.logaddexp(0.0, log_ratio)))
    t = np.tanh(log_ratio / 2)  # (p - q) / (p + q): where the two are close, their parts would cancel
    close = (p + q) / 2 * (t * log_ratio + np.log1p(-t * t)) / 2
    return np.maximum(np.where(np.abs(log_ratio) < 1, close, (from_p + from_q) / 2), 0.0)


def _tv_terms(p: np.ndarray, q: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    return np.abs(p - q) / 2


TERMS = {"kl": _kl_terms, "reverse_kl": _reverse_kl_terms, "js": _js_terms, "tv": _tv_terms}


def cross_sums(weights: np.ndarray, probs: np.ndarray, *, scale: np.ndarray | float = 1.0) -> np.ndarray:
    """-sum of scale * weights * ln(probs) per row, float64; a weight of 0 counts 0 even where the probability is 0.

    `scale` is a number or one per class.
    """
    scale = np.broadcast_to(np.asarray(scale, np.float64), probs.shape)  # a view: no memory is made

    def sums(views: list[Any], buffers: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        weight, log = buffers
        load(views[0], weight, IDENTITY)
        load(views[1], log, IDENTITY)
        weight *= views[2]
        np.log(log, out=log)
        np.multiply(weight, log, out=weight, where=weight != 0)
        return (weight.sum(axis=1),)

    return 0.0 - sum_tiles(sums, [weights, probs, scale], [np.float64] * 2)[0]


def row_sums(rows: np.ndarray, *, high: float = np.inf, ignore: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(how many entries are not in [0, high], the sum of all) per row: what a check of probabilities needs.

    An entry equal to `ignore` is no fault.
    """

    def sums(views: list[Any], buffers: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        load(views[0], buffers[0], IDENTITY)
        outside = ~((buffers[0] >= 0) & (buffers[0] <= high))  # a NaN is outside
        if ignore is not None:
            outside &= views[0] != ignore
        return outside.sum(axis=1), buffers[0].sum(axis=1)

    outside, total = sum_tiles(sums, [rows], [work_dtype(rows.dtype, IDENTITY)], outputs=2)
    return outside.astype(np.int64), total


def onehot_sums(rows: np.ndarray, vocab_start: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(number of ones, number of entries other than 0 and 1, sum of the indices of the ones) per row."""

    columns = np.broadcast_to(np.arange(vocab_start, vocab_start + rows.shape[-1]), rows.shape)

    def sums(views: list[Any], _buffers: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        ones = views[0] == 1
        return ones.sum(axis=1), (~ones & (views[0] != 0)).sum(axis=1), (ones * views[1]).sum(axis=1)

    ones, others, classes = sum_tiles(sums, [rows, columns], [], outputs=3)
    return ones, others, classes
