"""Interleaved timing: whatever slows the machine down for a while slows every contender."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Timed:
    """What is timed, and what has to be done off the clock before so many calls of it."""

    call: Callable[[], Any]
    before: Callable[[], None] = nothing
    calls: int = 1


Turn = Callable[[Timed], float]  # seconds of one call


@dataclass(frozen=True)
class Plan:
    """Rounds go on until `seconds` have passed, but there are at least `least` and at most `most`."""

    seconds: float
    least: int
    most: int


class Spread(NamedTuple):
    """Seconds of one call: quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    contenders: Mapping[str, Timed],
    plan: Plan,
    turn: Turn,
    seed: int = 0,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, Spread]:
    """Every contender has one turn a round, in an order that is drawn anew for each: none always follows another."""
    rng = np.random.default_rng(seed)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    started, rounds = perf_counter(), 0
    with _no_garbage_collection():
        while rounds < plan.least or (rounds < plan.most and perf_counter() - started < plan.seconds):
            for name in rng.permutation(names):
                tick(name)
                times[name].append(turn(contenders[name]))
            rounds += 1
    return {name: spread(of_rounds) for name, of_rounds in times.items()}


def spread(times: list[float]) -> Spread:
    low, middle, high = np.percentile(times, (25, 50, 75))
    return Spread(float(middle), float(low), float(high), len(times))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
