"""Rows of logits for the Numba backend: their statistics and gradients at the speed of memory, within 4 eps.

- A row is a memory address, so one compiled function serves every layout of the rows: read-only, sliced, broadcast.
- Tiles stay in the L1 cache. One loop over a tile takes its sum and its maximum together: reading memory overlaps with
  arithmetic, and nothing waits for a maximum.
- That loop need not know the maximum, because it scales by a power of two, which is exact: it computes
  exp(x) * 2**-power from x itself. No difference x - max is rounded, which would cost a confident row dozens of eps.
  Only if the guessed power (that of the last tile, or of the first logit) is far off is the tile summed again.
- `rest` leaves the maximum out. A tile that raises the row's maximum takes its own term off its sum, or, where that
  would enlarge the sum's error, is summed again without it.
- The order of additions in a row is fixed by the row: its bits depend on no other row, no thread and no option.

16-bit logits are widened in registers. softcap and temperature go through a float64 tile. Every option adds loops over
a tile that is in the cache; none changes those that the others use.

What the functions take: `logits` = (addresses of the rows, an empty array of their type, columns); `labels` local to
these columns; `how` = (spread, transform), where the spread is None, (base,) or (addresses, empty array, scale, base),
and the transform None or (softcap or 0, temperature); `tiles` = scratch for transformed logits, padding, weights,
results; `record` (FIELDS, rows); `pushes` (3, rows), the fields of GradWeights.
"""

import math

import numpy as np

from gpuxent.backends._numba_core import elements, entry, inner, load, store, work
from gpuxent.backends._numba_tiles import (
    LOG2_E,
    STEP,
    TILE,
    classes_before,
    first_equal,
    from_column,
    gap_sums,
    has_nan,
    moment_of,
    plus,
    power_for,
    probabilities,
    rest_of,
    scale,
    shift_for,
    spread_tile,
    store_all,
    sum_and_top,
    tile_at,
    times_slope,
    unscale,
)

# The fields of RowStats as they are numbered in a record.
FIELDS = MAX, REST, LABEL_LOGIT, SPREAD_GAP, SPREAD_WEIGHT, ARGMAX, MOMENT, RANK = range(8)


# ---- one read: the statistics ----


@entry
def measure_rows(first, last, logits, labels, ranked, how, also, tiles, record):
    """Fill the record of rows first to last, as far as is asked for.

    `ranked` are the logits that the rank is wanted of, or None. `also`: are argmax and moment wanted?
    """
    for i in range(first, last):
        _measure(i, logits, labels, ranked, how[0], how[1], also, tiles, record)


@inner
def _measure(i, logits, labels, ranked, spread, transform, also, tiles, record):
    rows, like, columns = logits
    want_argmax, want_moment = also
    scratch, padding, weights, _ = tiles
    top, rest, lost, argmax, moment, rank, gap, weight = -np.inf, -1.0, 0.0, 0, 0.0, 0, 0.0, 0.0
    # Sums of exp are scaled by exp(-shift) * 2**-power; `factor` makes them relative to the top.
    shift, power, factor = 0.0, 0.0, 0.0
    for start in range(0, columns, TILE):
        tile = tile_at(rows[i], like, start, columns, scratch, transform)
        if start == 0:
            power = power_for(load(tile, 0))  # a first guess
        total, high = sum_and_top(tile, padding, shift, power)
        if np.isfinite(high) and (abs(power_for(high) - power) > STEP or shift_for(high) != shift):
            shift, power = shift_for(high), power_for(high)
            total, high = sum_and_top(tile, padding, shift, power)
            factor = unscale(shift, power, top) if np.isfinite(top) else 0.0
        before, behind = top, 1.0 + rest
        here_shift, here_power, here_factor = shift, power, factor  # for what else is summed over this tile
        if high > top:
            top, factor = high, unscale(shift, power, high) if high < np.inf else np.nan
            here_factor = factor
            rest = total * factor - 1.0
            if rest < 3.0:  # to take the maximum off would enlarge the sum's error
                rest, here_shift, here_power, here_factor = rest_of(tile, padding, top, shift, power, factor)
            if before > -np.inf:
                down = unscale(before, 0.0, top)
                behind, lost = behind * down, lost * down
                rest, lost = plus(rest, lost, behind)
            else:
                rest += behind  # 0, or NaN
            if want_argmax:
                argmax = start + first_equal(tile, work(tile, top))
        else:
            rest, lost = plus(rest, lost, total * factor)
        if want_moment and high > -np.inf:
            below = 0.0  # also where the distance to the others is more than a float holds
            if here_factor != 0.0:
                below = moment_of(tile, padding, high, here_shift, here_power) * here_factor
            moment = _moment_with(moment, below, before, behind, high, total * factor)
        if spread is not None:
            spread_tile(spread, i, start, weights, tile.size)
            gap, weight = _gap_with(gap, weight, before, high, *gap_sums(tile, padding, high, weights))
        if ranked is not None:
            rank += classes_before(tile, work(tile, ranked[i]), labels[i] - start)
    rest += lost
    if rest != rest and has_nan(elements(rows[i], like, 0, columns)):
        top = np.nan
    record[MAX, i], record[REST, i] = top, rest
    record[LABEL_LOGIT, i] = _label_logit(i, logits, labels, scratch, transform)
    if want_argmax:
        record[ARGMAX, i] = argmax
    if want_moment:
        record[MOMENT, i] = moment
    if spread is not None:
        record[SPREAD_GAP, i], record[SPREAD_WEIGHT, i] = gap, weight
    if ranked is not None:
        record[RANK, i] = rank


@inner
def _moment_with(moment, below, before, behind, high, total):
    """The moment relative to the larger of two tops: `before`, of the row so far, and `high`, of a tile.

    `below`: the tile's sum of exp * (high - x). `behind`: the sum of exp of the row so far, `total`: of the tile, both
    relative to the larger top.
    """
    if high <= before:
        return moment + ((high - before) * total - below)
    if before == -np.inf:
        return -below
    return moment * unscale(before, 0.0, high) + (before - high) * behind - below


@inner
def _gap_with(gap, weight, before, high, tile_gap, tile_weight):
    """(spread gap, spread weight) of the row so far, whose top is `before`, and a tile, whose top is `high`."""
    if before > -np.inf and high > before and weight != 0.0:
        gap += weight * (high - before)
    if high > -np.inf and before > high and tile_weight != 0.0:
        gap += tile_weight * (before - high)
    return gap + tile_gap, weight + tile_weight


@entry
def label_logits(first, last, logits, labels, transform, tiles, out):
    """The transformed logit at each row's label; -inf where the label is not among these columns."""
    for i in range(first, last):
        out[i] = _label_logit(i, logits, labels, tiles[0], transform)


@inner
def _label_logit(i, logits, labels, scratch, transform):
    """Transformed with its tile, so that it has the very bits that the row's maximum is taken of."""
    rows, like, columns = logits
    if not 0 <= labels[i] < columns:
        return -np.inf
    if transform is None:
        return np.float64(load(elements(rows[i], like, labels[i], 1), 0))
    start = labels[i] - labels[i] % TILE
    return np.float64(load(tile_at(rows[i], like, start, columns, scratch, transform), labels[i] - start))


# ---- one read, one write: gradients and log-probabilities ----


@entry
def push_rows(first, last, logits, labels, how, tiles, record, pushes, targets):
    """Store the gradient of rows first to last, whose statistics are in the record, at the addresses `targets`, which
    may be the logits' own."""
    for i in range(first, last):
        _push(i, logits, labels, how[0], how[1], tiles, record, pushes, targets)


@entry
def measure_and_push_rows(first, last, logits, labels, how, also, tiles, record, pushes, targets):
    """Both, row by row: the second read of a row finds it in the cache."""
    for i in range(first, last):
        _measure(i, logits, labels, None, how[0], how[1], also, tiles, record)
        _push(i, logits, labels, how[0], how[1], tiles, record, pushes, targets)


@inner
def _push(i, logits, labels, spread, transform, tiles, record, pushes, targets):
    rows, like, columns = logits
    scratch, _, weights, results = tiles
    target = elements(targets[i], like, 0, columns)
    label_push, spread_push, lse_push = pushes[0, i], pushes[1, i], pushes[2, i]
    if label_push == 0.0 and spread_push == 0.0 and lse_push == 0.0:  # stored, not multiplied: the row may be NaN
        for j in range(columns):
            store(target, j, 0.0)
        return
    top, rest, label = record[MAX, i], record[REST, i], labels[i]
    softmax_push = label_push + spread_push * record[SPREAD_WEIGHT, i]
    if lse_push != 0.0:
        softmax_push += lse_push * (top + math.log1p(rest))
    if top == -np.inf:  # no distribution, no gradient
        softmax_push = np.nan
    at_label = _at_label(i, label, columns, spread, transform, record, softmax_push, label_push, spread_push)
    shift = shift_for(top)
    power = np.rint(top * LOG2_E) if shift == 0.0 else 0.0  # the nearest: no probability is lost that has a float
    factor = unscale(shift, power, top) / (1.0 + rest)
    for start in range(0, columns, TILE):
        tile = tile_at(rows[i], like, start, columns, scratch, transform)
        out = results[: tile.size]
        probabilities(tile, *scale(tile, shift, power), work(tile, factor), work(tile, softmax_push), out)
        if spread is not None:
            spread_tile(spread, i, start, weights, tile.size)
            pull = work(tile, spread_push)
            for j in range(out.size):
                out[j] -= pull * weights[j]
        if transform is not None:
            times_slope(tile, transform, out)
        store_all(out, target[start : start + tile.size])
    if 0 <= label < columns:
        store(target, label, at_label)


@inner
def _at_label(i, label, columns, spread, transform, record, softmax_push, label_push, spread_push):
    """The gradient at the label, from rest / (1 + rest), which keeps its digits where p - 1 does not."""
    top, rest, label_logit = record[MAX, i], record[REST, i], record[LABEL_LOGIT, i]
    others = rest if label_logit == top else 1.0 + rest
    if -np.inf < label_logit < top:
        others -= unscale(label_logit, 0.0, top)
    entry = (softmax_push - label_push) - softmax_push * (others / (1.0 + rest))
    if spread is not None and 0 <= label < columns:
        entry -= spread_push * from_column(spread[-1], label - label % TILE)[label % TILE]
    if transform is not None:
        softcap, temperature = transform
        entry /= temperature
        if softcap > 0.0:
            entry *= 1.0 - (label_logit * temperature / softcap) ** 2
    return entry


@entry
def log_prob_rows(first, last, logits, record, targets):
    """(logit - max) - log1p(rest)."""
    rows, like, columns = logits
    for i in range(first, last):
        source, target = elements(rows[i], like, 0, columns), elements(targets[i], like, 0, columns)
        top, log_sum = work(source, record[MAX, i]), work(source, math.log1p(record[REST, i]))
        for j in range(columns):
            store(target, j, (load(source, j) - top) - log_sum)
