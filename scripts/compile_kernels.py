#!/usr/bin/env python3
"""Compiles every CUDA kernel for every architecture and judges what the compiler says: no spills, no stack frame, and
no more registers than tests/kernel_registers.json allows.

It needs no GPU, no driver and no CuPy, only the wheels of NVIDIA's run-time compiler and of CUDA's headers (extra
"test"). Feature combinations that `builds()` does not mark `every_arch` are compiled for sm_90 alone, unless --all.
What the compiler said of the same code is kept in ~/.cache/gpuxent/nvrtc, which may be deleted at any time.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, time

ROOT = Path(__file__).resolve().parents[1]
CEILINGS = ROOT / "tests" / "kernel_registers.json"
ARCHS = (75, 80, 86, 89, 90, 100, 120)
MAIN_ARCH = 90
SHOWN = 20  # failures
KEPT_DAYS = 14

sys.path.insert(0, str(ROOT))

from gpuxent.backends import _cupy_core  # noqa: E402


@dataclass(frozen=True)
class Unit:
    """One call of the compiler."""

    files: tuple[str, ...]
    names: tuple[str, ...]
    arch: int


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel on one architecture. `stack` and `spills` in bytes per thread."""

    name: str
    arch: int
    registers: int
    stack: int
    spills: int

    def __str__(self) -> str:
        return f"{self.name} on sm_{self.arch}"


class CompileError(Exception):
    pass


# ---- the compiler ----


class Nvrtc:
    """NVIDIA's run-time compiler, called as a C library."""

    def __init__(self, library: Path, include: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.include = include

    @property
    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, names: Sequence[str], arch: int, options: Sequence[str]) -> tuple[str, list[str]]:
        """(the compiler's log, the lowered name of each name expression). CompileError: what is wrong, as it says."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        try:
            for name in names:
                self._call("nvrtcAddNameExpression", program, name.encode())
            given = [*options, f"-arch=sm_{arch}", "--ptxas-options=-v", f"-I{self.include}"]
            array = (ctypes.c_char_p * len(given))(*map(str.encode, given))
            if self._library.nvrtcCompileProgram(program, len(given), array) != 0:
                raise CompileError(self._text("nvrtcGetProgramLog", program))
            return self._text("nvrtcGetProgramLog", program), [self._lowered(program, name) for name in names]
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _lowered(self, program: ctypes.c_void_p, name: str) -> str:
        lowered = ctypes.c_char_p()
        self._call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(lowered))
        assert lowered.value is not None
        return lowered.value.decode()

    def _text(self, function: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(function, program, text)
        return text.value.decode(errors="replace")

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise CompileError(f"{function}: {self._library.nvrtcGetErrorString(status).decode()}")


@cache
def nvrtc() -> Nvrtc:
    """The compiler of the installed wheels."""
    found = find_spec("nvidia")
    folders = [Path(place) for place in (found.submodule_search_locations if found else None) or ()]
    libraries = [path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    headers = [path.parent for folder in folders for path in sorted(folder.glob("*/include/cuda_fp16.h"))]
    for files, wheel in ((libraries, "nvidia-cuda-nvrtc"), (headers, "nvidia-cuda-runtime")):
        if not files:
            raise FileNotFoundError(f"the wheel {wheel} is not installed: pip install 'gpuxent[test]'")
    return Nvrtc(libraries[-1], headers[-1])


def compile_unit(unit: Unit) -> list[Kernel]:
    """CompileError names the kernel and the architecture."""
    try:
        log, lowered = said(_cupy_core.source(*unit.files), unit.names, unit.arch, _cupy_core.OPTIONS)
        return figures(log, dict(zip(lowered, unit.names, strict=True)), unit.arch)
    except CompileError as error:
        names = f"{unit.names[0]} ({'+'.join(unit.files)})" if unit.names else "+".join(unit.files)
        raise CompileError(f"{names} on sm_{unit.arch}:\n{error}") from None


def said(source: str, names: Sequence[str], arch: int, options: Sequence[str]) -> tuple[str, list[str]]:
    """As `Nvrtc.compile`; what it refuses is not kept."""
    key = hashlib.sha256(json.dumps([wheels(), source, names, arch, options]).encode()).hexdigest()
    path = kept() / f"{key}.json"
    with suppress(OSError, ValueError):  # not there, or not whole
        log, lowered = json.loads(path.read_text(encoding="utf-8"))
        path.touch()
        return log, lowered
    found = nvrtc().compile(source, names, arch, options)
    with suppress(OSError):  # no place to keep it
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(found, file)
        os.replace(file.name, path)
    return found


def kept() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuxent" / "nvrtc"


def forget_old() -> None:
    for path in kept().glob("*"):
        with suppress(OSError):  # another process was faster
            if time() - path.stat().st_mtime > KEPT_DAYS * 24 * 3600:
                path.unlink()


@cache
def wheels() -> list[str]:
    """The compiler and the headers, exactly."""
    return sorted(f"{wheel.name} {wheel.version}" for wheel in distributions() if wheel.name.startswith("nvidia"))


def attempt(unit: Unit) -> list[Kernel] | str:
    """What the compiler says of the kernels, or what is wrong with them."""
    try:
        return compile_unit(unit)
    except CompileError as error:
        return str(error)


def figures(log: str, names: dict[str, str], arch: int) -> list[Kernel]:
    """What ptxas says of each kernel; `names` maps lowered names to the ones asked for.

    A function that was not inlined has a stack line of its own, and counts for the kernel that it follows.
    """
    sections = re.split(r"Compiling entry function '(\w+)'", log)
    found = {}
    for lowered, text in zip(sections[1::2], sections[2::2], strict=True):
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        if lowered not in names or not frames or registers is None:
            raise CompileError(f"cannot read what the compiler says of {names.get(lowered, lowered)}:\n{text.strip()}")
        cumulative = re.search(r"(\d+) bytes cumulative stack size", text)
        stack = max(*(int(frame[0]) for frame in frames), int(cumulative[1]) if cumulative else 0)
        spills = max(max(int(stores), int(loads)) for _, stores, loads in frames)
        found[lowered] = Kernel(names[lowered], arch, int(registers[1]), stack, spills)
    if missing := [name for lowered, name in names.items() if lowered not in found]:
        raise CompileError(f"the compiler says nothing of {', '.join(missing)}")
    return list(found.values())


# ---- what is compiled ----


def units(builds: Iterable[_cupy_core.Build], archs: Sequence[int], everything: bool) -> list[Unit]:
    chosen = []
    for build in builds:
        own = [arch for arch in archs if arch >= build.least_arch]
        if not (everything or build.every_arch):
            own = [arch for arch in own if arch == max(MAIN_ARCH, build.least_arch)]
        chosen += [Unit(tuple(build.files), tuple(build.names), arch) for arch in own]
    return chosen


def compile_all(chosen: Sequence[Unit], workers: int) -> tuple[list[Kernel], list[str]]:
    """What the compiler says of the kernels, and what it refused."""
    kernels: list[Kernel] = []
    refused: list[str] = []
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        for done, found in enumerate((pool.map if pool else map)(attempt, chosen), 1):
            if isinstance(found, str):
                refused.append(found)
            else:
                kernels += found
            if sys.stderr.isatty():
                print(f"\r{done} of {len(chosen)} compiled\033[K", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return kernels, refused


# ---- ceilings ----


Ceilings = dict[str, dict[str, int]]  # registers by kernel and architecture


def read_ceilings(path: Path) -> tuple[str, Ceilings]:
    """(the compiler's version that they come from, ceilings)."""
    if not path.exists():
        return "", {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["nvrtc"], found["registers"]


def write_ceilings(path: Path, version: str, ceilings: Ceilings) -> None:
    """A kernel a line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(ceilings[name])}" for name in sorted(ceilings))
    path.write_text(f'{{\n "nvrtc": "{version}",\n "registers": {{\n{lines}\n }}\n}}\n', encoding="utf-8")


def updated(ceilings: Ceilings, kernels: Iterable[Kernel], known: set[str]) -> Ceilings:
    """The ceilings with these kernels' own figures; kernels that are not `known` any more are dropped."""
    new = {name: dict(of_kernel) for name, of_kernel in ceilings.items() if name in known}
    for kernel in kernels:
        new.setdefault(kernel.name, {})[str(kernel.arch)] = kernel.registers
    return {name: dict(sorted(of_kernel.items(), key=lambda item: int(item[0]))) for name, of_kernel in new.items()}


def faults(kernels: Iterable[Kernel], ceilings: Ceilings) -> list[str]:
    found = []
    for kernel in kernels:
        if kernel.spills:
            found.append(f"{kernel}: {kernel.spills} bytes of spills")
        if kernel.stack:
            found.append(f"{kernel}: a stack frame of {kernel.stack} bytes")
        ceiling = ceilings.get(kernel.name, {}).get(str(kernel.arch))
        if ceiling is None:
            found.append(f"{kernel}: {kernel.registers} registers, and no ceiling is stored: --update stores it")
        elif kernel.registers > ceiling:
            found.append(f"{kernel}: {kernel.registers} registers, ceiling {ceiling}")
    return found


# ---- the command ----


def table(kernels: Iterable[Kernel]) -> str:
    """The most registers of each kernel's variants, by architecture."""
    most: dict[str, dict[int, int]] = defaultdict(dict)
    variants: dict[str, set[str]] = defaultdict(set)
    for kernel in kernels:
        base = kernel.name.partition("<")[0]
        variants[base].add(kernel.name)
        most[base][kernel.arch] = max(kernel.registers, most[base].get(kernel.arch, 0))
    archs = sorted({arch for of_kernel in most.values() for arch in of_kernel})
    width = max(map(len, [*most, "registers, at most"]))
    lines = [f"{'registers, at most':{width}}  variants" + "".join(f"{f'sm_{arch}':>8}" for arch in archs)]
    for base in sorted(most):
        numbers = "".join(f"{most[base].get(arch, ''):>8}" for arch in archs)
        lines.append(f"{base:{width}}  {len(variants[base]):8}{numbers}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every feature combination for every architecture")
    parser.add_argument("--update", action="store_true", help="store what is found as the new ceilings")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="only this one; may be repeated")
    parser.add_argument("--ceilings", type=Path, default=CEILINGS, help="the file of stored registers")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="compile so many at a time")
    options = parser.parse_args(arguments)
    try:
        version = nvrtc().version
    except FileNotFoundError as error:
        print(f"compile_kernels: {error}", file=sys.stderr)
        return 2
    builds = list(_cupy_core.builds())
    chosen = units(builds, sorted(options.arch or ARCHS), options.all)
    stored_version, ceilings = read_ceilings(options.ceilings)
    forget_old()
    started = perf_counter()
    kernels, wrong = compile_all(chosen, options.jobs)
    if options.update:
        ceilings = updated(ceilings, kernels, {name for build in builds for name in build.names})
        write_ceilings(options.ceilings, version, ceilings)
    wrong += faults(kernels, ceilings)
    if kernels:
        print(table(kernels))
    seconds = f"{perf_counter() - started:.0f} s"
    print(f"NVRTC {version}: {len(kernels)} kernels in {len(chosen)} compilations, {seconds}")
    if wrong and stored_version not in ("", version) and not options.update:
        print(f"The ceilings come from NVRTC {stored_version}: another version counts otherwise.")
    for fault in wrong[:SHOWN]:
        print(f"FAILED: {fault}", file=sys.stderr)
    if len(wrong) > SHOWN:
        print(f"FAILED: and {len(wrong) - SHOWN} more", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
