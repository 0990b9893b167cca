"""Exact sums of many groups of float64 values at once: integers in limbs of 32 bits, added without rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

import numpy as np

from gpuxent._records import NO_SQUARES, NOTHING, ExactSum

BITS = 32
MASK = 2**BITS - 1
BATCH = 2**20  # values at a time: what bounds the temporary arrays, and keeps the sums of limbs below 2**63


@dataclass(frozen=True)
class LimbSums:
    """One integer per group, sum over i of limbs[i, group] * 2**(32 * (low + i)), in units of 2**-scale.

    The limbs are signed and may be larger than 32 bits: carries are the affair of who keeps them.
    """

    low: int
    limbs: np.ndarray  # int64 (limbs, groups)
    nonfinite: np.ndarray  # float64 (groups,): the sum of the values that are infinite or NaN; 0 if there were none
    scale: int

    def exact(self) -> list[ExactSum]:
        """For a few groups: Python's integers."""
        return [
            ExactSum(sum(limb << (BITS * (self.low + i)) for i, limb in enumerate(group) if limb), bad, self.scale)
            for group, bad in zip(self.limbs.T.tolist(), self.nonfinite.tolist(), strict=True)
        ]


def sums_by_group(values: np.ndarray, groups: np.ndarray | int, size: int) -> LimbSums:
    """The sum of the values of each group 0 .. size - 1; `groups` has the group of each value."""
    finite, nonfinite = _set_aside_nonfinite(values, groups, size)
    mantissa, exponent = _integers(finite)
    return LimbSums(*_limb_sums(mantissa, exponent, groups, size), nonfinite, NOTHING.scale)


def square_sums_by_group(values: np.ndarray, groups: np.ndarray | int, size: int) -> LimbSums:
    """The sums of their squares, as exact: a square has 106 bits and is added in three pieces."""
    finite, nonfinite = _set_aside_nonfinite(values, groups, size)
    mantissa, exponent = _integers(finite)
    high, low = mantissa >> 27, mantissa & (2**27 - 1)
    pieces = np.concatenate((high * high, 2 * high * low, low * low))
    twice = 2 * exponent
    exponents = np.concatenate((twice + 54, twice + 27, twice))
    thrice = groups if isinstance(groups, int) else np.tile(groups, 3)
    return LimbSums(*_limb_sums(pieces, exponents, thrice, size), np.abs(nonfinite), NO_SQUARES.scale)


def _set_aside_nonfinite(values: np.ndarray, groups: np.ndarray | int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(the values with 0 in place of those that are not finite, the sum of those by group)."""
    nonfinite = np.zeros(size)
    finite = np.isfinite(values)
    if finite.all():
        return values, nonfinite
    with np.errstate(invalid="ignore"):
        np.add.at(nonfinite, groups if isinstance(groups, int) else groups[~finite], values[~finite])
    return np.where(finite, values, 0.0), nonfinite


def _integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 m and e >= 0 with value = m * 2**e * 2**-1126, as `ExactSum` counts."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(fraction, 53).astype(np.int64), exponent.astype(np.int64) + (NOTHING.scale - 53)


def _limb_sums(
    mantissa: np.ndarray, exponent: np.ndarray, groups: np.ndarray | int, size: int
) -> tuple[int, np.ndarray]:
    """(low, limbs) of the sums of mantissa * 2**exponent, |mantissa| < 2**62.

    Moved to the grid of limbs, a mantissa reaches into three of them.
    """
    if mantissa.size == 0:
        return 0, np.zeros((1, size), np.int64)
    low, high = int(exponent.min()) // BITS, int(exponent.max()) // BITS
    limbs = np.zeros((high - low + 3) * size, np.int64)
    for start in range(0, mantissa.size, BATCH):
        batch = slice(start, start + BATCH)
        shift = exponent[batch] & (BITS - 1)
        place = ((exponent[batch] >> 5) - low) * size + (groups if isinstance(groups, int) else groups[batch])
        lower, upper = (mantissa[batch] & MASK) << shift, (mantissa[batch] >> BITS) << shift
        np.add.at(limbs, place, lower & MASK)
        np.add.at(limbs, place + size, (lower >> BITS) + (upper & MASK))
        np.add.at(limbs, place + 2 * size, upper >> BITS)
    return low, limbs.reshape(-1, size)


@dataclass(frozen=True)
class LossSums:
    """How many losses, their exact sum and that of their squares: enough for the mean and its standard error."""

    count: int = 0
    total: ExactSum = NOTHING
    squares: ExactSum = NO_SQUARES

    @classmethod
    def of_groups(cls, losses: np.ndarray, groups: np.ndarray, size: int) -> tuple[LossSums, ...]:
        counts = np.bincount(groups, minlength=size).tolist()
        totals, squares = sums_by_group(losses, groups, size), square_sums_by_group(losses, groups, size)
        return tuple(map(cls, counts, totals.exact(), squares.exact()))

    def merge(self, other: LossSums) -> LossSums:
        return LossSums(self.count + other.count, self.total.merge(other.total), self.squares.merge(other.squares))

    @classmethod
    def merge_all(cls, parts: Iterable[LossSums]) -> LossSums:
        return reduce(cls.merge, parts, cls())

    @property
    def mean(self) -> float:
        """Rounded once; NaN without losses."""
        return self.total.divided_by(self.count)

    @property
    def stderr(self) -> float:
        """Of the mean, losses taken as independent: sqrt(variance / n), the variance from exact integers."""
        n = self.count
        if n < 2 or self.total.nonfinite != 0:
            return math.nan
        mean_square = Fraction(self.squares.units, n)  # in units of the squares
        squared_mean = Fraction(self.total.units, n) ** 2
        try:
            return math.sqrt((mean_square - squared_mean) / (n - 1) / (1 << self.squares.scale))
        except OverflowError:
            return math.inf
