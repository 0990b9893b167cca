"""The reference backend, and the fallback that is always there: plain NumPy, to be read first.

Inside a tile the arithmetic is float32, or float64 for float64 logits and wherever softcap or temperature are used
(their rounding would cost more than the 4 eps that a row loss may be off). Between tiles it is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuxent._records import (
    DIVERGENCES,
    IDENTITY,
    NO_LABEL,
    ExactSum,
    GradWeights,
    PairStats,
    RowStats,
    Spread,
    Transform,
    exp_difference,
)
from gpuxent.backends._numpy_binary import binary_grad, binary_losses, binary_sums
from gpuxent.backends._numpy_pairs import cross_sums, divergence_sums, onehot_sums, row_sums
from gpuxent.backends._numpy_sums import limb_sums
from gpuxent.backends._tiles import TILE, load, over_tiles, slope_of, work_dtype

__all__ = [
    "after",
    "binary_grad",
    "binary_losses",
    "binary_sums",
    "cross_sums",
    "divergence_sums",
    "label_logits",
    "laid_out_as",
    "limb_sums",
    "log_probs",
    "logit_grad",
    "map_rows",
    "onehot_sums",
    "pair_stats",
    "row_stats",
    "row_stats_and_grad",
    "row_sums",
    "take_label",
    "total",
    "unlabelled",
]

# Without subtracting anything first, exp of a logit between these is a normal float32 number, and so is a sum of TILE
# of them; and exp(x) has no rounding error of x - max in it. Every class within 55 of the largest is normal then.
NO_SHIFT_LOW, NO_SHIFT_HIGH = -32.0, 64.0


# ---- one read: the statistics of rows ----


def row_stats(
    logits: np.ndarray,
    labels: np.ndarray | None = None,
    vocab_start: int = 0,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    label_logit: np.ndarray | None = None,
    also: Sequence[str] = (),
) -> RowStats:
    """RowStats of (a slice of) the rows; see the contract in `backends`."""
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows, dtype = int(np.prod(shape)), work_dtype(logits.dtype, transform)
    own_label = np.full(shape, -np.inf) if labels is None else label_logits(logits, labels, vocab_start, transform)
    local = None if labels is None else labels.ravel() - vocab_start
    ranked = (own_label if label_logit is None else label_logit).ravel()
    tiles = _TileStats(-(-vocab // TILE), rows, "moment" in also)
    rank = np.zeros((tiles.count, rows), np.int64) if "rank" in also else None

    def work(at: slice, columns: slice, views: list[Any], buffers: list[np.ndarray]) -> None:
        tile, buffer = columns.start // TILE, buffers[0]
        load(views[0], buffer, transform)
        if rank is not None and local is not None:
            rank[tile, at] = _classes_before(buffer, ranked[at].astype(dtype), local[at] - columns.start, buffers[-1])
        tiles.measure(tile, at, columns, buffer, buffers[1:], spread, views[1])

    soft = None if spread is None else spread.soft
    extra = 2 if spread is not None else 1 if "moment" in also else 0
    scratch = [dtype] * (1 + extra) + [np.bool_] * (rank is not None)
    over_tiles(work, [logits, soft], scratch)
    fields = vars(tiles.merged(vocab_start)) | {"label_logit": own_label}
    if rank is not None:
        fields["rank"] = rank.sum(axis=0)
    return RowStats(**{name: values.reshape(shape) for name, values in fields.items()})


class _TileStats:
    """What is kept of every tile of every row until the tiles are merged: a few numbers in float64."""

    def __init__(self, count: int, rows: int, moment: bool) -> None:
        self.count, self.rows = count, rows
        self.top, self.shift, self.tail = (np.empty((count, rows)) for _ in range(3))
        self.argmax = np.empty((count, rows), np.int64)
        self.has_moment = moment
        self.gap, self.weight, self.moment = (np.zeros((count, rows)) for _ in range(3))

    def measure(
        self,
        tile: int,
        at: slice,
        columns: slice,
        buffer: np.ndarray,
        scratch: list[np.ndarray],
        spread: Spread | None,
        soft: np.ndarray | None,
    ) -> None:
        """Fill the numbers of one tile from its logits in `buffer`, which is used up."""
        here = np.arange(buffer.shape[0])
        argmax = buffer.argmax(axis=1)  # the first NaN if there is one
        top = buffer[here, argmax]
        if spread is not None or self.has_moment:
            gap = np.subtract(top[:, None], buffer, out=scratch[0])
            gap[here, argmax] = 0.0  # also where inf - inf would be NaN: such a row is NaN through `rest`
        if spread is not None:
            weight = _spread_tile(spread, soft, columns, scratch[1])
            self.weight[tile, at] = weight.sum(axis=1)
            np.multiply(weight, gap, out=weight, where=weight != 0)  # weight 0 on a -inf logit counts 0
            self.gap[tile, at] = weight.sum(axis=1)
        # The sum leaves the maximum out, so shift by what is largest then: no digit of a confident row's tail is lost.
        buffer[here, argmax] = -np.inf
        second = buffer.max(axis=1)
        shift = np.where((second >= NO_SHIFT_LOW) & (second <= NO_SHIFT_HIGH) | (second == -np.inf), 0, second)
        if shift.any():
            buffer -= shift[:, None]
        np.exp(buffer, out=buffer)
        self.tail[tile, at] = buffer.sum(axis=1)
        self.top[tile, at], self.shift[tile, at], self.argmax[tile, at] = top, shift, argmax
        if self.has_moment:
            np.minimum(gap, np.finfo(gap.dtype).max, out=gap)  # a class at -inf counts 0, not 0 * inf
            gap *= buffer
            self.moment[tile, at] = gap.sum(axis=1)

    def merged(self, vocab_start: int) -> RowStats:
        with np.errstate(all="ignore"):
            return RowStats.merge_all(self._record(tile, vocab_start) for tile in range(self.count))

    def _record(self, tile: int, vocab_start: int) -> RowStats:
        top, tail = self.top[tile], self.tail[tile]
        scale = np.where(tail == 0, 0.0, exp_difference(self.shift[tile], top))  # no class but one: no 0 * inf
        rest = np.where(top == -np.inf, -1.0, np.where(np.isfinite(top), tail * scale, np.nan))
        empty = top == -np.inf
        return RowStats(
            max=top,
            rest=rest,
            label_logit=np.full(self.rows, -np.inf),
            # every weight of an all -inf tile meets a logit of -inf, that of its argmax too
            spread_gap=np.where(empty, np.where(self.weight[tile] > 0, np.inf, 0.0), self.gap[tile]),
            spread_weight=self.weight[tile],
            argmax=self.argmax[tile] + (vocab_start + tile * TILE),
            moment=np.where(empty | (scale == 0), 0.0, -scale * self.moment[tile]),
            rank=np.zeros(self.rows, np.int64),
        )


def _spread_tile(spread: Spread, soft: np.ndarray | None, columns: slice, out: np.ndarray) -> np.ndarray:
    def part(values: Any) -> Any:
        return values[columns] if np.ndim(values) else values

    if soft is None:
        out[...] = part(spread.base)
        return out
    np.copyto(out, soft, casting="unsafe")  # soft labels may be wider than the logits
    out *= part(spread.scale)
    out += part(spread.base)
    return out


def _classes_before(buffer: np.ndarray, label_logit: np.ndarray, local: np.ndarray, before: np.ndarray) -> np.ndarray:
    """How many classes of the tile come before the label when sorted by logit, and by index among equals."""
    np.greater(buffer, label_logit[:, None], out=before)
    ties = buffer == label_logit[:, None]
    ties &= np.arange(buffer.shape[1]) < local[:, None]
    before |= ties
    return np.count_nonzero(before, axis=1)


def label_logits(logits: np.ndarray, labels: np.ndarray, vocab_start: int, transform: Transform) -> np.ndarray:
    """The transformed logit at each row's label, float64; -inf where the label is not in this slice."""
    local, here = _local(labels, vocab_start, logits.shape[-1])
    values = np.take_along_axis(logits, local[..., None], axis=-1)[..., 0].ravel()
    work: np.ndarray = np.empty((1, values.size), work_dtype(logits.dtype, transform))
    with np.errstate(all="ignore"):
        load(values[None], work, transform)  # the same arithmetic as in a tile, so that label == max is exact
    return np.where(here, work[0].astype(np.float64).reshape(labels.shape), -np.inf)


def take_label(rows: np.ndarray, labels: np.ndarray, vocab_start: int = 0) -> np.ndarray:
    """The entry at each row's label, float64; 0 where the label is not in this slice."""
    local, here = _local(labels, vocab_start, rows.shape[-1])
    return np.where(here, np.take_along_axis(rows, local[..., None], axis=-1)[..., 0].astype(np.float64), 0.0)


def _local(labels: np.ndarray, vocab_start: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    local = labels - vocab_start
    here = (labels >= 0) & (local >= 0) & (local < vocab)
    return np.where(here, local, 0), here


# ---- one read, one write: gradients and log-probabilities ----


def logit_grad(
    logits: np.ndarray,
    labels: np.ndarray | None,
    stats: RowStats,
    weights: GradWeights,
    vocab_start: int = 0,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The gradient that `GradWeights` describes, times the slope of the transform."""
    out = np.empty(logits.shape, logits.dtype) if out is None else out
    dtype = work_dtype(logits.dtype, transform)
    top, rest = stats.max.ravel(), stats.rest.ravel()
    label_weight, spread_weight, lse_weight = (w.ravel() for w in (weights.label, weights.spread, weights.lse))
    off = (label_weight == 0) & (spread_weight == 0) & (lse_weight == 0)
    with np.errstate(all="ignore"):
        softmax_weight = label_weight + spread_weight * stats.spread_weight.ravel()
        softmax_weight += np.where(lse_weight == 0, 0.0, lse_weight * (top + np.log1p(rest)))
        softmax_weight[top == -np.inf] = np.nan  # no distribution, no gradient
        factor = (softmax_weight / (1.0 + rest)).astype(dtype)
    if labels is not None:
        column = labels.ravel() - vocab_start
        label_entry = _label_entry(labels, stats, softmax_weight, weights, spread, vocab_start, transform)

    def work(at: slice, columns: slice, views: list[Any], buffers: list[np.ndarray]) -> None:
        tile, soft, target = views
        buffer = buffers[0]
        load(tile, buffer, transform)
        slope = None if transform.softcap is None else slope_of(buffer, transform, buffers[-1])
        buffer -= top[at, None].astype(dtype)
        np.exp(buffer, out=buffer)
        buffer *= factor[at, None]
        if spread is not None:
            pull = _spread_tile(spread, soft, columns, buffers[1])
            pull *= spread_weight[at, None].astype(dtype)
            buffer -= pull
        if slope is not None:
            buffer *= slope
        elif transform.temperature != 1.0:
            buffer /= transform.temperature
        if labels is not None:
            local = column[at] - columns.start
            here = np.flatnonzero((local >= 0) & (local < buffer.shape[1]))
            buffer[here, local[here]] = label_entry[at][here]
        buffer[off[at]] = 0.0  # stored, not multiplied: such a row may be NaN
        target[...] = buffer

    soft = None if spread is None else spread.soft
    scratch = [dtype] + [dtype] * (spread is not None) + [dtype] * (transform.softcap is not None)
    over_tiles(work, [logits, soft, out], scratch)
    return out


def _label_entry(
    labels: np.ndarray,
    stats: RowStats,
    softmax_weight: np.ndarray,
    weights: GradWeights,
    spread: Spread | None,
    vocab_start: int,
    transform: Transform,
) -> np.ndarray:
    """The gradient at the label in float64 (rows,): from rest / (1 + rest), which keeps its digits where p - 1 does
    not."""
    label_logit, top, rest = stats.label_logit.ravel(), stats.max.ravel(), stats.rest.ravel()
    with np.errstate(all="ignore"):
        one_minus_p = np.where(label_logit == top, rest, 1.0 + rest - exp_difference(label_logit, top)) / (1.0 + rest)
        entry = (softmax_weight - weights.label.ravel()) - softmax_weight * one_minus_p
        if spread is not None:
            base: Any = spread.base
            if np.ndim(base):
                local, _ = _local(labels.ravel(), vocab_start, base.size)
                base = base[local]
            entry = entry - weights.spread.ravel() * base
        entry /= transform.temperature
        if transform.softcap is not None:
            entry *= 1.0 - (label_logit * transform.temperature / transform.softcap) ** 2
    return entry


def row_stats_and_grad(
    logits: np.ndarray,
    labels: np.ndarray | None,
    weights: GradWeights,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    also: Sequence[str] = (),
    out: np.ndarray | None = None,
) -> tuple[RowStats, np.ndarray]:
    """Both, in two reads."""
    stats = row_stats(logits, labels, spread=spread, transform=transform, also=also)
    return stats, logit_grad(logits, labels, stats, weights, spread=spread, transform=transform, out=out)


def pair_stats(
    base: np.ndarray,
    other: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
    divergences: Sequence[str] = DIVERGENCES,
    also: Sequence[str] = (),
) -> PairStats:
    """Statistics and divergences of two models' rows, in two reads of each."""
    sides = zip((base, other), transforms, strict=True)
    p, q = (row_stats(logits, labels, transform=transform, also=also) for logits, transform in sides)
    return PairStats(p, q, divergence_sums(base, other, p, q, transforms=transforms, divergences=divergences))


def log_probs(logits: np.ndarray, stats: RowStats) -> np.ndarray:
    """log softmax in the logits' dtype: (logit - max) - log1p(rest)."""
    out = np.empty(logits.shape, logits.dtype)
    dtype = work_dtype(logits.dtype, IDENTITY)
    with np.errstate(all="ignore"):
        log_sum, top = np.log1p(stats.rest.ravel()).astype(dtype), stats.max.ravel().astype(dtype)

    def work(at: slice, columns: slice, views: list[Any], buffers: list[np.ndarray]) -> None:
        load(views[0], buffers[0], IDENTITY)
        buffers[0] -= top[at, None]
        buffers[0] -= log_sum[at, None]
        views[1][...] = buffers[0]

    over_tiles(work, [logits, out], [dtype])
    return out


# ---- rows and vectors: what only Dask has to do something for ----


def laid_out_as(logits: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values


def unlabelled(rows: np.ndarray) -> np.ndarray:
    return np.full(rows.shape[:-1], NO_LABEL)


def after(guard: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rows


def map_rows(
    function: Callable[..., Any], *arguments: Any, outputs: int = 1, dtype: Any = np.float64, at: bool = False
) -> Any:
    """Apply a function of vectors and records; with `at` it is told the index of its first row."""
    with np.errstate(all="ignore"):
        if not at:
            return function(*arguments)
        return function(*arguments, start=(0,) * np.ndim(arguments[0]))


def total(values: np.ndarray, denominator: float = 1.0) -> np.float64:
    """The exact sum of all entries over the denominator, rounded once; NaN over 0."""
    if values.dtype.kind == "b":
        return np.float64(np.count_nonzero(values) / denominator)
    return np.float64(ExactSum.of(values).divided_by(denominator))
