"""Sums and arrays of integers as short text in JSON, without losing a bit."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from gpuxent._records import ExactSum

_DTYPES = tuple(np.dtype(code) for code in ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<i8"))


def pack_sum(total: ExactSum) -> str:
    """`1a2bp-60` is 0x1a2b * 2**-60, as C writes it; the sum of what is not finite comes after a space."""
    zeros = (total.units & -total.units).bit_length() - 1 if total.units else total.scale
    text = f"{total.units >> zeros:x}p{zeros - total.scale}"
    return text if total.nonfinite == 0 else f"{text} {total.nonfinite!r}"


def unpack_sum(text: str, scale: int) -> ExactSum:
    finite, _, nonfinite = text.partition(" ")
    mantissa, _, exponent = finite.partition("p")
    bad = float(nonfinite or 0.0)
    return ExactSum(int(mantissa, 16) << (int(exponent) + scale), math.nan if math.isnan(bad) else bad, scale)


def pack(array: np.ndarray) -> str:
    """Integers in the narrowest type that holds them, or float64: `<u2:` and base64."""
    if array.dtype.kind != "f":
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        array = array.astype(next(d for d in _DTYPES if np.iinfo(d).min <= low and high <= np.iinfo(d).max))
    return f"{array.dtype.str}:{base64.b64encode(array.tobytes()).decode()}"


def unpack(text: str, dtype: Any) -> np.ndarray:
    code, _, data = text.partition(":")
    return np.frombuffer(base64.b64decode(data), np.dtype(code)).astype(dtype)
