"""Exact sums of many groups of float64 values at once: integers in limbs of 32 bits, added without rounding."""

from __future__ import annotations

import numpy as np

from gpuxent._records import NOTHING

BITS = 32
MASK = 2**BITS - 1
BATCH = 2**20  # values at a time: what bounds the temporary arrays


def limb_sums(
    values: np.ndarray, groups: np.ndarray, size: int, squared: bool = False
) -> tuple[int, np.ndarray, np.ndarray]:
    """(low, limbs, nonfinite) of the sums of the values, or of their squares, of each group 0 .. size - 1.

    `groups` has the group of each value, int64. The finite sum of a group is that of limbs[i, group] * 2**(32 * (low +
    i)) over i, in units of 2**-1126 (2**-2252 for squares); limbs are int64, signed, and reach beyond 32 bits: carries
    are the affair of who keeps them. nonfinite[group] is the sum of the values that are infinite or NaN; 0 without.
    """
    nonfinite = np.zeros(size)
    finite = np.isfinite(values)
    if not finite.all():
        bad = values[~finite]
        with np.errstate(invalid="ignore"):
            np.add.at(nonfinite, groups[~finite], np.abs(bad) if squared else bad)
        values = np.where(finite, values, 0.0)
    if values.size == 0:
        return 0, np.zeros((1, size), np.int64), nonfinite
    fraction, exponent = np.frexp(values)
    mantissa, exponent = np.ldexp(fraction, 53).astype(np.int64), exponent.astype(np.int64) + (NOTHING.scale - 53)
    if squared:  # 106 bits, in three pieces
        high, low = mantissa >> 27, mantissa & (2**27 - 1)
        mantissa = np.concatenate((high * high, 2 * high * low, low * low))
        exponent = np.concatenate((2 * exponent + 54, 2 * exponent + 27, 2 * exponent))
        groups = np.tile(groups, 3)
    return *_added(mantissa, exponent, groups, size), nonfinite


def _added(mantissa: np.ndarray, exponent: np.ndarray, groups: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    """(low, limbs) of the sums of mantissa * 2**exponent, |mantissa| < 2**62.

    Moved to the grid of limbs, a mantissa reaches into three of them.
    """
    low, high = int(exponent.min()) // BITS, int(exponent.max()) // BITS
    limbs = np.zeros((high - low + 3) * size, np.int64)
    for start in range(0, mantissa.size, BATCH):
        batch = slice(start, start + BATCH)
        shift = exponent[batch] & (BITS - 1)
        place = (exponent[batch] // BITS - low) * size + groups[batch]
        lower, upper = (mantissa[batch] & MASK) << shift, (mantissa[batch] >> BITS) << shift
        np.add.at(limbs, place, lower & MASK)
        np.add.at(limbs, place + size, (lower >> BITS) + (upper & MASK))
        np.add.at(limbs, place + 2 * size, upper >> BITS)
    return low, limbs.reshape(-1, size)
