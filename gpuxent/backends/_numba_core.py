"""What the loops of the Numba backend are made of: how they are compiled, elements in memory, exp, log1p and tanh.

Numba has no types for 16-bit floats in memory: bfloat16 comes as uint16, float16 as int16.
"""

import hashlib
import math
import platform
from contextlib import suppress
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload


def _features():
    """Of the CPU that Numba compiles for."""
    given = config.CPU_FEATURES
    return set((get_host_cpu_features() if given is None else given).split(","))


FEATURES = _features()

# How many partial sums the compiler makes of a loop that adds up float32 numbers: one in each lane of a vector
# register, and in as many registers as it can spare.
PARTIAL_SUMS = 4 * 16 if "+avx512f" in FEATURES else 2 * 8 if "+avx2" in FEATURES else 4 * 4


def _why_not():
    """What is missing for these loops, or nothing."""
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set, and its loops exist only compiled"
    if platform.machine().lower() in ("x86_64", "amd64") and not {"+fma", "+f16c"} <= FEATURES:
        return "the CPU that it compiles for has no FMA and F16C"  # LLVM would call functions that are not there
    return None


if reason := _why_not():
    raise ImportError(reason)

f32, f64, i32, i64, u32, u64 = np.float32, np.float64, np.int32, np.int64, np.uint32, np.uint64

# ---- compilation ----

# What the compiler may do: fuse a * b + c, and split a sum into lanes. Nothing lets it assume that there is no NaN.
EXACT = {"contract", "nsz"}
LANED = {"contract", "nsz", "reassoc"}

inner = njit(error_model="numpy")
exact = njit(error_model="numpy", fastmath=EXACT)
laned = njit(error_model="numpy", fastmath=LANED)


def entry(function):
    """A function that Python calls: compiled on first use, without the GIL, and kept on disk where that is possible."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):  # no folder for it is writable: every process compiles for itself
        dispatcher._cache = Cache(function)
    return dispatcher


class Cache(FunctionCache):
    """Numba's cache on disk, without which all works as well: a full disk or a broken file is no error.

    It holds for these sources. Numba looks at the time of the function's own file only, which says nothing of the other
    functions that it calls, and is another one in every copy of the same sources.
    """

    def __init__(self, function):
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, SOURCES)

    def load_overload(self, signature, *arguments):
        try:
            found = super().load_overload(signature, *arguments)
        except Exception:  # whatever pickle finds in a broken file
            with suppress(OSError):
                self.flush()
            return None
        # Two processes that save at once can give one file to two signatures: the code is for the last one.
        return found if found is not None and found.signature.args == tuple(signature) else None

    def save_overload(self, *arguments):
        with suppress(Exception):  # a full disk, or an index that is no pickle
            super().save_overload(*arguments)


def _digest():
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("_numba*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


SOURCES = _digest()


# ---- elements in memory ----


@intrinsic
def _pointer(typing_context, address, like):
    """The address as a pointer to elements of the type of the array `like`."""
    pointer = types.CPointer(like.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, like), generate


@intrinsic
def _from_half(typing_context, half):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _to_half(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@inner
def elements(address, like, start, count):
    """Some elements of a row as an array; nothing is copied."""
    return carray(_pointer(address + start * like.itemsize, like), (count,))


# ---- what differs between float32 and float64: chosen by type when a loop is compiled ----


def work(array, value):
    """A number in the type in which the array's elements are computed: float64 for float64, float32 otherwise."""
    raise NotImplementedError


@overload(work)
def _work(array, value):
    return (lambda array, value: f64(value)) if array.dtype == types.float64 else (lambda array, value: f32(value))


def load(array, j):
    """An element, widened."""
    raise NotImplementedError


@overload(load)
def _load(array, j):
    if array.dtype == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda array, j: i32(u32(array[j]) << u32(16)).view(np.float32)
    if array.dtype == types.int16:
        return lambda array, j: _from_half(array[j])
    return lambda array, j: work(array, array[j])


def store(array, j, value):
    """Round a value to the array's type and store it."""
    raise NotImplementedError


@overload(store)
def _store(array, j, value):
    def to_bfloat16(array, j, value):
        bits = u32(f32(value).view(np.int32))
        nearest_even = u32(bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1)))
        array[j] = np.uint16(nearest_even >> u32(16)) if value == value else np.uint16(0x7FC0)

    def to_float16(array, j, value):
        array[j] = _to_half(f32(value))

    def to_float(array, j, value):
        array[j] = value

    return {types.uint16: to_bfloat16, types.int16: to_float16}.get(array.dtype, to_float)


def bits_of(x):
    """The bits of a float as a signed integer."""
    raise NotImplementedError


@overload(bits_of)
def _bits_of(x):
    return (lambda x: f64(x).view(np.int64)) if x == types.float64 else (lambda x: f32(x).view(np.int32))


def unsigned(array, bits):
    raise NotImplementedError


@overload(unsigned)
def _unsigned(array, bits):
    return (lambda array, bits: u64(bits)) if array.dtype == types.float64 else (lambda array, bits: u32(bits))


def float_of(array, bits):
    raise NotImplementedError


@overload(float_of)
def _float_of(array, bits):
    if array.dtype == types.float64:
        return lambda array, bits: i64(bits).view(np.float64)
    return lambda array, bits: i32(bits).view(np.float32)


def lowest_power(array):
    """Where 2**power is no normal number any more."""
    raise NotImplementedError


@overload(lowest_power)
def _lowest_power(array):
    return (lambda array: -1022.6) if array.dtype == types.float64 else (lambda array: -126.6)


# ---- exp, log1p, tanh ----

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)
LN_2_LOW = 2.3190468138462996e-17  # what float64 cannot hold of ln 2
LN_2_32 = f32(LN_2)
LN_2_32_LOW = f32(LN_2 - float(LN_2_32))
LN_2_SHORT = float.fromhex("0x1.62e42fefp-1")  # 33 bits: times a power it is exact
LN_2_SHORT_LOW = LN_2 - LN_2_SHORT + LN_2_LOW

# Adding 1.5 * 2**23 (2**52) rounds to an integer in the low bits; with the exponent's bias added too, a shift makes
# that integer the exponent of a float.
MAGIC_32, MAGIC_64 = f32(1.5 * 2**23 + 127), 1.5 * 2**52 + 1023

# exp(r) on |r| <= ln(2) / 2 with the least relative error (Remez): 0.78 float32 eps, and 0.02 float64 eps.
A1, A2, A3, A4, A5 = (
    f32(a) for a in (0.9999997019767761, 0.49999144673347473, 0.16667640209197998, 0.041898392140, 0.008290228433907)
)
B2, B3, B4, B5 = 0.50000000000000117011, 0.16666666666666386305, 0.041666666666519153695, 0.0083333333335076585334
B6, B7, B8 = 0.0013888888946919863954, 0.00019841269486168343956, 2.4801489352339690169e-5
B9, B10, B11 = 2.7557597179622466854e-6, 2.7631687328466402364e-7, 2.4998995142898356936e-8


@intrinsic
def fused(typing_context, a, b, c):
    """a * b + c, rounded once: the accuracy of exp hangs on it, so it is not left to the compiler to contract."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return c(c, c, c), generate


def scaled_exp(x, shift, power, lowest):
    """exp(x - shift) * 2**-power; exactly 0 for x - shift under `lowest`, so for -inf; NaN for NaN.

    With the integer k nearest to x / ln 2 and r = x - k ln 2 it is exp(r) * 2**(k - power): only r is rounded.
    """
    raise NotImplementedError


@overload(scaled_exp)
def _scaled_exp(x, shift, power, lowest):
    if x == types.float64:
        return lambda x, shift, power, lowest: _scaled_exp_64(x, shift, power, lowest)
    return lambda x, shift, power, lowest: _scaled_exp_32(x, shift, power, lowest)


@exact
def _scaled_exp_32(x, shift, power, lowest):
    d = x - shift
    d = lowest if d < lowest else d
    magic = MAGIC_32 - power
    t = d * f32(LOG2_E) + magic
    k = t - magic
    r = fused(-k, LN_2_32, d)
    r = r - k * LN_2_32_LOW
    p = A4 + r * A5
    p = p * r + A3
    p = p * r + A2
    p = p * r + A1
    p = p * r + f32(1.0)
    return p * i32(bits_of(t) << i32(23)).view(np.float32)


@exact
def _scaled_exp_64(x, shift, power, lowest):
    d = x - shift
    d = lowest if d < lowest else d
    magic = MAGIC_64 - power
    t = d * LOG2_E + magic
    k = t - magic
    r = fused(-k, LN_2, d)
    r = r - k * LN_2_LOW
    return (_expm1_near_0(r) + 1.0) * i64(bits_of(t) << i64(52)).view(np.float64)


@exact
def _expm1_near_0(r):
    """exp(r) - 1 on |r| <= ln(2) / 2."""
    p = B10 + r * B11
    p = p * r + B9
    p = p * r + B8
    p = p * r + B7
    p = p * r + B6
    p = p * r + B5
    p = p * r + B4
    p = p * r + B3
    p = p * r + B2
    return p * (r * r) + r


@exact
def tanh(x):
    """tanh |x| = -m / (2 + m) with m = exp(-2 |x|) - 1, which has no cancellation near 0."""
    d = abs(x) * -2.0
    d = -100.0 if d < -100.0 else d
    t = d * LOG2_E + MAGIC_64
    k = t - MAGIC_64
    r = fused(-k, LN_2, d)
    r = r - k * LN_2_LOW
    scale = i64(bits_of(t) << i64(52)).view(np.float64)
    m = scale * _expm1_near_0(r) + (scale - 1.0)
    y = m / (2.0 + m)
    return y if x < 0.0 else -y


# log1p(u) = 2 artanh(u / (2 + u)) and artanh(s) = s (1 + s**2 q(s**2)): q with the least relative error (Remez)
L32 = tuple(f32(a) for a in (0.33333207607, 0.20010798671, 0.14000268422, 0.14009386046))
L64 = (
    *(0.33333333333338900244, 0.19999999998007860785, 0.14285714530843746618, 0.11111096356085017524),
    *(0.090914097972183732723, 0.076821018391270016071, 0.067935982587884652523, 0.049491410703272299391),
    0.088747174833767280767,
)


def log1p_of(u):
    """log(1 + u) for u in [0, 1]."""
    raise NotImplementedError


@overload(log1p_of, jit_options={"fastmath": EXACT, "error_model": "numpy"})
def _log1p_of(u):
    def in_float32(u):
        s = u / (f32(2.0) + u)
        z = s * s
        q = ((L32[3] * z + L32[2]) * z + L32[1]) * z + L32[0]
        return f32(2.0) * (s + s * (z * q))

    def in_float64(u):
        s = u / (2.0 + u)
        z = s * s
        q = ((L64[8] * z + L64[7]) * z + L64[6]) * z + L64[5]
        q = ((((q * z + L64[4]) * z + L64[3]) * z + L64[2]) * z + L64[1]) * z + L64[0]
        return 2.0 * (s + s * (z * q))

    return in_float64 if u == types.float64 else in_float32
