"""What the kernels over rows are told, how they are started, and what they leave behind; and what a device has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cupy
import numpy as np

from gpuxent._records import NO_CLASS, GradWeights, RowStats, Spread, Transform
from gpuxent.backends import _cupy_core as core

MOST_CLASSES = 2**31 - 2**16  # columns are int in the kernels, which look a little ahead


class Job:
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
        if transform.temperature != 1 and self.itemsize == 2 and not self.how:
            self.how = core.TEMPERATURE
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
        self.vectors |= {name: (vector(values), bytes_per_row) for name, values in vectors.items()}

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
        if not self.rows:
            return
        run = kernel_of(kernel, cupy.cuda.Device().id)
        for first, rows, layout in stretches(self.shape, self.arrays):
            task = self.task(first, layout | {"rows": rows, "slices": slices or blocks_per_row})
            run((-(-rows // rows_per_block) * blocks_per_row,), (threads,), (task,), shared_mem=shared)

    def task(self, first: int, layout: dict[str, int]) -> np.ndarray:
        """struct Task for the rows from `first` on."""
        places = {name: values.data.ptr + first * step for name, (values, step) in self.vectors.items()}
        told = self.values | places | layout
        return np.array(tuple([told.get(name, 0) for name in core.TASK.names or ()]), core.TASK)


def stretches(shape: tuple[int, ...], arrays: dict[str, cupy.ndarray]) -> Iterator[tuple[int, int, dict[str, int]]]:
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


def vector(values: Any) -> cupy.ndarray:
    return values if isinstance(values, cupy.ndarray) and values.flags.c_contiguous else cupy.ascontiguousarray(values)


def _moved(values: Any, dtype: Any) -> cupy.ndarray:
    """On the device, in this dtype; converted before it travels, where it is on the host."""
    return (
        values.astype(dtype, copy=False)
        if isinstance(values, cupy.ndarray)
        else cupy.asarray(np.asarray(values, dtype))
    )


class Record:
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
        return row_stats_of(shape, **{NAMES.get(name, name): values for name, values in self.arrays.items()})


NAMES = {"gap": "spread_gap", "weight": "spread_weight"}  # in task.cu and in RowStats


def row_stats_of(shape: tuple[int, ...], **found: cupy.ndarray) -> RowStats:
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


# ---- devices and kernels ----


@dataclass(frozen=True)
class Chip:
    """What a device has; bytes."""

    arch: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    l2: int


@cache
def chip_of(device: int) -> Chip:
    attributes = cupy.cuda.Device(device).attributes
    return Chip(
        int(cupy.cuda.Device(device).compute_capability),
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
        attributes["L2CacheSize"],
    )


def here() -> Chip:
    return chip_of(cupy.cuda.Device().id)


def shared_for_l2(chip: Chip, row_bytes: int, threads: int) -> int:
    """Shared memory that nobody uses, so that no more rows are in work than L2 can hold until their second read."""
    blocks = max(1, min(2048 // threads, int(0.7 * chip.l2) // (row_bytes * chip.multiprocessors)))
    share = chip.shared_per_multiprocessor // blocks - core.SYSTEM_SHARED
    return max(core.BLOCK_SHARED, min(share, chip.shared_per_block) // 16 * 16)


def whole_vectors(size: int) -> int:
    return -(-size // core.VECTOR) * core.VECTOR


@cache
def kernel_of(name: str, device: int) -> Any:
    """The kernel of that name, compiled once per process and, through CuPy's cache on disk, once per machine."""
    module = cupy.RawModule(code=core.source(*core.files_of(name)), options=core.OPTIONS, name_expressions=[name])
    kernel = module.get_function(name)
    if name.startswith(core.KEEPING):  # more than 48 KB has to be asked for
        kernel.max_dynamic_shared_size_bytes = chip_of(device).shared_per_block
    return kernel
