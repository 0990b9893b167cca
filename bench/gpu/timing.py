"""The turn of one contender on a GPU, where a call returns before its work is done: CUDA events time it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import cupy
import numpy as np

from bench.gpu.limits import kernel
from bench.timing import Timed

SPARE_SECONDS, LONGEST_SECONDS = 1e-3, 50e-3


def turn(timed: Timed) -> float:
    """Seconds of one call, where one follows another: the device's work, or asking for it where that takes longer."""
    timed.before()
    wait()
    return _seconds(timed)


def busy_turn(timed: Timed) -> float:
    """Seconds of one call of the device's work alone: it is kept busy until all calls are queued.

    A contender that waits for the device in the middle of a call is not spared its gaps.
    """
    timed.before()
    wait()
    started = perf_counter()
    _call(timed)
    to_ask = perf_counter() - started
    timed.before()
    wait()
    hold(min(2 * to_ask + SPARE_SECONDS, LONGEST_SECONDS))
    return _seconds(timed)


def _seconds(timed: Timed) -> float:
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    _call(timed)
    end.record()
    end.synchronize()
    return elapsed(start, end) / timed.calls


def _call(timed: Timed) -> None:
    for _ in range(timed.calls):
        timed.call()


def elapsed(start: Any, end: Any) -> float:
    return cupy.cuda.get_elapsed_time(start, end) / 1e3


def hold(seconds: float) -> None:
    kernel("hold")((1,), (1,), (np.uint64(seconds * 1e9),))


wait: Callable[[], None] = cupy.cuda.runtime.deviceSynchronize
