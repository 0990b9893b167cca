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
from gpuxent.backends._threads import thread_count, threads
from gpuxent.evaluation.sources import Rows, Source
from gpuxent.evaluation.totals import RowScores, score_rows

BLOCK_BYTES = (
    32 * 2**20
)  # of logits per block: long enough that a block's overhead does not count, short enough for progress


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
    block_bytes: int = BLOCK_BYTES,
    **options: Any,
) -> Iterator[Block]:
    """The blocks of a data set in order, one scored on each thread; `options` go to `score_rows`."""
    check_sources(logits, labels, documents)
    plan = list(plan_blocks(logits, block_bytes))
    if not plan:
        return
    workers = min(thread_count(), len(plan))
    threads_per_block = thread_count() // workers  # 1, unless there are fewer blocks than threads

    def score(first_row: int, rows: Rows) -> Block:
        with threads(threads_per_block):
            try:
                first = tuple(s.start for s in rows)
                scores = score_rows(logits.read(rows), labels.read(rows), first_row=first, **options)
            except IndexError as error:  # a label outside the vocabulary
                raise IndexError(f"{error} (in {labels.name})") from None
        ids = None if documents is None else documents.read(rows).ravel()
        return Block(first_row, RowScores(*(field.ravel() for field in vars(scores).values())), ids)

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
