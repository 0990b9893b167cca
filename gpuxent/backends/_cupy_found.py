"""Whether CuPy is there, new enough and has a device; and what the devices are. CuPy is imported when that is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

OLDEST = (14, 0, 1)
EXCLUDED = (14, 1, 0)  # imports pytest
INSTALL = "pip install 'gpuxent[cuda13]', or 'gpuxent[cuda12]' for an older driver"


def cupy() -> Any:
    """The module, ready to compute; ModuleNotFoundError or RuntimeError with one sentence otherwise."""
    error = trouble()
    if error is not None:
        raise type(error)(*error.args)  # a new one: each keeps the traceback of where it was raised
    return import_module("cupy")


@cache
def trouble() -> Exception | None:
    """Why CuPy cannot compute here, if it cannot. Found out once per process: on some machines it takes seconds."""
    try:
        module = import_module("cupy")
    except ImportError as error:
        if error.name == "cupy":
            return ModuleNotFoundError(f"the GPU needs CuPy, which is not installed: {INSTALL}")
        reason = [line.strip() for line in str(error).split("\n") if line.strip(" =")][-1:]  # below CuPy's own advice
        return RuntimeError(f"CuPy is installed but cannot be imported: {''.join(reason)}")
    found = tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:3])
    if found < OLDEST or found == EXCLUDED:
        needed = f"{_dotted(OLDEST)} or later, but not {_dotted(EXCLUDED)}"
        return RuntimeError(f"the installed CuPy {module.__version__} will not do: gpuxent needs {needed}")
    return _device_trouble(module.cuda.runtime) or _compiler_trouble(module)


def _device_trouble(runtime: Any) -> Exception | None:
    try:
        if runtime.getDeviceCount() > 0:
            return None
        reason = "it finds none"
    except RuntimeError as error:  # CUDARuntimeError
        reason = str(error)
    driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        return RuntimeError("the GPU needs NVIDIA's driver, and there is none")
    if driver // 1000 < needed // 1000:
        versions = f"of CUDA {_version_text(driver)}, and the installed CuPy is for CUDA {needed // 1000}"
        return RuntimeError(f"NVIDIA's driver is {versions}: update the driver, or pip install 'gpuxent[cuda12]'")
    return RuntimeError(f"CuPy has no CUDA device to use: {reason}")


def _compiler_trouble(module: Any) -> Exception | None:
    if _nvrtc(module) is not None:
        return None
    return RuntimeError(f"CuPy does not find NVRTC, which compiles the kernels: {INSTALL}")


def _nvrtc(module: Any) -> str | None:
    try:
        return ".".join(map(str, module.cuda.nvrtc.getVersion()))
    except RuntimeError:
        return None


def versions() -> dict[str, str | None]:
    """Of CuPy, of CUDA as the driver and as CuPy have it, and of NVRTC; None for what there is not."""
    try:
        module = import_module("cupy")
    except ImportError:
        return dict.fromkeys(("cupy", "driver", "runtime", "nvrtc"))
    driver, runtime = module.cuda.runtime.driverGetVersion(), module.cuda.runtime.runtimeGetVersion()
    return {
        "cupy": module.__version__,
        "driver": _version_text(driver) if driver else None,
        "runtime": _version_text(runtime),
        "nvrtc": _nvrtc(module),
    }


@dataclass(frozen=True)
class Device:
    """A GPU, as its driver describes it; memory in bytes, bandwidth in bytes per second (None: not known)."""

    number: int
    name: str
    compute_capability: str
    memory_free: int
    memory_total: int
    multiprocessors: int
    l2_cache: int
    shared_memory_per_block: int
    bandwidth: float | None


def devices() -> list[Device]:
    """All that this process may use."""
    module = cupy()
    return [_device(module, number) for number in range(module.cuda.runtime.getDeviceCount())]


def _device(module: Any, number: int) -> Device:
    name = module.cuda.runtime.getDeviceProperties(number)["name"]
    device = module.cuda.Device(number)
    (free, total), attributes = device.mem_info, device.attributes
    # two transfers per clock, which is in kHz; the bus is in bits. CUDA 13 took the clock out of the properties.
    bandwidth = 2e3 * attributes.get("MemoryClockRate", 0) * attributes.get("GlobalMemoryBusWidth", 0) / 8
    return Device(
        number=number,
        name=name.decode() if isinstance(name, bytes) else name,
        compute_capability=f"{device.compute_capability[:-1]}.{device.compute_capability[-1]}",
        memory_free=free,
        memory_total=total,
        multiprocessors=attributes["MultiProcessorCount"],
        l2_cache=attributes["L2CacheSize"],
        shared_memory_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
        bandwidth=bandwidth or None,
    )


def _version_text(number: int) -> str:
    """13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
