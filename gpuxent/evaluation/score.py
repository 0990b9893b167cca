"""A data set's summary: what is done already from the run directory, the rest block by block from the workers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from gpuxent import _arguments as arguments
from gpuxent.backends import is_cupy
from gpuxent.backends._threads import one_blas_thread
from gpuxent.evaluation.driver import (
    BLOCK_BYTES,
    CallerWorkers,
    Stop,
    ThreadWorkers,
    Workers,
    plan,
    rows_per_block,
    run_blocks,
    sized,
)
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.runs.directory import RunDirectory
from gpuxent.evaluation.runs.fingerprint import differences, fingerprint
from gpuxent.evaluation.sources import Source
from gpuxent.evaluation.statistics.metadata import Metadata
from gpuxent.evaluation.statistics.result import Evaluation
from gpuxent.evaluation.statistics.tokens import BlockResult

Watch = Callable[[int, Any], None]  # rows that are done since the last call, and the summary of all that are


def evaluate_job(job: Job, about: Metadata | None = None, **how: Any) -> Evaluation:
    """The statistics of a job; `how` it is scored, and what is kept, as in `scored`."""
    check_about(job, about)
    with scored(job, **how) as done:
        result = done.summary.result(rows=job.rows, metadata=about, mixed=done.mixed)
        done.keep(result.to_dict(by_document=False))
    return result


@dataclass(frozen=True)
class Scored:
    """The summary of so many rows, who computed it, if there were several, and the folder that keeps it."""

    summary: Any
    rows: int
    mixed: tuple[str, ...]
    directory: RunDirectory | None

    def keep(self, result: dict[str, Any]) -> None:
        """In the run's folder, if there is one."""
        if self.directory is not None:
            self.directory.write_result(result)


@contextmanager
def scored(
    job: Job,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    allow_mixed: bool = False,
    memory: int | None = None,
    workers: Workers | None = None,
    stop: Stop | None = None,
    watch: Watch | None = None,
) -> Iterator[Scored]:
    """A job scored, in a run directory if one is named: it is open until the result has been kept."""
    if memory is not None:
        arguments.positive(memory, "memory")
    if run is None and (resume or allow_mixed):
        raise ValueError(f"{'resume' if resume else 'allow_mixed'} is about a run in a folder, but run is not given")
    kinds, done = set[str](), 0

    def count(rows: int, summary: Any) -> None:
        nonlocal done
        done += rows
        if watch is not None:
            watch(rows, summary)

    with ExitStack() as stack:
        directory = None
        if run is not None:
            job = replace(job, keep_tokens=True)
            what = fingerprint(job.inputs, job.options)
            directory = RunDirectory(run, what, job.rows, record=job.record, resume=resume, allow_mixed=allow_mixed)
            stack.enter_context(directory)
        with unchanged(job):
            summary = score(job, directory, memory=memory, workers=workers, stop=stop, watch=count, kinds=kinds)
        mixed = tuple(sorted(kinds)) if directory is None else directory.mixed
        yield Scored(summary, done, mixed if len(mixed) > 1 else (), directory)


@contextmanager
def unchanged(job: Job) -> Iterator[None]:
    """Around reads of the job's files: ValueError if they were not the same all the time, which no single read could
    notice."""
    files: dict[str, Source | None] = {
        name: source for name, source in job.inputs.items() if source is not None and source.files()
    }
    before = fingerprint(files, {})
    yield
    if changed := differences(before, fingerprint(files, {})):
        raise ValueError(f"what was read changed meanwhile: {'; '.join(changed)}")


def check_about(job: Job, about: Metadata | None) -> None:
    """That what is known of the documents goes with the rows."""
    if about is None:
        return
    if about.needs_documents and job.documents is None:
        raise ValueError("documents must be given: the metadata, or counts by document, belong to their ids")
    if job.rows < job.all_rows and (about.bytes is not None or about.words is not None):
        raise ValueError("limit must not be given with bytes or words, which are those of the whole text")


def score(
    job: Job,
    run: RunDirectory | None = None,
    *,
    memory: int | None = None,
    workers: Workers | None = None,
    stop: Stop | None = None,
    watch: Watch | None = None,
    kinds: set[str] | None = None,
) -> Any:
    """The summary of all rows, or of those done when `stop` was requested.

    `memory` bounds the logits in flight, in bytes (in each worker process, if a cluster has them); `kinds` gets the
    `computed_by` of every block. What the summary is, the job says.
    """
    summary, todo = job.identity(), [range(job.rows)]
    if run is not None:
        summary, todo = job.summary_of(run), gaps(run.finished, job.rows)
        if watch is not None:
            watch(run.finished_rows, summary)
    with closing(block_results(job, todo, memory=memory, workers=workers, stop=stop)) as results:
        for result in results:
            if run is not None:
                run.add(result)
            summary = summary.merge(result.summary)
            if kinds is not None:
                kinds.add(result.computed_by)
            if watch is not None:
                watch(result.rows, summary)
    return summary


def block_results(
    job: Job,
    todo: list[range],
    *,
    memory: int | None = None,
    workers: Workers | None = None,
    stop: Stop | None = None,
) -> Generator[BlockResult, None, None]:
    """The results of the blocks of these rows, as they come back."""
    left = sum(map(len, todo))
    if workers is None:
        in_memory_of_gpu = is_cupy(getattr(job.logits, "array", None))
        workers = CallerWorkers() if in_memory_of_gpu else ThreadWorkers(ceil(left / rows_per_block(job, BLOCK_BYTES)))
    job, rows = sized(job, left, workers, memory)
    blocks = plan(todo, rows, getattr(job.logits, "row_edges", None))
    products = one_blas_thread() if job.has_products else nullcontext()  # blocks run side by side anyway
    with products, closing(run_blocks(job, blocks, workers, stop)) as results:
        yield from results


def gaps(finished: list[range], rows: int) -> list[range]:
    """The rows between ranges, which are in order."""
    edges = [0, *(edge for done in finished for edge in (done.start, done.stop)), rows]
    return [range(a, min(b, rows)) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < min(b, rows)]


@contextmanager
def interruptible(stop: Stop, say: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C, or the SIGTERM of a job scheduler, lets the blocks in flight finish; a second one is KeyboardInterrupt.

    Only the main thread is told of signals: elsewhere nothing changes.
    """
    if current_thread() is not main_thread():
        yield
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.request()
        with suppress(RuntimeError, ImportError):  # in the middle of another line, or of what it imports
            say("interrupted: the blocks in flight are being finished; once more to stop now")

    before: dict[int, Any] = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
