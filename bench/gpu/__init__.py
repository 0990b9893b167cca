"""Measuring on a CUDA GPU through CuPy."""

from __future__ import annotations

from bench.devices import Device


def gpu() -> Device:
    """RuntimeError: no GPU can be used, and why."""
    check()
    from bench.gpu import limits, machine, memory, problems, rivals, timing
    from bench.gpu.cases import CASES, QUICK
    from bench.timing import Plan

    return Device(
        cases=CASES,
        quick=QUICK,
        plan=Plan(seconds=0.8, least=5, most=30),
        quick_plan=Plan(seconds=0.3, least=3, most=10),
        make=problems.make,
        limits=limits.limits,
        contenders=rivals.CONTENDERS,
        turn=timing.turn,
        busy_turn=timing.busy_turn,
        wait=timing.wait,
        peak_growth=memory.peak_growth,
        forget=memory.forget,
        describe=machine.describe,
        results=machine.results,
    )


def check() -> None:
    """RuntimeError: no GPU can be used, and why."""
    try:
        import cupy

        found = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise RuntimeError(f"a GPU is measured through CuPy, which cannot be imported ({error})") from error
    except Exception as error:  # what CuPy raises here is one of its own kinds
        raise RuntimeError(f"there is no GPU to measure ({error})") from error
    if found == 0:
        raise RuntimeError("there is no GPU to measure")
