"""What a run depends on: its inputs and options, and the kind of machine that computes. Resuming compares them."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import gpuxent
from gpuxent.backends import NAMES, _cupy_found, has_numba, is_dask, on_host
from gpuxent.evaluation.sources import FileStamp, Source

FORMAT = 1
HASHED_AT_ONCE = 32 * 2**20  # bytes of an array in memory; those of a GPU are copied


def fingerprint(sources: dict[str, Source | None], options: dict[str, Any]) -> dict[str, Any]:
    """What the result of a run depends on, ready for JSON; None for sources that there are not.

    Of files it holds names, sizes and times of change, of arrays in memory a hash of their content, of arrays of Dask
    their name, which is a hash of how they are made.
    """
    return {
        "format": FORMAT,
        "gpuxent": gpuxent.__version__,
        "sources": {name: None if source is None else _of_source(source) for name, source in sources.items()},
        "options": {name: _plain(value, name) for name, value in options.items()},
    }


def _of_source(source: Source) -> dict[str, Any]:
    files = source.files()
    return {
        "name": os.path.abspath(source.name) if files else source.name,
        "files": len(files),
        "bytes": sum(file.size for file in files) if files else _bytes_in_memory(source),
        "sha256": _digest_of_files(files) if files else _digest_in_memory(source),
        "shape": list(source.shape),
        "dtype": source.dtype.name,
    }


def _digest_of_files(files: list[FileStamp]) -> str:
    paths = [os.path.abspath(file.path) for file in files]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    found = hashlib.sha256()
    for path, file in sorted(zip(paths, files, strict=True), key=lambda pair: pair[0]):
        relative = Path(path).relative_to(folder).as_posix()
        found.update(f"{relative}\0{file.size}\0{file.mtime_ns}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def _bytes_in_memory(source: Source) -> int:
    return math.prod(source.shape) * source.dtype.itemsize


def _digest_in_memory(source: Source) -> str:
    array: Any = getattr(source, "array", None)
    if is_dask(array):
        return f"dask {array.name}"
    found = hashlib.sha256()
    for block in _blocks(source):
        found.update(np.ascontiguousarray(on_host(block)).view(np.uint8).data)
    return found.hexdigest()


def _blocks(source: Source) -> Iterator[Any]:
    """All of an array in C order; a few megabytes at a time, and more only where a row has more."""
    *lead, row = source.shape if len(source.shape) > 1 else (*source.shape, 1)
    columns = slice(0, row) if len(source.shape) > 1 else None
    rows = math.prod(lead)
    step = max(1, HASHED_AT_ONCE // max(1, row * source.dtype.itemsize))
    for first in range(0, rows if row else 0, step):
        yield source.read(slice(first, min(first + step, rows)), columns)


def _plain(value: Any, name: str) -> Any:
    """The value as JSON has it, arrays by their hash."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, os.PathLike):
        return os.path.abspath(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry, name) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, name) for entry in value]
    value = on_host(value)
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype.name}{list(value.shape)} {digest[:16]}"
    raise TypeError(f"option {name} must be made of numbers, strings and arrays, got {type(value).__name__}")


# ---- differences ----


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same, in words; nothing if all is."""
    found = []
    if recorded["format"] != now["format"]:
        return [f"format {recorded['format']} -> {now['format']}"]
    if recorded["gpuxent"] != now["gpuxent"]:
        found.append(f"gpuxent {recorded['gpuxent']} -> {now['gpuxent']}")
    for name in {**recorded["sources"], **now["sources"]}:
        found += _source_differences(name, recorded["sources"].get(name), now["sources"].get(name))
    for name in {**recorded["options"], **now["options"]}:
        before, after = (_shown(side["options"], name) for side in (recorded, now))
        if before != after:
            found.append(f"option {name}: {before} -> {after}")
    return found


def _shown(options: dict[str, Any], name: str) -> str:
    return str(options[name]) if name in options else "not given"


def _source_differences(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
    if before is None or after is None:
        pair = [side["name"] if side else "none" for side in (before, after)]
        return [] if before == after else [f"{name}: {pair[0]} -> {pair[1]}"]
    words = {
        "name": lambda side: side["name"],
        "shape": lambda side: f"shape {tuple(side['shape'])}",
        "dtype": lambda side: side["dtype"],
        "files": lambda side: f"{side['files']:,} files",
        "bytes": lambda side: f"{side['bytes']:,} bytes",
    }
    found = []
    for key, say in words.items():
        if before[key] != after[key]:
            verb = "" if key == "name" else " changed"
            found.append(f"{name}{verb}: {say(before)} -> {say(after)}")
    if not found and before["sha256"] != after["sha256"]:
        what = "a file was written to again" if after["files"] else "the array has other values"
        found.append(f"{name} changed: {what} ({after['bytes']:,} bytes as before)")
    return found


# ---- who computes ----


@cache
def computed_by(backend: str | None = None) -> str:
    """What the last bits of a loss depend on: the same text, the same bits. None: what NumPy arrays go to here.

    Where a GPU computes it is its kind, else that of the CPU as the compiled code sees it.
    """
    backend = backend or ("numba" if has_numba() else "numpy")
    if backend not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    parts = [f"gpuxent {gpuxent.__version__}", f"numpy {np.__version__}"]
    if backend == "cupy":
        return ", ".join([f"cupy on {_gpu()}", *parts, *_cupy_versions()])
    if backend == "numba":
        parts += [f"{package} {version(package)}" for package in ("numba", "llvmlite")]
    parts += [" ".join(platform.libc_ver())]  # NumPy's log1p is the C library's
    return ", ".join([f"{backend} on {_cpu(backend)}", *(part for part in parts if part.strip())])


def _gpu() -> str:
    current = _cupy_found.cupy().cuda.Device().id
    device = next(device for device in _cupy_found.devices() if device.number == current)
    return f"{device.name} (compute capability {device.compute_capability})"


def _cupy_versions() -> list[str]:
    found = _cupy_found.versions()
    return [f"{name} {found[name]}" for name in ("cupy", "runtime", "nvrtc")]


def _cpu(backend: str) -> str:
    """Machine, family and model, and the extensions that compiled code chooses by."""
    words = [platform.machine(), *_cpu_model(), *_numpy_features()]
    if backend == "numba":
        words.append(_numba_target())
    return " ".join(words)


def _numba_target() -> str:
    """The CPU that LLVM compiles for, and a hash of its hundred features."""
    config, binding = import_module("numba").config, import_module("llvmlite.binding")
    name, features = config.CPU_NAME or binding.get_host_cpu_name(), config.CPU_FEATURES
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    return f"{name}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _cpu_model() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return [platform.processor()] if platform.processor() not in ("", platform.machine()) else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "cpu family" in fields:
        return [f"{fields.get('vendor_id', 'unknown')} family {fields['cpu family']} model {fields.get('model', '?')}"]
    if "CPU part" in fields:  # Arm
        return [f"implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"]
    return [fields["model name"]] if "model name" in fields else []


def _numpy_features() -> list[str]:
    """Of the extensions for which NumPy has loops of their own, those that it uses here."""
    core = import_module("numpy._core._multiarray_umath")  # what np.show_runtime reads
    can = getattr(core, "__cpu_features__", {})
    return [name for name in getattr(core, "__cpu_dispatch__", []) if can.get(name)]
