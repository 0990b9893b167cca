"""What a block costs that has no work in it, and that memory does not grow with their number."""

from __future__ import annotations

import gc
import multiprocessing
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from bench.clock import rounds
from bench.driver import data
from bench.driver.data import WrongResult, agree, serial, tiny_job
from bench.figures import Figure, Target
from bench.timing import Plan
from gpuxent.evaluation.driver import ThreadWorkers
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.runs.directory import RunDirectory
from gpuxent.evaluation.runs.fingerprint import fingerprint
from gpuxent.evaluation.runs.token_record import PART_TOKENS
from gpuxent.evaluation.score import score
from gpuxent.evaluation.statistics.summary import Summary

ROWS = 64  # of a block: as many as 32 MB of float32 logits have at V = 128k
STATUS = Path("/proc/self/status")
MEMORY_DISK = Path("/dev/shm")
GROWTH = 16.0  # MB that count as none: what allocators keep


def drive(job: Job, rows: int, run: RunDirectory | None = None, watch: Callable[..., None] | None = None) -> Summary:
    """On threads, in blocks of so many rows."""
    workers = ThreadWorkers(-(-job.rows // rows))
    return score(job, run, memory=data.memory(job, rows, workers), workers=workers, watch=watch)


def overhead(blocks: int, timing: Plan) -> Iterator[Figure]:
    """Of a block on threads, all in all: planning, handing over, labels, statistics and merging, and the ledger's
    commit and the tokens where there is a run directory."""
    job = tiny_job(blocks, ROWS)
    expected = serial(job, ROWS)
    agree("tiny blocks on threads", drive(job, ROWS), expected)
    found = rounds({"serial": lambda: serial(job, ROWS), "threads": lambda: drive(job, ROWS)}, timing)
    times = found["threads"]
    beside = {
        "by CPU time": 1e3 * times.cpu / blocks,
        "by median": 1e3 * times.median / blocks,
        "serial ms": 1e3 * found["serial"].best / blocks,
        "blocks": blocks,
        "others": times.others,
    }
    yield Figure(
        "overhead", f"a block of {ROWS} rows", 1e3 * times.best / blocks, "ms", Target(2, at_most=True), beside
    )
    places = {"disk": None, "memory": MEMORY_DISK} if MEMORY_DISK.is_dir() else {"disk": None}
    for kind, place in places.items():
        with tempfile.TemporaryDirectory(prefix="gpuxent-bench-", dir=place) as folder:
            path = Path(folder) / "run"
            agree(f"a run directory on {kind}", _with_directory(job, path), expected)
            times = rounds({"run": lambda path=path: _with_directory(job, path)}, timing)["run"]
        what = f"a block of {ROWS} rows, run directory on {kind}"
        beside = {"by CPU time": 1e3 * times.cpu / blocks, "by median": 1e3 * times.median / blocks}
        yield Figure("overhead", what, 1e3 * times.best / blocks, "ms", Target(2, at_most=True), beside)


def _with_directory(job: Job, path: Path) -> Summary:
    """Begun anew; the folder is opened, and its tokens go to Parquet, on the clock."""
    shutil.rmtree(path, ignore_errors=True)
    job = replace(job, keep_tokens=True)
    with RunDirectory(path, fingerprint(job.sources, job.options), job.rows) as run:
        return drive(job, ROWS, run)


def memory(plain: int, with_documents: int, in_directory: int) -> Iterator[Figure]:
    """Resident memory as blocks go by, each time in a new process. It has to be constant; documents take room."""
    cases = {
        f"{plain:,} blocks": (plain, False, False),
        f"{with_documents:,} blocks with document ids": (with_documents, True, False),
        f"{in_directory:,} blocks into a run directory": (in_directory, False, True),
    }
    for what, (blocks, documents, directory) in cases.items():
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            seen = pool.submit(watched, blocks, documents, directory).result()
        enough = PART_TOKENS / ROWS if directory else 0  # to have written a file of tokens, which takes some room
        early, _, before = next((at for at in seen[:-1] if at[0] > enough), seen[0])
        last, seconds, after = seen[-1]
        beside: dict[str, object] = {f"MB at {count:,}": round(size / 1e6, 1) for count, _, size in seen}
        beside["ms/block"] = 1e3 * (seconds - seen[-2][1]) / (last - seen[-2][0])
        growth = (after - before) / 1e6
        if documents:
            number = (last - early) * ROWS // 8
            beside |= {"documents": number, "bytes/document": (after - before) / number}
        yield Figure(
            "memory",
            what,
            growth,
            f"MB more than at {early:,}",
            None if documents else Target(GROWTH, at_most=True),
            beside,
        )


def watched(blocks: int, documents: bool, directory: bool) -> list[tuple[int, float, int]]:
    """(blocks, seconds, bytes of resident memory) at 1, 3, 10, 30, ... thousand, or hundred if there are few."""
    at = {n * 10**k for k in range(2 if blocks < 10**4 else 3, 9) for n in (1, 3) if n * 10**k < blocks} | {blocks}
    job, seen, count, started = tiny_job(blocks, ROWS, documents=documents), [], 0, perf_counter()

    def watch(rows: int, summary: Summary) -> None:
        nonlocal count
        count += rows > 0
        if count in at:
            at.discard(count)
            gc.collect()
            seen.append((count, perf_counter() - started, resident()))

    if directory:
        with tempfile.TemporaryDirectory(prefix="gpuxent-bench-") as folder:
            kept = replace(job, keep_tokens=True)
            with RunDirectory(Path(folder) / "run", {}, job.rows) as run:
                summary = drive(kept, ROWS, run, watch)
    else:
        summary = drive(job, ROWS, watch=watch)
    if summary.totals.scored != job.rows:
        raise WrongResult(f"{summary.totals.scored:,} of {job.rows:,} rows are in the result")
    return seen


def resident() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} does not say how much memory this process has")
    return 1024 * int(found[1])
