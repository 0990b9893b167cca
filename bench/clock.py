"""Interleaved rounds on a machine that others use too: the best round counts, and how busy the others were is told."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from bench.timing import Plan

STAT = Path("/proc/stat")
CLEAR_REST = (3, 4)  # of its columns: idle, and waiting for a disk


@dataclass(frozen=True)
class Times:
    """Seconds of one pass. `cpu` is that of this process, on all its threads, and hardly depends on what others do."""

    best: float
    median: float
    cpu: float  # the least
    rounds: int
    others: float | None  # cores that other processes kept busy in the median round; None where nobody knows


def rounds(contenders: Mapping[str, Callable[[], Any]], plan: Plan, seed: int = 0) -> dict[str, Times]:
    """Every contender has one pass a round, in an order that is drawn anew for each."""
    rng, names = np.random.default_rng(seed), list(contenders)
    passes: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    gc.collect()
    started, done = perf_counter(), 0
    while done < plan.least or (done < plan.most and perf_counter() - started < plan.seconds):
        for name in rng.permutation(names):
            passes[name].append(_pass(contenders[name]))
        done += 1
    return {name: _times(found) for name, found in passes.items()}


def _pass(call: Callable[[], Any]) -> tuple[float, float, float]:
    """(seconds, CPU seconds of this process, those of all other processes)."""
    busy, own, start = _busy(), process_time(), perf_counter()
    result = call()
    seconds, own = perf_counter() - start, process_time() - own
    others = _busy() - busy - own
    del result
    return seconds, own, max(0.0, others) if busy == busy else busy


def _times(passes: list[tuple[float, float, float]]) -> Times:
    seconds, own, others = np.array(passes).T
    share = float(np.median(others / seconds))
    return Times(
        float(seconds.min()),
        float(np.median(seconds)),
        float(own.min()),
        len(passes),
        None if np.isnan(share) else share,
    )


def _busy() -> float:
    """Seconds for which the cores of this machine have been at work, or were taken from it; NaN outside Linux."""
    try:
        columns = STAT.read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return float("nan")
    ticks = sum(int(count) for place, count in enumerate(columns) if place not in CLEAR_REST)
    return ticks / os.sysconf("SC_CLK_TCK")
