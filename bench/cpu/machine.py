"""Which CPU this is."""

from __future__ import annotations

import platform
from pathlib import Path

from bench.machine import CORES


def describe() -> dict[str, object]:
    return {
        "model": _model(),
        "cores": CORES,
        "caches": _caches(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _model() -> str:
    """ "AMD EPYC (family 25, model 17)": a cloud's name alone says little. Outside Linux what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields and "model" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name


def _caches() -> dict[str, str]:
    """Size by level, of one core's view: {"L1d": "32K", "L2": "1024K", "L3": "32768K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return found
