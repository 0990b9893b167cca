"""Divergences of two models' rows for the Numba backend, in float64: models that are close differ by little.

With r = ln(p / q), which the logits and normalizers give without p and q, a class adds

    KL   p ln(p/q) - p + q = p (exp(-r) - 1 + r) = p r**2 (E(r**2) - r O(r**2)) near r = 0
    JS   (p ln(p/m) + q ln(q/m)) / 2 with m = (p + q) / 2, = (p + q) / 2 * (r/2 tanh(r/2) - ln cosh(r/2))

none of which is negative: near r = 0 as series in r, elsewhere from p and q themselves.
"""

import math

from gpuxent.backends._numba_core import (
    LN_2,
    elements,
    entry,
    exact,
    f64,
    inner,
    laned,
    load,
    log1p_of,
    scaled_exp,
    store,
)
from gpuxent.backends._numba_tiles import LANES, TILE

LOWEST = -1022.6 * LN_2  # of a logarithm whose exponential is a normal number

# exp(-r) - 1 + r = r**2 * (E(r**2) - r * O(r**2)): the sums of r**(2k) / (2k + 2)! and of r**(2k) / (2k + 3)!
E0, E1, E2, E3, E4, E5, E6, E7, E8 = (1 / math.factorial(2 * k + 2) for k in range(9))
O0, O1, O2, O3, O4, O5, O6, O7, O8 = (1 / math.factorial(2 * k + 3) for k in range(9))

# (r/2 tanh(r/2) - ln cosh(r/2)) / r**2 as a polynomial in r**2 on [0, 1], with the least error (6e-19)
J = (
    *(0.12499999999999999938, -0.015624999999999848914, 0.0017361111111050548578, -0.00018446180546070183084),
    *(0.000019221229395181718716, -1.9835492774528973351e-6, 2.0357506010099755385e-7, -2.0805680080944528842e-8),
    *(2.1007351845217135438e-9, -1.9701139242339730768e-10, 1.286131072453550669e-11),
)


@entry
def pair_rows(first, last, p, q, columns, normalizers, wanted, padding, out):
    """KL(p || q), KL(q || p) and JS of rows first to last, into `out` (3, rows).

    `p` and `q` = (addresses of the rows, an empty array of their type); `normalizers` (4, rows): the maximum of p's row
    and ln(1 + rest), and q's; `wanted` = (both KL?, JS?); `padding`: a tile of LANES for each.
    """
    for i in range(first, last):
        tops = (normalizers[0, i], normalizers[1, i], normalizers[2, i], normalizers[3, i])
        kl, reverse, js = 0.0, 0.0, 0.0
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            x, y = elements(p[0][i], p[1], start, count), elements(q[0][i], q[1], start, count)
            whole = count - count % LANES
            more = _divergences(x[:whole], y[:whole], tops, wanted)
            kl, reverse, js = kl + more[0], reverse + more[1], js + more[2]
            if whole < count:
                _padded(x[whole:], padding[0])
                _padded(y[whole:], padding[1])
                more = _divergences(padding[0], padding[1], tops, wanted)
                kl, reverse, js = kl + more[0], reverse + more[1], js + more[2]
        out[0, i], out[1, i], out[2, i] = kl, reverse, js


@inner
def _padded(rest, padding):
    """Classes of probability 0 in both models add nothing."""
    for j in range(padding.size):
        if j < rest.size:
            padding[j] = rest[j]
        else:
            store(padding, j, -math.inf)


@inner
def _divergences(x, y, tops, wanted):
    kl, reverse = _kl(x, y, tops) if wanted[0] else (0.0, 0.0)
    return kl, reverse, _js(x, y, tops) if wanted[1] else 0.0


@exact
def _log_prob(x, top, log):
    return (f64(x) - top) - log  # in this order: top + log may be far larger than either difference


@laned
def _kl(x, y, tops):
    """Both ways."""
    total, reverse = 0.0, 0.0
    for j in range(x.size):
        a, b = _log_prob(load(x, j), tops[0], tops[1]), _log_prob(load(y, j), tops[2], tops[3])
        p, q = scaled_exp(a, 0.0, 0.0, LOWEST), scaled_exp(b, 0.0, 0.0, LOWEST)
        r = a - b
        z = r * r
        even, odd = _even(z), r * _odd(z)
        near = abs(r) < 1.0
        total += _kl_term(near, p * z * (even - odd), p, q, r)
        reverse += _kl_term(near, q * z * (even + odd), q, p, -r)
    return total, reverse


@exact
def _kl_term(near, series, p, q, r):
    term = series if near else p * r - (p - q)
    term = q if p == 0.0 else term
    return 0.0 if term < 0.0 else term


@exact
def _even(z):
    s = E8 * z + E7
    s = s * z + E6
    s = s * z + E5
    s = s * z + E4
    s = s * z + E3
    s = s * z + E2
    s = s * z + E1
    return s * z + E0


@exact
def _odd(z):
    s = O8 * z + O7
    s = s * z + O6
    s = s * z + O5
    s = s * z + O4
    s = s * z + O3
    s = s * z + O2
    s = s * z + O1
    return s * z + O0


@laned
def _js(x, y, tops):
    total = 0.0
    for j in range(x.size):
        a, b = _log_prob(load(x, j), tops[0], tops[1]), _log_prob(load(y, j), tops[2], tops[3])
        p, q = scaled_exp(a, 0.0, 0.0, LOWEST), scaled_exp(b, 0.0, 0.0, LOWEST)
        total += _js_term(a - b, p, q)
    return total


@exact
def _js_term(r, p, q):
    z = r * r
    near = J[10] * z + J[9]
    near = near * z + J[8]
    near = near * z + J[7]
    near = near * z + J[6]
    near = near * z + J[5]
    near = near * z + J[4]
    near = near * z + J[3]
    near = near * z + J[2]
    near = near * z + J[1]
    near = near * z + J[0]
    size = abs(r)
    more = p if r > 0.0 else q
    less = q if r > 0.0 else p
    tail = log1p_of(less / more)  # a third exponential would be one too many for LLVM to put all into one loop
    of_less = less * ((LN_2 - size) - tail)
    of_less = 0.0 if less == 0.0 else of_less
    far = 0.5 * (more * (LN_2 - tail) + of_less)
    close = 0.5 * (p + q) * (z * near)
    term = close if size < 1.0 else far
    term = 0.0 if p + q == 0.0 else term
    return 0.0 if term < 0.0 else term
