"""Measuring on the CPU."""

from __future__ import annotations

from bench import problems
from bench.cases import LIMIT
from bench.cpu import limits, machine, rivals
from bench.cpu.cases import CASES, QUICK
from bench.cpu.memory import peak_growth
from bench.cpu.timing import turn
from bench.devices import Device
from bench.timing import Plan, Timed, nothing

CPU = Device(
    cases=CASES,
    quick=QUICK,
    plan=Plan(seconds=8, least=5, most=30),
    quick_plan=Plan(seconds=1, least=3, most=10),
    make=lambda case: [problems.make(case)],
    limits=lambda problems: {LIMIT: Timed(limits.limit_of(problems[0]))},
    contenders=rivals.CONTENDERS,
    turn=turn,
    busy_turn=None,
    wait=nothing,
    peak_growth=peak_growth,
    forget=rivals.forget_compiled,
    describe=machine.describe,
    results=lambda: "cpu",
)
