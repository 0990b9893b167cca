"""The functions of the contract for CuPy arrays: which kernel, how many threads, and what they are told.

Nothing here waits for the GPU. Work is done on the array's own device, in that device's current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import cupy
import numpy as np

from gpuxent._records import DIVERGENCES, IDENTITY, NO_LABEL, Divergences, GradWeights, RowStats, Spread, Transform
from gpuxent.backends import _cupy_core as core
from gpuxent.backends import _cupy_pairs as pairs
from gpuxent.backends import _cupy_sums as sums
from gpuxent.backends._cupy_jobs import Job, Record, here, row_stats_of, shared_for_l2, whole_vectors
from gpuxent.backends._cupy_rules import map_rows, total

__all__ = [
    "after",
    "binary_grad",
    "binary_losses",
    "binary_sums",
    "cross_sums",
    "divergence_sums",
    "label_logits",
    "laid_out_as",
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

PIECE = 1 << 14  # bytes below which a row is not cut up further
PIECE_SUMS = 40  # at most, of struct PieceSums in split.cu


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(logits: cupy.ndarray, *arguments: Any, **options: Any) -> Any:
        with logits.device:
            return function(logits, *arguments, **options)

    return call


# ---- the contract ----


@_on_its_device
def row_stats(
    logits: cupy.ndarray,
    labels: cupy.ndarray | None = None,
    vocab_start: int = 0,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    label_logit: cupy.ndarray | None = None,
    also: Sequence[str] = (),
) -> RowStats:
    """RowStats of (a slice of) the rows; see the contract in `backends`."""
    job = Job(logits, labels, vocab_start, spread, transform)
    if not job.dense and labels is None and spread is None and transform.is_identity and job.rows:
        return _from_reduction(logits, vocab_start, also)
    job.features(also)
    if job.how & core.RANK and label_logit is not None:
        job.point(ranked_logit=label_logit)
    return _measured(job)


@_on_its_device
def logit_grad(
    logits: cupy.ndarray,
    labels: cupy.ndarray | None,
    stats: RowStats,
    weights: GradWeights,
    vocab_start: int = 0,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    out: cupy.ndarray | None = None,
) -> cupy.ndarray:
    """The gradient that `GradWeights` describes, times the slope of the transform."""
    out = cupy.empty(logits.shape, logits.dtype) if out is None else out
    job = Job(logits, labels, vocab_start, spread, transform, out)
    job.push_with(weights)
    job.point(max=stats.max, rest=stats.rest, label_logit=stats.label_logit)
    if spread is not None:
        job.point(weight=stats.spread_weight)
    _over_pieces(job, f"gradient_rows<{job.types}, {job.how & ~core.TEMPERATURE}, {{}}>")
    return out


@_on_its_device
def row_stats_and_grad(
    logits: cupy.ndarray,
    labels: cupy.ndarray | None,
    weights: GradWeights,
    *,
    spread: Spread | None = None,
    transform: Transform = IDENTITY,
    also: Sequence[str] = (),
    out: cupy.ndarray | None = None,
) -> tuple[RowStats, cupy.ndarray]:
    """Both, in one read of memory where a row can be kept near."""
    out = cupy.empty(logits.shape, logits.dtype) if out is None else out
    job = Job(logits, labels, 0, spread, transform, out)
    job.features(also)
    if _pieces(job) > 1:
        how = {"spread": spread, "transform": transform}
        stats = row_stats(logits, labels, also=also, **how)
        return stats, logit_grad(logits, labels, stats, weights, out=out, **how)
    job.push_with(weights)
    return _resident(job, core.GRADIENT), out


@_on_its_device
def label_logits(logits: cupy.ndarray, labels: cupy.ndarray, vocab_start: int, transform: Transform) -> cupy.ndarray:
    """The transformed logit at each row's label, float64; -inf where the label is not in this slice."""
    job = Job(logits, labels, vocab_start, None, transform)
    found = cupy.empty(job.rows, np.float64)
    job.point(label_logit=found)
    job.launch(f"label_logit_rows<{job.logit}, {job.how & core.SOFTCAP}>", 128, rows_per_block=128)
    return found.reshape(job.shape)


@_on_its_device
def log_probs(logits: cupy.ndarray, stats: RowStats) -> cupy.ndarray:
    """log softmax in the logits' dtype: (logit - max) - log1p(rest)."""
    out = cupy.empty(logits.shape, logits.dtype)
    job = Job(logits, None, 0, None, IDENTITY, out)
    job.point(max=stats.max, rest=stats.rest)
    _over_pieces(job, f"log_prob_rows<{job.logit}, {{}}>")
    return out


@_on_its_device
def divergence_sums(
    p: cupy.ndarray,
    q: cupy.ndarray,
    p_stats: RowStats | None = None,
    q_stats: RowStats | None = None,
    *,
    transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
    divergences: Sequence[str] = DIVERGENCES,
) -> Divergences:
    """The divergences that are named: of rows of logits with their stats, or of probabilities."""
    if p_stats is None or q_stats is None:
        return sums.divergence_sums(p, q, divergences=divergences)
    return pairs.divergence_sums(p, q, p_stats, q_stats, transforms=transforms, divergences=divergences)


binary_grad = _on_its_device(sums.binary_grad)
binary_losses = _on_its_device(sums.binary_losses)
binary_sums = _on_its_device(sums.binary_sums)
cross_sums = _on_its_device(sums.cross_sums)
onehot_sums = _on_its_device(sums.onehot_sums)
pair_stats = _on_its_device(pairs.pair_stats)
row_sums = _on_its_device(sums.row_sums)
take_label = _on_its_device(sums.take_label)


def laid_out_as(logits: cupy.ndarray, values: cupy.ndarray) -> cupy.ndarray:
    return values


def unlabelled(rows: cupy.ndarray) -> cupy.ndarray:
    with rows.device:
        return cupy.full(rows.shape[:-1], NO_LABEL, np.int64)


def after(guard: cupy.ndarray, rows: cupy.ndarray) -> cupy.ndarray:
    return rows


# ---- which kernel ----


def _measured(job: Job) -> RowStats:
    """The statistics of the rows, which are read once."""
    slices = _pieces(job)
    return _resident(job, 0) if slices == 1 else _split(job, slices)


def _resident(job: Job, gradient: int) -> RowStats:
    """By one kernel, which depends on the row and the chip alone, so that the bits of a row depend on nothing else."""
    record = Record(job.how, job.rows)
    job.point(**record.arrays)
    job.launch(*(_in_registers(job, job.how | gradient) or _near(job, job.how | gradient)))
    return record.stats(job.shape)


def _in_registers(job: Job, how: int) -> tuple[Any, ...] | None:
    """Kernel and launch for rows that fit into the registers of some lanes of a warp, or of a block."""
    vectors = -(-job.row_bytes // core.VECTOR)
    for lanes in (8, 16, 32):
        if vectors <= lanes * core.VECTORS_EACH:
            steps = 1 if how & core.GRADIENT else _steps(job.rows, lanes)
            job.values["steps"] = steps
            return f"small_rows<{job.types}, {how}, {lanes}>", 256, 1, 256 // lanes * steps
    threads = -(-vectors // (32 * core.VECTORS_EACH)) * 32
    if threads > core.most_threads(job.logit, how):
        return None
    return f"block_rows<{job.types}, {how}>", threads, 1, 1, core.BLOCK_SHARED


def _steps(rows: int, lanes: int) -> int:
    """How many rows some lanes take one after another: as many as leave the GPU two warps for every one it can hold."""
    warps = 2 * 32 * here().multiprocessors
    return max(1, min(lanes, rows * lanes // 32 // warps))


def _near(job: Job, how: int) -> tuple[Any, ...]:
    """For longer rows: shared memory that holds two of them, or one eighth, or one; if there is none, L2."""
    chip, threads = here(), core.most_threads(job.logit, how)
    whole = core.BLOCK_SHARED + whole_vectors(job.row_bytes)
    share = core.BLOCK_SHARED + whole_vectors(core.piece_columns(job.vocab, core.CLUSTER) * job.itemsize)
    if 2 * (whole + core.SYSTEM_SHARED) <= chip.shared_per_multiprocessor and whole <= chip.shared_per_block:
        return f"kept_rows<{job.types}, {how}, true>", threads, 1, 1, whole
    if _clusters_fit(job):
        return f"cluster_rows<{job.types}, {how}>", 256, core.CLUSTER, 1, share
    if whole <= chip.shared_per_block:
        return f"kept_rows<{job.types}, {how}, true>", threads, 1, 1, whole
    return f"kept_rows<{job.types}, {how}, false>", threads, 1, 1, shared_for_l2(chip, job.row_bytes, threads)


def _clusters_fit(job: Job) -> bool:
    share = core.BLOCK_SHARED + whole_vectors(core.piece_columns(job.vocab, core.CLUSTER) * job.itemsize)
    return here().arch >= 90 and share <= here().shared_per_block


def _pieces(job: Job) -> int:
    """Into how many pieces rows are cut where there are too few of them for the GPU, and no cluster takes a row."""
    exact = not core.is_double(job.logit, job.how) and not job.how & core.SOFT  # sums that may be added up anyhow
    if not job.rows or not exact or job.row_bytes < 4 * PIECE or _clusters_fit(job):
        return 1
    return max(1, min(job.row_bytes // PIECE, 2 * here().multiprocessors // job.rows))


def _split(job: Job, slices: int) -> RowStats:
    """Piece by piece, and merged: three launches, and one for the labels."""
    record = Record(job.how, job.rows)
    job.point(**record.arrays)
    job.launch(f"label_logit_rows<{job.logit}, {job.how & core.SOFTCAP}>", 128, 1, 128)
    if "ranked_logit" not in job.vectors:
        job.point(ranked_logit=record.arrays["label_logit"])
    job.point(PIECE_SUMS * slices, pieces=cupy.empty(job.rows * slices * PIECE_SUMS, np.uint8))
    tops, totals, merge = (f"{kernel}<{job.logit}, {job.how}>" for kernel in core.SPLIT)
    job.launch(tops, 256, slices, 1, core.BLOCK_SHARED)
    job.launch(totals, 256, slices, 1, core.BLOCK_SHARED)
    job.launch(merge, 32, slices=slices)
    return record.stats(job.shape)


def _over_pieces(job: Job, kernel: str) -> None:
    """For kernels that treat every piece of a row alike: short rows go to some lanes of a warp each."""
    vectors = -(-job.row_bytes // core.VECTOR)
    lanes = next((lanes for lanes in (8, 32) if vectors <= lanes * core.VECTORS_EACH), 0)
    if lanes:
        job.launch(kernel.format(lanes), 256, 1, 256 // lanes)
    else:
        job.launch(kernel.format(0), 256, max(1, vectors // 2048), 1, core.BLOCK_SHARED)


def _from_reduction(logits: cupy.ndarray, vocab_start: int, also: Sequence[str]) -> RowStats:
    """Of rows whose classes do not lie side by side: CuPy's reduction goes along memory, whatever the axis is."""
    top, rest, argmax, moment = sums.strided_row_stats(logits, also)
    found = {"max": top, "rest": rest}
    if "argmax" in also:
        found["argmax"] = argmax + vocab_start
    if "moment" in also:
        found["moment"] = moment
    return row_stats_of(logits.shape[:-1], **found)
