"""Arrays of Zarr in folders."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpuxent.evaluation.sources._base import (
    ChangedError,
    FileStamp,
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
from gpuxent.evaluation.sources._zarr_plain import PlainChunks

METADATA = ("zarr.json", ".zarray")  # of version 3, and of 2


@dataclass(frozen=True)
class ZarrSource:
    """A Zarr array in a folder. bfloat16 is stored as uint16 with the attribute {"dtype": "bfloat16"}."""

    name: str
    stamp: FileStamp  # of the metadata
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]  # of what is one file: shards, if there are
    stored_chunks: int
    newest_ns: int  # the latest time at which one was written
    plain: PlainChunks | None
    format: ClassVar[str] = "Zarr"

    @classmethod
    def open(cls, path: Path, member: str | None = None) -> ZarrSource:
        name, folder = (str(path), path) if member is None else (f"{path}::{member}", path / member)
        zarr = optional("zarr", "zarr", name)
        if member is None and not _is_array(folder) and (found := list(_arrays(folder))):
            return cls.open(path, pick(path, None, found, "Zarr array"))
        stamp = _metadata(folder, name)
        with opening(name, "Zarr array"):
            array = zarr.open_array(str(folder), mode="r")
        dtype = number_dtype(np.dtype(array.dtype), name, array.attrs.get("dtype"))
        chunks = tuple(array.shards or array.chunks)
        stored = newest = 0
        for chunk in _chunk_files(os.path.dirname(stamp.path), _grid(array.shape, chunks)):
            stored, newest = stored + 1, max(newest, chunk.mtime_ns)
        with opening(name, "Zarr array"):
            metadata = json.loads(Path(stamp.path).read_bytes())
            plain = PlainChunks.of(metadata) if metadata["zarr_format"] == 3 else None
        return cls(name, stamp, tuple(array.shape), dtype, chunks, stored, newest, plain)

    @property
    def folder(self) -> str:
        return os.path.dirname(self.stamp.path)

    @property
    def row_chunk(self) -> int:
        return row_chunk(self.shape, self.chunks)

    @property
    def missing_chunks(self) -> int:
        """Chunks that are not stored. Zarr reads them as the fill value, which a killed writer did not mean."""
        return math.prod(_grid(self.shape, self.chunks)) - self.stored_chunks

    def read(self, rows: slice, columns: slice | None = None) -> np.ndarray:
        window = Window.of(self.shape, rows, columns)
        with reading(self.name, window, self.stamp.check):
            block = self._read_plain(window)
            return as_dtype(cached_rows(self, window, self._cut) if block is None else block, self.dtype)

    def _read_plain(self, window: Window) -> np.ndarray | None:
        """Without Zarr; None where that cannot be, or where a chunk is better decoded once and kept."""
        plain = self.plain
        if plain is None or not len(window) or (plain.checksum and len(self.shape) == 1):
            return None
        first, stop = window.first * window.row_size, window.stop * window.row_size
        with self._unchanged({piece.file for piece in plain.pieces(first, stop)}):
            numbers = plain.read(first, stop, self.dtype.newbyteorder("<"), self._chunk_path)
        if numbers is None or window.columns is None:
            return numbers
        block = numbers.reshape(len(window), window.row_size)[:, window.columns]
        return block.copy() if 2 * block.size < numbers.size else block

    def _cut(self, place: Slices) -> np.ndarray:
        with self._unchanged(self._touched(place)):
            return np.asarray(self._array()[place])

    def _array(self) -> Any:
        zarr = optional("zarr", "zarr", self.name)
        return handles.get(self.stamp, lambda: zarr.open_array(self.folder, mode="r"))

    def _chunk_path(self, at: tuple[int, ...]) -> str:
        return os.path.join(self.folder, self._array().metadata.encode_chunk_key(at))

    @contextmanager
    def _unchanged(self, chunks: Iterable[tuple[int, ...]]) -> Iterator[None]:
        """Around the reading of chunks. ValueError if they were written since the source was opened."""
        stamps = [self._chunk_stamp(self._chunk_path(at)) for at in chunks]
        yield
        for stamp in stamps:
            if stamp is not None:
                stamp.check()

    def _touched(self, place: Slices) -> Iterator[tuple[int, ...]]:
        """Coordinates of the chunks that hold a rectangle."""
        spans = zip(place, self.chunks, strict=False)
        return product(*(range(cut.start // chunk, math.ceil(cut.stop / chunk)) for cut, chunk in spans))

    def _chunk_stamp(self, path: str) -> FileStamp | None:
        """None of a chunk that is not stored."""
        try:
            stamp = FileStamp.of(path)
        except FileNotFoundError:
            if not self.missing_chunks:
                raise ChangedError(f"{self.name} changed while it was read: {path} is gone") from None
            return None
        if stamp.mtime_ns > self.newest_ns:
            raise ChangedError(f"{self.name} changed while it was read: {path} was written since it was opened")
        return stamp

    def files(self) -> list[FileStamp]:
        chunks = _chunk_files(self.folder, _grid(self.shape, self.chunks))
        return [FileStamp.of(self.stamp.path), *sorted(chunks, key=lambda stamp: stamp.path)]

    def check(self, rows: slice, columns: slice | None = None) -> None:
        self.stamp.check()
        for place in Window.of(self.shape, rows, columns).slices():
            for at in self._touched(place):
                self._chunk_stamp(self._chunk_path(at))

    def warnings(self) -> list[str]:
        if not self.missing_chunks:
            return []
        return [f"{self.name}: {self.missing_chunks:,} chunks are not stored and read as the fill value"]


def _metadata(folder: Path, name: str) -> FileStamp:
    """Of the array's metadata; ValueError if the folder has none."""
    for file in METADATA:
        if (folder / file).is_file():
            return FileStamp.of(folder / file)
    raise ValueError(f"{name} is not a Zarr array: there is no {METADATA[0]} in it")


def _arrays(folder: Path, prefix: str = "") -> Iterator[str]:
    """Names of the arrays in a group and in its groups."""
    for child in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if _is_array(child):
            yield prefix + child.name
        else:
            yield from _arrays(child, f"{prefix}{child.name}/")


def _is_array(folder: Path) -> bool:
    if (folder / ".zarray").is_file():
        return True
    try:
        return json.loads((folder / "zarr.json").read_bytes())["node_type"] == "array"
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _grid(shape: Sequence[int], chunks: Sequence[int]) -> list[int]:
    """How many chunks there are along each axis."""
    return [math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True)]


def _chunk_files(folder: str, grid: list[int], prefix: str = "") -> Iterator[FileStamp]:
    """Stamps of the stored chunks, which lie in files such as c/0/1, 0/1, c.0.1 or 0.1; what a killed writer left
    beside them is none."""
    with os.scandir(folder) as entries:
        for entry in entries:
            place = f"{prefix}{entry.name}"
            if not re.fullmatch(r"(c|\d+)([./]\d+)*", place):
                continue
            if entry.is_dir():
                yield from _chunk_files(entry.path, grid, f"{place}/")
                continue
            at = [int(number) for number in re.findall(r"\d+", place)]
            if not grid or (len(at) == len(grid) and all(i < size for i, size in zip(at, grid, strict=True))):
                found = entry.stat()
                yield FileStamp(entry.path, found.st_size, found.st_mtime_ns)
