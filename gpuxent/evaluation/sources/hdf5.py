"""Datasets of HDF5 files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpuxent.evaluation.sources._base import (
    BFLOAT16,
    FileStamp,
    InFile,
    Slices,
    Window,
    as_dtype,
    number_dtype,
    opening,
    optional,
    pick,
    reading,
    row_chunk,
)
from gpuxent.evaluation.sources._handles import cached_rows, handles
from gpuxent.evaluation.sources._mapped import MappedSource


@dataclass(frozen=True)
class Hdf5Source(InFile):
    """A dataset in chunks. bfloat16 is stored as uint16 with the attribute dtype = "bfloat16"."""

    name: str
    stamp: FileStamp
    dataset: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    missing_chunks: int
    format: ClassVar[str] = "HDF5"

    @property
    def row_chunk(self) -> int:
        return row_chunk(self.shape, self.chunks)

    def read(self, rows: slice, columns: slice | None = None) -> np.ndarray:
        window = Window.of(self.shape, rows, columns)
        with reading(self.name, window, self.stamp.check):
            return as_dtype(cached_rows(self, window, self._cut), self.dtype)

    def _cut(self, place: Slices) -> np.ndarray:
        file = handles.get(self.stamp, lambda: _open_file(Path(self.stamp.path)))
        try:
            return np.asarray(file[self.dataset][place])
        except OSError as error:
            handles.drop(self.stamp)  # one that a network file system has let go stays useless
            raise _with_number(error) from error

    def warnings(self) -> list[str]:
        if not self.missing_chunks:
            return []
        return [f"{self.name}: {self.missing_chunks:,} chunks are not stored and read as the fill value"]


def open_hdf5(path: Path, member: str | None = None) -> MappedSource | Hdf5Source:
    """A dataset; without a name, the only one."""
    h5py = optional("h5py", "hdf5", str(path))
    stamp, found = FileStamp.of(path), dict[str, Any]()
    with opening(path, "HDF5 file"):
        file = _open_file(path)
    with file:
        with opening(path, "HDF5 file"):
            file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        dataset = pick(path, member and member.strip("/"), found, "dataset")
        return _source(str(path) if member is None else f"{path}::{member}", stamp, dataset, found[dataset])


def _source(name: str, stamp: FileStamp, path: str, dataset: Any) -> MappedSource | Hdf5Source:
    if dataset.shape is None:
        raise ValueError(f"{name} is an empty dataset, without a shape")
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{name} is a view of other files, whose changes nobody would see; give those files")
    dtype = number_dtype(dataset.dtype, name, dataset.attrs.get("dtype"))
    offset = dataset.id.get_offset()  # of what is written in one piece, not of chunks
    if offset is not None and _is_plain(dataset, dtype):
        stored = BFLOAT16 if dtype == BFLOAT16 else dataset.dtype
        return MappedSource(name, stamp, dataset.shape, stored, offset, "HDF5")
    if dataset.chunks is None:
        missing = int(dataset.size > 0 and dataset.id.get_storage_size() == 0)
        return Hdf5Source(name, stamp, path, dataset.shape, dtype, (1,) * dataset.ndim, missing)
    grid = [math.ceil(size / chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    missing = math.prod(grid) - dataset.id.get_num_chunks()
    return Hdf5Source(name, stamp, path, dataset.shape, dtype, dataset.chunks, missing)


def _is_plain(dataset: Any, dtype: np.dtype) -> bool:
    """Whether the bytes in the file are NumPy's: HDF5 has number types that it would convert."""
    h5py = optional("h5py", "hdf5", dataset.name)
    as_numpy = h5py.h5t.py_create(dataset.dtype, logical=True)
    return dataset.id.get_type() == as_numpy and (dataset.dtype.isnative or dtype != BFLOAT16)


def _open_file(path: Path) -> Any:
    h5py = optional("h5py", "hdf5", str(path))
    try:
        return h5py.File(path, "r", locking=False)  # which network file systems may lack; changes are noticed anyway
    except OSError as error:
        raise _with_number(error) from error


def _with_number(error: OSError) -> OSError:
    """HDF5 hides the system's reason in its text."""
    number = re.search(r"errno = (\d+), error message = '([^']*)'", str(error))
    if error.errno is None and number is not None and int(number[1]):
        return OSError(int(number[1]), number[2])
    return error
