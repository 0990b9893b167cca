"""Two worker processes beside one; each computes one block at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from bench.clock import rounds
from bench.driver.data import agree, memory, serial, tiny_job, write
from bench.figures import Figure, Target
from bench.machine import CORES
from bench.timing import Plan
from gpuxent.evaluation.cluster import ClientWorkers, local_workers
from gpuxent.evaluation.driver import BLOCK_BYTES, rows_per_block
from gpuxent.evaluation.evaluate import open_job
from gpuxent.evaluation.score import score

TINY_BLOCKS = 200


def two_against_one(size: int, timing: Plan) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="gpuxent-bench-") as folder, ExitStack() as stack:
        job = open_job(*write(Path(folder), 128256, "f32", size))
        expected = serial(job, rows_per_block(job, BLOCK_BYTES))
        crews, contenders, more = {}, {}, {}
        for count in (1, 2):
            started = perf_counter()
            crews[count] = crew = stack.enter_context(local_workers(count, computing=1))
            ready = perf_counter()
            agree(f"{count} processes", score(job, workers=crew), expected)  # imports and compiles
            more |= {f"start of {count} s": ready - started, f"first pass of {count} s": perf_counter() - ready}
            contenders[f"{count}"] = lambda crew=crew: score(job, workers=crew)
        times = rounds({**contenders, "threads": lambda: score(job)}, timing)
        yield Figure(
            "processes",
            f"2 worker processes / 1, {CORES} cores",
            times["1"].best / times["2"].best,
            "x",
            Target(1.5) if CORES >= 2 else None,
            {
                "by median": times["1"].median / times["2"].median,
                "1 ms": 1e3 * times["1"].best,
                "2 ms": 1e3 * times["2"].best,
                "threads ms": 1e3 * times["threads"].best,
                **more,
                "rounds": times["1"].rounds,
                "others": times["1"].others,
            },
        )
        yield from _per_task(crews[2], TINY_BLOCKS)


def _per_task(crew: ClientWorkers, blocks: int, rows: int = 64) -> Iterator[Figure]:
    """What a block costs beside its work; scheduler, client and workers share the cores."""
    job = tiny_job(blocks, rows)
    budget = memory(job, rows, crew)
    agree("tiny blocks on processes", score(job, workers=crew, memory=budget), serial(job, rows))
    times = rounds({"tiny": lambda: score(job, workers=crew, memory=budget)}, Plan(seconds=1, least=1, most=5))["tiny"]
    yield Figure("processes", "overhead of a block, 2 processes", 1e3 * times.best / blocks, "ms", None)
