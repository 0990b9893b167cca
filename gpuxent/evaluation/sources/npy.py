"""`.npy` files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from tokenize import TokenError

import numpy as np

from gpuxent.evaluation.sources._base import BFLOAT16, FileStamp, number_dtype
from gpuxent.evaluation.sources._mapped import MappedSource


def open_npy(path: Path, member: str | None = None) -> MappedSource:
    """NumPy writes bfloat16 (`ml_dtypes`) as two anonymous bytes, `|V2`; such a file is read as bfloat16."""
    if member is not None:
        raise ValueError(f"{path} holds one array, without a name; give it without ::{member}")
    stamp = FileStamp.of(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # np.load, but for .npy alone: no archive, no pickle
    except (ValueError, SyntaxError, TokenError) as error:  # not the format, cut short, empty, or pickled objects
        if zipfile.is_zipfile(path):
            raise ValueError(f"{path} is an archive of arrays; give one .npy file") from error
        raise ValueError(f"{path} is not a whole .npy file: {error}") from error
    expected = array.offset + array.nbytes
    if stamp.size != expected:
        raise ValueError(f"{path} has {stamp.size:,} bytes, expected {expected:,}: it holds more than one array")
    stored = BFLOAT16 if array.dtype == np.dtype("V2") else array.dtype
    number_dtype(stored, str(path))
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    return MappedSource(str(path), stamp, array.shape, stored, array.offset, ".npy", fortran)
