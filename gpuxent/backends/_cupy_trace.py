"""A function of vectors, written for NumPy, as the text of one CUDA kernel.

The function is called once, with a `Symbol` for each number that a row has: to a symbol, an operation is something to
write down. A row alone cannot answer questions about values or shapes, so these are answered "maybe" (`MAYBE`), or are
errors. Whether `bad.any()`, the kernel finds out: see `Trace.doubts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

C_TYPES = {
    np.dtype(stored): name
    for stored, name in (
        (np.bool_, "bool"),
        (np.int8, "signed char"),
        (np.int16, "short"),
        (np.int32, "int"),
        (np.int64, "long long"),
        (np.uint8, "unsigned char"),
        (np.uint16, "unsigned short"),
        (np.uint32, "unsigned int"),
        (np.uint64, "unsigned long long"),
        (np.float32, "float"),
        (np.float64, "double"),
    )
}

# What a symbol can be, by the kind of NumPy's dtypes: narrower numbers are widened as they are read.
WIDE = {"b": np.dtype(np.bool_), "i": np.dtype(np.int64), "u": np.dtype(np.uint64), "f": np.dtype(np.float64)}
INTEGERS = {"b": (-(2**63), 2**63 - 1), "i": (-(2**63), 2**63 - 1), "u": (0, 2**64 - 1)}

# Numbers that are written out. Others become arguments of the kernel, so that it need not be compiled again for them.
WRITTEN = (-2, -1, 0, 1, 2)
SUFFIXES = {"i": "ll", "u": "ull", "f": ""}
NOT_FINITE = {"inf": "0x7ff0000000000000", "-inf": "0xfff0000000000000", "nan": "0x7ff8000000000000"}


class Maybe:
    """Neither yes nor no: the general case has to be traced. True, but equal to nothing."""

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


MAYBE = Maybe()


@dataclass(frozen=True)
class Argument:
    """What the kernel gets: a constant, or a leaf; a number among the leaves is first made a `number_type`."""

    declaration: str
    leaf: int | None = None
    constant: Any = None
    number_type: Any = None


class Symbol(np.lib.mixins.NDArrayOperatorsMixin):
    """A number of a row: its kind, and how it comes from others, as C++ with a {} for each, and {argument}."""

    shape = ()  # so that np.zeros(labels.shape) is one number, which goes for every row
    ndim = size = MAYBE

    def __init__(self, trace: Trace, kind: str, text: str, *operands: Symbol, argument: Argument | None = None) -> None:
        self.trace, self.kind, self.text, self.operands, self.argument = trace, kind, text, operands, argument

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *operands: Any, **how: Any) -> Symbol:
        rule = UFUNCS.get(ufunc)
        if rule is None or method != "__call__" or how:
            raise TypeError(f"numpy.{ufunc.__name__} has no rule")
        return rule(self.trace, *map(_plain, operands))

    def __array_function__(self, function: Any, types: Any, operands: Any, how: dict[str, Any]) -> Any:
        rule = FUNCTIONS.get(function)
        if rule is None or how:
            raise TypeError(f"numpy.{function.__name__} has no rule")
        return rule(self.trace, *map(_plain, operands))

    def __array__(self, *how: Any, **more: Any) -> np.ndarray:
        raise TypeError("a row alone is no array")

    def __bool__(self) -> bool:
        raise TypeError("it decides by values of rows")

    def any(self) -> bool:
        """Written down as a doubt, and taken for False."""
        self.trace.doubts.append(self.trace.cast(self, "b"))
        return False

    def astype(self, dtype: Any, copy: bool = True) -> Symbol:
        dtype = np.dtype(dtype)
        if dtype == np.float32:
            return Symbol(self.trace, "f", "widened(narrowed({}))", self)
        if dtype != WIDE.get(dtype.kind):
            raise TypeError(f"no values of dtype {dtype}")
        return self.trace.cast(self, dtype.kind)


class Table:
    """A vector in which rows look their entries up."""

    def __init__(self, trace: Trace, leaf: int, dtype: np.dtype) -> None:
        self.trace, self.leaf, self.dtype = trace, leaf, dtype

    def __getitem__(self, index: Any) -> Symbol:
        if not isinstance(index, Symbol) or index.kind not in "iu":
            raise TypeError("it indexes a table with something else than integers of the rows")
        return self.trace.entry(self.leaf, self.dtype, "{argument}[{}]", index)


class Trace:
    """What is written down of one function. The leaves of its arguments are numbered."""

    def __init__(self) -> None:
        self.doubts: list[Symbol] = []  # true where a row needs a second look

    def entry(self, leaf: int, dtype: np.dtype, text: str, *operands: Symbol) -> Symbol:
        """Of an array; `text` indexes it."""
        if dtype == np.float32:
            text = f"widened({text})"
        return Symbol(self, _kind(dtype), text, *operands, argument=Argument(f"const {C_TYPES[dtype]}*", leaf))

    def number(self, leaf: int, dtype: np.dtype) -> Symbol:
        """One that is the same for every row."""
        wide = WIDE[_kind(dtype)]
        argument = Argument(C_TYPES[wide], leaf, number_type=wide.type)
        return Symbol(self, wide.kind, "{argument}", argument=argument)

    def symbol(self, value: Any) -> Symbol:
        value = _plain(value)
        return self.cast(value, _kind_of(value))

    def cast(self, operand: Any, kind: str) -> Symbol:
        """A symbol or a Python number as a symbol of that kind."""
        if not isinstance(operand, Symbol):
            return self._constant(WIDE[kind].type(operand))
        if operand.kind == kind:
            return operand
        return Symbol(self, kind, f"static_cast<{C_TYPES[WIDE[kind]]}>({{}})", operand)

    def _constant(self, value: Any) -> Symbol:
        kind = value.dtype.kind
        if kind == "b":
            return Symbol(self, kind, "true" if value else "false")
        if kind == "f" and not math.isfinite(value):
            return Symbol(self, kind, f"__longlong_as_double({NOT_FINITE[str(value)]})")
        if value in WRITTEN:
            return Symbol(self, kind, f"{value}{SUFFIXES[kind]}")
        return Symbol(self, kind, "{argument}", argument=Argument(C_TYPES[value.dtype], constant=value))


def written(
    name: str, outputs: Sequence[tuple[Symbol, np.dtype]], doubts: Sequence[Symbol]
) -> tuple[str, list[Argument]]:
    """The kernel: first the number of rows, then what the outputs and doubts need, the outputs, and a flag for doubts.

    Numbers are named in the order in which they are needed, and so the text tells only what is computed.
    """
    names: dict[int, str] = {}
    body: list[str] = []
    arguments: list[Argument] = []

    def name_of(symbol: Symbol) -> str:
        if id(symbol) not in names:
            operands = [name_of(operand) for operand in symbol.operands]
            text = symbol.text.format(*operands, argument=f"a{len(arguments)}")
            if symbol.argument is not None:
                arguments.append(symbol.argument)
            if operands or symbol.argument is not None:
                body.append(f"const {C_TYPES[WIDE[symbol.kind]]} v{len(body)} = {text};")
                text = f"v{len(body) - 1}"
            names[id(symbol)] = text  # a constant goes by its text
        return names[id(symbol)]

    stores = []
    for i, (symbol, dtype) in enumerate(outputs):
        convert = "narrowed" if dtype == np.float32 else f"static_cast<{C_TYPES[dtype]}>"
        stores.append(f"out{i}[row] = {convert}({name_of(symbol)});")
    stores += [f"if ({name_of(symbol)}) *doubt = 1;" for symbol in doubts]
    parameters = ["long long rows"]
    parameters += [f"{argument.declaration} a{i}" for i, argument in enumerate(arguments)]
    parameters += [f"{C_TYPES[dtype]}* out{i}" for i, (_, dtype) in enumerate(outputs)]
    parameters += ["int* doubt"] * bool(doubts)
    lines = [
        "const long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;",
        "if (row >= rows) return;",
        *body,
        *stores,
    ]
    signature = f'extern "C" __global__ void {name}({", ".join(parameters)})'
    return f"{signature} {{\n    " + "\n    ".join(lines) + "\n}\n", arguments


# ---- what the functions may use of NumPy ----


def _plain(operand: Any) -> Any:
    """A symbol, or a Python number: what NumPy makes of shape (), as it made np.zeros(labels.shape), is one."""
    if isinstance(operand, (np.generic, np.ndarray)) and operand.ndim == 0:
        operand = operand.item()
    if isinstance(operand, (Symbol, bool, int, float)):
        return operand
    raise TypeError(f"it meets {operand!r}")


def _kind(dtype: np.dtype) -> str:
    """Of the symbol for a number of that dtype."""
    if dtype not in C_TYPES:
        raise TypeError(f"no arrays of dtype {dtype}")
    return "i" if dtype.kind == "u" and dtype.itemsize < 8 else dtype.kind


def _kind_of(operand: Any) -> str:
    if isinstance(operand, Symbol):
        return operand.kind
    return "b" if isinstance(operand, bool) else "i" if isinstance(operand, int) else "f"


def _common(*operands: Any) -> str:
    """The kind that NumPy computes in; a Python integer takes the kind of the integers that it meets."""
    kinds = {_kind_of(operand) for operand in operands}
    if kinds >= {"i", "u"} and "f" not in kinds:
        if any(_kind_of(o) == "i" and (isinstance(o, Symbol) or o < 0) for o in operands):
            raise TypeError("it mixes uint64 and int64")
        return "u"
    return max(kinds, key="biuf".index)


Rule = Callable[..., Symbol]


def _arithmetic(text: str, kinds: str = "if") -> Rule:
    def rule(trace: Trace, *operands: Any) -> Symbol:
        kind = _common(*operands)
        if kind not in kinds:
            raise TypeError(f"no arithmetic of {WIDE[kind]}")
        return Symbol(trace, kind, text, *(trace.cast(o, kind) for o in operands))

    return rule


def _of_kind(kind: str, text: str) -> Rule:
    """A rule for operands that become this kind; only what is bool is taken for bool."""

    def rule(trace: Trace, *operands: Any) -> Symbol:
        if kind == "b" and _common(*operands) != "b":
            raise TypeError("it takes numbers for bool")
        return Symbol(trace, kind, text, *(trace.cast(o, kind) for o in operands))

    return rule


def _comparison(ufunc: np.ufunc, sign: str) -> Rule:
    """Integers are compared as such, whatever their types, as NumPy does: uint64 is never -1."""

    def rule(trace: Trace, *operands: Any) -> Symbol:
        if all(_kind_of(o) != "f" for o in operands):
            kind = next(o.kind for o in operands if isinstance(o, Symbol))
            low, high = INTEGERS[kind]
            if any(not isinstance(o, Symbol) and not low <= o <= high for o in operands):
                beside_zero = [0 if isinstance(o, Symbol) else (o > 0) - (o < 0) for o in operands]
                return trace.cast(bool(ufunc(*beside_zero)), "b")
        kind = _common(*operands)
        return Symbol(trace, "b", f"{{}} {sign} {{}}", *(trace.cast(o, kind) for o in operands))

    return rule


def _extreme(sign: str) -> Rule:
    def rule(trace: Trace, *operands: Any) -> Symbol:
        kind = _common(*operands)
        text = f"{{0}} {sign} {{1}} ? {{0}} : {{1}}"
        if kind == "f":
            text = f"{{0}} != {{0}} || {text}"  # a NaN stays
        return Symbol(trace, kind, text, *(trace.cast(o, kind) for o in operands))

    return rule


def _power(trace: Trace, base: Any, exponent: Any) -> Symbol:
    if not isinstance(base, Symbol) or exponent != 2:
        raise TypeError("of powers there are only squares")
    return UFUNCS[np.multiply](trace, base, base)


def _where(trace: Trace, condition: Any, yes: Any, no: Any) -> Symbol:
    if _kind_of(condition) != "b":
        raise TypeError("it takes numbers for bool")
    kind = _common(yes, no)
    return Symbol(trace, kind, "{} ? {} : {}", trace.cast(condition, "b"), trace.cast(yes, kind), trace.cast(no, kind))


UFUNCS: dict[Any, Rule] = {
    np.add: _arithmetic("{} + {}"),
    np.subtract: _arithmetic("{} - {}"),
    np.multiply: _arithmetic("{} * {}"),
    np.true_divide: _of_kind("f", "{} / {}"),
    np.negative: _arithmetic("-{}"),
    np.power: _power,
    np.absolute: _arithmetic("fabs({})", "f"),
    np.exp: _of_kind("f", "exp({})"),
    np.log: _of_kind("f", "log({})"),
    np.log1p: _of_kind("f", "log1p({})"),
    np.isnan: lambda trace, value: UFUNCS[np.not_equal](trace, value, value),
    np.maximum: _extreme(">"),
    np.minimum: _extreme("<"),
    np.bitwise_and: _of_kind("b", "{} && {}"),
    np.logical_and: _of_kind("b", "{} && {}"),
    np.bitwise_or: _of_kind("b", "{} || {}"),
    np.logical_or: _of_kind("b", "{} || {}"),
    np.invert: _of_kind("b", "!{}"),
    np.logical_not: _of_kind("b", "!{}"),
    np.equal: _comparison(np.equal, "=="),
    np.not_equal: _comparison(np.not_equal, "!="),
    np.less: _comparison(np.less, "<"),
    np.less_equal: _comparison(np.less_equal, "<="),
    np.greater: _comparison(np.greater, ">"),
    np.greater_equal: _comparison(np.greater_equal, ">="),
}


def _filled(value: int) -> Rule:
    def rule(trace: Trace, like: Symbol) -> Symbol:
        return trace.cast(value, like.kind)

    return rule


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.where: _where,
    np.zeros_like: _filled(0),
    np.ones_like: _filled(1),
    np.shape: lambda trace, symbol: symbol.shape,
    np.ndim: lambda trace, symbol: symbol.ndim,
    np.count_nonzero: lambda trace, symbol: MAYBE,
}
