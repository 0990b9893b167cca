"""g++ in place of NVRTC: CUDA sources become shared libraries, kept on disk, and a launch a call of `runtime.cpp`."""

import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
INCLUDE = FOLDER / "include"

# -O1 is the best sum of compiling and running. A warning is an error; those left out are noise in CUDA code.
FLAGS = shlex.split("""
    -O1 -g1 -gdwarf-4 -fPIC -shared -nodefaultlibs -fno-exceptions -fno-rtti -fno-strict-aliasing -fno-gnu-unique
    -ffp-contract=off -U_FORTIFY_SOURCE -fno-sanitize-recover=all --param=tsan-instrument-func-entry-exit=0
    -fsanitize=thread,alignment,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,bounds,bool
    -fsanitize=null,return
    -Wall -Werror -Wno-unknown-pragmas -Wno-unused -Wno-maybe-uninitialized -Wno-sign-compare -Wno-comment
""")


class Fault(RuntimeError):
    """What a GPU might have let pass: says which kernel, block and thread did what."""


class CompileError(Exception):
    """With g++'s own words. `cupy.cuda.compiler.CompileException` is this."""


class Launch(ctypes.Structure):
    """As in runtime.cpp."""

    _fields_ = (
        ("call", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("order", ctypes.c_uint),
        ("seconds", ctypes.c_uint),
        ("seed", ctypes.c_uint64),
    )


class Parameter(ctypes.Structure):
    """As in launcher.h."""

    _fields_ = (
        ("kind", ctypes.c_char),
        ("target", ctypes.c_char),
        ("size", ctypes.c_uint),
        ("target_size", ctypes.c_uint),
    )


@cache
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise RuntimeError("the emulation of CUDA needs g++")
    return found


@cache
def _common() -> bytes:
    """Whatever besides source and flags makes a library what it is."""
    version = subprocess.run([compiler(), "-v"], capture_output=True, check=True).stderr
    return b"".join([version, *(path.read_bytes() for path in sorted(INCLUDE.iterdir()))])


@cache
def _libraries() -> Path:
    """A folder that nobody else can write to: what lies in it is loaded."""
    wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuxent-emulation"
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = wanted.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(wanted, os.W_OK):
            return wanted
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="gpuxent-emulation-"))


@cache
def _forget_old() -> None:
    for library in _libraries().glob("*.so"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - library.stat().st_mtime > 14 * 24 * 3600:
                library.unlink()


_lock = threading.RLock()


def build(source: str, *flags: str) -> Path:
    """The library of a source, compiled if there is none yet."""
    with _lock:
        key = hashlib.sha256(b"\0".join([_common(), source.encode(), repr(flags).encode()])).hexdigest()[:32]
        library = _libraries() / f"{key}.so"
        if library.exists():
            library.touch()
            return library
        _forget_old()
        with tempfile.TemporaryDirectory(dir=_libraries()) as folder:
            made, text = Path(folder) / "made.so", Path(folder) / "made.cpp"
            text.write_text(source)
            command = [compiler(), "-std=c++17", *flags, f"-I{INCLUDE}", "-o", made, text, "-lgcc"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CompileError(done.stderr.replace(str(text), "emulated.cpp"))
            os.replace(made, library)
        return library


@cache
def runtime() -> ctypes.PyDLL:
    """PyDLL: one launch at a time, other threads wait."""
    flags = shlex.split("-O2 -g -fPIC -shared -fno-exceptions -Wall -Wextra -U_FORTIFY_SOURCE -lm -ldl")
    library = ctypes.PyDLL(str(build((FOLDER / "runtime.cpp").read_text(), *flags)), mode=ctypes.RTLD_GLOBAL)
    library.emulation_launch.restype = ctypes.c_char_p
    library.emulation_launch.argtypes = (ctypes.POINTER(Launch),)
    library.emulation_allocate.restype = ctypes.c_void_p
    library.emulation_allocate.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
    library.emulation_damage.restype = ctypes.c_long
    library.emulation_damage.argtypes = (ctypes.c_void_p,)
    library.emulation_free.argtypes = (ctypes.c_void_p,)
    library.emulation_library.restype = ctypes.c_char_p
    library.emulation_library.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t))
    return library


def _place(address: int) -> str:
    """File and line of an address in a library."""
    offset = ctypes.c_size_t()
    library = runtime().emulation_library(address, ctypes.byref(offset))
    if library is None:
        return hex(address)
    # A return address points behind the call.
    command = ["addr2line", "-i", "-e", library.decode(), hex(offset.value - 1)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return hex(address)
    headers = {path.name for path in INCLUDE.iterdir()}
    own = [
        place for place in map(os.path.basename, found) if "?" not in place and place.partition(":")[0] not in headers
    ]
    return own[0] if own else hex(address)


class Function:
    """One kernel of a source, compiled when it is first needed."""

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()):
        self.name = name
        self._source = (
            f'#include "emulator.h"\n#line 1 "kernel.cu"\n{code}\n'
            f'#line 1 "launcher of {name}"\n#include "launcher.h"\n{_declared(code, name)}EMULATION_KERNEL({name})\n'
        )
        self._flags = tuple(option for option in options if option.startswith(("-D", "-U", "-std=")))
        self._library: ctypes.PyDLL | None = None

    def library(self) -> ctypes.PyDLL:
        with _lock:
            if self._library is None:
                runtime()
                library = ctypes.PyDLL(str(build(self._source, *FLAGS, *self._flags)))
                library.emulation_parameters.restype = ctypes.POINTER(Parameter)
                self.block_limit, self.cluster = library.emulation_block_limit(), library.emulation_cluster_size()
                self.parameters = library.emulation_parameters()[: library.emulation_count()]
                self._library = library
        return self._library

    def launch(self, grid, block, cells: list, shared_bytes: int, order: int, seed: int, seconds: int) -> None:
        """`cells` are ctypes objects or buffers that hold the arguments, each as wide as its parameter."""
        call = ctypes.cast(self.library().emulation_call, ctypes.c_void_p).value
        pointers = (ctypes.c_void_p * max(1, len(cells)))(*(ctypes.addressof(cell) for cell in cells))
        what = Launch(
            call, pointers, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), self.cluster, shared_bytes, order,
            seconds, seed,
        )  # fmt: skip
        message = runtime().emulation_launch(ctypes.byref(what))
        if message is not None:
            text = re.sub(r"<(0x[0-9a-f]+)>", lambda found: _place(int(found[1], 16)), message.decode(errors="replace"))
            raise Fault(f"{self.name}: {text}")


def _declared(code: str, name: str) -> str:
    """Functions that tell what a kernel's declaration says of its launch, in whatever terms it says it."""
    space, bare, arguments = re.fullmatch(r"\s*(?:([\w:]+)::)?(\w+)\s*(<.*>)?\s*", name).groups(default="")
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", code, flags=re.DOTALL)
    found = re.search(rf"(template\s*<[^;{{}}]*>\s*)?(?:extern\s+\"C\"\s*)?__global__([^;{{}}]*?)\b{bare}\s*\(", code)
    template, attributes = found.groups(default="") if found else ("", "")
    made = ""
    for function, attribute, absent in (("block_limit", "launch_bounds", 1024), ("cluster_size", "cluster_dims", 1)):
        value = str(absent)
        if (start := attributes.find(f"__{attribute}__(")) >= 0:
            rest = attributes[attributes.index("(", start) :]
            depths = itertools.accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in rest)
            value = f"emulation::first{rest[: next(i for i, depth in enumerate(depths) if not depth) + 1]}"
        made += (
            f"namespace {space} {{\n" * bool(space)
            + f"{template}constexpr unsigned declared_{function}() {{ return {value}; }}\n"
            + "}\n" * bool(space)
            + f'extern "C" unsigned emulation_{function}() {{ return {space}::declared_{function}{arguments}(); }}\n'
        )
    return made
