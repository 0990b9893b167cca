"""Columns of Parquet files: lists of logits, or numbers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpuxent.evaluation.sources._base import (
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
)
from gpuxent.evaluation.sources._handles import cached_rows, handles

BATCH_BYTES, READ_BYTES = 16 * 2**20, 2**20  # decoded and read at a time: a row group may be larger than memory


@dataclass(frozen=True)
class ParquetSource(InFile):
    """A column: lists of one length have shape (rows, vocab), numbers (rows,). Read by row groups.

    bfloat16 is stored as uint16 with the field's metadata {"dtype": "bfloat16"}.
    """

    name: str
    stamp: FileStamp
    column: str
    shape: tuple[int, ...]
    dtype: np.dtype
    group_edges: tuple[int, ...]  # between row groups, from 0 to the number of rows
    format: ClassVar[str] = "Parquet"

    @property
    def row_chunk(self) -> int:
        """Exact for even row groups, else that of the largest."""
        return max((stop - first for first, stop in pairwise(self.group_edges)), default=1)

    @property
    def chunks(self) -> tuple[int, ...]:
        return (self.row_chunk, *self.shape[1:])

    def read(self, rows: slice, columns: slice | None = None) -> np.ndarray:
        window = Window.of(self.shape, rows, columns)
        with reading(self.name, window, self.stamp.check):
            return cached_rows(self, window, self._cut)

    def _cut(self, place: Slices) -> np.ndarray:
        rows, columns = place[0], place[1:]
        blocks = [np.empty((0, *self.shape[1:]), self.dtype)[(slice(None), *columns)]]
        group = bisect_right(self.group_edges, rows.start) - 1
        while rows.start < rows.stop and group < len(self.group_edges) - 1 and self.group_edges[group] < rows.stop:
            first = self.group_edges[group]
            part = slice(max(rows.start - first, 0), rows.stop - first)
            blocks += [batch[(slice(None), *columns)] for batch in self._batches(group, part)]
            group += 1
        return blocks[1] if len(blocks) == 2 else np.concatenate(blocks)

    def _batches(self, group: int, part: slice) -> Iterator[np.ndarray]:
        """Rows of a group. What comes before them has to be decoded too, but is not kept."""
        parquet = optional("pyarrow.parquet", "parquet", self.name)
        metadata = handles.get(self.stamp, lambda: parquet.read_metadata(self.stamp.path))
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        begin, first = 0, self.group_edges[group]
        with open(self.stamp.path, "rb") as raw:  # a file of its own for each read: pyarrow's are not shared by threads
            file = parquet.ParquetFile(
                raw,
                metadata=metadata,
                page_checksum_verification=True,
                buffer_size=READ_BYTES,
                pre_buffer=False,  # else the group is in memory before its first page is looked at
            )
            for batch in file.iter_batches(
                max(1, BATCH_BYTES // row_bytes), row_groups=[group], columns=[self.column], use_threads=False
            ):
                stop = begin + len(batch)
                if stop > part.start:
                    numbers = as_dtype(_numbers(batch.column(0), self.shape, first + begin), self.dtype)
                    yield numbers[max(part.start - begin, 0) : part.stop - begin]
                begin = stop
                if begin >= part.stop:
                    return


def _numbers(chunk: Any, shape: tuple[int, ...], first: int) -> np.ndarray:
    """An Arrow array as NumPy's, of rows numbered from `first`. ValueError for nulls and for lists of other lengths."""
    if chunk.null_count:
        row = first + chunk.is_null().to_numpy(zero_copy_only=False).argmax()
        raise ValueError(f"row {row:,} is null")
    if len(shape) == 1:
        return chunk.to_numpy(zero_copy_only=False)
    if hasattr(chunk, "offsets"):  # not of fixed size
        sizes = np.diff(chunk.offsets.to_numpy())
        if (sizes != shape[1]).any():
            at = (sizes != shape[1]).argmax()
            raise ValueError(f"row {first + at:,} has {sizes[at]:,} values, expected {shape[1]:,}")
    values = chunk.flatten()
    if values.null_count:
        at = values.is_null().to_numpy(zero_copy_only=False).argmax()
        raise ValueError(f"a value of row {first + at // shape[1]:,} is null")
    return values.to_numpy(zero_copy_only=False).reshape(len(chunk), shape[1])


def open_parquet(path: Path, member: str | None = None) -> ParquetSource:
    """A column; without a name, the only one."""
    parquet = optional("pyarrow.parquet", "parquet", str(path))
    stamp = FileStamp.of(path)
    with path.open("rb") as raw:
        with opening(path, "Parquet file"):
            file = parquet.ParquetFile(raw)
            schema, metadata = file.schema_arrow, file.metadata
        column = pick(path, member, schema.names, "column")
        name, field = str(path) if member is None else f"{path}::{member}", schema.field(column)
        dtype = _dtype(field.type, name, (field.metadata or {}).get(b"dtype"))
        with opening(path, "Parquet file"):
            sizes = _list_size(file, column, field.type)
    if -1 in sizes:
        raise ValueError(f"{name} does not begin with a list, so that nobody knows how many values one has")
    groups = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return ParquetSource(name, stamp, column, (metadata.num_rows, *sizes), dtype, tuple(accumulate(groups, initial=0)))


def _is_list(kind: Any) -> bool:
    return hasattr(kind, "value_type") and kind.num_fields == 1  # a dictionary has values but no field


def _list_size(file: Any, column: str, kind: Any) -> tuple[int, ...]:
    """() of a column of numbers, (vocab,) of lists: that of their type, else of the first row; -1 if there is none."""
    if not _is_list(kind):
        return ()
    if hasattr(kind, "list_size"):
        return (kind.list_size,)
    for batch in file.iter_batches(batch_size=1, columns=[column]):
        return (-1,) if batch.column(0).null_count else (len(batch.column(0)[0]),)
    return (-1,)


def _dtype(kind: Any, name: str, mark: bytes | None) -> np.dtype:
    if _is_list(kind):
        kind = kind.value_type
    try:
        found = np.dtype(kind.to_pandas_dtype())
    except NotImplementedError:
        found = np.dtype(object)
    if found.kind not in "biuf":
        raise ValueError(f"{name} holds {kind}, expected floats or integers, or lists of one length of them")
    return number_dtype(found, name, mark)
