"""Where rows of logits, labels and document ids come from, read block by block and never whole."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

Rows = tuple[slice, ...]  # one slice per leading axis


class Source(Protocol):
    """An array that can be read in pieces, from several threads at once."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def row_chunk(self) -> int:
        """Blocks that begin at multiples of this many entries of the first axis read no chunk twice."""

    def read(self, rows: Rows, columns: slice = slice(None)) -> Any:
        """The rows, and of logits the columns (a slice of the last axis): a NumPy or CuPy array."""


@dataclass(frozen=True)
class ArraySource:
    """An array in memory, that of the CPU or of a GPU."""

    array: Any
    name: str = "array"
    row_chunk: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, rows: Rows, columns: slice = slice(None)) -> Any:
        return _cut(self.array, rows, columns)


@dataclass(frozen=True)
class NpySource:
    """A `.npy` file, memory-mapped by each read: a task on another thread or machine needs only the path.

    NumPy writes bfloat16 (`ml_dtypes`) as two anonymous bytes, `|V2`; such a file is read as bfloat16.
    """

    path: Path
    row_chunk: int = 1

    @property
    def name(self) -> str:
        return str(self.path)

    @cached_property
    def _header(self) -> tuple[tuple[int, ...], np.dtype]:
        array = self._map()
        return array.shape, array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._header[0]

    @property
    def dtype(self) -> np.dtype:
        return self._header[1]

    def _map(self) -> np.ndarray:
        try:
            array = np.lib.format.open_memmap(self.path, mode="r")  # np.load, but for .npy alone: no archive, no pickle
        except ValueError as error:  # not the format, cut short, empty, or pickled objects
            if zipfile.is_zipfile(self.path):
                raise ValueError(f"{self.path} is an archive of arrays; give one .npy file") from error
            raise ValueError(f"{self.path} is not a whole .npy file: {error}") from error
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array

    def read(self, rows: Rows, columns: slice = slice(None)) -> np.ndarray:
        return _cut(self._map(), rows, columns)


@dataclass(frozen=True)
class ZarrSource:
    """A Zarr v3 array in a folder. bfloat16 is stored as uint16 with the attribute {"dtype": "bfloat16"}."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @cached_property
    def _array(self) -> Any:
        try:
            import zarr
        except ImportError as error:
            raise ValueError(f"{self.path} is a folder, and reading Zarr needs: pip install zarr") from error
        try:
            array = zarr.open_array(str(self.path), mode="r")
        except Exception as error:  # zarr raises many kinds for what is not an array
            raise ValueError(f"{self.path} is not a Zarr array: {error}") from error
        return array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        stored = np.dtype(self._array.dtype)
        return np.dtype(ml_dtypes.bfloat16) if self._is_bfloat16(stored) else stored

    def _is_bfloat16(self, stored: np.dtype) -> bool:
        return stored == np.uint16 and self._array.attrs.get("dtype") == "bfloat16"

    @property
    def row_chunk(self) -> int:
        return (self._array.shards or self._array.chunks)[0] if self.shape else 1

    @property
    def missing_chunks(self) -> int:
        """Chunks that are not stored. Zarr reads them as the fill value, which a killed writer did not mean."""
        return self._array.nchunks - self._array.nchunks_initialized

    def read(self, rows: Rows, columns: slice = slice(None)) -> np.ndarray:
        array, place = self._array, _index(len(self.shape), rows, columns)
        try:
            block = np.asarray(array[place])
        except Exception as error:  # each codec raises its own kind for a chunk that is cut short or altered
            where = ", ".join(f"{s.start}:{s.stop}" for s in rows)
            raise ValueError(f"{self.path} cannot be read at [{where}]: {error}") from error
        return block.view(ml_dtypes.bfloat16) if self._is_bfloat16(block.dtype) else block


def open_source(path: str | Path) -> Source:
    """The source for a path: a folder is Zarr, a file is `.npy`; ValueError or OSError if it cannot be read."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    source: Source = ZarrSource(path) if path.is_dir() else NpySource(path)
    source.shape, source.dtype  # noqa: B018  an unreadable file is an error now, not in the middle of a run
    return source


def _index(ndim: int, rows: Rows, columns: slice) -> tuple[slice, ...]:
    return (*rows, columns) if ndim > len(rows) else rows


def _cut(array: np.ndarray, rows: Rows, columns: slice) -> np.ndarray:
    return array[_index(array.ndim, rows, columns)]
