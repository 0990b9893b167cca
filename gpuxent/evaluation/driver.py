"""Scores a data set block by block, a bounded number of blocks in flight, on whatever workers there are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from queue import Empty, SimpleQueue
from threading import Semaphore
from typing import Protocol

from gpuxent.backends._threads import thread_count, threads
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.statistics.tokens import BlockResult

# Of logits that are read at once: long enough that their overhead does not count, short enough for progress. A GPU
# reads a hundred times faster.
BLOCK_BYTES, GPU_BLOCK_BYTES, MOST_BLOCK_BYTES = 64 * 2**20, 2**30, 512 * 2**20
TASK_READS = 8  # of a task on a cluster, which has ten times the overhead of a block on a thread
ROW_BYTES = 256  # what is kept of a row beside its logits until its block is finished
READERS = 2  # blocks that are read while every thread computes


class WorkerDied(RuntimeError):
    """The process that scored a block was lost with it."""


@dataclass(frozen=True)
class Done:
    """A block that came back: its result, or why there is none."""

    block: range
    result: BlockResult | None = None
    error: BaseException | None = None


class Workers(Protocol):
    """Where blocks are scored."""

    @property
    def read_bytes(self) -> int:
        """Of logits that are read at once, unless the user bounds the memory."""

    @property
    def reads(self) -> int:
        """How many make a block."""

    @property
    def slots(self) -> int:
        """How many blocks to keep in flight."""

    @property
    def at_once(self) -> int:
        """How many reads one process holds in memory."""

    @property
    def computing(self) -> int:
        """How many blocks all of them compute at once."""

    def submit(self, job: Job, block: range) -> None: ...
    def next(self, timeout: float) -> Done | None:
        """A block that came back, in whatever order; None if none did in so many seconds."""

    def close(self) -> None:
        """Without waiting for what nobody will read."""


class Stop:
    """Set to let the blocks in flight finish and begin no others."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        self.requested = True


def run_blocks(
    job: Job, blocks: Iterable[range], workers: Workers, stop: Stop | None = None
) -> Generator[BlockResult, None, None]:
    """The results of the blocks as they come back; in memory are those in flight.

    After an error no block is begun; the results of those in flight are given before it is raised, and of several
    errors that of the first rows. Blocks whose worker died are scored again, each alone, and are an error (after all
    others) if it dies again: RuntimeError, which names their rows.
    """
    waiting, flying, errors, orphans = iter(blocks), 0, list[Done](), list[range]()
    stop = stop or Stop()
    try:
        while True:
            while flying < workers.slots and not (errors or stop.requested):
                block = next(waiting, None)
                if block is None:
                    break
                workers.submit(job, block)
                flying += 1
            if not flying:
                break
            done = workers.next(timeout=0.5)
            if done is None:
                continue
            flying -= 1
            if done.result is not None:
                yield done.result
            elif isinstance(done.error, WorkerDied):
                orphans.append(done.block)
            else:
                errors.append(done)
        if errors:
            first = min(errors, key=lambda done: done.block.start)
            assert first.error is not None
            raise first.error
        yield from _each_alone(job, orphans, workers, stop)
    finally:
        workers.close()


def _each_alone(job: Job, blocks: list[range], workers: Workers, stop: Stop) -> Iterator[BlockResult]:
    """A worker that dies takes innocent blocks with it; alone there is no doubt which one it was."""
    lost: list[tuple[range, BaseException]] = []
    for block in sorted(blocks, key=lambda block: block.start):
        if stop.requested:
            return
        workers.submit(job, block)
        done = None
        while done is None:
            done = workers.next(timeout=0.5)
        if done.result is not None:
            yield done.result
        elif isinstance(done.error, WorkerDied):
            lost.append((block, done.error))
        else:
            assert done.error is not None
            raise done.error
    if lost:
        rows = ", ".join(f"{block.start:,} to {block.stop:,}" for block, _ in lost)
        raise RuntimeError(f"{job.logits.name}: every worker that scored rows {rows} alone died: {lost[0][1]}")


class ThreadWorkers:
    """Threads of this process: as many compute at once as `gpuxent.threads` allows, two more read."""

    read_bytes, reads = BLOCK_BYTES, 1

    def __init__(self, blocks: int) -> None:
        self.computing = computing = max(1, min(thread_count(), blocks))
        self.slots = self.at_once = computing + READERS
        self._threads_per_block = thread_count() // computing  # 1, unless there are fewer blocks than threads
        self._gate = Semaphore(computing)
        self._pool = ThreadPoolExecutor(self.slots, thread_name_prefix="gpuxent-block")
        self._done: SimpleQueue[Done] = SimpleQueue()

    def submit(self, job: Job, block: range) -> None:
        self._pool.submit(self._score, job, block)

    def _score(self, job: Job, block: range) -> None:
        try:
            with threads(self._threads_per_block):
                self._done.put(Done(block, job.score(block.start, block.stop, self._gate)))
        except BaseException as error:
            self._done.put(Done(block, error=error))

    def next(self, timeout: float) -> Done | None:
        try:
            return self._done.get(timeout=timeout)
        except Empty:
            return None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class CallerWorkers:
    """The calling thread, on whose current stream the arrays of a GPU are ready."""

    slots = at_once = computing = 1
    read_bytes, reads = GPU_BLOCK_BYTES, 1

    def __init__(self) -> None:
        self._done: Done | None = None

    def submit(self, job: Job, block: range) -> None:
        try:
            self._done = Done(block, job.score(block.start, block.stop))
        except Exception as error:
            self._done = Done(block, error=error)

    def next(self, timeout: float) -> Done | None:
        done, self._done = self._done, None
        return done

    def close(self) -> None:
        pass


def rows_per_block(job: Job, block_bytes: int) -> int:
    """As many as make about so many bytes of logits, and whole chunks of the storage where those are not much larger:
    blocks of several chunks read none twice."""
    fixed = getattr(job.logits, "tile_rows", None)
    if fixed is not None:
        return fixed
    rows, chunk = max(1, block_bytes // (job.row_bytes + ROW_BYTES)), job.logits.row_chunk
    return max(rows // chunk, 1) * chunk if chunk <= 4 * rows else rows


def sized(job: Job, rows: int, workers: Workers, memory: int | None = None) -> tuple[Job, int]:
    """The job as the workers shall read it, and how many of the rows to give them in a block; `memory` bounds what a
    process holds of logits, in bytes."""
    size = workers.read_bytes if memory is None else min(memory // workers.at_once, MOST_BLOCK_BYTES)
    read, chunk = rows_per_block(job, size), job.logits.row_chunk
    if hasattr(job.logits, "row_edges"):  # its chunks come as they are
        return job, read
    if not hasattr(job.logits, "tile_rows"):
        read = levelled(read, rows, workers.computing, 1 if read % chunk else chunk)
    most = MOST_BLOCK_BYTES // (job.row_bytes + ROW_BYTES)
    block = max(read, min(workers.reads * read, most) // read * read)
    return replace(job, rows_at_once=read), levelled(block, rows, workers.computing, read)


def levelled(rows: int, total: int, computing: int, step: int = 1) -> int:
    """At most so many rows per block, and so that the last blocks keep as many workers busy as the first; a multiple of
    the step, as `rows` is."""
    rounds = max(1, ceil(total / (rows * computing)))
    return max(1, min(rows, ceil(total / (rounds * computing * step)) * step))


def plan(todo: Iterable[range], rows: int, edges: list[int] | None = None) -> Iterator[range]:
    """The rows to do, cut at multiples of `rows`; of an array of Dask at the edges of its chunks, never inside one."""
    for part in todo:
        start = part.start
        while start < part.stop:
            stop = (start // rows + 1) * rows if edges is None else _edge(edges, start, rows)
            yield range(start, min(stop, part.stop))
            start = min(stop, part.stop)


def _edge(edges: list[int], start: int, rows: int) -> int:
    """The last chunk edge at most `rows` after the start, or the next one."""
    last = bisect_right(edges, start + rows) - 1
    return edges[last] if edges[last] > start else edges[last + 1]
