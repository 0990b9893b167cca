"""What is read: files in the page cache, and sources that make no work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import ml_dtypes
import numpy as np

from gpuxent.evaluation.driver import ROW_BYTES, Workers, plan
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.sources import Source
from gpuxent.evaluation.sources._base import InMemory
from gpuxent.evaluation.statistics.summary import Summary

DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
DIFFERENT = 64  # rows; the file repeats them, each time turned further


class WrongResult(AssertionError):
    """What was to be timed does not give the bits of the serial run."""


def write(folder: Path, vocab: int, dtype: str, size: int) -> tuple[Path, Path]:
    """A file of logits, of about `size` bytes, and one of their labels, in the page cache as readers leave them there:
    in larger pieces than writers do, which can be mapped in less time."""
    rng, kind = np.random.default_rng(vocab), DTYPES[dtype]
    rows = max(1, size // (vocab * kind.itemsize))
    block = (3 * rng.standard_normal((DIFFERENT, vocab), np.float32)).astype(kind)
    logits, labels = folder / f"logits-{dtype}-{vocab}.npy", folder / f"labels-{dtype}-{vocab}.npy"
    with open(logits, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (rows, vocab)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, rows, DIFFERENT):
            file.write(np.roll(block, first, axis=1)[: rows - first].view(np.uint8).data)
    np.save(labels, rng.integers(0, vocab, rows))
    _read_back(logits)
    return logits, labels


def _read_back(path: Path) -> None:
    with open(path, "rb+") as file:
        if hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(2**20):
            pass


@dataclass(frozen=True)
class Repeated(InMemory):
    """The same few entries for whatever rows are read."""

    entries: np.ndarray  # as many as the largest read takes
    shape: tuple[int, ...]
    name: str = "repeated"
    row_chunk: int = 1

    @property
    def dtype(self) -> np.dtype:
        return self.entries.dtype

    def read(self, rows: slice, columns: slice | None = None) -> np.ndarray:
        return self.entries[: rows.stop - rows.start]


@dataclass(frozen=True)
class Numbered(Repeated):
    """Document ids: every `length` rows are a document."""

    length: int = 8

    def read(self, rows: slice, columns: slice | None = None) -> np.ndarray:
        return np.arange(rows.start, rows.stop) // self.length


@dataclass(frozen=True)
class Late:
    """A source that takes so long for each read, without keeping a core busy, as a disk or a network does."""

    source: Source
    seconds: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        sleep(self.seconds)
        return self.source.read(rows, columns)


def tiny_job(blocks: int, rows: int, vocab: int = 8, documents: bool = False) -> Job:
    """So many blocks of so many rows, which cost next to nothing to read and to compute."""
    rng, total = np.random.default_rng(0), blocks * rows
    return Job(
        Repeated(rng.standard_normal((rows, vocab), np.float32), (total, vocab)),
        Repeated(rng.integers(0, vocab, rows), (total,)),
        Numbered(np.zeros(0, np.int64), (total,)) if documents else None,
    )


def memory(job: Job, rows: int, workers: Workers) -> int:
    """The budget that makes blocks of so many rows."""
    return workers.at_once * rows * (job.row_bytes + ROW_BYTES)


def serial(job: Job, rows: int) -> Summary:
    """Block after block on this thread: what every other road has to give."""
    summary = job.identity()
    for block in plan([range(job.rows)], rows):
        summary = summary.merge(job.score(block.start, block.stop).summary)
    return summary


def agree(what: str, found: Summary, expected: Summary) -> None:
    if found.to_json() != expected.to_json():
        raise WrongResult(f"{what}: the result differs from that of the serial run")
