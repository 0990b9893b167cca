"""The record of a run's tokens on disk: Parquet files, each of all tokens of a range of rows, in their order.

Floats are stored bit for bit, and nothing compresses the noise of their last digits: of the 24 bytes of one model's
token, 21 are nll, entropy and p_max.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from gpuxent.evaluation.statistics.tokens import TokenColumns

AT_ONCE = 2**18  # tokens that are read at once

R = TypeVar("R", bound=TokenColumns)
_NAME = re.compile(r"\d{12,}-\d{12,}\.parquet(\.tmp)?")


def require_pyarrow(what: str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(f"{what} needs pyarrow: pip install 'gpuxent[parquet]'") from error


# ---- bytes: until there are enough for a part ----


def to_bytes(tokens: TokenColumns) -> bytes:
    """Column after column, 8 bytes a number."""
    return b"".join(
        np.ascontiguousarray(column, "<f8" if name in tokens.floats else "<i8").tobytes()
        for name, column in tokens.columns.items()
    )


def from_bytes(record: type[R], counts: list[int], pieces: Iterable[bytes]) -> R:
    """The tokens of the pieces, of which each has so many, one after the other; there is at least one."""
    numbers, at = None, 0
    for count, piece in zip(counts, pieces, strict=True):
        if count:
            columns = np.frombuffer(piece, "<i8").reshape(-1, count)
            numbers = np.empty((len(columns), sum(counts)), "<i8") if numbers is None else numbers
            numbers[:, at : at + count] = columns
            at += count
    assert numbers is not None
    named = zip(record.names(), numbers, strict=False)  # `document`, the last, may be missing
    return record(**{name: column.view("<f8") if name in record.floats else column for name, column in named})


def split(tokens: R, first: int, stop: int, most: int = AT_ONCE) -> Iterator[tuple[int, int, R]]:
    """(first row, last row + 1, tokens) of pieces of at most so many tokens, which together cover [first, stop)."""
    starts = range(0, max(1, len(tokens)), most)
    edges = [first, *tokens.row[starts[1:]].tolist(), stop] if len(starts) > 1 else [first, stop]
    for start, low, high in zip(starts, edges[:-1], edges[1:], strict=True):
        yield low, high, tokens.take(slice(start, start + most))


# ---- parts ----


def part_name(first: int, stop: int) -> str:
    """Of the rows [first, stop): in the order of names is in that of rows."""
    return f"{first:012d}-{stop:012d}.parquet"


def is_part(name: str) -> bool:
    """Whether a file of this name is a part, or one that was not written to its end."""
    return _NAME.fullmatch(name) is not None


def write_part(path: Path, tokens: TokenColumns) -> int:
    """A part that is whole, or is not there: the bytes written. Without a power supply, too."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(tokens.columns).replace_schema_metadata({"gpuxent": tokens.format})
    # Sorted or nearly so: differences. Random mantissas: bytes of one weight together. Few values: a dictionary.
    encodings = dict.fromkeys(tokens.rising, "DELTA_BINARY_PACKED") | dict.fromkeys(tokens.floats, "BYTE_STREAM_SPLIT")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            parquet.write_table(
                table,
                file,
                row_group_size=AT_ONCE,
                compression="zstd",
                use_dictionary=[name for name in table.column_names if name not in encodings],
                column_encoding={name: how for name, how in encodings.items() if name in table.column_names},
            )
            file.flush()
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return size


def read_part(record: type[R], path: Path) -> Iterator[R]:
    """Its tokens, `AT_ONCE` at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            found = (file.schema_arrow.metadata or {}).get(b"gpuxent", b"").decode()
            if found != record.format:
                raise ValueError(f"its format is {found!r}, expected {record.format!r}")
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                yield record(**{name: table.column(name).to_numpy() for name in table.column_names})
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def sync_folder(path: Path) -> None:
    """A file's new name survives a loss of power once its folder is on the disk."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
