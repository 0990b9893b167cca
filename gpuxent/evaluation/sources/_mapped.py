"""Arrays that lie in a file as they lie in memory: of a read, the range that it needs is mapped."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gpuxent.evaluation.sources._base import FileStamp, InFile, Slices, Window, as_dtype, number_dtype, reading

MADV_POPULATE_READ = 22  # Linux 5.14
SLAB_BYTES = 64 * 2**20


def map_bytes(path: str, offset: int, size: int, *, populate: bool = True) -> np.ndarray:
    """Bytes of a file, their pages in memory. The mapping goes with the array: what stays mapped counts as memory of
    the process, and Dask kills workers for it."""
    if size == 0:
        return np.empty(0, np.uint8)
    ahead = offset % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), size + ahead, access=mmap.ACCESS_READ, offset=offset - ahead)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return _read_bytes(path, offset, size)  # a file system whose files cannot be mapped
    whole = np.frombuffer(mapped, np.uint8)
    if populate and (number := _populate(whole)):
        if number not in (errno.EINVAL, errno.ENOSYS):
            return _read_bytes(path, offset, size)  # which says why: to touch pages that are not there would kill us
        whole[:: mmap.PAGESIZE].max()  # an old kernel, another system: touch every page instead
    return whole[ahead:]


def _populate(pages: np.ndarray) -> int:
    """All pages in one call; 0 or the error's number.

    As fast as faults one by one, but the disk is read now, while others compute, and pages that cannot be had are an
    error and not a signal. Not by `mmap.madvise`, which keeps the interpreter's lock meanwhile.
    """
    madvise = _madvise()
    if madvise is None:
        return errno.ENOSYS
    return ctypes.get_errno() if madvise(pages.ctypes.data, pages.size, MADV_POPULATE_READ) else 0


@cache
def _madvise() -> Any:
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, TypeError, AttributeError):  # Windows
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _read_bytes(path: str, offset: int, size: int) -> np.ndarray:
    block, done = np.empty(size, np.uint8), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < size:
            count = file.readinto(block[done:].data)
            if not count:
                raise ValueError(f"the file ends {size - done:,} bytes too soon")
            done += count
    return block


@dataclass(frozen=True)
class MappedSource(InFile):
    """An array in a file: a `.npy` file, a tensor of a safetensors file, a contiguous dataset of an HDF5 file."""

    name: str
    stamp: FileStamp
    shape: tuple[int, ...]
    stored: np.dtype
    offset: int  # of its first byte
    format: str
    fortran: bool = False
    row_chunk: int = 1

    @property
    def dtype(self) -> np.dtype:
        return number_dtype(self.stored, self.name)

    def read(self, rows: slice, columns: slice | None = None) -> np.ndarray:
        window = Window.of(self.shape, rows, columns)
        with reading(self.name, window, self.stamp.check):
            block = window.gather(self._cut_columns) if self.fortran else self._cut_rows(window)
        return as_dtype(block, self.dtype)

    def _cut_rows(self, window: Window) -> np.ndarray:
        width = window.row_size * self.stored.itemsize
        part = math.prod(window.shape[1:]) < window.row_size // 2  # then most pages of a row are not needed
        start, size = self.offset + window.first * width, len(window) * width
        block = map_bytes(self.stamp.path, start, size, populate=not part).view(self.stored)
        if window.columns is not None:
            block = block.reshape(len(window), window.row_size)[:, window.columns]
        return block.copy() if part or not block.flags.aligned else block

    def _cut_columns(self, place: Slices) -> np.ndarray:
        """Of a file in Fortran order, in which a row is spread over all of it: slabs of whole columns, one after the
        other, of which only pages with these rows are touched."""
        block = np.empty([cut.stop - cut.start for cut in place], self.stored)
        height = math.prod(self.shape[:-1])
        step = max(1, SLAB_BYTES // (height * self.stored.itemsize)) if height else 1
        last = place[-1]
        for first in range(last.start, last.stop, step):
            stop = min(first + step, last.stop)
            size = self.stored.itemsize * height
            mapped = map_bytes(self.stamp.path, self.offset + first * size, (stop - first) * size, populate=False)
            slab = mapped.view(self.stored).reshape(stop - first, *self.shape[-2::-1]).T
            block[..., first - last.start : stop - last.start] = slab[place[:-1]]
        return block
