"""Copying an array from one format into another, block by block and (but for `.kld`) bit for bit."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gpuxent.evaluation.files.kld import KldWriter, check_windows, sizes_of
from gpuxent.evaluation.files.writers import BFLOAT16, CHUNK_BYTES, WRITERS, Layout, ParquetWriter, Writer, ZarrWriter
from gpuxent.evaluation.progress import Progress
from gpuxent.evaluation.sources import Source

KINDS = ("f2", "f4", "f8", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "b1")
PIECE_BYTES = 512 * 2**20  # the most that is read at once for the sake of chunks
MOST_CHUNK_BYTES = 2**32  # of HDF5
SLACK_BYTES, SLACK = 2**20, 0.01  # of headers, indices and checksums: so many bytes, and a share
PARTIAL = ".partial-"  # and the number of the process: the end of a name until the file is whole
ZARR_METADATA = ("zarr.json", ".zarray", ".zgroup")
FORMATS: dict[str, Any] = {**WRITERS, ".kld": KldWriter}  # by suffix


@dataclass(frozen=True)
class Target:
    """Where the copy goes: a path, and a name inside if one was given."""

    path: Path
    name: str
    suffix: str  # of the format
    tokens: Source | None = None  # beside the logits, in a .kld file

    @classmethod
    def parse(cls, text: str, to: str | None = None, tokens: Source | None = None) -> Target:
        """Of "PATH" or "PATH::name", in the format `to`, or that of the suffix. ValueError: one that is not written, a
        name that cannot be, or tokens that the format does not hold."""
        before, separator, name = text.partition("::")
        path = Path(before)
        suffix = path.suffix if to is None else f".{to}"
        if suffix not in FORMATS:
            if to is not None:
                raise ValueError(f"--to must be one of {', '.join(s[1:] for s in FORMATS)}, got {to!r}")
            raise ValueError(f"OUT must end in {', '.join(FORMATS)}, or --to must say the format, got {path}")
        if separator and not FORMATS[suffix].has_names:
            raise ValueError(f"{text}: a {suffix} file holds one array, without a name")
        if separator and any(part in ("", ".", "..", "__metadata__") for part in name.split("/")):
            raise ValueError(f"{text}: {name!r} cannot be the name of an array")
        if tokens is not None and suffix != ".kld":
            raise ValueError(f"--tokens is for .kld files, and {text} is none")
        # not a link, which would be replaced by the file
        return cls(Path(os.path.realpath(path)), name, suffix, tokens)

    @property
    def writer(self) -> type[Writer]:
        return FORMATS[self.suffix]

    def open(self, partial: Path, layout: Layout) -> Writer:
        beside = () if self.tokens is None else (self.tokens,)
        return self.writer(partial, layout, *beside)

    def size(self, layout: Layout) -> int:
        if self.tokens is not None:
            return sizes_of(layout, self.tokens).file_size
        # Parquet keeps short integers in four bytes each, and only the zeros of unsigned ones (bfloat16 too) compress.
        signed = self.writer is ParquetWriter and layout.dtype.kind == "i"
        return math.prod(layout.shape) * max(layout.dtype.itemsize, 4 if signed else 0)


@dataclass(frozen=True)
class Converted:
    """What was written, and the bytes that it takes."""

    out: str
    layout: Layout
    bytes: int
    note: str = ""  # what is not as before

    def __str__(self) -> str:
        what = f"{self.out}: {self.layout.dtype} of shape {self.layout.shape}, {size_text(self.bytes)}"
        return f"{what}; {self.note}" if self.note else what


def convert(
    source: Source,
    out: str,
    progress: Console,
    *,
    to: str | None = None,
    tokens: Source | None = None,
    rows: int | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write an array to `out` ("PATH" or "PATH::name"), of the same shape and dtype, every bit kept.

    `to` names the format ("npy", "kld"), by default the suffix does. A `.kld` file holds logits as log-probabilities in
    16 bits, and the result says what that lost; `tokens` (windows, n_ctx) are of the windows whose second halves the
    rows are: of each the n_ctx - 1 - n_ctx // 2 that predict its last tokens.

    OUT appears when it is whole: until then it has another name beside it, which is removed after an error. What
    cannot work is refused before anything is written. `rows`: per chunk or row group, by default as many as have
    16 MiB; HDF5 is written in one piece then. In memory are a few chunks, of Zarr a few shards.

    Raises: ValueError, OSError.
    """
    target = Target.parse(out, to, tokens)
    layout = _layout(source, target, rows)
    for read in filter(None, (source, tokens)):
        _check_place(target.path, read, overwrite)
    _check_space(target, layout)
    for left in target.path.parent.glob(f"{escape(target.path.name)}{PARTIAL}*"):
        warning = f"{left} is of a convert that still runs, or was killed: then it may be deleted"
        progress.print(f"gpuxent: warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    with _appears_whole(target.path, overwrite) as partial:
        with _open_writer(target, partial, layout) as writer:
            _copy(source, writer, layout, target, progress)
            note = getattr(writer, "note", "")
        with _says_where(target.path):
            size = _sync(partial)
    return Converted(out, layout, size, note)


def _layout(source: Source, target: Target, rows: int | None) -> Layout:
    """ValueError: what the format cannot hold, and options that it has not."""
    shape, dtype, lists = tuple(source.shape), source.dtype, target.writer is ParquetWriter
    if dtype != BFLOAT16 and dtype.str[1:] not in KINDS:
        raise ValueError(f"{source.name} holds {dtype}; float16 to float64, bfloat16, integers and bool are converted")
    if not shape or (len(shape) > 1 and shape[-1] == 0):
        raise ValueError(f"{source.name} has no rows to convert: its shape is {shape}")
    if lists and len(shape) > 2:
        raise ValueError(f"{target.path}: a Parquet column has the shape (rows,) or (rows, vocab), got {shape}")
    if rows is not None and not target.writer.has_chunks:
        raise ValueError(f"--rows is for formats with chunks, and {target.suffix} has none")
    if rows is not None and rows < 1:
        raise ValueError(f"--rows must be 1 or more, got {rows}")
    if missing := getattr(source, "missing_chunks", 0):
        raise ValueError(f"{source.name}: {missing:,} of its chunks are not stored; a copy would hide that")
    integers = dtype.kind in "iub"
    name = target.name
    if not name and target.writer is not ZarrWriter:
        name = source.name.partition("::")[2].rpartition("/")[2] or ("labels" if integers else "logits")
    # Every axis of integers is one of rows: labels are read so. But a list in a Parquet column is written whole.
    layout = Layout(shape, dtype, name, len(shape) > 1 and (lists or not integers), rows)
    if target.suffix == ".kld":
        check_windows(layout, target.tokens, source.name)
    if rows is not None and rows * layout.row_bytes >= MOST_CHUNK_BYTES:
        raise ValueError(f"--rows must make chunks below 4 GiB, got {rows:,} of {size_text(layout.row_bytes)}")
    return layout


def _check_place(path: Path, source: Source, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}, the folder of OUT, does not exist")
    read = [Path(os.path.realpath(stamp.path)) for stamp in source.files()]
    if any(file.is_relative_to(path) for file in read):
        raise ValueError(f"OUT must be another file than what is read, got {path}")
    folder = os.path.realpath(source.name.partition("::")[0])
    if (os.path.isdir(folder) and path.is_relative_to(folder)) or fnmatch(str(path), folder):
        raise ValueError(f"OUT must not be in the folder that is read, or match its pattern, got {path}")
    if os.path.lexists(path):
        if not overwrite:
            raise ValueError(f"{path} exists; --overwrite replaces it, with all that is in it")
        if path.is_dir() and not any((path / name).is_file() for name in ZARR_METADATA):
            raise ValueError(f"{path} is a folder that is no Zarr array or group; it is not overwritten")


def _check_space(target: Target, layout: Layout) -> None:
    size = target.size(layout)
    needed, free = round(size * (1 + SLACK)) + SLACK_BYTES, shutil.disk_usage(target.path.parent).free
    if needed > free:
        raise ValueError(
            f"{target.path} needs {size_text(needed)}, and {size_text(free)} are free in {target.path.parent}"
        )


def size_text(size: float) -> str:
    """ "512 bytes", "1.5 MiB", "12.0 GiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while size >= 1000 and power < len(units) - 1:
        size, power = size / 1024, power + 1
    return f"{size:,.1f} {units[power]}" if power else f"{size:,.0f} {units[0]}"


@contextmanager
def _appears_whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end, and is removed after an error or Ctrl-C."""
    partial = path.with_name(f"{path.name}{PARTIAL}{os.getpid()}")
    _remove(partial)  # of a dead process that had our number
    try:
        yield partial
        with _says_where(path):
            _rename(partial, path, overwrite)
    finally:
        _remove(partial)


def _rename(partial: Path, path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        os.rename(partial, path)
    elif not overwrite:
        raise FileExistsError(0, "another program has made it in the meantime")
    elif partial.is_file() and not path.is_dir():
        os.replace(partial, path)
    else:  # a folder cannot take another's place in one step
        old = path.with_name(f"{path.name}.replaced-{os.getpid()}")
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(old, path)
            raise
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> int:
    """Wait until the disk has it, for it may say only now that it is full; the size in bytes."""
    files = [path] if path.is_file() else [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            total += os.fstat(opened.fileno()).st_size
    return total


@contextmanager
def _says_where(path: Path) -> Iterator[None]:
    """Errors of writing are about OUT, whatever the name that it has until then."""
    try:
        yield
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else error.strerror or error  # without what libraries add
        raise OSError(f"{path} cannot be written: {cause}") from error


@contextmanager
def _open_writer(target: Target, partial: Path, layout: Layout) -> Iterator[Writer]:
    with _says_where(target.path):
        writer = target.open(partial, layout)
    try:
        yield writer
    except BaseException:
        with suppress(Exception):  # it will be removed
            writer.close()
        raise
    with _says_where(target.path):
        writer.close()


def _copy(source: Source, writer: Writer, layout: Layout, target: Target, console: Console) -> None:
    started, done = time.monotonic(), 0
    with Progress(math.prod(layout.lead), "rows", console) as progress:
        for first, block in _regrouped(_pieces(source, layout), writer.blocks(), layout):
            with _says_where(target.path):
                writer.write(first, block)
            done += block.nbytes
            speed = done / max(time.monotonic() - started, 1e-9)
            progress.advance(len(block), f"{size_text(speed)}/s")


def _pieces(source: Source, layout: Layout) -> Iterator[np.ndarray]:
    """All rows in order, each chunk of the source read once."""
    total, columns = math.prod(layout.lead), slice(0, layout.shape[-1]) if layout.has_columns else None
    chunk = source.row_chunk * (1 if layout.has_columns or len(layout.shape) == 1 else layout.shape[-1])
    step = max(layout.rows_of(CHUNK_BYTES) // max(chunk, 1), 1) * max(chunk, 1)
    if step * layout.row_bytes > PIECE_BYTES:
        step = layout.rows_of(PIECE_BYTES)
    for first in range(0, total, step):
        yield source.read(slice(first, min(first + step, total)), columns)


def _regrouped(
    pieces: Iterator[np.ndarray], boxes: Iterator[tuple[int, int]], layout: Layout
) -> Iterator[tuple[int, np.ndarray]]:
    """The same rows cut otherwise: (first row, rows) of each box."""
    piece = np.empty((0, *layout.columns), layout.dtype)
    for first, stop in boxes:
        size = stop - first
        piece = piece if len(piece) else next(pieces)
        if len(piece) >= size:  # without a copy
            yield first, piece[:size]
            piece = piece[size:]
            continue
        block, filled = np.empty((size, *layout.columns), layout.dtype), 0
        while filled < size:
            piece = piece if len(piece) else next(pieces)
            part = piece[: size - filled]
            block[filled : filled + len(part)] = part
            filled, piece = filled + len(part), piece[len(part) :]
        yield first, block
