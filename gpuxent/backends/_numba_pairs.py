"""Two models' rows for the Numba backend: how far their distributions diverge, given the normalizers of both.

A class of probabilities p and q adds to each divergence the larger of the two times a function of x = |ln(p/q)|, which
logits and normalizers give without p and q. With e = exp(-x), the smaller over the larger, and w = 1 - e these are

    KL(p || q)  p ln(p/q) - p + q    x - w where p is the larger, w - x e where q is
    KL(q || p)                       the other way round
    JS          (p ln(p/m) + q ln(q/m)) / 2 with m = (p + q) / 2    (w**2 C(w) - e (x - w)) / 2
    TV          |p - q| / 2          w / 2

where C(w) = 1 - (w - (2 - w) ln(2 / (2 - w))) / w**2 is smooth. None is negative, all are 0 at x = 0 and keep their
digits near it: two exponentials and two polynomials give all four.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload

from gpuxent.backends._numba_core import (
    LN_2,
    LN_2_32,
    LN_2_LOW,
    LOG2_E,
    MAGIC_32,
    MAGIC_64,
    bits_of,
    entry,
    exact,
    f32,
    f64,
    float_of,
    fused,
    i32,
    i64,
    inner,
    laned,
    load,
    scaled_exp,
    work,
)
from gpuxent.backends._numba_rows import MAX, REST
from gpuxent.backends._numba_tiles import (
    LANES,
    STEP,
    TILE,
    plus,
    power_for,
    remainder,
    scale,
    shift_for,
    tile_at,
    unscale,
)

# Q(r) = (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2, and C(w), with the least errors (Remez): 3e-9 and 5e-8 in float32,
# 2e-16 and 3e-17 in float64.
Q32 = tuple(
    f32(a)
    for a in (
        *(0.500000001346, 0.166666665314, 0.0416664647281, 0.00833336088321, 0.00139336866972),
        *(1.98577929383e-4,),
    )
)
C32 = tuple(
    f32(a)
    for a in (
        *(0.749999950203, -0.0416621120709, -0.010484434039, -0.00275135759962, -0.00199819485826),
        *(8.18649415571e-4, -7.75270693251e-4),
    )
)
Q64 = (
    *(0.50000000000000010243, 0.16666666666666643817, 0.041666666666624009136, 0.0083333333333562587553),
    *(0.0013888888917288682858, 1.9841269784701888536e-4, 2.4801521162109360391e-5),
    *(2.7557355236971007971e-6, 2.7620158308807556102e-7, 2.5068351516832876966e-8),
)
C64 = (
    *(0.75000000000000003356, -0.041666666666687805569, -0.010416666664457471249),
    *(-0.0031250000913959397114, -0.0010416646751731801738, -3.7205016609274085241e-4),
    *(-1.3927857260256430179e-4, -5.5655693577453719923e-5, -1.554542320947478092e-5),
    *(-2.881271868124558252e-5, 4.4545541445995231037e-5, -8.9250887280668593802e-5),
    *(1.1861638784933903078e-4, -1.2015559901751201795e-4, 8.6445245923218763641e-5),
    *(-4.2750475496553109258e-5, 1.2945879004697593182e-5, -1.8748606053315398475e-6),
)

LARGEST_32, LARGEST_64 = np.finfo(np.float32).max, float(np.finfo(np.float64).max)
NEAR = 0.34  # under ln(2) / 2: the exponential is not reduced
LOWEST_32, LOWEST_64 = f32(126.6 * LN_2), 1022.6 * LN_2  # exp of less than minus these is 0


@entry
def diverge_rows(first, last, base, other, out):
    """The divergences of rows first to last, or what a slice of the vocabulary adds to them, into `out` (4, rows).

    A side = (logits, transform, tiles, record), as `measure_rows` takes and fills them.
    """
    for i in range(first, last):
        _diverge(i, base, other, out)


@inner
def _diverge(i, base, other, out):
    (rows, like, columns), transform, tiles, record = base
    (other_rows, other_like, _), other_transform, other_tiles, other_record = other
    tops, rests = (record[MAX, i], other_record[MAX, i]), (record[REST, i], other_record[REST, i])
    ratio = _log_ratio_of_sums(tops, rests)
    if not np.isfinite(ratio[0]):  # one side has no distribution
        out[:, i] = np.nan
        return
    scales = _scales(tops, rests)
    kl, reverse, js, tv = 0.0, 0.0, 0.0, 0.0
    for start in range(0, columns, TILE):
        a = tile_at(rows[i], like, start, columns, tiles[0], transform)
        b = tile_at(other_rows[i], other_like, start, columns, other_tiles[0], other_transform)
        whole = a.size - a.size % LANES
        more = _tile_sums(a[:whole], b[:whole], ratio, scales)
        kl, reverse, js, tv = kl + more[0], reverse + more[1], js + more[2], tv + more[3]
        if whole < a.size:  # what is filled up with -inf adds nothing
            more = _tile_sums(remainder(a, tiles[1]), remainder(b, other_tiles[1]), ratio, scales)
            kl, reverse, js, tv = kl + more[0], reverse + more[1], js + more[2], tv + more[3]
    out[0, i], out[1, i], out[2, i], out[3, i] = kl, reverse, 0.5 * js, 0.5 * tv


@inner
def _log_ratio_of_sums(tops, rests):
    """ln of p's sum of exp over q's, in two parts."""
    total, lost = plus(tops[0], 0.0, -tops[1])
    return plus(total, lost, math.log1p(rests[0]) - math.log1p(rests[1]))


@inner
def _scales(tops, rests):
    """What makes probabilities of exp(x - shift) * 2**-power: the power, and of each side the shift and a factor.

    One power for both sides, so that the loop need not choose; rows too far apart for that are shifted.
    """
    power, other_power = power_for(tops[0]), power_for(tops[1])
    shift, other_shift = shift_for(tops[0]), shift_for(tops[1])
    if abs(power - other_power) > STEP or shift != 0.0 or other_shift != 0.0:
        power, other_power, shift, other_shift = 0.0, 0.0, tops[0], tops[1]
    power = 0.5 * (power + other_power)
    factor = unscale(shift, power, tops[0]) / (1.0 + rests[0])
    other_factor = unscale(other_shift, power, tops[1]) / (1.0 + rests[1])
    return power, shift, factor, other_shift, other_factor


# ---- the loop over a tile ----


@inner
def _tile_sums(a, b, ratio, scales):
    """KL(p || q), KL(q || p), twice JS and twice TV."""
    kl, reverse, js, tv, excluding = _divergences(a, b, ratio, scales)
    if excluding:
        only_p, only_q = _one_sided(a, b)
        kl, reverse = np.inf if only_p else kl, np.inf if only_q else reverse
    return kl, reverse, js, tv


@inner
def _one_sided(a, b):
    """Does p have a class that q excludes, does q have one that p excludes?"""
    only_p, only_q = i32(0), i32(0)
    for j in range(a.size):
        p_has, q_has = load(a, j) > -np.inf, load(b, j) > -np.inf
        only_p = i32(only_p + (p_has and not q_has))
        only_q = i32(only_q + (q_has and not p_has))
    return only_p > 0, only_q > 0


@laned
def _divergences(a, b, ratio, scales):
    """As `_tile_sums`, and whether a side excludes a class: what it adds to a KL divergence is wrong then."""
    wide = _wider(a, b)
    shift, power, lowest = scale(wide, scales[1], scales[0])
    factor, other_shift, other_factor = work(wide, scales[2]), work(wide, scales[3]), work(wide, scales[4])
    c = work(wide, ratio[0])
    c_low = work(wide, (ratio[0] - f64(c)) + ratio[1])
    kl = reverse = js = tv = work(wide, 0.0)
    top, widest = bits_of(largest(wide)), bits_of(work(wide, 0.0))
    for j in range(a.size):
        u, v = work(wide, load(a, j)), work(wide, load(b, j))
        r = _log_ratio(wide, u, v, c, c_low)
        p_leads, x = r > work(wide, 0.0), bits_of(abs(r))
        widest = max(widest, x)
        ahead, behind, mean, w = _terms(float_of(wide, min(x, top)))
        larger = scaled_exp(u if p_leads else v, shift if p_leads else other_shift, power, lowest)
        larger = larger * (factor if p_leads else other_factor)
        kl += larger * (ahead if p_leads else behind)
        reverse += larger * (behind if p_leads else ahead)
        js += larger * mean
        tv += larger * w
    return f64(kl), f64(reverse), f64(js), f64(tv), widest > top


@exact
def _log_ratio(wide, u, v, c, c_low):
    """u - v - c, with the rounding error of u - v put back (TwoSum); NaN where both are -inf."""
    d = u - v
    virtual = d - u
    lost = (u - (d - virtual)) - (v + virtual)
    lost = lost if lost == lost else work(wide, 0.0)
    return (d - c) + (lost - c_low)


@exact
def _terms(x):
    """x - w, w - x e, w**2 C(w) - e (x - w) and w; all 0 for NaN."""
    near, e, w, h = _fall(x)
    behind = x * w - h if near else w - x * e
    return h, behind, w * w * _c(w) - h * e, w


def _fall(x):
    """(is x near 0, e = exp(-x), w = 1 - e, x - w)"""
    raise NotImplementedError


@overload(_fall, jit_options={"fastmath": {"contract", "nsz"}, "error_model": "numpy"})
def _fall_of(x):
    def in_float32(x):
        d = x if x < LOWEST_32 else LOWEST_32
        t = MAGIC_32 - d * f32(LOG2_E)
        k = t - MAGIC_32
        r = -d - k * LN_2_32
        q = ((((Q32[5] * r + Q32[4]) * r + Q32[3]) * r + Q32[2]) * r + Q32[1]) * r + Q32[0]
        s = i32(bits_of(t) << i32(23)).view(np.float32)
        z = r * r * q
        m = z + r
        w = (f32(1.0) - s) - s * m
        near = x < f32(NEAR)
        return near, s + s * m, w, z if near else x - w

    def in_float64(x):
        d = -x if x < LOWEST_64 else -LOWEST_64
        t = d * LOG2_E + MAGIC_64
        k = t - MAGIC_64
        r = fused(-k, LN_2, d)
        r = r - k * LN_2_LOW
        q = (((Q64[9] * r + Q64[8]) * r + Q64[7]) * r + Q64[6]) * r + Q64[5]
        q = ((((q * r + Q64[4]) * r + Q64[3]) * r + Q64[2]) * r + Q64[1]) * r + Q64[0]
        s = i64(bits_of(t) << i64(52)).view(np.float64)
        z = r * r * q
        m = z + r
        w = (1.0 - s) - s * m
        near = x < NEAR
        return near, s + s * m, w, z if near else x - w

    return in_float64 if x == types.float64 else in_float32


def _c(w):
    """C(w)"""
    raise NotImplementedError


@overload(_c, jit_options={"fastmath": {"contract", "nsz"}, "error_model": "numpy"})
def _c_of(w):
    def in_float32(w):
        c = (C32[6] * w + C32[5]) * w + C32[4]
        return (((c * w + C32[3]) * w + C32[2]) * w + C32[1]) * w + C32[0]

    def in_float64(w):
        c = ((C64[17] * w + C64[16]) * w + C64[15]) * w + C64[14]
        c = ((((c * w + C64[13]) * w + C64[12]) * w + C64[11]) * w + C64[10]) * w + C64[9]
        c = ((((c * w + C64[8]) * w + C64[7]) * w + C64[6]) * w + C64[5]) * w + C64[4]
        return (((c * w + C64[3]) * w + C64[2]) * w + C64[1]) * w + C64[0]

    return in_float64 if w == types.float64 else in_float32


def largest(wide):
    """The largest finite number of the type in which the tile is computed."""
    raise NotImplementedError


@overload(largest)
def _largest(wide):
    if wide.dtype == types.float64:
        return lambda wide: LARGEST_64
    return lambda wide: LARGEST_32


def _wider(a, b):
    """The tile in whose type both are computed: float64 if either is, float32 otherwise."""
    raise NotImplementedError


@overload(_wider)
def _wider_of(a, b):
    return (lambda a, b: a) if a.dtype == types.float64 else (lambda a, b: b)
