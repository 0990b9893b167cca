"""Independent sigmoids and plain sums of rows for the Numba backend.

`scores`, `targets` and `rows` = (addresses of the rows, an empty array of their type); `weights` = (pos_weight,
class_weight), each one entry per column or a constant tile. They and `buffer`, a tile, have the type in which all is
computed. `ignore` is NaN for none.
"""

from gpuxent.backends._numba_core import (
    LN_2,
    elements,
    entry,
    exact,
    f64,
    i32,
    laned,
    load,
    log1p_of,
    lowest_power,
    scaled_exp,
    work,
)
from gpuxent.backends._numba_tiles import LANES, TILE, from_column, store_all


@entry
def binary_rows(first, last, scores, targets, columns, weights, ignore, buffer, results, slope):
    """Store the loss, or its slope, of every element of rows first to last at the addresses of `results`."""
    for i in range(first, last):
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            x, y = elements(scores[0][i], scores[1], start, count), elements(targets[0][i], targets[1], start, count)
            if slope:
                _slopes(x, y, from_column(weights[0], start), from_column(weights[1], start), ignore, buffer)
            else:
                _losses(x, y, from_column(weights[0], start), from_column(weights[1], start), ignore, buffer)
            store_all(buffer, elements(results[0][i], results[1], start, count))


@entry
def binary_sum_rows(first, last, scores, targets, columns, weights, ignore, buffer, sums, counts):
    """Per row, the sum of the losses and the number of elements that count."""
    for i in range(first, last):
        total, counted = 0.0, 0
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            x, y = elements(scores[0][i], scores[1], start, count), elements(targets[0][i], targets[1], start, count)
            _losses(x, y, from_column(weights[0], start), from_column(weights[1], start), ignore, buffer)
            part, ignored = _sum_and_ignored(buffer, y, ignore)
            total, counted = total + part, counted + count - ignored
        sums[i], counts[i] = total, counted


@exact
def _losses(scores, targets, pos_weight, class_weight, ignore, out):
    """class_weight * (pos_weight y softplus(-x) + (1 - y) softplus(x)); a term of weight 0 counts 0."""
    zero, one, ignore = work(out, 0.0), work(out, 1.0), work(out, ignore)
    lowest = work(out, lowest_power(out) * LN_2)
    for j in range(scores.size):
        x, y = work(out, load(scores, j)), work(out, load(targets, j))
        tail = log1p_of(scaled_exp(-abs(x), zero, zero, lowest))
        positive = pos_weight[j] * y
        positive = zero if positive == zero else positive * ((-x if x < zero else zero) + tail)
        negative = zero if y == one else (one - y) * ((x if x > zero else zero) + tail)
        loss = zero if class_weight[j] == zero else class_weight[j] * (positive + negative)
        loss = x if x != x else loss
        out[j] = zero if y == ignore else loss


@exact
def _slopes(scores, targets, pos_weight, class_weight, ignore, out):
    """class_weight * ((1 - y) sigmoid(x) - pos_weight y sigmoid(-x))."""
    zero, one, ignore = work(out, 0.0), work(out, 1.0), work(out, ignore)
    lowest = work(out, lowest_power(out) * LN_2)
    for j in range(scores.size):
        x, y = work(out, load(scores, j)), work(out, load(targets, j))
        small = scaled_exp(-abs(x), zero, zero, lowest)
        large, small = (one, small) if x >= zero else (small, one)
        slope = class_weight[j] * (((one - y) * large - pos_weight[j] * y * small) / (large + small))
        slope = x if x != x else slope
        out[j] = zero if y == ignore else slope


@laned
def _sum_and_ignored(losses, targets, ignore):
    count, ignore = i32(0), work(losses, ignore)
    for j in range(targets.size):
        count = i32(count + (work(losses, load(targets, j)) == ignore))
    whole = targets.size + -targets.size % LANES
    losses[targets.size : whole] = 0.0
    padded, total = losses[:whole], work(losses, 0.0)
    for j in range(padded.size):
        total += padded[j]
    return f64(total), count


@entry
def sum_rows(first, last, rows, columns, high, ignore, outside, totals):
    """Per row, the number of entries outside [0, high] (but for `ignore`) and the sum of all."""
    for i in range(first, last):
        count, total = 0, 0.0
        for start in range(0, columns, TILE):
            tile = elements(rows[0][i], rows[1], start, min(TILE, columns - start))
            more, part = _range_sums(tile, work(tile, high), work(tile, ignore))
            count, total = count + more, total + part
        outside[i], totals[i] = count, total


@laned
def _range_sums(tile, high, ignore):
    count, total = i32(0), work(tile, 0.0)
    for j in range(tile.size):
        x = load(tile, j)
        inside = ((x >= 0.0) & (x <= high)) | (x == ignore)  # a NaN is outside
        count = i32(count + (not inside))
        total += x
    return count, f64(total)
