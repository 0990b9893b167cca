"""Loops over one tile of a row for the Numba backend: a few thousand bytes, which stay in the L1 cache."""

import math

import numpy as np
from numba import types
from numba.extending import overload

from gpuxent.backends._numba_core import (
    LN_2,
    LN_2_SHORT,
    LN_2_SHORT_LOW,
    LOG2_E,
    PARTIAL_SUMS,
    bits_of,
    elements,
    exact,
    f64,
    float_of,
    i32,
    inner,
    laned,
    load,
    lowest_power,
    scaled_exp,
    store,
    tanh,
    unsigned,
    work,
)

# Columns. Twice as many would be 5 % faster, but more than 16 equal terms in a partial sum add up to more than 4 eps.
TILE = 16 * PARTIAL_SUMS
LANES = 64  # a loop over a multiple of this many elements leaves no remainder, which is 16 times as slow per element

# How a sum is scaled: by exp(-shift) * 2**-power. The shift is 0 but beyond HUGE: there, logits whose exp counts beside
# the largest differ from it exactly. Powers are multiples of STEP, so that most tiles of a row have the same.
HUGE, STEP = 65536.0, 32.0
SMALL = 2.0**-64  # beside a scaled sum of this, what was under 2**-126 does not count


@inner
def shift_for(top):
    return 0.0 if abs(top) <= HUGE else top


@inner
def power_for(top):
    return STEP * np.rint(top * (LOG2_E / STEP)) if abs(top) <= HUGE else 0.0


@inner
def unscale(shift, power, top):
    """exp(shift - top) * 2**power, in float64, with the rounding error of the exponent put back (TwoSum)."""
    a, b = power * LN_2_SHORT + shift, -top
    d = a + b
    virtual = d - a
    error = (a - (d - virtual)) + (b - virtual) + power * LN_2_SHORT_LOW
    if not abs(error) < 1.0:  # float64 cannot hold the difference: exp is 0, or NaN
        error = 0.0
    return math.exp(d) * (1.0 + error * (1.0 + 0.5 * error))


@inner
def plus(total, lost, more):
    """A sum, and what its roundings have lost so far (TwoSum)."""
    result = total + more
    virtual = result - total
    return result, lost + ((total - (result - virtual)) + (more - virtual))


# ---- the loops over one tile ----


@laned
def _sum_and_top(tile, shift, power, lowest):
    """(sum of exp, largest bits as signed integers, least as unsigned ones): see `_top`."""
    total, high, low = work(tile, 0.0), bits_of(work(tile, -0.0)), unsigned(tile, -1)
    for j in range(tile.size):
        x = load(tile, j)
        total += scaled_exp(x, shift, power, lowest)
        high = max(high, bits_of(x))
        low = min(low, unsigned(tile, bits_of(x)))
    return total, high, low


@inner
def _top(tile, high, low):
    """The largest float: the bits of floats that are not negative are in order, and those of negative ones the other
    way round. (A maximum of floats would be slow, or wrong about NaN; here NaN is the largest, or does not count.)"""
    return f64(float_of(tile, high)) if high >= 0 else f64(float_of(tile, low))


@laned
def _sum_without(tile, top, shift, power, lowest):
    """(sum of exp over all but the elements equal to `top`, number of these)."""
    total, count = work(tile, 0.0), i32(0)
    for j in range(tile.size):
        x = load(tile, j)
        e = scaled_exp(x, shift, power, lowest)
        total += work(tile, 0.0) if x == top else e
        count = i32(count + (x == top))  # to add 1 or 0 by a condition would not be vectorised
    return total, count


@inner
def gap_sums(tile, padding, top, weights):
    """(sum of weight * (top - x), sum of the weights); weight 0 on a -inf logit counts 0.

    There is a weight of 0 for each element of the padding.
    """
    whole = tile.size - tile.size % LANES
    gap, total = _gap_sums(tile[:whole], work(tile, top), weights[:whole])
    if whole < tile.size:
        more_gap, more = _gap_sums(remainder(tile, padding), work(tile, top), weights[whole : whole + LANES])
        gap, total = gap + more_gap, total + more
    if top == -np.inf:  # every weight meets a logit of -inf
        gap = work(tile, np.inf) if total > 0 else work(tile, 0.0)
    return f64(gap), f64(total)


@laned
def _gap_sums(tile, top, weights):
    gap, total = work(tile, 0.0), work(tile, 0.0)
    for j in range(tile.size):
        weight = weights[j]
        product = weight * (top - load(tile, j))
        gap += work(tile, 0.0) if weight == 0 else product
        total += weight
    return gap, total


@inner
def moment_of(tile, padding, top, shift, power):
    """Sum of exp * (top - x), scaled as the sum is; a class at -inf counts 0, and so does one at the top, whose exp may
    be too large for that scale."""
    shift, power, lowest = scale(tile, shift, power)
    total = _moment(_whole(tile), work(tile, top), shift, power, lowest)
    if tile.size % LANES:
        total += _moment(remainder(tile, padding), work(tile, top), shift, power, lowest)
    return f64(total)


@laned
def _moment(tile, top, shift, power, lowest):
    total = work(tile, 0.0)
    for j in range(tile.size):
        x = load(tile, j)
        e = scaled_exp(x, shift, power, lowest)
        product = e * (top - x)
        total += work(tile, 0.0) if e == 0 or x == top else product
    return total


@inner
def classes_before(tile, label_logit, label):
    """How many classes come before the label when sorted by logit, and by index among equals."""
    ties = min(max(label, 0), tile.size)
    ahead, behind, count = tile[:ties], tile[ties:], i32(0)
    for j in range(ahead.size):
        count = i32(count + (load(ahead, j) >= label_logit))
    for j in range(behind.size):
        count = i32(count + (load(behind, j) > label_logit))
    return count


@inner
def first_equal(tile, top):
    for j in range(tile.size):
        if load(tile, j) == top:
            return j
    return 0


@inner
def _second(tile, top):
    second = work(tile, -np.inf)
    for j in range(tile.size):
        x = load(tile, j)
        second = x if second < x and x != top else second
    return f64(second)


@inner
def has_nan(tile):
    count = i32(0)
    for j in range(tile.size):
        count = i32(count + (load(tile, j) != load(tile, j)))
    return count > 0


@exact
def probabilities(tile, shift, power, lowest, factor, times, out):
    """times * exp * factor, where exp * factor is a probability, so that its last bit does not carry it over 1."""
    for j in range(tile.size):
        p = scaled_exp(load(tile, j), shift, power, lowest) * factor
        p = work(tile, 1.0) if p > work(tile, 1.0) else p
        out[j] = times * p


@inner
def times_slope(tile, transform, out):
    """d transformed / d logit = (1 - tanh**2) / temperature."""
    softcap, temperature = transform
    if softcap > 0.0:
        for j in range(out.size):
            t = tile[j] * (temperature / softcap)
            out[j] *= 1.0 - t * t
    for j in range(out.size):
        out[j] /= temperature


@inner
def store_all(values, target):
    for j in range(target.size):
        store(target, j, values[j])


# ---- tiles of any length ----


@inner
def _whole(tile):
    return tile[: tile.size - tile.size % LANES]


@inner
def remainder(tile, padding):
    """What is left of a tile after its last whole vectors, with -inf after it."""
    count = tile.size % LANES
    left, empty = tile[tile.size - count :], padding[count:]
    for j in range(left.size):
        padding[j] = left[j]
    for j in range(empty.size):
        store(empty, j, -np.inf)
    return padding


@inner
def scale(tile, shift, power):
    lowest = (power + lowest_power(tile)) * LN_2
    return work(tile, shift), work(tile, power), work(tile, lowest)


@inner
def sum_and_top(tile, padding, shift, power):
    shift, power, lowest = scale(tile, shift, power)
    total, high, low = _sum_and_top(_whole(tile), shift, power, lowest)
    if tile.size % LANES:
        more, higher, lower = _sum_and_top(remainder(tile, padding), shift, power, lowest)
        total, high, low = total + more, max(high, higher), min(low, lower)
    return f64(total), _top(tile, high, low)


@inner
def sum_without(tile, padding, top, shift, power):
    shift, power, lowest = scale(tile, shift, power)
    top = work(tile, top)
    total, count = _sum_without(_whole(tile), top, shift, power, lowest)
    if tile.size % LANES:
        more, others = _sum_without(remainder(tile, padding), top, shift, power, lowest)
        total, count = total + more, count + others
    return f64(total), count


@inner
def rest_of(tile, padding, top, shift, power, factor):
    """(sum of exp(x - top) over all but one of the elements equal to `top`, the largest; the shift, power and factor of
    a scale at which none of the others is lost)."""
    total, equals = sum_without(tile, padding, top, shift, power)
    if equals == 1 and total < SMALL:  # all others are so far below that some may have been lost
        second = _second(tile, work(tile, top))
        if second > -np.inf:
            shift, power = shift_for(second), power_for(second)
            total, equals = sum_without(tile, padding, top, shift, power)
            factor = unscale(shift, power, top)
    return total * factor + (equals - 1), shift, power, factor


def prepared(source, scratch, transform):
    """The tile on which the loops run: the logits as they are, or transformed in a scratch tile of float64."""
    raise NotImplementedError


@overload(prepared)
def _prepared(source, scratch, transform):
    def transformed(source, scratch, transform):
        softcap, temperature = transform
        tile = scratch[: source.size]
        for j in range(source.size):
            tile[j] = load(source, j)
        if softcap > 0.0:
            for j in range(source.size):
                tile[j] = softcap * tanh(tile[j] / softcap)
        if temperature != 1.0:
            for j in range(source.size):
                tile[j] = tile[j] / temperature
        return tile

    return (lambda source, scratch, transform: source) if isinstance(transform, types.NoneType) else transformed


@inner
def tile_at(row, like, start, columns, scratch, transform):
    """The tile of a row that begins at column `start`."""
    return prepared(elements(row, like, start, min(TILE, columns - start)), scratch, transform)


def spread_tile(spread, i, start, out, count):
    """The spread row scale * soft + base of row i, from column `start`: `count` entries, and 0 up to whole vectors.

    `scale` and `base` are vectors: one entry per column, or a constant tile.
    """
    raise NotImplementedError


@overload(spread_tile)
def _spread_tile(spread, i, start, out, count):
    def from_base(spread, i, start, out, count):
        base = from_column(spread[0], start)
        for j in range(count):
            out[j] = base[j]
        out[count : count + -count % LANES] = 0.0

    def from_soft(spread, i, start, out, count):
        rows, like, scale, base = spread
        soft = elements(rows[i], like, start, count)
        scale, base = from_column(scale, start), from_column(base, start)
        for j in range(count):
            out[j] = work(out, load(soft, j)) * scale[j] + base[j]
        out[count : count + -count % LANES] = 0.0

    return from_soft if len(spread) == 4 else from_base


@inner
def from_column(values, start):
    """The entries from a column on of a vector that has one per column, or is a constant tile."""
    return values[start if values.size > TILE else 0 :]
