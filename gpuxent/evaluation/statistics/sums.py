"""Exact sums of losses, of many groups at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

import numpy as np

from gpuxent._records import NO_SQUARES, NOTHING, ExactSum
from gpuxent.backends import limb_sums
from gpuxent.backends._numpy_sums import BITS


def sums_by_group(values: np.ndarray, groups: np.ndarray, size: int, squared: bool = False) -> list[ExactSum]:
    """The sum of the values, or of their squares, of each group 0 .. size - 1; for a few groups."""
    low, limbs, nonfinite = limb_sums(values, groups, size, squared)
    zero = NO_SQUARES if squared else NOTHING
    sums = [zero] * size
    for group in np.flatnonzero(limbs.any(axis=0) | (nonfinite != 0)).tolist():
        units = sum(limb << (BITS * (low + i)) for i, limb in enumerate(limbs[:, group].tolist()))
        sums[group] = ExactSum(units, float(nonfinite[group]), zero.scale)
    return sums


def exact_sum(values: np.ndarray, squared: bool = False) -> ExactSum:
    """`ExactSum.of`, or `of_squares`, at the speed of the backend."""
    return sums_by_group(values, np.zeros(values.size, np.int64), 1, squared)[0]


@dataclass(frozen=True)
class LossSums:
    """How many losses, their exact sum and that of their squares: enough for the mean and its standard error."""

    count: int = 0
    total: ExactSum = NOTHING
    squares: ExactSum = NO_SQUARES

    @classmethod
    def of_groups(cls, losses: np.ndarray, groups: np.ndarray, size: int) -> tuple[LossSums, ...]:
        counts = np.bincount(groups, minlength=size).tolist()
        totals, squares = (sums_by_group(losses, groups, size, squared) for squared in (False, True))
        return tuple(map(cls, counts, totals, squares))

    def merge(self, other: LossSums) -> LossSums:
        if not (self.count and other.count):
            return self if self.count else other
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
