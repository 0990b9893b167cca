"""The functions of the contract for CuPy arrays: which kernel, how many threads, and what they are told.

Nothing here waits for the GPU. Work is done on the array's own device, in that device's current stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import cupy
import numpy as np

from gpuxent._records import IDENTITY, NO_CLASS, NO_LABEL, GradWeights, RowStats, Spread, Transform
from gpuxent.backends import _cupy_core as core
from gpuxent.backends import _cupy_sums as sums
from gpuxent.backends._cupy_rules import map_rows, total

__all__ = [
    "after",
    "binary_grad",
    "binary_losses",
    "binary_sums",
    "cross_sums",
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

MOST_CLASSES = 2**31 - 2**16  # columns are int in the kernels, which look a little ahead
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
    job = _Job(logits, labels, vocab_start, spread, transform)
    if not job.dense and labels is None and spread is None and transform.is_identity and job.rows:
        return _from_reduction(logits, vocab_start, also)
    job.features(also)
    if job.how & core.RANK and label_logit is not None:
        job.point(ranked_logit=_vector(label_logit))
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
    job = _Job(logits, labels, vocab_start, spread, transform, out)
    job.push_with(weights)
    job.point(max=stats.max, rest=stats.rest, label_logit=stats.label_logit)
    if spread is not None:
        job.point(weight=stats.spread_weight)
    _over_pieces(job, f"gradient_rows<{job.types}, {job.how}, {{}}>")
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
    job = _Job(logits, labels, 0, spread, transform, out)
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
    job = _Job(logits, labels, vocab_start, None, transform)
    found = cupy.empty(job.rows, np.float64)
    job.point(label_logit=found)
    job.launch(f"label_logit_rows<{job.logit}, {job.how}>", 128, rows_per_block=128)
    return found.reshape(job.shape)


@_on_its_device
def log_probs(logits: cupy.ndarray, stats: RowStats) -> cupy.ndarray:
    """log softmax in the logits' dtype: (logit - max) - log1p(rest)."""
    out = cupy.empty(logits.shape, logits.dtype)
    job = _Job(logits, None, 0, None, IDENTITY, out)
    job.point(max=stats.max, rest=stats.rest)
    _over_pieces(job, f"log_prob_rows<{job.logit}, {{}}>")
    return out


binary_grad = _on_its_device(sums.binary_grad)
binary_losses = _on_its_device(sums.binary_losses)
binary_sums = _on_its_device(sums.binary_sums)
cross_sums = _on_its_device(sums.cross_sums)
onehot_sums = _on_its_device(sums.onehot_sums)
pair_stats = _on_its_device(sums.pair_stats)
row_sums = _on_its_device(sums.row_sums)
take_label = _on_its_device(sums.take_label)


def laid_out_as(logits: cupy.ndarray, values: cupy.ndarray) -> cupy.ndarray:
    return values


def unlabelled(rows: cupy.ndarray) -> cupy.ndarray:
    with rows.device:
        return cupy.full(rows.shape[:-1], NO_LABEL, np.int64)


def after(guard: cupy.ndarray, rows: cupy.ndarray) -> cupy.ndarray:
    return rows


# ---- what the kernels are told ----


class _Job:
    """Rows of logits with what goes with them, and the kernels that run over them."""

    def __init__(
        self,
        logits: cupy.ndarray,
        labels: cupy.ndarray | None,
        vocab_start: int,
        spread: Spread | None,
        transform: Transform,
        out: cupy.ndarray | None = None,
    ) -> None:
        self.shape, self.vocab = logits.shape[:-1], logits.shape[-1]
        if self.vocab > MOST_CLASSES:
            raise ValueError(f"logits must have at most {MOST_CLASSES} classes on a GPU, got {self.vocab}")
        self.rows = math.prod(self.shape)
        self.logit, self.itemsize = core.C_TYPES[logits.dtype], logits.itemsize
        self.arrays = {"logits": logits}
        if out is not None:
            self.arrays["out"] = out
        self.dense = self.vocab == 1 or logits.strides[-1] == logits.itemsize
        self.how = core.SOFTCAP if transform.softcap is not None else 0
        self.vectors: dict[str, tuple[cupy.ndarray, int]] = {}  # and bytes per row
        softcap, temperature = transform.softcap or 1.0, transform.temperature
        self.values = {
            "vocab": self.vocab,
            "vocab_start": vocab_start,
            "softcap": softcap,
            "inverse_softcap": 1.0 / softcap,
            "temperature": temperature,
            "inverse_temperature": 1.0 / temperature,
        }
        if labels is not None:
            self.point(labels=labels)
        self._kept = self._spread(spread)

    def _spread(self, spread: Spread | None) -> list[cupy.ndarray]:
        """Features and values of the spread row; returns what has to outlive the launch."""
        if spread is None:
            return []
        kept, dtype = [], np.float64 if core.is_double(self.logit, self.how) else np.float32
        self.how |= core.SOFT if spread.soft is not None else core.BY_CLASS if np.ndim(spread.base) else core.UNIFORM
        if spread.soft is not None:
            self.arrays["soft"] = spread.soft
        for name, values in (("base", spread.base), ("scale", spread.scale)):
            if np.ndim(values):
                kept.append(cupy.ascontiguousarray(_moved(values, dtype)))
                self.values[name] = kept[-1].data.ptr
            else:
                self.values[f"{name}_number"] = float(values)
        return kept

    @property
    def types(self) -> str:
        soft = self.arrays.get("soft")
        return f"{self.logit}, {'float' if soft is None else core.C_TYPES[soft.dtype]}"

    @property
    def row_bytes(self) -> int:
        return self.vocab * self.itemsize

    def features(self, also: Sequence[str]) -> None:
        labelled = "labels" in self.vectors
        for name, bit in (("argmax", core.ARGMAX), ("moment", core.MOMENT), ("rank", core.RANK if labelled else 0)):
            if name in also:
                self.how |= bit

    def point(self, bytes_per_row: int = 8, **vectors: cupy.ndarray) -> None:
        """Tell the kernels where these vectors are."""
        self.vectors |= {name: (_vector(values), bytes_per_row) for name, values in vectors.items()}

    def push_with(self, weights: GradWeights) -> None:
        self.point(label_weight=weights.label, spread_weight=weights.spread, lse_weight=weights.lse)

    def launch(
        self,
        kernel: str,
        threads: int,
        blocks_per_row: int = 1,
        rows_per_block: int = 1,
        shared: int = 0,
        slices: int = 0,
    ) -> None:
        """Run the kernel over all rows: at once, or for each stretch of them that two strides describe."""
        run = _kernel(kernel, cupy.cuda.Device().id)
        for first, rows, layout in _stretches(self.shape, self.arrays):
            places = {name: vector.data.ptr + first * step for name, (vector, step) in self.vectors.items()}
            task = _packed(self.values | places | layout | {"rows": rows, "slices": slices or blocks_per_row})
            run((-(-rows // rows_per_block) * blocks_per_row,), (threads,), (task,), shared_mem=shared)


def _packed(task: dict[str, Any]) -> np.ndarray:
    """struct Task."""
    return np.array(tuple([task.get(name, 0) for name in core.TASK.names or ()]), core.TASK)


def _stretches(shape: tuple[int, ...], arrays: dict[str, cupy.ndarray]) -> Iterator[tuple[int, int, dict[str, int]]]:
    """(first row, number of rows, members of the task) of stretches in which two strides lead from row to row, in each
    of the arrays."""
    sizes, steps = _joined(shape, [array.strides[:-1] for array in arrays.values()])
    inner = sizes[-1] if len(sizes) > 1 else 0
    rows = math.prod(sizes[-2:])
    first = 0
    for index in np.ndindex(*sizes[:-2]):
        layout = {"inner": inner}
        for i, (name, array) in enumerate(arrays.items()):
            start = sum(at * step[i] for at, step in zip(index, steps, strict=False))
            layout[name] = array.data.ptr + start
            layout[f"{name}_outer"] = steps[-2][i] // array.itemsize if inner else 0
            layout[f"{name}_step"] = steps[-1][i] // array.itemsize if steps else 0
            layout[f"{name}_column"] = array.strides[-1] // array.itemsize
        yield first, rows, layout
        first += rows


def _joined(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """The axes without those that only continue the next one: sizes, and for each the steps of the arrays in bytes."""
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []
    for size, step in zip(shape, zip(*strides, strict=True), strict=True):
        if size == 1:
            continue
        if sizes and all(before == size * now for before, now in zip(steps[-1], step, strict=True)):
            sizes[-1], steps[-1] = sizes[-1] * size, step
        else:
            sizes.append(size)
            steps.append(step)
    return sizes, steps


def _vector(values: Any) -> cupy.ndarray:
    return values if isinstance(values, cupy.ndarray) and values.flags.c_contiguous else cupy.ascontiguousarray(values)


def _moved(values: Any, dtype: Any) -> cupy.ndarray:
    """On the device, in this dtype; converted before it travels, where it is on the host."""
    return (
        values.astype(dtype, copy=False)
        if isinstance(values, cupy.ndarray)
        else cupy.asarray(np.asarray(values, dtype))
    )


class _Record:
    """Where the kernels write the fields of RowStats that they are asked for."""

    def __init__(self, how: int, entries: int) -> None:
        numbers = ["max", "rest", "label_logit"]
        numbers += ["gap", "weight"] if how & core.SOFT else []
        numbers += ["moment"] if how & core.MOMENT else []
        integers = [name for name, bit in (("argmax", core.ARGMAX), ("rank", core.RANK)) if how & bit]
        self.arrays = dict(zip(numbers, cupy.empty((len(numbers), entries), np.float64), strict=True))
        if integers:
            self.arrays |= zip(integers, cupy.empty((len(integers), entries), np.int64), strict=True)

    def stats(self, shape: tuple[int, ...]) -> RowStats:
        return _row_stats(shape, **{NAMES.get(name, name): values for name, values in self.arrays.items()})


NAMES = {"gap": "spread_gap", "weight": "spread_weight"}  # in task.cu and in RowStats


def _row_stats(shape: tuple[int, ...], **found: cupy.ndarray) -> RowStats:
    """What was not asked for keeps its identity, which takes no memory."""
    device = cupy.cuda.Device().id
    identities = {
        name: cupy.broadcast_to(value, shape) for name, value in _identities(device).items() if name not in found
    }
    return RowStats(**identities, **{name: values.reshape(shape) for name, values in found.items()})


@cache
def _identities(device: int) -> dict[str, cupy.ndarray]:
    """Made once, in a stream of their own that is waited for: whatever stream comes first, they are there."""
    with cupy.cuda.Stream(non_blocking=True) as stream:
        numbers = {name: cupy.zeros((), np.float64) for name in ("spread_gap", "spread_weight", "moment")}
        numbers["label_logit"] = cupy.full((), -np.inf)
        numbers |= {"argmax": cupy.full((), NO_CLASS, np.int64), "rank": cupy.zeros((), np.int64)}
        stream.synchronize()
    return numbers


# ---- which kernel ----


@dataclass(frozen=True)
class _Chip:
    """What a device has; bytes."""

    arch: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    l2: int


@cache
def _chip(device: int) -> _Chip:
    attributes = cupy.cuda.Device(device).attributes
    return _Chip(
        int(cupy.cuda.Device(device).compute_capability),
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
        attributes["L2CacheSize"],
    )


def _here() -> _Chip:
    return _chip(cupy.cuda.Device().id)


def _measured(job: _Job) -> RowStats:
    """The statistics of the rows, which are read once."""
    slices = _pieces(job)
    return _resident(job, 0) if slices == 1 else _split(job, slices)


def _resident(job: _Job, gradient: int) -> RowStats:
    """By one kernel, which depends on the row and the chip alone, so that the bits of a row depend on nothing else."""
    record = _Record(job.how, job.rows)
    job.point(**record.arrays)
    if job.rows:
        job.launch(*(_in_registers(job, job.how | gradient) or _near(job, job.how | gradient)))
    return record.stats(job.shape)


def _in_registers(job: _Job, how: int) -> tuple[Any, ...] | None:
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
    warps = 2 * 32 * _here().multiprocessors
    return max(1, min(lanes, rows * lanes // 32 // warps))


def _near(job: _Job, how: int) -> tuple[Any, ...]:
    """For longer rows: shared memory that holds two of them, or one eighth, or one; if there is none, L2."""
    chip, threads = _here(), core.most_threads(job.logit, how)
    whole = core.BLOCK_SHARED + _whole_vectors(job.row_bytes)
    share = core.BLOCK_SHARED + _whole_vectors(_piece_columns(job.vocab, core.CLUSTER) * job.itemsize)
    if 2 * (whole + core.SYSTEM_SHARED) <= chip.shared_per_multiprocessor and whole <= chip.shared_per_block:
        return f"kept_rows<{job.types}, {how}, true>", threads, 1, 1, whole
    if _clusters_fit(job):
        return f"cluster_rows<{job.types}, {how}>", 256, core.CLUSTER, 1, share
    if whole <= chip.shared_per_block:
        return f"kept_rows<{job.types}, {how}, true>", threads, 1, 1, whole
    return f"kept_rows<{job.types}, {how}, false>", threads, 1, 1, _shared_for_l2(chip, job.row_bytes, threads)


def _clusters_fit(job: _Job) -> bool:
    share = core.BLOCK_SHARED + _whole_vectors(_piece_columns(job.vocab, core.CLUSTER) * job.itemsize)
    return _here().arch >= 90 and share <= _here().shared_per_block


def _piece_columns(vocab: int, slices: int) -> int:
    """The columns of a piece: `width` of struct Piece in task.cu."""
    share = -(-vocab // slices)
    return -(-share // 16) * 16


def _pieces(job: _Job) -> int:
    """Into how many pieces rows are cut where there are too few of them for the GPU, and no cluster takes a row."""
    exact = not core.is_double(job.logit, job.how) and not job.how & core.SOFT  # sums that may be added up anyhow
    if not job.rows or not exact or job.row_bytes < 4 * PIECE or _clusters_fit(job):
        return 1
    return max(1, min(job.row_bytes // PIECE, 2 * _here().multiprocessors // job.rows))


def _split(job: _Job, slices: int) -> RowStats:
    """Piece by piece, and merged: three launches, and one for the labels."""
    record = _Record(job.how, job.rows)
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


def _shared_for_l2(chip: _Chip, row_bytes: int, threads: int) -> int:
    """Shared memory that nobody uses, so that no more rows are in work than L2 can hold until their second read."""
    blocks = max(1, min(2048 // threads, int(0.7 * chip.l2) // (row_bytes * chip.multiprocessors)))
    share = chip.shared_per_multiprocessor // blocks - core.SYSTEM_SHARED
    return max(core.BLOCK_SHARED, min(share, chip.shared_per_block) // 16 * 16)


def _whole_vectors(size: int) -> int:
    return -(-size // core.VECTOR) * core.VECTOR


def _over_pieces(job: _Job, kernel: str) -> None:
    """For kernels that treat every piece of a row alike: short rows go to some lanes of a warp each."""
    vectors = -(-job.row_bytes // core.VECTOR)
    lanes = next((lanes for lanes in (8, 32) if vectors <= lanes * core.VECTORS_EACH), 0)
    if lanes and job.rows:
        job.launch(kernel.format(lanes), 256, 1, 256 // lanes)
    elif job.rows:
        job.launch(kernel.format(0), 256, max(1, vectors // 2048), 1, core.BLOCK_SHARED)


def _from_reduction(logits: cupy.ndarray, vocab_start: int, also: Sequence[str]) -> RowStats:
    """Of rows whose classes do not lie side by side: CuPy's reduction goes along memory, whatever the axis is."""
    top, rest, argmax, moment = sums.strided_row_stats(logits, also)
    found = {"max": top, "rest": rest}
    if "argmax" in also:
        found["argmax"] = argmax + vocab_start
    if "moment" in also:
        found["moment"] = moment
    return _row_stats(logits.shape[:-1], **found)


@cache
def _kernel(name: str, device: int) -> Any:
    """The kernel of that name, compiled once per process and, through CuPy's cache on disk, once per machine."""
    module = cupy.RawModule(code=core.source(*core.ROWS), options=core.OPTIONS, name_expressions=[name])
    kernel = module.get_function(name)
    if name.startswith(("kept_rows", "cluster_rows")):  # more than 48 KB has to be asked for
        kernel.max_dynamic_shared_size_bytes = _chip(device).shared_per_block
    return kernel
