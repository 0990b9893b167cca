"""Scores a source block by block on threads, with a bounded number of blocks in flight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent.backends import is_cupy, to_gpu
from gpuxent.backends._threads import thread_count, threads
from gpuxent.evaluation.sources import ArraySource, Rows, Source
from gpuxent.evaluation.totals import RowScores, score_rows

# Of logits per block: long enough that a block's overhead does not count, short enough for progress. A GPU reads
# a hundred times faster.
BLOCK_BYTES, GPU_BLOCK_BYTES = 32 * 2**20, 2**30


@dataclass(frozen=True)
class Block:
    """A block's place in the data set, its scores (flat), and what belongs to its rows."""

    first_row: int
    scores: RowScores
    documents: np.ndarray | None

    @property
    def rows(self) -> int:
        return self.scores.loss.size

    @property
    def numbers(self) -> np.ndarray:
        """The rows' numbers in the data set."""
        return np.arange(self.first_row, self.first_row + self.rows)


def score_blocks(
    logits: Source,
    labels: Source,
    documents: Source | None = None,
    *,
    block_bytes: int | None = None,
    **options: Any,
) -> Iterator[Block]:
    """The blocks of a data set in order, one scored on each thread; `options` go to `score_rows`.

    A CuPy array is scored by the calling thread, on whose current stream the array is ready.
    """
    check_sources(logits, labels, documents)
    on_gpu = isinstance(logits, ArraySource) and is_cupy(logits.array)
    plan = list(plan_blocks(logits, block_bytes or (GPU_BLOCK_BYTES if on_gpu else BLOCK_BYTES)))
    if not plan:
        return
    workers = min(thread_count(), len(plan))
    threads_per_block = thread_count() // workers  # 1, unless there are fewer blocks than threads

    def score(first_row: int, rows: Rows) -> Block:
        with threads(threads_per_block):
            try:
                first = tuple(s.start for s in rows)
                block, block_labels = logits.read(rows), labels.read(rows)
                if on_gpu and not isinstance(labels, ArraySource):  # from a file
                    block_labels = to_gpu(block_labels, block)
                scores = score_rows(block, block_labels, first_row=first, **options)
            except IndexError as error:  # a label outside the vocabulary
                raise IndexError(f"{error} (in {labels.name})") from None
        ids = None if documents is None else documents.read(rows).ravel()
        return Block(first_row, RowScores(*(field.ravel() for field in vars(scores).values())), ids)

    if on_gpu:
        yield from (score(*place) for place in plan)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="gpuxent-block") as pool:
        flying: deque[Future[Block]] = deque()
        try:
            for place in plan:
                flying.append(pool.submit(score, *place))
                if len(flying) > 2 * workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:  # an error, Ctrl-C or a consumer that stops early: do not wait for what nobody will read
            for future in flying:
                future.cancel()


def check_sources(logits: Source, labels: Source, documents: Source | None) -> None:
    """What can be seen without reading: dtypes and shapes."""
    if logits.dtype.newbyteorder("=") not in arguments.FLOAT_DTYPES:
        raise TypeError(f"logits ({logits.name}) must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if len(logits.shape) < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits ({logits.name}) must have shape (rows, vocab) or (..., vocab), got {logits.shape}")
    for name, source in (("labels", labels), ("documents", documents)):
        if source is None:
            continue
        if source.dtype.kind not in "iu":
            raise TypeError(f"{name} ({source.name}) must be integers, got {source.dtype}")
        if source.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} ({source.name}) must have shape {logits.shape[:-1]} for logits of shape {logits.shape}, "
                f"got {source.shape}"
            )


def plan_blocks(logits: Source, block_bytes: int) -> Iterator[tuple[int, Rows]]:
    """(number of the first row, slices of the leading axes) of blocks of contiguous rows of about the given size."""
    *shape, vocab = logits.shape
    rows = max(1, block_bytes // (vocab * logits.dtype.itemsize))
    yield from _cut(tuple(shape), rows, logits.row_chunk)


def _cut(shape: tuple[int, ...], rows: int, multiple: int = 1) -> Iterator[tuple[int, Rows]]:
    """Blocks of at most `rows` rows: whole entries of the first axis if they fit, else each entry cut further."""
    inner = math.prod(shape[1:])
    if inner == 0:
        return
    step = rows // inner
    if step == 0:
        for i in range(shape[0]):
            for first, slices in _cut(shape[1:], rows):
                yield i * inner + first, (slice(i, i + 1), *slices)
        return
    step = max(step // multiple, 1) * multiple if multiple <= 4 * step else step
    for start in range(0, shape[0], step):
        yield start * inner, (slice(start, min(start + step, shape[0])), *(slice(0, n) for n in shape[1:]))
