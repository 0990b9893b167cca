"""Which GPU this is."""

from __future__ import annotations

import platform
import re
import subprocess
from typing import Any

import cupy


def describe() -> dict[str, Any]:
    device = cupy.cuda.Device()
    return {
        "model": name(),
        "compute capability": ".".join(re.findall(r"(\d+)(\d)", device.compute_capability)[0]),
        "multiprocessors": int(device.attributes["MultiProcessorCount"]),
        "memory": f"{device.mem_info[1] / 2**30:.0f} GiB",
        "caches": {"L2": f"{int(device.attributes['L2CacheSize']) >> 20}M"},
        "driver": driver(),
        "CUDA": f"{_version(cupy.cuda.runtime.runtimeGetVersion())}, the driver's {_version(_of_driver())}",
        "system": f"{platform.system()} {platform.machine()}",
    }


def results() -> str:
    """ "gpu-nvidia-h200": results of several devices lie side by side."""
    return f"gpu-{re.sub('[^a-z0-9]+', '-', name().lower()).strip('-')}"


def name() -> str:
    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def driver() -> str:
    """As nvidia-smi says it; CUDA itself knows only which CUDA it serves."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _of_driver() -> int:
    return int(cupy.cuda.runtime.driverGetVersion())


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
