"""The turn of one contender on a CPU, where a call returns when its work is done."""

from __future__ import annotations

from statistics import median
from time import perf_counter

from bench.timing import Timed

TURN_SECONDS = 0.02


def turn(timed: Timed) -> float:
    """The median of as many calls as fit in TURN_SECONDS, at least one.

    One call comes first, off the clock, so that what the contender before has left behind does not count: its data in
    the caches, its threads (of compiled PyTorch) that spin for 5 ms on the cores, and freed memory that a virtual
    machine has given back, which makes fresh pages three times as dear. A result is freed off the clock, too.
    """
    timed.before()
    timed.call()
    times: list[float] = []
    started = perf_counter()
    while not times or perf_counter() - started < TURN_SECONDS:
        timed.before()
        start = perf_counter()
        result = timed.call()
        times.append(perf_counter() - start)
        del result
    return median(times)
