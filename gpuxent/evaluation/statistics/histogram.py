"""Quantiles of losses from counts in fixed bins, whose relative width bounds the error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpuxent.evaluation.statistics.packed import pack, unpack

PRECISION = 7  # bits of the mantissa: 128 bins in every octave
SMALLEST = 2.0**-60  # of the first bin
RELATIVE_ERROR = 2.0 ** -(PRECISION + 1)  # of a bin's (harmonic) middle, from any value in it
_SHIFT = 52 - PRECISION
_OFFSET = int(np.float64(SMALLEST).view(np.int64)) >> _SHIFT
_NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class LossHistogram:
    """How many losses lie in each bin: the bits of a float64, cut off after PRECISION bits of its mantissa.

    So an octave has 2**PRECISION equal bins, and there are 138,752 of them from 2**-60 to the largest float64, of which
    `counts` has those from number `first` to the last that is not empty. `tiny` counts what is below 2**-60 (a
    negative loss, by rounding, too).
    """

    first: int = 0
    counts: np.ndarray = field(default_factory=lambda: _NOTHING)  # int64
    zero: int = 0
    tiny: int = 0
    infinite: int = 0
    nan: int = 0

    @classmethod
    def of(cls, losses: np.ndarray) -> LossHistogram:
        inside = losses[(losses >= SMALLEST) & (losses < math.inf)]
        zero = nan = infinite = 0
        if inside.size < losses.size:
            zero = int(np.count_nonzero(losses == 0))
            nan = int(np.count_nonzero(np.isnan(losses)))
            infinite = int(np.count_nonzero(losses == math.inf))
        tiny = losses.size - inside.size - zero - nan - infinite
        if not inside.size:
            return cls(0, _NOTHING, zero, tiny, infinite, nan)
        bins = (inside.view(np.int64) >> _SHIFT) - _OFFSET
        first = int(bins.min())
        return cls(first, np.bincount(bins - first), zero, tiny, infinite, nan)

    def merge(self, other: LossHistogram) -> LossHistogram:
        special = (getattr(self, name) + getattr(other, name) for name in _SPECIAL)
        if not other.counts.size or not self.counts.size:
            filled = self if self.counts.size else other
            return LossHistogram(filled.first, filled.counts, *special)
        first, stop = min(self.first, other.first), max(self._stop, other._stop)
        counts = np.zeros(stop - first, np.int64)
        for part in (self, other):
            counts[part.first - first : part._stop - first] += part.counts
        return LossHistogram(first, counts, *special)

    @property
    def _stop(self) -> int:
        return self.first + self.counts.size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LossHistogram) and self.to_data() == other.to_data()

    __hash__ = None  # type: ignore[assignment]

    def quantiles(self, levels: Iterable[float]) -> dict[float, float]:
        """level -> loss, between the two losses in order as `numpy.quantile` does, each taken as its bin's middle.

        The relative error is at most RELATIVE_ERROR (below 2**-60 the absolute error 2**-60); NaN among NaN.
        """
        return _quantiles(*self.steps(), self.nan, levels)

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """(values in order, how many losses are taken as each)."""
        bins = np.flatnonzero(self.counts)
        lower = ((bins + self.first + _OFFSET) << _SHIFT).view(np.float64)
        in_octave = (bins + self.first) % 2**PRECISION  # _OFFSET is a whole octave
        middles = lower * (1 + 1 / (2 * (2**PRECISION + in_octave) + 1))
        values = np.concatenate(([0.0, SMALLEST / 2], middles, [math.inf]))
        return values, np.concatenate(([self.zero, self.tiny], self.counts[bins], [self.infinite]))

    def to_data(self) -> dict[str, Any]:
        """For JSON: the bins that are not empty, by their distance from the one before."""
        bins = np.flatnonzero(self.counts)
        return {
            "bins": pack(np.diff(bins + self.first, prepend=0)),
            "counts": pack(self.counts[bins]),
            **{name: getattr(self, name) for name in _SPECIAL},
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> LossHistogram:
        bins, counts = np.cumsum(unpack(data["bins"], np.int64)), unpack(data["counts"], np.int64)
        special = {name: data[name] for name in _SPECIAL}
        if not bins.size:
            return cls(**special)
        first = int(bins[0])
        window = np.zeros(int(bins[-1]) - first + 1, np.int64)
        window[bins - first] = counts
        return cls(first, window, **special)


_SPECIAL = ("zero", "tiny", "infinite", "nan")


@dataclass(frozen=True)
class ChangeHistogram:
    """Numbers of either sign: a histogram of those below 0, by their size, and one of the others."""

    below: LossHistogram = field(default_factory=LossHistogram)
    above: LossHistogram = field(default_factory=LossHistogram)

    @classmethod
    def of(cls, values: np.ndarray) -> ChangeHistogram:
        negative = values < 0
        return cls(LossHistogram.of(-values[negative]), LossHistogram.of(values[~negative]))

    def merge(self, other: ChangeHistogram) -> ChangeHistogram:
        return ChangeHistogram(self.below.merge(other.below), self.above.merge(other.above))

    def quantiles(self, levels: Iterable[float]) -> dict[float, float]:
        """As those of `LossHistogram`."""
        below, above = self.below.steps(), self.above.steps()
        values, counts = np.concatenate([-below[0][::-1], above[0]]), np.concatenate([below[1][::-1], above[1]])
        return _quantiles(values, counts, self.above.nan, levels)


def exact_quantiles(values: np.ndarray, levels: Iterable[float]) -> dict[float, float]:
    """Those of `numpy.quantile`, but of infinite values too."""
    values = np.sort(values)  # NaN comes last
    if values.size and np.isnan(values[-1]):
        values = values[:0]
    return _interpolated(lambda rank: float(values[rank]), values.size - 1, levels)


def _quantiles(values: np.ndarray, counts: np.ndarray, nan: int, levels: Iterable[float]) -> dict[float, float]:
    ends = np.cumsum(counts)
    last = -1 if nan else int(ends[-1]) - 1
    return _interpolated(lambda rank: float(values[np.searchsorted(ends, rank, side="right")]), last, levels)


def _interpolated(at: Callable[[int], float], last: int, levels: Iterable[float]) -> dict[float, float]:
    """`at` gives the value of a rank, from 0 to the last."""
    if last < 0:
        return dict.fromkeys(levels, math.nan)
    places = {level: level * last for level in levels}
    return {q: _between(at(int(place)), at(min(int(place) + 1, last)), place % 1) for q, place in places.items()}


def _between(a: float, b: float, share: float) -> float:
    return a if share == 0 or a == b else a + share * (b - a)
