"""What a process that is killed does: adds blocks to a run. The numbers of a row depend on nothing but the row."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpuxent.evaluation.runs import directory as run
from gpuxent.evaluation.runs import ledger, token_parts, token_record
from gpuxent.evaluation.runs.directory import RunDirectory
from gpuxent.evaluation.statistics.summary import Summary
from gpuxent.evaluation.statistics.tokens import BlockResult, Tokens

WHAT = {
    "format": 1,
    "gpuxent": "0.5",
    "sources": {
        "logits": {
            "name": "/data/logits.npy",
            "files": 1,
            "bytes": 4096,
            "sha256": "5eaf",
            "shape": [30000, 50],
            "dtype": "float32",
        },
        "documents": None,
    },
    "options": {"temperature": 1.0, "topk": [1, 5]},
}
MACHINE = "numpy on x86_64 AVX2"
WHERE_FILES_CHANGE = {
    function.__code__
    for function in (
        ledger._lock,
        ledger.Ledger.begin,
        ledger.Ledger.replace,
        ledger.Ledger.close,
        run._make_folder,
        token_parts.write_part,
        token_parts.sync_folder,
        token_record.TokenRecord.tidy,
        token_record.TokenRecord._write,
        RunDirectory.write_result,
    )
}


def tokens_of(first: int, stop: int) -> Tokens:
    """Two of three rows are scored, with losses of many magnitudes; one is infinite, one is NaN."""
    row = np.arange(first, stop, dtype=np.int64)
    row = row[row % 3 != 1]
    noise = (row * 2654435761 % 2**32) / 2**32
    nll = noise**9 * 30
    nll[row == 77], nll[row == 200] = np.inf, np.nan
    return Tokens(
        row=row,
        label=row * 40503 % 50257,
        position=row % 100,
        nll=nll,
        entropy=np.sqrt(noise),
        p_max=np.exp(-noise),
        rank=(row * 69069 % 2**16) // 2**12,
        document=row // 100,
    )


def result_of(first: int, stop: int, computed_by: str = MACHINE) -> BlockResult:
    tokens = tokens_of(first, stop)
    return BlockResult(first, stop - first, Summary.of(tokens, stop - first - len(tokens)), tokens, computed_by)


def work(folder: Path, rows: int, seed: int, part_tokens: int, die_at: int = 0) -> None:
    """Goes on with the run until it is done: blocks of other sizes each time, some not in order. With `die_at` it is
    dead at that one of the calls that make and change files, or their returns."""
    token_record.PART_TOKENS = part_tokens
    rng = random.Random(seed)
    if die_at:
        _kill_self_at(die_at)
    with RunDirectory(folder, WHAT, rows, resume=True) as directory, open(f"{folder}.log", "a", buffering=1) as log:
        for block in _shuffled_a_bit(list(_blocks(directory.finished, rows, rng)), rng):
            directory.add(result_of(block.start, block.stop))
            log.write(f"{block.start} {block.stop}\n")  # from here on it must not be lost
        directory.write_result({"rows": directory.finished_rows})


def _blocks(finished, rows, rng):
    starts = [0, *(done.stop for done in finished)]
    ends = [*(done.start for done in finished), rows]
    size = rng.randrange(10, 60)
    for start, end in zip(starts, ends, strict=True):
        for first in range(start, end, size):
            yield range(first, min(first + size, end))


def _shuffled_a_bit(blocks, rng):
    return [block for _, block in sorted((i + rng.uniform(0, 5), block) for i, block in enumerate(blocks))]


def _kill_self_at(count):
    seen = 0

    def profile(frame, event, argument):
        nonlocal seen
        seen += frame.f_code in WHERE_FILES_CHANGE
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def hold(folder: Path, ready, leave) -> None:
    """Has the run open from `ready` until `leave`."""
    with RunDirectory(folder, WHAT, 100, resume=True):
        ready.set()
        leave.wait()


def work_limited(folder: Path, rows: int, limited: str) -> None:
    """`work`, with files that may not grow: the ledger's, or those of tokens. Leaves the error in a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write_part = token_parts.write_part
    try:
        if limited == "ledger":
            with _files_of_at_most(400_000):
                work(folder, rows, 0, 10**6)
        else:
            token_parts.write_part = lambda *args: _limited(write_part, *args)
            work(folder, rows, 0, 6000)
    except OSError as error:
        Path(f"{folder}.error").write_text(str(error))


def _limited(function, *args):
    with _files_of_at_most(10_000):
        return function(*args)


@contextmanager
def _files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def add_many(folder: Path, blocks: int, memory) -> None:
    """Tiny blocks, every other one first; leaves the memory (kB) after a tenth and at the end."""
    block, text = result_of(0, 1), result_of(0, 1).summary.to_json()

    class Same:
        to_json = staticmethod(lambda: text)

    with RunDirectory(folder, WHAT, blocks, tokens=False) as directory:
        for i in range(blocks):
            first = 2 * i if 2 * i < blocks else 2 * i - blocks + 1
            directory.add(replace(block, first=first, summary=Same))
            if i in (blocks // 10, blocks - 1):
                memory[i == blocks - 1] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert directory.finished == [range(blocks)]
