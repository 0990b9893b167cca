"""CUDA on the CPU: a module `cupy` whose kernels g++ compiles and fibers run.

    from emulation import install, schedule, Fault
    install()
    import cupy

The .cu files are the ones that NVRTC gets. What a GPU lets pass or answers with a wrong number, such as a thread that
misses a barrier, is a `Fault` here. How threads take turns is a choice, so that order that nothing enforces shows.
"""

import sys
from collections.abc import Callable
from typing import Any

alignment = 256  # where arrays begin, as CUDA has it; with 16, reads behind an array are found to within 15 bytes
seconds = 120  # of CPU time, after which a launch is given up

ORDERS = ("forward", "backward", "shuffled")


class schedule:
    """In which order blocks, warps and lanes take turns. As a function, or `with schedule(...):`."""

    order, seed = "forward", 0  # what holds

    def __init__(self, order: str, seed: int = 0):
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        self._before = schedule.order, schedule.seed
        schedule.order, schedule.seed = order, seed

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        schedule.order, schedule.seed = self._before


def start(function: Any, grid: Any, block: Any, cells: list, shared_bytes: int) -> None:
    function.launch(grid, block, cells, shared_bytes, ORDERS.index(schedule.order), schedule.seed, seconds)


from .arrays import check_canaries  # noqa: E402 - these look at the names above
from .compiler import Fault  # noqa: E402
from .module import Device, module  # noqa: E402

__all__ = ["Device", "Fault", "alignment", "check_canaries", "install", "module", "schedule", "seconds"]


def install() -> Callable[[], None]:
    """Puts `cupy` into sys.modules; gives back what undoes it. A real CuPy gives way if it has no GPU."""
    real = {name: value for name, value in sys.modules.items() if name.partition(".")[0] == "cupy"}
    ours = module.submodules()
    if real == ours:
        return lambda: None
    if real and _has_gpu(real["cupy"]):
        raise RuntimeError("a real CuPy with a GPU is imported already")
    for name in real:
        del sys.modules[name]
    sys.modules.update(ours)

    def undo() -> None:
        for name in ours:
            sys.modules.pop(name, None)
        sys.modules.update(real)

    return undo


def _has_gpu(cupy: Any) -> bool:
    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except RuntimeError:
        return False
