"""What the machine can do at best with a case's arrays: read every byte, or read and write every byte, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from bench.cases import TASKS
from bench.machine import CORES
from bench.problems import Problem

SMALLEST_PIECE = 1 << 20  # bytes; below that, waking a thread costs more than it saves

_pool = ThreadPoolExecutor(CORES)


def limit_of(problem: Problem) -> Callable[[], object]:
    """The call that moves what the problem's task has to move, and computes nothing worth the name."""
    case = problem.case
    if TASKS[case.task].limit == "copy":
        target = problem.scratch
        return lambda: parallel_copy(problem.logits, target)
    arrays = [problem.logits, problem.labels][: TASKS[case.task].read]
    return lambda: [parallel_sum(array) for array in arrays]


def parallel_sum(array: np.ndarray) -> int:
    """The sum of the array's bytes as uint64 words, modulo 2**64 (fewer than 8 bytes at the end are left out).

    NumPy adds integers with vector instructions and without the GIL, as fast as the memory delivers.
    """
    words = array.reshape(-1).view(np.uint8)[: array.nbytes // 8 * 8].view(np.uint64)
    sums: list[np.uint64] = []
    _in_parallel(lambda piece: sums.append(np.add.reduce(words[piece])), _pieces(words))
    return int(np.sum(sums, dtype=np.uint64))


def parallel_copy(source: np.ndarray, target: np.ndarray) -> None:
    source, target = source.reshape(-1), target.reshape(-1)
    _in_parallel(lambda piece: np.copyto(target[piece], source[piece]), _pieces(source))


def _pieces(flat: np.ndarray) -> list[slice]:
    count = max(1, min(4 * CORES, flat.nbytes // SMALLEST_PIECE))  # more than cores: a slow core gets fewer of them
    edges = [len(flat) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _in_parallel(work: Callable[[slice], object], pieces: Iterable[slice]) -> None:
    """The calling thread works too: nobody waits for a thread to wake up where there is one piece."""
    pieces = list(pieces)
    pending = iter(pieces)  # a list iterator hands out each piece once, from any thread

    def drain() -> None:
        for piece in pending:
            work(piece)

    helpers = [_pool.submit(drain) for _ in range(min(CORES, len(pieces)) - 1)]
    drain()
    for helper in helpers:
        helper.result()
