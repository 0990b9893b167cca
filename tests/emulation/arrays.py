"""`cupy.ndarray`: an array between guard pages, as strict about NumPy as the real one."""

import contextlib
import math
import weakref
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

import emulation

from .compiler import Fault, runtime

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FILLED = 2**26  # a larger array stays as the system gives it, untouched


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What NumPy has and CuPy has not.
MISSING = words("""
    asmatrix block bmat busday_count busday_offset datetime_as_string datetime_data einsum_path errstate frompyfunc
    fromregex geomspace get_include getbufsize geterr geterrcall histogram_bin_edges info insert is_busday isnat matvec
    nanpercentile nanquantile ndenumerate ndindex nditer nested_iters polyder polydiv polyint setbufsize seterr
    seterrcall show_runtime spacing test unstack vecdot vecmat vectorize
""")
# The functions that may be given bfloat16: they move numbers. Not every CuPy can compute with it.
MOVING = words("""
    array asarray ascontiguousarray astype broadcast_arrays broadcast_to concatenate copy copyto diagonal empty_like
    expand_dims flatten full_like getitem may_share_memory moveaxis ndim ones_like ravel repeat reshape setitem shape
    shares_memory size squeeze stack swapaxes take take_along_axis transpose view where zeros_like
""")
# What depends on values: the GPU is waited for.
WAITING = words("nonzero flatnonzero argwhere unique array_equal allclose array_equiv extract compress")


class Counter:
    """How often a result was waited for."""

    synchronisations = 0


def synchronise() -> None:
    Counter.synchronisations += 1


class Memory:
    """One allocation; numbers behind its end or before its beginning are out of reach or change a canary."""

    alive: ClassVar["weakref.WeakSet[Memory]"] = weakref.WeakSet()
    damaged: ClassVar[list[str]] = []

    def __init__(self, nbytes: int):
        self.size = nbytes
        self.ptr = runtime().emulation_allocate(nbytes, emulation.alignment)
        if self.ptr is None:
            raise MemoryError(f"the emulation has no room for {nbytes} bytes")
        self.device_id = 0
        self.alive.add(self)

    def __del__(self):
        with contextlib.suppress(Exception):  # at exit anything may be gone
            self.check(self.damaged)
            runtime().emulation_free(self.ptr)

    def check(self, damaged: list[str]) -> None:
        if count := runtime().emulation_damage(self.ptr):
            damaged.append(f"{count} bytes just outside an array of {self.size} bytes were written")

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.ptr, False), "shape": (self.size,), "typestr": "|u1", "version": 3}


def check_canaries() -> None:
    """Raises Fault if anything was written beside an array, whether it still exists or not."""
    damaged, Memory.damaged[:] = list(Memory.damaged), []
    for memory in list(Memory.alive):
        memory.check(damaged)
    if damaged:
        raise Fault("; ".join(damaged))


class MemoryPointer:
    """`array.data`"""

    def __init__(self, ptr: int, mem: Any):
        self.ptr, self.mem, self.device_id = ptr, mem, 0

    @property
    def device(self) -> Any:
        return emulation.Device(0)


class Flags:
    def __init__(self, flags: Any):
        self.c_contiguous, self.f_contiguous, self.owndata = flags.c_contiguous, flags.f_contiguous, flags.owndata

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


def supported(dtype: Any) -> np.dtype:
    found = np.dtype(dtype)
    if found.char not in "?bhilqBHILQefdFD" and found != BFLOAT16 and found.names is None:
        raise ValueError(f"Unsupported dtype {found}")
    return found


def allocate(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    """Filled with 0xFF: NaN, or -1."""
    found = supported(dtype)
    shape = (shape,) if np.ndim(shape) == 0 else tuple(shape)
    count = math.prod(map(int, shape))
    raw = np.asarray(Memory(count * found.itemsize))
    if raw.size <= FILLED:
        raw[:] = 0xFF
    return raw.view(found).reshape(shape, order=order) if count else np.ndarray(shape, found, raw, order=order)


def placed(host: Any, order: str = "C") -> np.ndarray:
    """A copy between guard pages."""
    host = np.asarray(host)
    keep = "F" if order in "FKA" and host.flags.f_contiguous and not host.flags.c_contiguous else "C"
    made = allocate(host.shape, host.dtype, "F" if order == "F" else keep)
    made[...] = host
    return made


def unwrap(value: Any, seen: list[np.ndarray]) -> Any:
    """The host arrays inside, which are also listed."""
    if isinstance(value, ndarray):
        seen.append(value._host)
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: NumPy and CuPy arrays do not mix")
    if type(value) in (list, tuple):
        return type(value)(unwrap(item, seen) for item in value)
    if type(value) is dict:
        return {key: unwrap(item, seen) for key, item in value.items()}
    return value


def wrap(value: Any, seen: list[np.ndarray]) -> Any:
    """Views stay views, what is new moves between guard pages."""
    if isinstance(value, np.ndarray):
        if value.size and any(np.may_share_memory(value, host) for host in seen):
            return of(value)
        return of(placed(value, "K"))
    if isinstance(value, np.generic):
        return of(placed(value))
    if type(value) in (list, tuple):
        return type(value)(wrap(item, seen) for item in value)
    return value


def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A NumPy function on the host arrays; like a GPU it does not warn."""
    seen: list[np.ndarray] = []
    args, kwargs = unwrap(args, seen), unwrap(kwargs, seen)
    name = getattr(function, "__name__", "")
    if name not in MOVING and any(host.dtype == BFLOAT16 for host in seen):
        raise TypeError(f"{name} of bfloat16: not every CuPy can; view it as uint16")
    out = kwargs.get("out")
    with np.errstate(all="ignore"):
        result = function(*args, **kwargs)
    return None if result is None else wrap(result, seen if out is None else [*seen, result])


def of(host: np.ndarray) -> "ndarray":
    made = object.__new__(ndarray)
    made._host = host
    return made


def restored(host: np.ndarray) -> "ndarray":
    return of(placed(host))


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    __module__ = "cupy"
    __array_priority__ = 100
    _host: np.ndarray

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        if memptr is None:
            self._host = allocate(shape, dtype, order)
            return
        raw = np.asarray(memptr.mem)
        self._host = np.ndarray(shape, supported(dtype), raw, memptr.ptr - memptr.mem.ptr, strides, order)

    dtype = property(lambda self: self._host.dtype)
    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    flags = property(lambda self: Flags(self._host.flags))
    device = property(lambda self: emulation.Device(0))
    T = property(lambda self: of(self._host.T))
    base = property(lambda self: None if self._host.base is None else self)

    @property
    def data(self) -> MemoryPointer:
        memory: Any = self._host
        while isinstance(memory, np.ndarray):
            memory = memory.base
        return MemoryPointer(self._host.ctypes.data, memory)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = dict(self._host.__array_interface__)
        interface.update(version=3, stream=1, strides=None if self._host.flags.c_contiguous else self._host.strides)
        return interface

    # To the host: the GPU is waited for.
    def get(self, stream=None, order="C", out=None, blocking=True) -> np.ndarray:
        synchronise()
        if out is not None:
            out[...] = self._host
            return out
        return self._host.copy(order)

    def set(self, arr, stream=None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.shape != self.shape or arr.dtype != self.dtype:
            raise ValueError("Shape or dtype mismatch")
        self._host[...] = arr

    def item(self, *index):
        synchronise()
        return self._host.item(*index)

    def tolist(self):
        return self.get().tolist()

    def tobytes(self, order="C"):
        return self.get().tobytes(order)

    def __bool__(self):
        synchronise()
        return bool(self._host)

    def __int__(self):
        synchronise()
        return int(self._host)

    def __float__(self):
        synchronise()
        return float(self._host)

    def __complex__(self):
        synchronise()
        return complex(self._host)

    def __index__(self):
        synchronise()
        return self._host.__index__()

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, form):
        return format(self.get(), form)

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __reduce__(self):
        return restored, (self.get(),)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        keys = key if isinstance(key, tuple) else (key,)
        if any(getattr(k, "dtype", None) == np.bool_ and getattr(k, "ndim", 0) for k in keys):
            synchronise()  # how many are there?
        return apply(getitem, self, keys)

    def __setitem__(self, key, value):
        apply(setitem, self, key if isinstance(key, tuple) else (key,), value)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__" or ufunc.__name__ in MISSING:
            return NotImplemented
        out = kwargs.get("out")
        if out is None:
            return apply(ufunc, *inputs, **kwargs)
        if not all(isinstance(array, ndarray) for array in out):
            raise TypeError("Output arguments type must be cupy.ndarray")
        apply(ufunc, *inputs, **kwargs)
        return out[0] if len(out) == 1 else out

    def __array_function__(self, function, types, args, kwargs):
        if not all(t in (ndarray, np.ndarray) for t in types):
            return NotImplemented
        if function.__name__ in MISSING or not function.__module__.startswith("numpy"):
            return NotImplemented
        return function_of(function)(*args, **kwargs)

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        found = supported(dtype)
        if not copy and found == self.dtype:
            return self
        with np.errstate(all="ignore"):
            return of(placed(self._host.astype(found), order))

    def copy(self, order="C"):
        return of(placed(self._host, order))

    def view(self, dtype=None):
        return of(self._host.view() if dtype is None else self._host.view(supported(dtype)))

    def fill(self, value):
        self[...] = value

    def reduced_view(self, dtype=None):
        return self

    def toDlpack(self):
        raise NotImplementedError("the emulation has no DLPack")

    def __dlpack_device__(self):
        return (2, 0)


def getitem(host: np.ndarray, keys: tuple[Any, ...]) -> np.ndarray:
    """A view of one element is an array, too."""
    return host[keys] if any(key is Ellipsis for key in keys) else host[(*keys, ...)]


def setitem(host: np.ndarray, keys: tuple[Any, ...], value: Any) -> None:
    host[keys] = value


def _method(name: str) -> Any:
    function = getattr(np.ndarray, name)

    def method(self, *args, **kwargs):
        if name in WAITING:
            synchronise()
        return apply(function, self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in words("""
    all any argmax argmin argsort clip compress conj conjugate cumprod cumsum diagonal dot flatten max mean min nonzero
    prod ravel repeat reshape round searchsorted sort squeeze std sum swapaxes take trace transpose var
"""):
    setattr(ndarray, _name, _method(_name))


# ---------------------------------------------------------------------------------------------------------------------
# The functions of the module


def function_of(function: Any) -> Any:
    """CuPy's function of the same name as NumPy's."""
    own = OWN.get(function.__name__)
    if own is not None:
        return own

    def delegated(*args, **kwargs):
        if function.__name__ in WAITING:
            synchronise()
        return apply(function, *args, **kwargs)

    delegated.__name__ = function.__name__
    return delegated


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    if isinstance(obj, ndarray):
        host = obj._host
    elif isinstance(obj, np.ndarray | np.generic):
        host = np.asarray(obj)
    else:
        seen: list[np.ndarray] = []
        host = np.asarray(unwrap(obj, seen))
    with np.errstate(all="ignore"):
        host = np.array(host, dtype=None if dtype is None else supported(dtype), ndmin=ndmin, copy=None)
    if isinstance(obj, ndarray) and not copy and np.may_share_memory(host, obj._host):
        return of(host) if ndmin else obj
    return of(placed(host, order))


def asarray(a, dtype=None, order=None, *, blocking=False):
    return array(a, dtype, False, order or "K")


def ascontiguousarray(a, dtype=None):
    made = array(a, dtype, False, "C")
    return made if made.flags.c_contiguous else made.copy("C")


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    return np.asarray(a, order=order)


def empty(shape, dtype=float, order="C"):
    return of(allocate(shape, dtype, order))


def zeros(shape, dtype=float, order="C"):
    made = allocate(shape, dtype, order)
    if made.nbytes <= FILLED:  # beyond, pages come as zeros
        made[...] = np.zeros((), made.dtype)
    return of(made)


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype, order)


def full(shape, fill_value, dtype=None, order="C"):
    if dtype is None:
        dtype = fill_value.dtype if isinstance(fill_value, ndarray) else np.asarray(fill_value).dtype
    made = of(allocate(shape, dtype, order))
    made[...] = fill_value
    return made


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    host = prototype._host
    dtype = host.dtype if dtype is None else dtype
    fortran = order == "F" or (order in "KA" and host.flags.f_contiguous and not host.flags.c_contiguous)
    return of(allocate(host.shape if shape is None else shape, dtype, "F" if fortran else "C"))


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    return full_like(a, 0, dtype, order, subok, shape)


def ones_like(a, dtype=None, order="K", subok=None, shape=None):
    return full_like(a, 1, dtype, order, subok, shape)


def full_like(a, fill_value, dtype=None, order="K", subok=None, shape=None):
    made = empty_like(a, dtype, order, subok, shape)
    made[...] = fill_value
    return made


def get_array_module(*args):
    return emulation.module if any(isinstance(arg, ndarray) for arg in args) else np


OWN: dict[str, Any] = {
    function.__name__: function
    for function in (
        array, asarray, ascontiguousarray, asnumpy, empty, zeros, ones, full, empty_like, zeros_like, ones_like,
        full_like, get_array_module,
    )
}  # fmt: skip
OWN["asanyarray"] = asarray
