"""The mergeable records that everything is built from.

A record is fields, an identity and a merge. Records of rows hold one entry per row in arrays of the rows' shape;
merging the records of all slices of a row, in any grouping, gives the record of the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np

Array = Any  # NumPy, CuPy or Dask: the backend knows which

# Entries of a vector of labels that are no class. Labels are brought to this form at the door, at their full width.
IGNORED = -1
NO_LABEL = -2  # a row of soft labels, or an unchecked label outside the vocabulary: its logit is -inf

INTEGER_FIELDS = ("argmax", "rank")  # of RowStats

# Identity of `argmax`: loses every tie, and is exact in float64.
NO_CLASS = 2**53


@dataclass(frozen=True)
class RowStats:
    """What one read of (a slice of) the rows leaves behind; a field that nobody asked for keeps its identity.

    `max` and `rest` = sum of exp(logit - max) over every class *but one that has the maximum*: so
    lse = max + log1p(rest), p_max = 1 / (1 + rest), and a row with p = 1 - 1e-12 has loss 1e-12, not 0.
    A NaN or +inf logit makes `rest` NaN, and NaN survives every merge.

    `spread_gap` and `spread_weight` are the sums over the row of s * (max - logit) and of s, where s is the row's
    `Spread`. Relative to the maximum every term is non-negative, so nothing cancels, and adding 10000 to every logit
    changes nothing.
    """

    max: Array  # largest logit; -inf for an empty slice
    rest: Array  # see above; -1 for an empty slice, so that 1 + rest = 0
    label_logit: Array  # logit at the label; -inf if the label is not in this slice
    spread_gap: Array
    spread_weight: Array
    argmax: Array  # class of the maximum, the lowest on ties
    moment: Array  # sum of exp(logit - max) * (logit - max), for the entropy
    rank: Array  # classes before the label: a larger logit, or an equal one and a lower index

    @classmethod
    def identity(cls, shape: tuple[int, ...] = ()) -> RowStats:
        """The record of an empty slice; a slice that is all -inf has the same `max` and `rest`."""
        return cls(
            max=np.full(shape, -np.inf),
            rest=np.full(shape, -1.0),
            label_logit=np.full(shape, -np.inf),
            spread_gap=np.zeros(shape),
            spread_weight=np.zeros(shape),
            argmax=np.full(shape, NO_CLASS),
            moment=np.zeros(shape),
            rank=np.zeros(shape, np.int64),
        )

    def merge(self, other: RowStats) -> RowStats:
        """The record of both slices together."""
        with np.errstate(all="ignore"):
            top = np.maximum(self.max, other.max)
            ahead, behind = 1.0 + self.rest, 1.0 + other.rest
            rest = np.where(
                other.max > self.max,
                other.rest + ahead * rescale(self.max, top),
                self.rest + behind * rescale(other.max, top),
            )
            argmax = np.where(self.max == top, self.argmax, NO_CLASS)
            return RowStats(
                max=top,
                rest=rest,
                label_logit=np.maximum(self.label_logit, other.label_logit),
                spread_gap=self._gap_below(top) + other._gap_below(top),
                spread_weight=self.spread_weight + other.spread_weight,
                argmax=np.minimum(argmax, np.where(other.max == top, other.argmax, NO_CLASS)),
                moment=self._moment_below(top) + other._moment_below(top),
                rank=self.rank + other.rank,
            )

    @classmethod
    def merge_all(cls, records: Iterable[RowStats]) -> RowStats:
        """Left to right, in the order given: a row's slices in column order, so that the last bits are always the
        same."""
        return reduce(cls.merge, records)

    def stacked(self) -> Array:
        """The fields as one array (..., fields) of float64, in which the integers are exact too."""
        return np.stack([values.astype(np.float64, copy=False) for values in vars(self).values()], axis=-1)

    @classmethod
    def unstacked(cls, stacked: Array) -> RowStats:
        found = {field.name: stacked[..., i] for i, field in enumerate(fields(cls))}
        return cls(**found | {name: found[name].astype(np.int64) for name in INTEGER_FIELDS})

    def _gap_below(self, top: Array) -> Array:
        moved = np.where((self.spread_weight == 0) | (self.max == top), 0.0, self.spread_weight * (top - self.max))
        return self.spread_gap + moved

    def _moment_below(self, top: Array) -> Array:
        scale = rescale(self.max, top)
        moved = np.where(self.max == top, 0.0, (self.max - top) * (1.0 + self.rest))
        return np.where(scale == 0, 0.0, scale * (self.moment + moved))


def rescale(from_max: Array, to_max: Array) -> Array:
    """exp(from - to), and 1 where both are the same: this one equality keeps inf - inf out."""
    return np.where(from_max == to_max, 1.0, exp_difference(from_max, to_max))


def exp_difference(a: Array, b: Array) -> Array:
    """exp(a - b) within an eps or two: the rounding error of a - b, times |a - b| large, would cost dozens.

    TwoSum finds it (Knuth, TAOCP 2, 4.2.2), and exp(d + error) = exp(d) * (1 + error).
    """
    difference = a - b
    virtual = difference - a
    error = (a - (difference - virtual)) - (b + virtual)
    return np.exp(difference) * np.where(np.isfinite(error), 1.0 + error, 1.0)


@dataclass(frozen=True)
class GradWeights:
    """How strongly each row's logits are pushed along the three directions of every loss here, per row: a weight of
    (lse - label logit), one of the sum of s * (lse - logit) over the spread row s, and the slope in lse of what else
    there is. So

        dlogits = (label + spread * spread_weight + lse * lse(row)) * softmax - label * onehot - spread * s

    Reduction, upstream gradient, ignored rows, smoothing and z-loss are folded into these, before the logits are read:
    a backend can take statistics and gradient in one go. A row whose three weights are 0 gets a gradient of exactly 0,
    whatever its logits are.
    """

    label: Array
    spread: Array
    lse: Array


@dataclass(frozen=True)
class LinearGrad:
    """Gradients of the parameters of logits = hidden @ classifier.T + bias, each in its parameter's shape and dtype;
    None where not asked for."""

    hidden: Array | None
    classifier: Array | None
    bias: Array | None


@dataclass(frozen=True)
class Divergences:
    """Sums over the classes of two distributions p and q, given both normalizers: in nats but for the last, none of
    them negative, merged by addition. Those that were not asked for are 0."""

    kl: Array | float = 0.0  # KL(p || q)
    reverse_kl: Array | float = 0.0  # KL(q || p)
    js: Array | float = 0.0  # Jensen-Shannon divergence
    tv: Array | float = 0.0  # total variation, sum of |p - q| / 2

    @classmethod
    def identity(cls, shape: tuple[int, ...] = ()) -> Divergences:
        return cls(*(np.zeros(shape) for _ in fields(cls)))

    def merge(self, other: Divergences) -> Divergences:
        return Divergences(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


DIVERGENCES = tuple(field.name for field in fields(Divergences))


@dataclass(frozen=True)
class PairStats:
    """What one read of two models' rows leaves behind, of whole rows: slices of a vocabulary are merged as the two
    RowStats first, and with those in hand as Divergences."""

    base: RowStats
    other: RowStats
    divergences: Divergences  # p is base's distribution, q is other's


@dataclass(frozen=True)
class Spread:
    """The spread row of every row of logits: s = scale * soft + base, without ever being formed whole.

    Plain smoothing: base = eps / V. With class weights w: base = w * eps / V. Soft labels: soft (..., vocab), with
    scale = w * (1 - eps) and base = w * eps / V. `scale` and `base` are scalars or vectors of length vocab.
    """

    soft: Array | None
    scale: Array | float
    base: Array | float


@dataclass(frozen=True)
class Transform:
    """What happens to a logit before the softmax: softcap * tanh(x / softcap), then division by the temperature."""

    softcap: float | None = None
    temperature: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self.softcap is None and self.temperature == 1.0


IDENTITY = Transform()


@dataclass(frozen=True)
class ExactSum:
    """A sum of float64 values without rounding, and so the same under any grouping and order.

    `units` is the sum of the finite values as a Python integer, in units of 2**-1126 (or 2**-2252 for squares, see
    `scale`). `nonfinite` is the sum of the others, which float addition gets right in any order: 0 if there were none.
    """

    units: int = 0
    nonfinite: float = 0.0
    scale: int = 1126

    @classmethod
    def of(cls, values: np.ndarray) -> ExactSum:
        if values.size <= FEW:
            return cls(*_integer_and_nonfinite_sum(values.ravel().tolist()))
        finite, nonfinite = _split_finite(values)
        return cls(_integer_sum(*_integers(finite)), nonfinite)

    @classmethod
    def of_squares(cls, values: np.ndarray) -> ExactSum:
        """The sum of the squares, as exact as the sum: a square has 106 bits and is added in three pieces."""
        finite, nonfinite = _split_finite(values)
        mantissa, exponent = _integers(finite)
        low, high = mantissa & (2**27 - 1), mantissa >> 27
        pieces = ((high * high, 54), (2 * high * low, 27), (low * low, 0))
        total = sum(_integer_sum(piece, 2 * exponent + shift) for piece, shift in pieces)
        return cls(total, abs(nonfinite), scale=2 * 1126)

    def merge(self, other: ExactSum) -> ExactSum:
        if self.scale != other.scale:
            raise ValueError(f"cannot merge sums in units of 2**-{self.scale} and 2**-{other.scale}")
        return ExactSum(self.units + other.units, self.nonfinite + other.nonfinite, self.scale)

    @property
    def value(self) -> float:
        """The sum rounded once, to the nearest float64: what `math.fsum` gives."""
        return self.divided_by(1)

    def divided_by(self, denominator: float) -> float:
        """The sum over a finite number, rounded once; NaN over 0."""
        if denominator == 0:
            return np.nan
        if self.nonfinite != 0:  # inf, -inf or NaN
            return self.nonfinite
        over, under = float(denominator).as_integer_ratio()
        try:
            return self.units * under / (over << self.scale)  # Python rounds the quotient of two integers correctly
        except OverflowError:
            return np.inf if self.units > 0 else -np.inf


NOTHING = ExactSum()
NO_SQUARES = ExactSum(scale=2 * 1126)


FEW = 32  # values for which Python's integers are quicker than NumPy's grouping


def _integer_and_nonfinite_sum(values: list[float]) -> tuple[int, float]:
    units, nonfinite = 0, 0.0
    for value in values:
        if math.isfinite(value):
            fraction, exponent = math.frexp(value)
            units += int(fraction * 2**53) << (exponent + (1126 - 53))
        else:
            nonfinite += value
    return units, nonfinite


def _split_finite(values: np.ndarray) -> tuple[np.ndarray, float]:
    values = np.asarray(values, np.float64).ravel()
    finite = np.isfinite(values)
    if finite.all():
        return values, 0.0
    with np.errstate(invalid="ignore"):
        return values[finite], float(values[~finite].sum())


def _integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers m and e >= 0 with value = m * 2**e * 2**-1126."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(fraction, 53).astype(np.int64), exponent.astype(np.int64) + (1126 - 53)


def _integer_sum(integers: np.ndarray, exponents: np.ndarray) -> int:
    """The sum of integers * 2**exponents (|integers| < 2**62), grouped by exponent.

    bincount adds in float64: exact while a group's sum stays under 2**53, so halves of 31 bits in batches of 2**21.
    """
    total = 0
    for start in range(0, integers.size, 2**21):
        batch, exponent = integers[start : start + 2**21], exponents[start : start + 2**21]
        base = int(exponent.min())
        low = np.bincount(exponent - base, weights=batch & (2**31 - 1))
        high = np.bincount(exponent - base, weights=batch >> 31)
        for group in np.flatnonzero((low != 0) | (high != 0)).tolist():
            total += ((int(high[group]) << 31) + int(low[group])) << (base + group)
    return total


ROW_FIELDS = tuple(field.name for field in fields(RowStats))
