"""Zarr chunks that hold the numbers as they are: mapped where one is enough, else copied once. Zarr itself copies three
times, at a tenth of the speed or less."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxent.evaluation.sources._base import optional
from gpuxent.evaluation.sources._mapped import map_bytes

MISSING = 2**64 - 1  # in the index of a shard
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Piece:
    """Part of the numbers of a chunk: [start, stop) of it, counted in numbers."""

    file: tuple[int, ...]  # coordinates
    number: int  # of the chunk in its file
    start: int
    stop: int


@dataclass(frozen=True)
class PlainChunks:
    """Chunks of whole rows that follow each other in C order, uncompressed, one or (in shards) several per file."""

    shape: tuple[int, ...]
    axis: int  # along which they are cut; one entry long on the axes before it, whole on those after it
    chunk: int  # entries of the axis
    per_file: int
    sharded: bool
    index_first: bool  # else at the end of the shard
    checksum: bool

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> PlainChunks | None:
        """From zarr.json; None of other chunks, which are Zarr's to decode."""
        shape, outer = tuple(metadata["shape"]), metadata["chunk_grid"]["configuration"]["chunk_shape"]
        codecs, inner, index_first = metadata["codecs"], outer, False
        if sharded := codecs[0]["name"] == "sharding_indexed":
            shards = codecs[0]["configuration"]
            index_first = shards.get("index_location", "end") == "start"
            if len(codecs) != 1 or _ending(shards["index_codecs"]) is not True:
                return None
            codecs, inner = shards["codecs"], shards["chunk_shape"]
        checksum = _ending(codecs)
        if checksum is None or metadata.get("storage_transformers") or not shape or 0 in shape:
            return None
        axis = next((at for at, size in enumerate(outer) if size > 1), len(shape) - 1)
        whole = list(shape[axis + 1 :])
        if whole != outer[axis + 1 :] or whole != inner[axis + 1 :]:
            return None
        per_file = outer[axis] // inner[axis]
        return cls(shape, axis, inner[axis], per_file, sharded, index_first, checksum)

    @property
    def size(self) -> int:
        """Numbers in a chunk."""
        return self.chunk * math.prod(self.shape[self.axis + 1 :])

    def pieces(self, first: int, stop: int) -> Iterator[Piece]:
        """What holds the numbers [first, stop) of the array in C order."""
        length = math.prod(self.shape[self.axis :])  # where the grid of chunks begins anew
        while first < stop:
            outer, place = divmod(first, length)
            number, start = divmod(place, self.size)
            count = min(self.size - start, length - place, stop - first)
            file, inside = divmod(number, self.per_file)
            before = tuple(int(at) for at in np.unravel_index(outer, self.shape[: self.axis])) if self.axis else ()
            yield Piece((*before, file, *(0,) * (len(self.shape) - self.axis - 1)), inside, start, start + count)
            first += count

    def read(self, first: int, stop: int, stored: np.dtype, path_of: Callable[[tuple[int, ...]], str]) -> Any:
        """The numbers [first, stop); None if a chunk is not stored. ValueError for chunks of another size or with a
        wrong checksum."""
        ranges: list[tuple[str, int, int]] = []
        blocks = []
        for piece in self.pieces(first, stop):
            path = path_of(piece.file)
            place = self._place(path, piece.number, stored.itemsize)
            if place is None:
                return None
            start, size = place + piece.start * stored.itemsize, (piece.stop - piece.start) * stored.itemsize
            if self.checksum:
                blocks.append(self._checked(path, place, stored.itemsize)[start - place : start - place + size])
            elif ranges and ranges[-1][0] == path and sum(ranges[-1][1:]) == start:  # adjacent in the shard
                ranges[-1] = (path, ranges[-1][1], ranges[-1][2] + size)
            else:
                ranges.append((path, start, size))
        blocks += [map_bytes(*place) for place in ranges]
        numbers = (blocks[0] if len(blocks) == 1 else np.concatenate(blocks)).view(stored)
        return numbers if numbers.flags.aligned else numbers.copy()

    def _place(self, path: str, number: int, itemsize: int) -> int | None:
        """Of a chunk in its file; None if it is not there."""
        size = self.size * itemsize + CHECKSUM_BYTES * self.checksum
        try:
            with open(path, "rb") as file:
                end = file.seek(0, 2)
                if not self.sharded:
                    found = (0, end)
                else:
                    file.seek(0 if self.index_first else max(end - 16 * self.per_file - CHECKSUM_BYTES, 0))
                    index = file.read(16 * self.per_file + CHECKSUM_BYTES)
                    if len(index) < 16 * self.per_file + CHECKSUM_BYTES:
                        raise ValueError(f"{path} has {end:,} bytes, too few for its index")
                    _verify(np.frombuffer(index, np.uint8), f"the index of {path}")
                    found = struct.unpack_from("<2Q", index, 16 * number)
        except FileNotFoundError:
            return None
        if found[0] == MISSING:
            return None
        if found[1] != size or found[0] + size > end:
            there = max(min(found[1], end - found[0]), 0)
            raise ValueError(f"{path} has a chunk of {there:,} bytes, expected {size:,}")
        return found[0]

    def _checked(self, path: str, place: int, itemsize: int) -> np.ndarray:
        chunk = map_bytes(path, place, self.size * itemsize + CHECKSUM_BYTES)
        _verify(chunk, path)
        return chunk[:-CHECKSUM_BYTES]


def _ending(codecs: Sequence[dict[str, Any]]) -> bool | None:
    """Whether a checksum follows the numbers; None if they are not as in memory."""
    if codecs[0]["name"] != "bytes" or codecs[0].get("configuration", {}).get("endian", "little") != "little":
        return None
    return {(): False, ("crc32c",): True}.get(tuple(codec["name"] for codec in codecs[1:]))


def _verify(data: np.ndarray, what: str) -> None:
    crc32c = optional("google_crc32c", "zarr", what)  # which Zarr needs
    if crc32c.value(data[:-CHECKSUM_BYTES]) != int.from_bytes(data[-CHECKSUM_BYTES:].tobytes(), "little"):
        raise ValueError(f"{what} has a wrong checksum")
