"""Exact sums by group for the Numba backend: `_numpy_sums` in one loop over the values."""

import numpy as np

from gpuxent._records import NOTHING
from gpuxent.backends._numba_core import entry, i64, inner
from gpuxent.backends._numpy_sums import BITS, MASK

HIDDEN = 1 << 52  # the bit of a mantissa that is not stored
TOP = 2047  # the exponent of what is not finite
OFFSET = NOTHING.scale - 1075  # from the exponent as it is stored to that of the units


def limb_sums(values, groups, size, squared=False):
    """See `_numpy_sums.limb_sums`."""
    values = np.ascontiguousarray(values, np.float64)
    bits, nonfinite = values.view(np.int64), np.zeros(size)
    least, most = _exponents(bits)
    times = 2 if squared else 1
    low, high = times * least // BITS, (times * most + (54 if squared else 0)) // BITS
    limbs = np.zeros((high - low + 3, size), np.int64)
    _add(values, bits, groups, squared, low, limbs, nonfinite)
    return low, limbs, nonfinite


@inner
def _exponent(bits):
    """Stored and in units; that of a subnormal number is the least."""
    return max((bits >> 52) & TOP, 1) + OFFSET


@entry
def _exponents(bits):
    """The least and the largest of the finite values that are not 0."""
    least, most = i64(TOP + OFFSET), i64(0)
    for value in bits:
        exponent = _exponent(value)
        if value << 1 != 0 and exponent < TOP + OFFSET:
            least, most = min(least, exponent), max(most, exponent)
    return min(least, most), most


@entry
def _add(values, bits, groups, squared, low, limbs, nonfinite):
    for i in range(bits.size):
        group, exponent = groups[i], _exponent(bits[i])
        if bits[i] << 1 == 0:
            continue
        if exponent == TOP + OFFSET:
            nonfinite[group] += abs(values[i]) if squared else values[i]
            continue
        mantissa = bits[i] & (HIDDEN - 1)
        if (bits[i] >> 52) & TOP:
            mantissa |= HIDDEN
        if squared:  # 106 bits, in three pieces
            over, under = mantissa >> 27, mantissa & ((1 << 27) - 1)
            _place(over * over, 2 * exponent + 54, low, limbs, group)
            _place(2 * over * under, 2 * exponent + 27, low, limbs, group)
            _place(under * under, 2 * exponent, low, limbs, group)
        else:
            _place(mantissa if bits[i] >= 0 else -mantissa, exponent, low, limbs, group)


@inner
def _place(mantissa, exponent, low, limbs, group):
    """Moved to the grid of limbs, |mantissa| < 2**62 reaches into three of them."""
    shift, place = exponent & (BITS - 1), exponent // BITS - low
    lower, upper = (mantissa & MASK) << shift, (mantissa >> BITS) << shift
    limbs[place, group] += lower & MASK
    limbs[place + 1, group] += (lower >> BITS) + (upper & MASK)
    limbs[place + 2, group] += upper >> BITS
