"""What a device has to offer so that cases can be measured on it: `bench/cpu` and `bench/gpu` each say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cases import Case
from bench.contenders import Prepare
from bench.problems import Problem
from bench.timing import Plan, Timed, Turn


@dataclass(frozen=True)
class Device:
    cases: tuple[Case, ...]
    quick: tuple[Case, ...]
    plan: Plan
    quick_plan: Plan
    # The data of a case, once or several times in different places, for calls that take turns.
    make: Callable[[Case], Sequence[Problem]]
    # What the device can do at best with these data: LIMIT, and what else is worth knowing, by name.
    limits: Callable[[Sequence[Problem]], Mapping[str, Timed]]
    contenders: Mapping[str, Mapping[str, Prepare]]
    turn: Turn
    # Seconds of one call for which the device itself is at work; None where a call does nothing else.
    busy_turn: Turn | None
    wait: Callable[[], None]  # until what was asked for is done
    peak_growth: Callable[[Callable[[], object]], int | None]  # of memory in bytes, while the call runs
    forget: Callable[[], None]  # what the last case has left behind
    describe: Callable[[], Mapping[str, Any]]
    results: Callable[[], str]  # the name of the file of results, without a suffix


def device(name: str) -> Device:
    """RuntimeError: there is none, and why."""
    if name == "gpu":
        from bench.gpu import gpu

        return gpu()
    from bench.cpu import CPU

    return CPU
