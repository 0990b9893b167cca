"""The driver on threads beside the bare backend, and whether it reads while it computes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.clock import rounds
from bench.driver.data import DTYPES, Late, agree, memory, serial, write
from bench.figures import Figure, Target
from bench.timing import Plan
from gpuxent.backends._threads import thread_count
from gpuxent.evaluation.driver import ThreadWorkers, plan, sized
from gpuxent.evaluation.evaluate import open_job
from gpuxent.evaluation.score import score
from gpuxent.evaluation.statistics.totals import score_rows

VOCABS = (128256, 32000, 1024)
GIB = 2**30


def against_the_backend(size: int, timing: Plan) -> Iterator[Figure]:
    """Both read the same blocks of a .npy file from the page cache, with as many threads: the backend one block after
    the other, each on all threads, through `numpy.load(mmap_mode="r")`. Beside it the backend on a mapping whose pages
    are all there, which no reader of a file has."""
    with tempfile.TemporaryDirectory(prefix="gpuxent-bench-") as folder:
        for vocab in VOCABS:
            for dtype in DTYPES:
                logits, labels = write(Path(folder), vocab, dtype, size)
                yield _against_the_backend(logits, labels, f"{dtype}, V = {vocab:,}", timing)
                logits.unlink()


def _against_the_backend(logits: Path, labels: Path, what: str, timing: Plan) -> Figure:
    job = open_job(logits, labels)
    _, rows = sized(job, job.rows, ThreadWorkers(job.rows))
    blocks, classes = list(plan([range(job.rows)], rows)), np.load(labels)

    def bare(mapped: np.ndarray) -> None:
        for block in blocks:
            score_rows(mapped[block.start : block.stop], classes[block.start : block.stop])

    def opened() -> np.ndarray:
        return np.load(logits, mmap_mode="r").view(job.logits.dtype)

    there = opened()
    contenders = {"driver": lambda: score(job), "bare": lambda: bare(opened()), "resident": lambda: bare(there)}
    agree(what, contenders["driver"](), serial(job, rows))
    times = rounds(contenders, timing)
    driver, backend, resident = times["driver"], times["bare"], times["resident"]
    return Figure(
        "driver / backend",
        what,
        backend.best / driver.best,
        "x",
        Target(0.9),
        {
            "by CPU time": backend.cpu / driver.cpu,
            "by median": backend.median / driver.median,
            "resident": resident.best / driver.best,
            "GB/s": job.rows * job.row_bytes / driver.best / 1e9,
            "ms/block": 1e3 * driver.best / len(blocks),
            "blocks": len(blocks),
            "rounds": driver.rounds,
            "others": driver.others,
        },
    )


def overlap(blocks: int, block_bytes: int, timing: Plan) -> Iterator[Figure]:
    """Every read of logits takes as long as computing a block takes one of the threads, without keeping it busy; with
    two blocks being read while the threads compute, all of it but the first is hidden behind the computing."""
    vocab, workers = 32000, thread_count()
    rows = max(1, block_bytes // (4 * vocab))
    rng = np.random.default_rng(0)
    job = open_job(rng.standard_normal((blocks * rows, vocab), np.float32), rng.integers(0, vocab, blocks * rows))
    budget = memory(job, rows, ThreadWorkers(blocks))

    def passes(late: float) -> float:
        slow = open_job(Late(job.logits, late), job.labels) if late else job
        agree(f"reads of {late:.3f} s", score(slow, memory=budget), expected)
        return rounds({"driver": lambda: score(slow, memory=budget)}, timing)["driver"].best

    expected = serial(job, rows)
    at_once = passes(0.0)
    latency = at_once / blocks * workers
    for times in (1.0, 2.0):
        ideal = max(at_once, times * latency * blocks / ThreadWorkers(blocks).slots) + times * latency
        found = passes(times * latency)
        yield Figure(
            "reading overlaps",
            f"reads as long as computing x {times:g}",
            ideal / found,
            "of ideal",
            None,
            {
                "ms/read": 1e3 * times * latency,
                "ms": 1e3 * found,
                "ideal ms": 1e3 * ideal,
                "one after the other ms": 1e3 * (at_once + times * latency * blocks / workers),
            },
        )
