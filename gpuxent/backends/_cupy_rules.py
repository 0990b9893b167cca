"""Vectors with one entry per row, on the GPU: a function of them is one kernel, and so is their exact sum."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, lru_cache, partial
from itertools import islice
from typing import Any

import cupy
import numpy as np

from gpuxent._records import Array
from gpuxent.backends import _numpy, on_host, to_gpu
from gpuxent.backends._cupy_core import OPTIONS, source
from gpuxent.backends._cupy_trace import C_TYPES, WIDE, Argument, Symbol, Table, Trace, written

BLOCK = 128  # threads

# Rounded as NumPy rounds: a * b before c is added.
RULE_OPTIONS = ("-std=c++17", "--fmad=false")

# What a function sees of the leaves of its arguments: the numbers and arrays, those of records too.
ROW, ONE, TABLE, NUMBER, CONSTANT, MISFIT = "an entry per row", "an array of shape ()", "a table", "number", "=", "!"


# ---- functions of vectors ----


def map_rows(
    function: Callable[..., Any], *arguments: Any, outputs: int = 1, dtype: Any = np.float64, at: bool = False
) -> Any:
    """As `_numpy.map_rows`. One output has the dtype; of several, each has that of its values.

    Python's numbers are part of what is traced; those of NumPy, and arrays of shape (), may change without another
    trace. Arrays that a partial function brings with it are tables, of any length. Nothing waits for the GPU but a
    check of values: where it finds a bad one, the function is called with NumPy arrays, and raises.
    """
    leaves = _leaves(arguments)
    rows = _rows_among(leaves)
    if rows is None:
        return _numpy.map_rows(function, *arguments, outputs=outputs, dtype=dtype, at=at)
    bound = function if isinstance(function, partial) else partial(function)
    with rows.device:
        leaves = [_on_gpu(leaf) for leaf in (*bound.args, *bound.keywords.values(), *leaves)]
        tables = len(bound.args) + len(bound.keywords)
        kinds = [_kind(leaf, None) for leaf in leaves[:tables]]
        kinds += [_kind(leaf, rows.shape) for leaf in leaves[tables:]]
        types = tuple(map(type, arguments))
        call = (bound.func, len(bound.args), tuple(bound.keywords), types, rows.ndim if at else None)
        try:
            rule = _rule(call, tuple(kinds), outputs, dtype)
        except TypeError as error:
            raise TypeError(f"{_name(bound.func)} cannot be made a kernel: {error}") from error
        results = [cupy.empty(rows.shape, found) for found in rule.dtypes]
        if rows.size == 0:
            return results[0] if outputs == 1 else tuple(results)
        given = [np.int64(rows.size), *rule.given(leaves), *results]
        if rule.doubtful:
            given.append(cupy.zeros((), np.int32))
        rule.kernel((-(-rows.size // BLOCK),), (BLOCK,), tuple(given))
        if rule.doubtful and given[-1].get():
            _call_on_host(bound, arguments, at)
    return results[0] if outputs == 1 else tuple(results)


@dataclass(frozen=True)
class _Rule:
    """A function as a kernel."""

    kernel: Any
    arguments: Sequence[Argument]
    dtypes: Sequence[np.dtype]
    doubtful: bool

    def given(self, leaves: Sequence[Any]) -> Iterator[Any]:
        for argument in self.arguments:
            if argument.leaf is None:
                yield argument.constant
            elif argument.number_type is not None:
                yield argument.number_type(leaves[argument.leaf])
            else:
                yield cupy.ascontiguousarray(leaves[argument.leaf])


@lru_cache(maxsize=256)
def _rule(call: tuple[Any, ...], kinds: tuple[tuple[Any, ...], ...], outputs: int, dtype: Any) -> _Rule:
    """A function made a kernel. All that this depends on is in the arguments, which are the key of the cache."""
    function, positional, keywords, types, ndim = call
    trace = Trace()
    symbols = iter([_symbol(trace, leaf, *kind) for leaf, kind in enumerate(kinds)])
    bound = [next(symbols) for _ in range(positional)]
    how = {name: next(symbols) for name in keywords}
    if ndim is not None:
        how["start"] = (0,) * ndim
    arguments: list[Any] = []
    for kind in types:
        size = len(fields(kind)) if is_dataclass(kind) else 0
        arguments.append(kind(*islice(symbols, size)) if size else next(symbols))
    # np.asarray would ask a symbol for an array
    traced: Any = Symbol.astype if function is np.asarray else function
    try:
        result = traced(*bound, *arguments, **how)
        found = [trace.symbol(value) for value in (result if outputs > 1 else [result])]
    except Exception as error:
        raise TypeError(str(error)) from error
    if len(found) != outputs:
        raise TypeError(f"it has {len(found)} outputs, expected {outputs}")
    dtypes = [np.dtype(dtype)] if outputs == 1 else [WIDE[symbol.kind] for symbol in found]
    if any(d not in C_TYPES for d in dtypes):
        raise TypeError(f"no output of dtype {dtypes[0]}")
    name = "gpuxent_" + re.sub(r"\W", "_", _name(function))
    text, needed = written(name, list(zip(found, dtypes, strict=True)), trace.doubts)
    return _Rule(_kernel(name, text), needed, dtypes, bool(trace.doubts))


@cache
def _kernel(name: str, text: str) -> Any:
    return cupy.RawKernel(source("float32") + text, name, options=RULE_OPTIONS)


def _leaves(arguments: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for argument in arguments:
        if hasattr(argument, "__dataclass_fields__"):  # is_dataclass takes a microsecond
            found.extend(vars(argument).values())
        else:
            found.append(argument)
    return found


def _rows_among(leaves: Sequence[Any]) -> Array | None:
    """A leaf with the shape of the rows and on their device."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, cupy.ndarray)]
    return next((array for array in arrays if array.ndim), arrays[0] if arrays else None)


def _on_gpu(leaf: Any) -> Any:
    is_host = isinstance(leaf, np.ndarray) and leaf.ndim and not isinstance(leaf, cupy.ndarray)
    return to_gpu(leaf) if is_host else leaf


def _kind(leaf: Any, shape: tuple[int, ...] | None) -> tuple[Any, ...]:
    """What the trace has to know of a leaf; without a shape, an array is a table."""
    if isinstance(leaf, cupy.ndarray):
        if leaf.ndim == 0:
            return ONE, leaf.dtype
        if shape is None:
            return TABLE, leaf.dtype
        return (ROW, leaf.dtype) if leaf.shape == shape else (MISFIT, leaf.shape, shape)
    if isinstance(leaf, (np.generic, np.ndarray)):
        return NUMBER, leaf.dtype
    return CONSTANT, leaf, type(leaf)


def _symbol(trace: Trace, leaf: int, kind: str, value: Any, other: Any = None) -> Any:
    if kind == ROW:
        return trace.entry(leaf, value, "{argument}[row]")
    if kind == ONE:
        return trace.entry(leaf, value, "*{argument}")
    if kind == TABLE:
        return Table(trace, leaf, value)
    if kind == NUMBER:
        return trace.number(leaf, value)
    return value if kind == CONSTANT else f"an array of shape {value} among rows of shape {other}"


def _call_on_host(bound: partial, arguments: Sequence[Any], at: bool) -> None:
    """For the error that it raises."""
    keywords = {name: on_host(value) for name, value in bound.keywords.items()}
    function = partial(bound.func, *map(on_host, bound.args), **keywords)
    on_hosts = [type(a)(*map(on_host, vars(a).values())) if is_dataclass(type(a)) else on_host(a) for a in arguments]
    _numpy.map_rows(function, *on_hosts, at=at)
    raise RuntimeError(f"{_name(bound.func)} finds a bad value on the GPU and none on the CPU")


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


# ---- sums ----

FEW = 2048  # values for one block: more blocks need memory to meet in, set to 0 by a launch of its own
PER_BLOCK, MOST_BLOCKS = 512, 512
WARP, WORDS = 32, 71  # as in totals.cu
SHARED_BYTES = 8 * (WORDS * WARP + WORDS + 1)


def total(values: Array, denominator: Any = 1.0) -> Array:
    """The exact sum of all entries over the denominator, rounded once; NaN over 0. The bits of `_numpy.total`, as an
    array of shape () that nothing waits for."""
    with values.device:
        if values.dtype != np.bool_:
            values = values.astype(np.float64, copy=False)
        values = cupy.ascontiguousarray(values)
        if isinstance(denominator, cupy.ndarray):
            denominator = denominator.astype(np.float64, copy=False)
            over = "const double*"
        else:
            denominator, over = np.float64(denominator), "double"
        blocks = 1 if values.size <= FEW else min(-(-values.size // PER_BLOCK), MOST_BLOCKS)
        result = cupy.empty((), np.float64)
        meeting = cupy.zeros(WORDS + 1, np.uint64) if blocks > 1 else cupy.empty(0, np.uint64)
        kernel = _total_kernel(C_TYPES[values.dtype], over)
        given = (values, np.int64(values.size), denominator, meeting, result)
        kernel((blocks,), (WARP,), given, shared_mem=SHARED_BYTES)
    return result


@cache
def _total_kernel(value: str, denominator: str) -> Any:
    name = f"totals::exact_total<{value}, {denominator}>"
    return _totals_module().get_function(name)


@cache
def _totals_module() -> Any:
    names = [f"totals::exact_total<{v}, {d}>" for v in ("bool", "double") for d in ("double", "const double*")]
    return cupy.RawModule(code=source("formats", "totals"), options=OPTIONS, name_expressions=names)
