"""How much of the GPU's memory a call takes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import cupy

from bench.gpu.timing import wait
from bench.torch_rivals import forget_compiled


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes that libraries take from the device while the call runs, its result included.

    They take them in pieces of up to some MB, and give none back before they are asked to.
    """
    give_back()
    before = free_bytes()
    call()
    wait()
    return max(0, before - free_bytes())


def give_back() -> None:
    wait()
    cupy.get_default_memory_pool().free_all_blocks()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget() -> None:
    """What the last case has left behind."""
    forget_compiled()
    give_back()


def free_bytes() -> int:
    return int(cupy.cuda.Device().mem_info[0])
