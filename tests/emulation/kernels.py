"""CuPy's four kinds of kernel, with the rules of CuPy 14 for what may be passed and what comes back."""

import ctypes
import math
from functools import lru_cache
from typing import Any

import numpy as np

import emulation

from .arrays import MemoryPointer, ndarray, of
from .arrays import allocate as allocate_host
from .compiler import CompileError, Fault, Function

MOST_SHARED, USUAL_SHARED = 227 * 1024, 48 * 1024

C_NAMES = {
    "float64": "double",
    "float32": "float",
    "int64": "long long",
    "int32": "int",
    "int16": "short",
    "int8": "signed char",
    "uint64": "unsigned long long",
    "uint32": "unsigned int",
    "uint16": "unsigned short",
    "uint8": "unsigned char",
    "bool": "bool",
}


def c_name(dtype: np.dtype) -> str:
    if dtype.name not in C_NAMES:
        raise TypeError(f"the emulation has no {dtype} in elementwise and reduction kernels: pass a view")
    return C_NAMES[dtype.name]


# ---------------------------------------------------------------------------------------------------------------------
# Launches


@lru_cache(maxsize=512)
def function(code: str, name: str, options: tuple[str, ...]) -> Function:
    return Function(code, name, options)


def cell(value: Any) -> Any:
    """Memory of ctypes that holds a value."""
    data = value.tobytes()
    return (ctypes.c_char * len(data)).from_buffer_copy(data)


def argument(name: str, position: int, parameter: Any, value: Any) -> Any:
    """A cell with what CuPy would pass, and a Fault if the kernel would read something else."""
    kind, size = parameter.kind.decode(), parameter.size
    target, target_size = parameter.target.decode(), parameter.target_size

    def check(fits: bool, passed: str) -> None:
        if not fits:
            wanted = {"p": "a pointer", "s": f"a struct of {size} bytes"}.get(kind, f"{kind}{size}")
            raise Fault(f"{name}: argument {position} is {passed} where the kernel takes {wanted}")

    if isinstance(value, MemoryPointer):
        check(kind == "p", "a MemoryPointer")
        return cell(np.uint64(value.ptr))
    if isinstance(value, ndarray):
        check(kind == "p", "an array")
        dtype = value.dtype
        same = dtype.itemsize == target_size and (dtype.kind == target or {dtype.kind, target} <= {"i", "u"})
        if target in "iufb" and not same and dtype != np.uint8:
            raise Fault(
                f"{name}: argument {position} is an array of {dtype} where the kernel takes {target}{target_size}*"
            )
        return cell(np.uint64(value._host.ctypes.data))
    if isinstance(value, np.ndarray):
        if value.ndim or value.dtype.names is None:
            raise TypeError(f"Unsupported type {type(value)}")
        check(kind == "s" and value.itemsize == size, f"a record of {value.itemsize} bytes")
        return cell(value)
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, int):
        value = np.int64(value) if value < 2**63 else np.uint64(value)
    elif isinstance(value, float):
        value = np.float64(value)
    elif not isinstance(value, np.generic):
        raise TypeError(f"Unsupported type {type(value)}")
    fits = value.itemsize == size and (value.dtype.kind == kind or {value.dtype.kind, kind} <= {"i", "u", "p"})
    check(fits, f"a {value.dtype.name}")
    return cell(value)


class RawKernel:
    def __init__(self, code, name, options=(), backend="nvrtc", *, translate_cucomplex=False,
                 enable_cooperative_groups=False, jitify=False):  # fmt: skip
        self.code, self.name, self.options, self.__name__ = code, name, tuple(options), name
        self._function = function(code, name, self.options)
        self._shared_limit = USUAL_SHARED
        self.preferred_shared_memory_carveout = -1

    # A real kernel has these from its cubin.
    num_regs = 32
    local_size_bytes = shared_size_bytes = const_size_bytes = 0
    binary_version = ptx_version = 90

    @property
    def max_threads_per_block(self) -> int:
        self._function.library()
        return min(1024, self._function.block_limit)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._shared_limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, limit: int) -> None:
        if not 0 <= limit <= MOST_SHARED:
            raise Fault(f"{self.name}: {limit} bytes of shared memory, at most {MOST_SHARED}")
        self._shared_limit = limit

    @property
    def kernel(self) -> "RawKernel":
        return self

    def compile(self, log_stream=None) -> None:
        self._function.library()

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None) -> None:
        self._function.library()
        grid, block = self._checked(grid, block, shared_mem)
        parameters = self._function.parameters
        if len(args) != len(parameters):
            raise Fault(f"{self.name}: {len(args)} arguments, the kernel takes {len(parameters)}")
        cells = [argument(self.name, i, p, a) for i, (p, a) in enumerate(zip(parameters, args, strict=True))]
        emulation.start(self._function, grid, block, cells, shared_mem)

    def _checked(self, grid, block, shared_mem) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if type(grid) is not tuple or type(block) is not tuple:
            raise TypeError("grid and block are tuples")
        grid, block = ((*map(int, sizes), 1, 1)[:3] for sizes in (grid, block))
        threads, cluster = math.prod(block), self._function.cluster

        def check(holds: bool, problem: str) -> None:
            if not holds:
                raise Fault(f"{self.name}: {problem}, with grid {grid}, block {block}, {shared_mem} bytes shared")

        check(min(grid) >= 1 and min(block) >= 1, "an empty launch")
        check(grid[0] <= 2**31 - 1 and max(grid[1:]) <= 65535, "too large a grid")
        check(max(block[:2]) <= 1024 and block[2] <= 64 and threads <= 1024, "too large a block")
        check(threads <= self._function.block_limit, f"__launch_bounds__ is {self._function.block_limit}")
        check(shared_mem <= self._shared_limit, f"shared memory is limited to {self._shared_limit} bytes")
        check(grid[0] % cluster == 0, f"the grid is no multiple of the cluster of {cluster} blocks")
        return grid, block


class RawModule:
    def __init__(self, *, code=None, path=None, options=(), backend="nvrtc", translate_cucomplex=False,
                 enable_cooperative_groups=False, name_expressions=None, jitify=False):  # fmt: skip
        if code is None:
            raise TypeError("the emulation takes `code`")
        self.code, self.options = code, tuple(options)
        self.name_expressions = None if name_expressions is None else tuple(name_expressions)

    def get_function(self, name: str) -> RawKernel:
        if self.name_expressions is None:
            if 'extern "C"' not in self.code:
                raise CompileError(f'named symbol not found: {name} is not extern "C" and no name expression')
        elif name not in self.name_expressions:
            raise CompileError(f"named symbol not found: {name} is not among the name expressions")
        return RawKernel(self.code, name, self.options)

    def compile(self, log_stream=None) -> None:
        for name in self.name_expressions or ():
            self.get_function(name).compile()


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of elementwise and reduction kernels


class Parameter:
    """One of 'T x, raw float64 y'."""

    def __init__(self, text: str, is_const: bool):
        words = text.split()
        if len(words) < 2:
            raise Exception(f"Syntax error: {text}")
        *keywords, kind, self.name = words
        self.raw, self.is_const = "raw" in keywords, is_const and "_non_const" not in keywords
        for word in keywords:
            if word not in ("raw", "_non_const"):
                raise Exception(f'Unknown keyword "{word}"')
        self.dtype = None if len(kind) == 1 else np.dtype(kind)
        self.ctype = kind if self.dtype is None else c_name(self.dtype)


def parameters(text: str, is_const: bool) -> tuple[Parameter, ...]:
    return tuple(Parameter(part, is_const) for part in text.strip().split(",")) if text else ()


def preprocessed(args: Any) -> list[Any]:
    for value in args:
        if not isinstance(value, ndarray | np.generic | bool | int | float | complex):
            raise TypeError(f"Unsupported type {type(value)}")
    return list(args)


def decide_types(ins: tuple[Parameter, ...], outs: tuple[Parameter, ...], in_args: list, out_args: list) -> tuple:
    """The dtype of every parameter and what the placeholders stand for."""
    types: dict[str, np.dtype] = {}
    for parameter, value in [*zip(outs, out_args, strict=len(out_args) > 0), *zip(ins, in_args, strict=True)]:
        if not isinstance(value, ndarray):
            if parameter in outs:
                raise TypeError("Output arguments must be cupy.ndarray")
            continue
        wanted = types.setdefault(parameter.ctype, value.dtype) if parameter.dtype is None else parameter.dtype
        if wanted != value.dtype:
            raise TypeError(f"Type is mismatched. {parameter.name} {value.dtype} {wanted} {parameter.ctype}")
    found = [[types[p.ctype] if p.dtype is None else p.dtype for p in side] for side in (ins, outs)]
    return (*found, types)


def broadcast(args: list, params: tuple[Parameter, ...], sized: bool) -> tuple[list, tuple[int, ...]]:
    loop = [isinstance(a, ndarray) and not p.raw for p, a in zip(params, args, strict=False)]
    if sized and any(loop):
        raise ValueError("Specified 'size' can be used only if all of the ndarray are 'raw'.")
    if not sized and not any(loop):
        raise ValueError("Loop size is undecided.")
    shape = np.broadcast_shapes(*(a.shape for a, is_loop in zip(args, loop, strict=True) if is_loop))
    made = [
        of(np.broadcast_to(a._host, shape)) if is_loop and a.shape != shape else a
        for a, is_loop in zip(args, loop, strict=True)
    ]
    return made, shape


def outputs(out_args: list, types: list, shape: tuple[int, ...], params: tuple[Parameter, ...], sized: bool) -> list:
    if not out_args:
        if any(p.raw for p in params) and not sized:
            raise ValueError("Output array size is Undecided")
        return [of(allocate_host(shape, t)) for t in types]
    for p, a in zip(params, out_args, strict=True):
        if not isinstance(a, ndarray):
            raise TypeError("Output arguments type must be cupy.ndarray")
        if not p.raw and a.shape != shape:
            raise ValueError("Out shape is mismatched")
    return out_args


def shape_words(shape: tuple[int, ...]) -> list[int]:
    """emulation::Shape; no dimension counts as one of length 1."""
    shape = shape or (1,)
    if len(shape) > 16:
        raise ValueError("the emulation knows up to 16 dimensions")
    return [math.prod(shape), len(shape), *shape, *[0] * (16 - len(shape))]


def array_cell(array: ndarray) -> Any:
    strides = array.strides or (array.itemsize,)
    words = [array._host.ctypes.data, *shape_words(array.shape), *strides, *[0] * (16 - len(strides))]
    return cell(np.array(words, np.int64))


def index_cell(shape: tuple[int, ...]) -> Any:
    return cell(np.array([*shape_words(shape), *[0] * 16], np.int64))


def scalar_cell(value: Any, dtype: np.dtype) -> Any:
    made = np.empty((), dtype)
    made[()] = value
    return cell(made)


def signature(params: tuple[Parameter, ...], args: list, types: list) -> list[str]:
    """The C++ parameters."""
    declared = []
    for p, a, dtype in zip(params, args, types, strict=True):
        const = "const " if p.is_const else ""
        if isinstance(a, ndarray):
            declared.append(f"{const}CArray<{c_name(a.dtype)}> {'' if p.raw else '_raw_'}{p.name}")
        else:
            declared.append(f"{const}{c_name(dtype)} {p.name}")
    return declared


def cells_of(args: list, types: list) -> list:
    pairs = zip(args, types, strict=True)
    return [array_cell(a) if isinstance(a, ndarray) else scalar_cell(a, dtype) for a, dtype in pairs]


def typedefs(types: dict[str, np.dtype]) -> str:
    return "".join(f"typedef {c_name(dtype)} {name};\n" for name, dtype in sorted(types.items()))


def references(params: tuple[Parameter, ...], args: list, index: str) -> str:
    """An element of each array that takes part in the loop, under the parameter's name."""
    return "\n".join(
        f"{'const ' if p.is_const else ''}{p.ctype} &{p.name} = _raw_{p.name}[{index}.get()];"
        for p, a in zip(params, args, strict=True)
        if isinstance(a, ndarray) and not p.raw
    )


def check_name(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f'Invalid kernel name: "{name}"')
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Elementwise


class ElementwiseKernel:
    def __init__(self, in_params, out_params, operation, name="kernel", reduce_dims=True, preamble="", no_return=False,
                 return_tuple=False, *, loop_prep="", after_loop="", options=()):  # fmt: skip
        self.name = self.__name__ = check_name(name)
        self.in_params, self.out_params = parameters(in_params, True), parameters(out_params, False)
        self.params = self.in_params + self.out_params
        if any(p.name == "i" for p in self.params):
            raise ValueError("Can not use 'i' as a parameter name")
        self.nin, self.nout, self.nargs = len(self.in_params), len(self.out_params), len(self.params)
        self.operation, self.preamble, self.options = operation, preamble, tuple(options)
        self.no_return, self.return_tuple = no_return, return_tuple
        self.loop_prep, self.after_loop = loop_prep, after_loop

    def __call__(self, *args, size=-1, stream=None, block_size=128, **unknown):
        if unknown:
            raise TypeError(f"Wrong arguments {unknown}")
        if len(args) not in (self.nin, self.nargs):
            raise TypeError(
                f"Wrong number of arguments for {self.name!r}. It must be either {self.nin} or {self.nargs} "
                f"(with outputs), but given {len(args)}."
            )
        args = preprocessed(args)
        out_args = args[self.nin :]
        looped, shape = broadcast(args, self.params[: len(args)], size != -1)
        in_args = looped[: self.nin]
        in_types, out_types, types = decide_types(self.in_params, self.out_params, in_args, out_args)
        if size != -1:
            shape = (size,)
        out_args = outputs(out_args, out_types, shape, self.out_params, size != -1)
        if math.prod(shape):
            self._run(in_args + out_args, in_types + out_types, types, shape)
        if self.no_return:
            return None
        return out_args[0] if self.nout == 1 and not self.return_tuple else tuple(out_args)

    def _run(self, args, dtypes, types, shape) -> None:
        code = f"""#include "carray.h"
{typedefs(types)}
#line 1 "preamble of {self.name}"
{self.preamble}
#line 1 "{self.name}"
__global__ void {self.name}({", ".join([*signature(self.params, args, dtypes), "CIndexer _ind"])}) {{
{self.loop_prep};
for (ptrdiff_t i = (ptrdiff_t)blockIdx.x * blockDim.x + threadIdx.x; i < _ind.size();
     i += (ptrdiff_t)blockDim.x * gridDim.x) {{
_ind.set(i);
{references(self.params, args, "_ind")}
{self.operation};
}}
{self.after_loop};
}}
"""
        cells = [*cells_of(args, dtypes), index_cell(shape)]
        # A few threads, each with a few elements, however many there are.
        emulation.start(function(code, self.name, self.options), (2, 1, 1), (16, 1, 1), cells, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Reduction


class ReductionKernel:
    """With several outputs, pass all of them: CuPy writes them all, but returns the first only."""

    def __init__(self, in_params, out_params, map_expr, reduce_expr, post_map_expr, identity, name="reduce_kernel",
                 reduce_type=None, reduce_dims=True, preamble="", options=()):  # fmt: skip
        self.name = self.__name__ = check_name(name)
        self.in_params, self.out_params = parameters(in_params, True), parameters(out_params, False)
        self.nin, self.nout = len(self.in_params), len(self.out_params)
        self.map_expr, self.reduce_expr, self.post_map_expr = map_expr, reduce_expr, post_map_expr
        self.identity = "" if identity is None else str(identity)
        self.reduce_type = self.out_params[0].ctype if reduce_type is None else reduce_type
        self.preamble, self.options = preamble, tuple(options)

    def __call__(self, *args, out=None, axis=None, keepdims=False, stream=None, **unknown):
        if unknown:
            raise TypeError(f"Wrong arguments {unknown}")
        if len(args) not in (self.nin, self.nin + self.nout):
            raise TypeError(f"Wrong number of arguments for {self.name}")
        out_args = list(args[self.nin :])
        if out is not None:
            if self.nout != 1:
                raise NotImplementedError
            if out_args:
                raise ValueError("cannot specify 'out' as both a positional and keyword argument")
            out_args = [out]
        in_args, out_args = preprocessed(args[: self.nin]), preprocessed(out_args)
        in_args, shape = broadcast(in_args, self.in_params, False)
        in_types, out_types, types = decide_types(self.in_params, self.out_params, in_args, out_args)
        reduced, kept = split_axes(axis, len(shape))
        if len(in_args) == 1 and len(kept) <= 1 and not in_args[0].flags.c_contiguous:
            reduced = tuple(sorted(reduced, key=lambda i: -abs(in_args[0].strides[i])))
        out_shape = tuple(1 if i in reduced else n for i, n in enumerate(shape) if keepdims or i in kept)
        out_args = outputs(out_args, out_types, out_shape, self.out_params, False)
        if not out_args[0].size:
            return out_args[0]
        if self.identity == "" and 0 in shape:
            raise ValueError(f"zero-size array to reduction operation {self.name} which has no identity")
        # CuPy hands simple cases to CUB if the machine has nvcc. Both ways have to work, so schedules take turns.
        if emulation.schedule.order != "backward" and self._cub_takes(in_args, out_args, reduced, kept):
            self._run_like_cub(in_args, out_args, types, reduced)
        else:
            self._run(in_args, out_args, in_types + out_types, types, shape, reduced, kept)
        return out_args[0]

    def _run(self, in_args, out_args, dtypes, types, shape, reduced, kept) -> None:
        order = reduced + kept
        if order != tuple(range(len(shape))):
            if any(p.raw for p in self.in_params):
                raise NotImplementedError("Illegal conditions")  # CuPy's words
            in_args = [of(a._host.transpose(order)) if isinstance(a, ndarray) else a for a in in_args]
        args = in_args + out_args
        params = self.in_params + self.out_params
        declared = [*signature(params, args, dtypes), "CIndexer _in_ind", "CIndexer _out_ind"]
        strands = 16
        code = f"""#include "carray.h"
{typedefs(types)}typedef int IndexT;
#line 1 "preamble of {self.name}"
{self.preamble}
#line 1 "{self.name}"
#define REDUCE(a, b) ({self.reduce_expr})
#define POST_MAP(a) ({self.post_map_expr})
typedef {self.reduce_type} _type_reduce;
static_assert(sizeof(_type_reduce) <= 96, "CuPy keeps 512 of them in 48 KB of shared memory.");
__global__ void {self.name}({", ".join(declared)}) {{
    _type_reduce* _strands = reinterpret_cast<_type_reduce*>(emulation::shared_memory()) + threadIdx.x * {strands};
    for (ptrdiff_t _i = threadIdx.x; _i < _out_ind.size(); _i += blockDim.x) {{
        for (int _strand = 0; _strand < {strands}; ++_strand) {{
            _type_reduce _s = _type_reduce({self.identity});
            IndexT _J = _strand;
            for (ptrdiff_t _j = _i + _strand * _out_ind.size(); _j < _in_ind.size();
                 _j += {strands} * _out_ind.size(), _J += {strands}) {{
                _in_ind.set(_j);
                {references(self.in_params, in_args, "_in_ind")}
                _type_reduce _a = static_cast<_type_reduce>({self.map_expr});
                _s = REDUCE(_s, _a);
            }}
            _strands[_strand] = _s;
        }}
        for (int _half = {strands // 2}; _half; _half /= 2) {{
            for (int _strand = 0; _strand < _half; ++_strand) {{
                _type_reduce _a = _strands[_strand], _b = _strands[_strand + _half];
                _strands[_strand] = REDUCE(_a, _b);
            }}
        }}
        _type_reduce _s = _strands[0];
        _out_ind.set(_i);
        {references(self.out_params, out_args, "_out_ind")}
        POST_MAP(_s);
    }}
}}
"""
        in_shape = tuple(shape[i] for i in order)
        cells = [*cells_of(args, dtypes), index_cell(in_shape), index_cell(out_args[0].shape)]
        self._start(code, self.options, cells, strands)

    def _cub_takes(self, in_args, out_args, reduced, kept) -> bool:
        if len(in_args) != 1 or len(out_args) != 1 or not isinstance(in_args[0], ndarray):
            return False
        reduced, kept, array = tuple(sorted(reduced)), tuple(sorted(kept)), in_args[0]
        if not array.size:
            return False
        every = tuple(range(array.ndim))
        if array.flags.f_contiguous:
            return reduced + kept == every
        return array.flags.c_contiguous and kept + reduced == every

    def _run_like_cub(self, in_args, out_args, types, reduced) -> None:
        """No options, no indices, the names in0 and out0 put in as text, at most 32 bytes per value."""
        array, out = in_args[0], out_args[0]
        old_in, old_out = self.in_params[0].name, self.out_params[0].name
        map_expr, post_map_expr = self.map_expr, self.post_map_expr
        if (old_in, old_out) != ("in0", "out0"):
            map_expr, post_map_expr = map_expr.replace(old_in, "in0"), post_map_expr.replace(old_out, "out0")
        names = {"type_in0_raw": array.dtype, "type_out0_raw": out.dtype}
        strands = 8
        code = f"""#include "carray.h"
{typedefs({**types, **names})}typedef int sizeT;
typedef int IndexT;
#line 1 "preamble of {self.name}"
{self.preamble}
#line 1 "{self.name} as CuPy hands it to CUB"
typedef {self.reduce_type} _type_reduce;
static_assert(sizeof(_type_reduce) <= 32, "The intermediate reduction type is assumed to be at most 32 bytes.");
#define POST_MAP(a) ({post_map_expr})
struct _reduction_op {{
    __device__ __forceinline__ _type_reduce operator()(const _type_reduce &a, const _type_reduce &b) const {{
        return {self.reduce_expr};
    }}
}};
__global__ void {self.name}(const type_in0_raw* _raw_in0, type_out0_raw* _raw_out0, long long _segments,
                            sizeT _segment_size, sizeT _array_size) {{
    _type_reduce* _strands = reinterpret_cast<_type_reduce*>(emulation::shared_memory()) + threadIdx.x * {strands};
    _reduction_op op;
    for (long long _segment = threadIdx.x; _segment < _segments; _segment += blockDim.x) {{
        const type_in0_raw* segment_head = _raw_in0 + _segment * _segment_size;
        _type_reduce aggregate = _type_reduce({self.identity});
        for (sizeT _first = 0; _first < _segment_size; _first += {strands}) {{
            for (sizeT _j = 0; _j < {strands}; ++_j) {{
                IndexT _J = _first + _j;
                if (_J < _segment_size) {{
                    const type_in0_raw in0 = segment_head[_J];
                    _strands[_j] = static_cast<_type_reduce>({map_expr});
                }} else {{
                    _strands[_j] = _type_reduce({self.identity});
                }}
            }}
            for (int _step = 1; _step < {strands}; _step *= 2)
                for (int _j = 0; _j < {strands}; _j += 2 * _step) _strands[_j] = op(_strands[_j], _strands[_j + _step]);
            aggregate = op(aggregate, _strands[0]);
        }}
        type_out0_raw &out0 = _raw_out0[_segment];
        POST_MAP(aggregate);
    }}
}}
"""
        segment = math.prod(array.shape[i] for i in reduced)
        if array.flags.f_contiguous:  # the result is laid out likewise, without asking whose it is
            out._host = np.ndarray(out.shape, out.dtype, out.data.mem, out.data.ptr - out.data.mem.ptr, order="F")
        cells = [
            cell(np.uint64(array.data.ptr)),
            cell(np.uint64(out.data.ptr)),
            cell(np.int64(array.size // segment)),
            cell(np.int32(segment)),
            cell(np.int32(0)),
        ]
        self._start(code, (), cells, strands)

    def _start(self, code, options, cells, strands) -> None:
        threads, most = 16, 96  # bytes of _type_reduce
        emulation.start(function(code, self.name, options), (1, 1, 1), (threads, 1, 1), cells, threads * strands * most)


def split_axes(axis: Any, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axes = range(ndim) if axis is None else axis if isinstance(axis, tuple | list) else (axis,)
    for i in axes:
        if not -ndim <= i < ndim:
            raise np.exceptions.AxisError(i, ndim)
    reduced = tuple(sorted(i % ndim for i in axes))
    kept = tuple(i for i in range(ndim) if i not in reduced)
    if len(reduced) + len(kept) != ndim:
        raise ValueError("duplicate value in 'axis'")
    return reduced, kept
