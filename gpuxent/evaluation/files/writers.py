"""Files of every format that `sources` reads, written block by block in the order of the rows, never held whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np

# Of the smallest piece that a reader decodes: long enough to be read at full speed, and two fit into a block of
# `gpuxent perplexity`. Zarr keeps a file per shard; a thousand files for 128 GB is a number that file systems like.
CHUNK_BYTES, SHARD_BYTES = 16 * 2**20, 128 * 2**20

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Layout:
    """An array that is to be written, and how it is cut: into boxes of whole rows that follow each other in C order.

    `has_columns`: the last axis is a row, not one more axis of rows. `chunk_rows`: how many rows a reader is to decode
    at once, fewer where an axis ends; None: 16 MiB of them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str  # inside the file; "" of one that is not named
    has_columns: bool
    chunk_rows: int | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        return self.shape[:-1] if self.has_columns else self.shape

    @property
    def columns(self) -> tuple[int, ...]:
        return self.shape[-1:] if self.has_columns else ()

    @property
    def row_bytes(self) -> int:
        return math.prod(self.columns) * self.dtype.itemsize

    @property
    def stored_dtype(self) -> np.dtype:
        """Little-endian; 16 bits of bfloat16, where the format has no bfloat16, go as uint16 with a mark beside."""
        return np.dtype("<u2") if self.dtype == BFLOAT16 else self.dtype.newbyteorder("<")

    def stored(self, block: np.ndarray) -> np.ndarray:
        """The bits of a block in the stored dtype; NaN payloads survive the change of byte order."""
        if self.dtype == BFLOAT16:
            return block.view(np.uint16)
        return np.ascontiguousarray(block, self.stored_dtype)

    def rows_of(self, size: int) -> int:
        """How many have so many bytes; at least one."""
        return max(size // max(self.row_bytes, 1), 1)

    @cached_property
    def chunk(self) -> tuple[int, ...]:
        """The box of `chunk_rows` rows: (1, ..., 1, some, all, ..., all) of the leading axes."""
        box: list[int] = []
        left = self.chunk_rows or self.rows_of(CHUNK_BYTES)
        for n in reversed(self.lead):
            box.insert(0, max(min(n, left), 1))
            left = max(left // max(n, 1), 1)
        return tuple(box)

    @cached_property
    def shard(self) -> tuple[int, ...]:
        """Chunks that follow each other, of 128 MiB together if the axis has so many."""
        cut = next((i for i, n in enumerate(self.chunk) if n > 1), len(self.chunk) - 1)
        while cut > 0 and self.chunk[cut] == self.lead[cut]:
            cut -= 1
        size = self.chunk[cut]
        wanted = SHARD_BYTES // max(math.prod(self.chunk) * self.row_bytes, 1)
        count = max(min(wanted, -(-self.lead[cut] // size)), 1)
        return (*self.chunk[:cut], size * count, *self.chunk[cut + 1 :])

    def boxes(self, box: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """(first, stop) of the flat rows of each box, in order."""
        cut = next((i for i, n in enumerate(box) if n > 1), len(box) - 1)
        inner = math.prod(self.lead[cut + 1 :])
        axis, step = self.lead[cut] * inner, box[cut] * inner
        for start in range(0, math.prod(self.lead), max(axis, 1)):
            for first in range(start, start + axis, step):
                yield first, min(first + step, start + axis)

    def place(self, first: int, stop: int, box: tuple[int, ...]) -> tuple[slice, ...]:
        """Where in the array a box lies."""
        start = np.unravel_index(first, self.lead)
        sides = (slice(int(i), min(int(i) + n, end)) for i, n, end in zip(start, box, self.lead, strict=True))
        return (*sides, *(slice(0, n) for n in self.columns))


class Writer(Protocol):
    """Writes one array; blocks come in order, each the rows of one of `blocks()`."""

    has_chunks: ClassVar[bool]
    has_names: ClassVar[bool]

    def __init__(self, path: Path, layout: Layout) -> None: ...
    def blocks(self) -> Iterator[tuple[int, int]]: ...
    def write(self, first: int, block: np.ndarray) -> None: ...
    def close(self) -> None: ...


def needed(package: str, why: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"{why} needs {package}: pip install 'gpuxent[{extra}]'") from error


class NpyWriter:
    """A header and the values. NumPy's own way with bfloat16: two anonymous bytes, `|V2`."""

    has_chunks: ClassVar[bool] = False
    has_names: ClassVar[bool] = False

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout = layout
        self.file = path.open("xb")
        descr = "|V2" if layout.dtype == BFLOAT16 else np.lib.format.dtype_to_descr(layout.stored_dtype)
        header = {"descr": descr, "fortran_order": False, "shape": layout.shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def blocks(self) -> Iterator[tuple[int, int]]:
        return self.layout.boxes(self.layout.chunk)

    def write(self, first: int, block: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(self.layout.stored(block)).data.cast("B"))

    def close(self) -> None:
        self.file.close()


SAFETENSORS_NAMES = {"b1": "BOOL"} | {
    f"{kind}{size}": f"{name}{8 * size}" for kind, name in (("f", "F"), ("i", "I"), ("u", "U")) for size in (1, 2, 4, 8)
}


class SafetensorsWriter(NpyWriter):
    """The length of the header (8 bytes), the header (JSON, padded so that values are aligned), and the values.

    The safetensors library writes only what is whole in memory.
    """

    has_names = True

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout = layout
        name = "BF16" if layout.dtype == BFLOAT16 else SAFETENSORS_NAMES[layout.dtype.str[1:]]
        size = math.prod(layout.shape) * layout.dtype.itemsize
        tensor = {"dtype": name, "shape": layout.shape, "data_offsets": [0, size]}
        header = json.dumps({layout.name: tensor}).encode()
        header += b" " * (-len(header) % 8)
        self.file = path.open("xb")
        self.file.write(len(header).to_bytes(8, "little") + header)


class ZarrWriter:
    """A Zarr v3 array, alone or inside a group; whole shards only, for Zarr has no lock that protects part of one.

    Logits hardly compress, so chunks are stored as they are, with a checksum.
    """

    has_chunks: ClassVar[bool] = True
    has_names: ClassVar[bool] = True

    def __init__(self, path: Path, layout: Layout) -> None:
        zarr = needed("zarr", "writing .zarr", "zarr")
        from zarr.codecs import Crc32cCodec

        self.layout, place = layout, path
        for part in filter(None, layout.name.split("/")):
            zarr.create_group(str(place))
            place = place / part
        self.array = zarr.create_array(
            str(place),
            shape=layout.shape,
            dtype=layout.stored_dtype,
            chunks=(*layout.chunk, *layout.columns),
            shards=(*layout.shard, *layout.columns),
            compressors=[Crc32cCodec()],
            attributes={"dtype": "bfloat16"} if layout.dtype == BFLOAT16 else None,
            config={"write_empty_chunks": True},  # one of zeros is left out otherwise, as is one never written
        )

    def blocks(self) -> Iterator[tuple[int, int]]:
        return self.layout.boxes(self.layout.shard)

    def write(self, first: int, block: np.ndarray) -> None:
        place = self.layout.place(first, first + len(block), self.layout.shard)
        self.array[place] = self.layout.stored(block).reshape([s.stop - s.start for s in place])

    def close(self) -> None:
        pass


class Hdf5Writer:
    """A dataset in one piece, which readers can map; if rows per chunk are given, in chunks with a checksum each."""

    has_chunks: ClassVar[bool] = True
    has_names: ClassVar[bool] = True

    def __init__(self, path: Path, layout: Layout) -> None:
        h5py = needed("h5py", "writing HDF5", "hdf5")
        self.layout = layout
        self.raw = _FileForHdf5(path, "x+")
        self.file = h5py.File(self.raw, "w")
        in_chunks = layout.chunk_rows is not None and 0 not in layout.shape
        storage = {"chunks": (*layout.chunk, *layout.columns), "fletcher32": True} if in_chunks else {}
        self.data = self.file.create_dataset(layout.name, shape=layout.shape, dtype=layout.stored_dtype, **storage)
        if layout.dtype == BFLOAT16:
            self.data.attrs["dtype"] = "bfloat16"

    def blocks(self) -> Iterator[tuple[int, int]]:
        return self.layout.boxes(self.layout.chunk)

    def write(self, first: int, block: np.ndarray) -> None:
        place = self.layout.place(first, first + len(block), self.layout.chunk)
        self.data[place] = self.layout.stored(block).reshape([s.stop - s.start for s in place])
        self.raw.check()

    def close(self) -> None:
        self.file.close()
        self.raw.close()
        self.raw.check()


class _FileForHdf5(FileIO):
    """A file that keeps its first error to itself: HDF5 crashes the process some time after one that it sees."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while self.error is None and left:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class ParquetWriter:
    """One column: numbers, or fixed-size lists of them; a row group per chunk."""

    has_chunks: ClassVar[bool] = True
    has_names: ClassVar[bool] = True

    def __init__(self, path: Path, layout: Layout) -> None:
        pa = self.pa = needed("pyarrow", "writing Parquet", "parquet")
        from pyarrow.parquet import ParquetWriter as Out

        self.layout = layout
        self.value = pa.field("element", pa.from_numpy_dtype(layout.stored_dtype), nullable=False)
        self.type = pa.list_(self.value, *layout.columns) if layout.has_columns else self.value.type
        mark = {"dtype": "bfloat16"} if layout.dtype == BFLOAT16 else None
        self.schema = pa.schema([pa.field(layout.name, self.type, nullable=False, metadata=mark)])
        short = layout.stored_dtype.kind in "iu" and layout.dtype.itemsize < 4  # Parquet keeps them in four bytes each
        self.out = Out(
            path,
            self.schema,
            compression="lz4" if short else "none",
            use_byte_stream_split=short,
            use_dictionary=False,
            write_statistics=not layout.has_columns,
            write_page_checksum=True,
        )

    def blocks(self) -> Iterator[tuple[int, int]]:
        return self.layout.boxes(self.layout.chunk)

    def write(self, first: int, block: np.ndarray) -> None:
        values = self.pa.array(self.layout.stored(block).ravel(), self.value.type)
        column = self.pa.FixedSizeListArray.from_arrays(values, type=self.type) if self.layout.has_columns else values
        self.out.write_table(self.pa.Table.from_arrays([column], schema=self.schema), row_group_size=len(block))

    def close(self) -> None:
        self.out.close()


WRITERS: dict[str, type[Writer]] = {
    ".npy": NpyWriter,
    ".zarr": ZarrWriter,
    ".safetensors": SafetensorsWriter,
    ".h5": Hdf5Writer,
    ".hdf5": Hdf5Writer,
    ".parquet": ParquetWriter,
}
