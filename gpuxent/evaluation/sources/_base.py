"""What every source does: numbers rows, notices files that change, and says what is wrong with what it reads."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Slices = tuple[slice, ...]


class ChangedError(ValueError):
    """A file is another than when it was opened."""


class SeveralError(ValueError):
    """A path alone does not say which array is meant."""

    def __init__(self, message: str, names: Collection[str] = ()) -> None:
        super().__init__(message)
        self.names = list(names)


@dataclass(frozen=True)
class FileStamp:
    """What tells one state of a file from the next."""

    path: str  # absolute: a worker in another folder opens the same file
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileStamp:
        path = os.path.abspath(path)
        found = os.stat(path)
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """ChangedError if the file is another now."""
        now = FileStamp.of(self.path)
        if now.size != self.size:
            raise ChangedError(f"{self.path} changed while it was read: {self.size:,} bytes -> {now.size:,} bytes")
        if now != self:
            raise ChangedError(f"{self.path} changed while it was read: it was written to again")


class Source(Protocol):
    """An array that can be read in pieces, by several threads at once and, pickled, in other processes.

    Rows are numbered as if all axes but that of the vocabulary were one, in C order.
    """

    @property
    def name(self) -> str:
        """For messages: the path as it was given, with ::member."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype:
        """In the machine's byte order, whatever the file's."""

    @property
    def row_chunk(self) -> int:
        """Of an array with a vocabulary: blocks that begin at multiples of this many rows read no chunk twice."""

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        """Without columns every axis is one of rows: shape (n,). With them the last is the vocabulary: (n, columns)."""

    def files(self) -> list[FileStamp]:
        """All files that it reads, as they are now; none of an array in memory."""

    def warnings(self) -> list[str]:
        """What is odd but can be read, a sentence each."""

    def check(self, rows: slice, columns: slice | None = None) -> None:
        """ValueError if files of these rows are others than when the source was opened.

        A read checks; but a block may be memory that changes with its file, so check again when it has been used.
        """


class InMemory:
    """No files."""

    def files(self) -> list[FileStamp]:
        return []

    def warnings(self) -> list[str]:
        return []

    def check(self, rows: slice, columns: slice | None = None) -> None:
        pass


class InFile:
    """All in one file."""

    stamp: FileStamp

    def files(self) -> list[FileStamp]:
        return [FileStamp.of(self.stamp.path)]

    def warnings(self) -> list[str]:
        return []

    def check(self, rows: slice, columns: slice | None = None) -> None:
        self.stamp.check()


def rectangles(shape: Sequence[int], first: int, stop: int) -> list[Slices]:
    """Slices of an array whose elements, one rectangle after the other, are those numbered [first, stop) in C order.

    At most 2 * len(shape) - 1 of them; a single empty one of an empty range.
    """
    if first >= stop:
        return [(slice(0, 0),) * len(shape)]
    if len(shape) == 1:
        return [(slice(first, stop),)]
    inner, rest = math.prod(shape[1:]), shape[1:]
    (start, head), (end, tail) = divmod(first, inner), divmod(stop, inner)
    if start == end:
        return [(slice(start, start + 1), *cut) for cut in rectangles(rest, head, tail)]
    found: list[Slices] = []
    if head:
        found += [(slice(start, start + 1), *cut) for cut in rectangles(rest, head, inner)]
        start += 1
    if start < end:
        found.append((slice(start, end), *(slice(0, size) for size in rest)))
    if tail:
        found += [(slice(end, end + 1), *cut) for cut in rectangles(rest, 0, tail)]
    return found


@dataclass(frozen=True)
class Window:
    """The part of an array that one read asks for."""

    rows: tuple[int, ...]  # the axes of rows; none of an array that is a single row
    first: int
    stop: int
    columns: slice | None
    row_size: int  # elements in a row of the array, all columns

    @classmethod
    def of(cls, shape: tuple[int, ...], rows: slice, columns: slice | None) -> Window:
        axes = shape if columns is None else shape[:-1]
        first, stop, step = rows.indices(math.prod(axes))
        if step != 1:
            raise ValueError(f"rows must be contiguous, got {rows}")
        if columns is not None:
            columns = slice(*columns.indices(shape[-1]))
        return cls(axes, first, max(first, stop), columns, 1 if columns is None else shape[-1])

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self),) if self.columns is None else (len(self), len(range(self.row_size)[self.columns]))

    def slices(self) -> list[Slices]:
        """Rectangles with the columns: what to index the array with."""
        columns = () if self.columns is None else (self.columns,)
        cuts = rectangles(self.rows, self.first, self.stop) if self.rows else [()]
        return [(*cut, *columns) for cut in cuts]

    def gather(self, cut: Callable[[Slices], Any]) -> Any:
        """One array from `cut(slices)` of every rectangle; without a copy if there is one of adjacent rows."""
        blocks = []
        for place in self.slices():
            block = cut(place)
            if len(self.rows) != 1:  # arrays of Dask with query planning cannot be reshaped
                count = math.prod(axis.stop - axis.start for axis in place[: len(self.rows)])
                block = block.reshape((count, *self.shape[1:]))[: len(self)]
            blocks.append(block)
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)  # CuPy and Dask step in for their own arrays


def row_chunk(shape: Sequence[int], chunks: Sequence[int]) -> int:
    """Of rows in an array of chunks: multiples of this many rows lie between chunks. The last axis is no row axis."""
    axes = range(max(len(shape) - 1, min(len(shape), 1)))
    for axis in axes:
        if chunks[axis] > 1:
            whole = axis == 0 or shape[axis] % chunks[axis] == 0
            # if not whole, the grid begins anew in the middle of a multiple
            return (chunks[axis] if whole else shape[axis]) * math.prod(shape[axis + 1 : len(axes)])
    return 1


def number_dtype(dtype: np.dtype, name: str, stored_as: Any = None) -> np.dtype:
    """The dtype that is read: native byte order, and bfloat16 where uint16 is marked so. ValueError if not numbers."""
    if stored_as in ("bfloat16", b"bfloat16") and dtype.newbyteorder("=") == np.uint16:
        return BFLOAT16
    if dtype.kind not in "biuf" and dtype != BFLOAT16:
        raise ValueError(f"{name} holds {dtype}, expected floats or integers")
    return dtype.newbyteorder("=")


def as_dtype(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The block as what it holds: 16 bits seen as bfloat16, foreign byte order turned round."""
    if dtype == BFLOAT16 and block.dtype != BFLOAT16:
        return block.astype(block.dtype.newbyteorder("="), copy=False).view(BFLOAT16)
    return block.astype(dtype, copy=False)


@contextmanager
def reading(name: str, window: Window, check: Callable[[], None]) -> Iterator[None]:
    """Around the reading of a window: files that change, and what libraries raise for a chunk that is cut short or
    altered, become a ValueError with the place. An OSError of the system passes: reading again may help."""
    check()
    try:
        yield
    except Exception as error:
        if passes(error):
            raise
        check()  # the better reason, if there is one
        raise ValueError(f"{name} cannot be read at rows {window.first}:{window.stop}: {cause(error)}") from error
    check()


@contextmanager
def opening(path: Any, kind: str) -> Iterator[None]:
    """Around a library's opening of a file: all that it raises for bad data becomes a ValueError."""
    try:
        yield
    except Exception as error:
        if passes(error):
            raise
        raise ValueError(f"{path} is not a whole {kind}: {cause(error)}") from error


def passes(error: Exception) -> bool:
    """Whether an error says more as it is: of the system (what codecs raise has no number), or ours."""
    return isinstance(error, (MemoryError, ChangedError)) or (isinstance(error, OSError) and error.errno is not None)


def cause(error: Exception) -> str:
    """One line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def optional(module: str, extra: str, name: str) -> Any:
    """A package that only some formats need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"reading {name} needs {package}: pip install 'gpuxent[{extra}]'") from error


def pick(path: Any, member: str | None, names: Collection[str], kind: str) -> str:
    """The member asked for, or the only one."""
    shown = ", ".join([*names][:5]) + (", ..." if len(names) > 5 else "")
    if member is None:
        if len(names) == 1:
            return next(iter(names))
        hint = f"; name one, as in {path}::{next(iter(names))}" if names else ""
        raise SeveralError(f"{path} holds {len(names)} {kind}s{': ' if names else ''}{shown}{hint}", names)
    if member not in names:
        raise ValueError(f"{path} has no {kind} {member!r}; it has {shown or 'none'}")
    return member
