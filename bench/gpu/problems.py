"""The data of a case on the GPU: the same arrays several times, so that no call finds its own in the L2 cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from bench import problems
from bench.cases import Case
from bench.problems import Problem

L2_TIMES = 4  # arrays that take turns make up so many times the L2 cache
MOST = 1024  # of them

# Rows that differ; the others repeat them. The oracle takes some 30 ns for each of their logits.
DISTINCT_ROWS, DISTINCT_LOGITS = 4096, 1 << 23


@dataclass(frozen=True)
class Place(Problem):
    """`pool`: the logits of all places, (places, rows, vocab)."""

    pool: Any


def make(case: Case) -> list[Place]:
    """The problem in as many places as it takes, at least two."""
    task = case.task if case.task in ("soft", "binary", "pairs") else "loss"  # the others have the same data
    return [replace(place, case=case) for place in _places(task, case.dtype, case.rows, case.vocab)]


@lru_cache(maxsize=1)  # cases that follow one another share them
def _places(task: str, dtype: str, rows: int, vocab: int) -> list[Place]:
    case = Case(task, dtype, rows, vocab)
    distinct = min(rows, DISTINCT_ROWS, max(1, DISTINCT_LOGITS // vocab))
    host = problems.make(replace(case, rows=distinct)).host
    count = min(MOST, max(2, -(-L2_TIMES * l2_bytes() // case.logits_bytes)))
    pool, labels = (_repeated(array, count, rows) for array in host)
    return [Place(case, pool[i], labels[i], host, pool) for i in range(count)]


def _repeated(array: np.ndarray, count: int, rows: int) -> Any:
    """(count, rows, ...): the host's rows in turn, `count` times."""
    made = cupy.empty((count, rows, *array.shape[1:]), array.dtype)
    given = cupy.asarray(array)
    for start in range(0, rows, len(array)):
        part = made[0, start : start + len(array)]
        cupy.copyto(part, given[: len(part)])
    for i in range(1, count):
        cupy.copyto(made[i], made[0])
    return made


def l2_bytes() -> int:
    return int(cupy.cuda.Device().attributes["L2CacheSize"])
