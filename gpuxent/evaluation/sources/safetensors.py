"""Tensors of safetensors files. The format is a header and the bytes: read here, so that only what a read needs is
mapped, and nothing need be installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gpuxent.evaluation.sources._base import BFLOAT16, FileStamp, opening, pick
from gpuxent.evaluation.sources._mapped import MappedSource

DTYPES = {"BOOL": np.dtype(bool), "BF16": BFLOAT16} | {
    f"{kind}{8 * size}": np.dtype(f"<{code}{size}")
    for kind, code, sizes in (("F", "f", (2, 4, 8)), ("I", "i", (1, 2, 4, 8)), ("U", "u", (1, 2, 4, 8)))
    for size in sizes
}
MOST_HEADER_BYTES = 100_000_000  # of the format


def open_safetensors(path: Path, member: str | None = None) -> MappedSource:
    """One tensor; without a name, the only one."""
    stamp = FileStamp.of(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MOST_HEADER_BYTES))
    with opening(path, "safetensors file"):
        tensors = _tensors(header, length, stamp.size)
    name = pick(path, member, tensors, "tensor")
    dtype, shape, offset = tensors[name]
    if dtype not in DTYPES:
        raise ValueError(f"{path}::{name} holds {dtype}, expected floats of 16 bits or more, or integers")
    named = str(path) if member is None else f"{path}::{member}"
    return MappedSource(named, stamp, shape, DTYPES[dtype], offset, "safetensors")


def _tensors(header: bytes, length: int, file_size: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """dtype, shape and place in the file by name; ValueError if they do not fit together."""
    if len(header) < length:
        raise ValueError(f"its header should have {length:,} bytes, found {len(header):,}")
    entries = json.loads(header)
    if not isinstance(entries, dict):
        raise ValueError("its header is no table of tensors")
    entries.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, (dtype, shape, first, stop) in sorted(map(_entry, entries.items()), key=lambda item: item[1][2:]):
        size = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else stop - first
        if (first, stop) != (end, end + size) or min(shape, default=0) < 0:
            raise ValueError(
                f"the place of {name!r}, bytes {first:,} to {stop:,}, does not fit its shape {list(shape)}"
            )
        tensors[name], end = (dtype, shape, 8 + length + first), stop
    if 8 + length + end != file_size:
        raise ValueError(f"it should have {8 + length + end:,} bytes, found {file_size:,}")
    return tensors


def _entry(item: tuple[str, Any]) -> tuple[str, tuple[str, tuple[int, ...], int, int]]:
    name, entry = item
    try:
        first, stop = map(int, entry["data_offsets"])
        return name, (str(entry["dtype"]), tuple(map(int, entry["shape"])), first, stop)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header says of {name!r} what is no tensor") from error
