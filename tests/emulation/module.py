"""The module `cupy` itself."""

import types
from importlib.machinery import ModuleSpec
from typing import Any, ClassVar

import numpy as np

from . import arrays, cublas, kernels
from .arrays import Counter, function_of, ndarray, synchronise
from .compiler import CompileError

# The device is an H100 as far as anyone asks.
ATTRIBUTES = {
    "MultiProcessorCount": 132,
    "MaxSharedMemoryPerBlock": 48 * 1024,
    "MaxSharedMemoryPerBlockOptin": 227 * 1024,
    "MaxSharedMemoryPerMultiprocessor": 228 * 1024,
    "MaxThreadsPerBlock": 1024,
    "MaxThreadsPerMultiProcessor": 2048,
    "MaxBlocksPerMultiprocessor": 32,
    "MaxRegistersPerMultiprocessor": 65536,
    "L2CacheSize": 50 * 2**20,
    "WarpSize": 32,
    "ClockRate": 1980000,
    "MemoryClockRate": 2619000,
    "GlobalMemoryBusWidth": 5120,
    "ComputeCapabilityMajor": 9,
    "ComputeCapabilityMinor": 0,
    "IsMultiGpuBoard": 0,
}


class Device:
    def __init__(self, device: int | None = None):
        self.id = 0 if device is None else int(device)
        self.attributes = dict(ATTRIBUTES)

    compute_capability = "90"
    mem_info = (60 * 2**30, 80 * 2**30)
    pci_bus_id = "0000:00:00.0"

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> None:
        pass

    def synchronize(self) -> None:
        synchronise()


class Stream:
    """All work is done when it is asked for, so that streams have nothing to do."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False, **_: Any):
        self.ptr, self.device_id = 0, 0

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def use(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        synchronise()

    def record(self, event: Any = None) -> Any:
        return event or Event()

    def wait_event(self, event: Any) -> None:
        pass


Stream.null = Stream()  # type: ignore[attr-defined]


class Event:
    def __init__(self, *_: Any, **__: Any):
        pass

    done = True

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        synchronise()


def properties(device: int) -> dict[str, Any]:
    return {
        "name": b"Emulated GPU",
        "totalGlobalMem": 80 * 2**30,
        "multiProcessorCount": ATTRIBUTES["MultiProcessorCount"],
        "sharedMemPerBlockOptin": ATTRIBUTES["MaxSharedMemoryPerBlockOptin"],
        "sharedMemPerBlock": ATTRIBUTES["MaxSharedMemoryPerBlock"],
        "sharedMemPerMultiprocessor": ATTRIBUTES["MaxSharedMemoryPerMultiprocessor"],
        "maxThreadsPerMultiProcessor": ATTRIBUTES["MaxThreadsPerMultiProcessor"],
        "regsPerMultiprocessor": ATTRIBUTES["MaxRegistersPerMultiprocessor"],
        "l2CacheSize": ATTRIBUTES["L2CacheSize"],
        "memoryClockRate": ATTRIBUTES["MemoryClockRate"],
        "memoryBusWidth": ATTRIBUTES["GlobalMemoryBusWidth"],
        "clockRate": ATTRIBUTES["ClockRate"],
        "warpSize": 32,
        "major": 9,
        "minor": 0,
        "pciBusID": 0,
        "pciDeviceID": 0,
        "pciDomainID": 0,
    }


class CUDARuntimeError(RuntimeError):
    pass


class Pool:
    def used_bytes(self) -> int:
        return sum(memory.size for memory in arrays.Memory.alive)

    def total_bytes(self) -> int:
        return self.used_bytes()

    def free_all_blocks(self, stream: Any = None) -> None:
        pass


def _namespace(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(members)
    return made


class CuPy(types.ModuleType):
    """NumPy's functions by their names, and what CuPy has besides."""

    __version__ = "14.2.0"
    __path__: ClassVar[list[str]] = []  # a package

    def __init__(self) -> None:
        super().__init__("cupy")
        self.__spec__ = ModuleSpec("cupy", None)
        self.__dict__.update(arrays.OWN)
        self.ndarray = ndarray
        for kind in (kernels.RawKernel, kernels.RawModule, kernels.ElementwiseKernel, kernels.ReductionKernel):
            kind.__module__ = "cupy"
            setattr(self, kind.__name__, kind)
        pool = Pool()
        self.get_default_memory_pool = self.get_default_pinned_memory_pool = lambda: pool
        self.is_available = lambda: True
        stream = Stream()
        self.runtime = _namespace(
            "cupy.cuda.runtime",
            getDeviceCount=lambda: 1,
            getDevice=lambda: 0,
            getDeviceProperties=properties,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000,
            deviceSynchronize=synchronise,
            is_hip=False,
            CUDARuntimeError=CUDARuntimeError,
        )
        self.compiler = _namespace("cupy.cuda.compiler", CompileException=CompileError)
        self.cuda = _namespace(
            "cupy.cuda",
            __path__=[],
            Device=Device,
            Stream=Stream,
            Event=Event,
            MemoryPointer=arrays.MemoryPointer,
            get_current_stream=lambda device_id=-1: stream,
            is_available=lambda: True,
            runtime=self.runtime,
            compiler=self.compiler,
            nvrtc=_namespace("cupy.cuda.nvrtc", getVersion=lambda: (13, 0)),
            cublas=_namespace("cupy.cuda.cublas", gemmEx=cublas.gemmEx),
            device=_namespace("cupy.cuda.device", get_cublas_handle=lambda: cublas.HANDLE),
        )

    @property
    def synchronisations(self) -> int:
        return Counter.synchronisations

    @synchronisations.setter
    def synchronisations(self, count: int) -> None:
        Counter.synchronisations = count

    def submodules(self) -> dict[str, types.ModuleType]:
        return {
            "cupy": self,
            "cupy.cuda": self.cuda,
            "cupy.cuda.runtime": self.runtime,
            "cupy.cuda.compiler": self.compiler,
        }

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name, None)
        if found is None or name.startswith("_") or name in arrays.MISSING:
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        if isinstance(found, np.ufunc) or (callable(found) and not isinstance(found, type)):
            return function_of(found)
        return found


module = CuPy()
