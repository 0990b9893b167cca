"""What the GPU can do at best with a case's bytes: read them, or copy half of them to another place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from bench.cases import COPY, LIMIT, TASKS, Case
from bench.contenders import MOST_CALLS
from bench.gpu.problems import Place
from bench.timing import Timed

THREADS, BLOCKS_PER_MULTIPROCESSOR, TOTALS = 256, 8, 256


def limits(places: Sequence[Place]) -> dict[str, Timed]:
    """Each call moves other bytes than the one before, as many as the task has to."""
    case, data = places[0].case, places[0].pool.reshape(-1).view(np.uint8)
    calls = min(len(places), MOST_CALLS)
    copying = Timed(copies(case, data), calls=calls)
    if TASKS[case.task].limit == "copy":
        return {LIMIT: copying}
    return {LIMIT: Timed(reads(case, data), calls=calls), COPY: copying}


def reads(case: Case, data: Any) -> Callable[[], None]:
    totals = cupy.zeros(TOTALS, np.uint32)
    windows = _windows(case.traffic, data)
    return lambda: add_words(next(windows), totals)


def copies(case: Case, data: Any) -> Callable[[], None]:
    target = cupy.empty_like(data)
    windows, targets = _windows(case.traffic // 2, data), _windows(case.traffic // 2, target)
    return lambda: cupy.copyto(next(targets), next(windows))


def add_words(data: Any, totals: Any) -> None:
    """Adds the sum of the 32-bit words of `data`, in TOTALS parts and modulo 2**32, to `totals`; `data` begins and ends
    at 16 bytes."""
    vectors = data.nbytes // 16
    blocks = min(-(-vectors // THREADS), BLOCKS_PER_MULTIPROCESSOR * multiprocessors())
    kernel("read_all")((blocks,), (THREADS,), (data, np.int64(vectors), totals))


@cache
def kernel(name: str) -> Any:
    """Read where it is needed: CuPy compiles for the device at hand, and keeps the result on disk."""
    return cupy.RawKernel((Path(__file__).parent / "kernels.cu").read_text(encoding="utf-8"), name)


@cache
def multiprocessors() -> int:
    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def _windows(size: int, data: Any) -> Iterator[Any]:
    """Pieces of so many bytes (less what exceeds a multiple of 16), one after another and round again."""
    size = min(size // 16 * 16, data.nbytes // 16 * 16)
    pieces = max(1, data.nbytes // size)
    return (data[i % pieces * size : (i % pieces + 1) * size] for i in count())
