"""Where and with what a run was made."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.limits import CORES

ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "numba", "ml_dtypes", "torch", "jax", "jaxlib", "optax", "scipy", "scikit-learn")


def describe_cpu() -> dict[str, object]:
    return {
        "model": _cpu_model(),
        "cores": CORES,
        "caches": _caches(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, object]:
    """The commit of this checkout, and whether files differ from it; empty outside of git."""
    try:
        return {"id": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_model() -> str:
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
