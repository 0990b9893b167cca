"""What `gpuxent info` shows: versions, the GPUs, and which backend which arrays go to."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table
from rich.text import Text

from gpuxent import __version__
from gpuxent.backends import _cupy_found, has_numba
from gpuxent.backends._threads import thread_count

PACKAGES = ("numpy", "numba", "ml_dtypes", "dask", "distributed", "zarr", "h5py", "pyarrow")


def facts() -> dict[str, Any]:
    """For JSON: None for what there is not."""
    in_memory = "numba" if has_numba() else "numpy"
    cuda = _cuda()
    return {
        "gpuxent": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {package: installed(package) for package in PACKAGES},
        "cuda": cuda,
        "threads": thread_count(),
        "backends": {"numpy": in_memory, "cupy": None if cuda["problem"] else "cupy"},
    }


def _cuda() -> dict[str, Any]:
    error, devices = _cupy_found.trouble(), []
    if error is None:
        try:
            devices = [asdict(device) for device in _cupy_found.devices()]
        except RuntimeError as found:  # a GPU that fails
            error = found
    return {**_cupy_found.versions(), "problem": None if error is None else str(error), "devices": devices}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def to_table(facts: dict[str, Any]) -> Table:
    table = Table(title=f"gpuxent {facts['gpuxent']}", title_justify="left")
    table.add_column("what")
    table.add_column("version or state")
    cuda = facts["cuda"]
    rows = [("Python", f"{facts['python']} on {facts['system']}")]
    rows += [(package, found or "not installed") for package, found in facts["packages"].items()]
    rows += [
        ("CuPy", cuda["cupy"] or "not installed"),
        ("CUDA driver", cuda["driver"] or "not found"),
        ("CUDA runtime, in CuPy", cuda["runtime"] or "not found"),
        ("NVRTC", cuda["nvrtc"] or "not found"),
    ]
    for device in cuda["devices"]:
        rows += _device_rows(device)
    for row in rows + _backend_rows(facts):
        table.add_row(*map(Text, row))  # in which [cpu] is no style
    return table


def _device_rows(device: dict[str, Any]) -> list[tuple[str, str]]:
    free, total, bandwidth = device["memory_free"], device["memory_total"], device["bandwidth"]
    return [
        (f"GPU {device['number']}", f"{device['name']}, compute capability {device['compute_capability']}"),
        ("  memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"),
        ("  bandwidth by specification", "unknown" if bandwidth is None else f"{bandwidth / 1e12:.2f} TB/s"),
        ("  multiprocessors", str(device["multiprocessors"])),
        ("  L2 cache", f"{device['l2_cache'] / 2**20:.0f} MiB"),
        ("  shared memory per block", f"{device['shared_memory_per_block'] / 2**10:.0f} KiB"),
    ]


def _backend_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    used = f"found, used for NumPy arrays ({facts['threads']} threads)"
    numba = facts["backends"]["numpy"] == "numba"
    return [
        ("backend numba", used if numba else "not installed: pip install 'gpuxent[cpu]' for several times the speed"),
        ("backend numpy", "found, used by name only" if numba else used),
        ("backend cupy", facts["cuda"]["problem"] or "found, used for CuPy arrays, and for NumPy arrays by name"),
        ("backend dask", "found, used for Dask arrays: each block goes to the backend of its kind"),
    ]
