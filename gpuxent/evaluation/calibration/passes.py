"""Reads of all rows, one after the other: by whom, and who is told how far each has come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from gpuxent import _arguments as arguments
from gpuxent.evaluation.cluster import ClientWorkers, check_reachable
from gpuxent.evaluation.driver import Workers
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.score import block_results
from gpuxent.evaluation.statistics.tokens import BlockResult

Watch = Callable[[str], Callable[[int], None]]  # of a pass, by its name: told how many more rows are done


@dataclass(frozen=True)
class Passes:
    """How the rows are read, as often as it takes."""

    memory: int | None = None  # about so many bytes of logits at once
    workers: Workers | None = None  # None: threads of this process
    watch: Watch | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            arguments.positive(self.memory, "memory")

    @classmethod
    def by(cls, client: Any, memory: int | None) -> Passes:
        """By the workers of a `distributed.Client`, if there is one."""
        return cls(memory, None if client is None else ClientWorkers(client))

    def results(self, job: Job, name: str) -> Iterator[BlockResult]:
        """Of the blocks in the order of their rows, so that sums are the same whoever is first."""
        watch = None if self.watch is None else self.watch(name)
        if self.workers is not None:
            check_reachable(job)
        blocks = block_results(job, [range(job.rows)], memory=self.memory, workers=self.workers)
        with closing(blocks):
            yield from in_order(watched(blocks, watch))

    def total(self, job: Job, name: str) -> Any:
        """What all rows leave behind."""
        summary = job.identity()
        for result in self.results(job, name):
            summary = summary.merge(result.summary)
        return summary


def watched(
    results: Generator[BlockResult, None, None], watch: Callable[[int], None] | None
) -> Generator[BlockResult, None, None]:
    for result in results:
        if watch is not None:
            watch(result.rows)
        yield result


def in_order(results: Iterable[BlockResult]) -> Iterator[BlockResult]:
    """Results from row 0 on: one that comes early waits for those before it."""
    early: dict[int, BlockResult] = {}
    row = 0
    for result in results:
        early[result.first] = result
        while (ready := early.pop(row, None)) is not None:
            yield ready
            row += ready.rows
