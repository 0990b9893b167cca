"""Totals: exact, order-free, JSON round trip; and the statistics that `evaluate` makes of them."""

import itertools
import json
import math
import random
from fractions import Fraction
from functools import reduce

import numpy as np
import oracle
import pytest
from makers import FLOAT_DTYPES, labels, logits
from oracle import assert_close

import gpuxent as gx
from gpuxent.evaluation.statistics.tokens import Tokens
from gpuxent.evaluation.statistics.totals import Totals, score_rows

DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)


def totals_of(x, y, pieces, **options):
    """Totals by pieces of the rows, in any order."""
    parts = []
    for a, b in pieces:
        scores = score_rows(x[a:b], y[a:b], **options)
        on = np.flatnonzero(scores.scored)
        fields = (scores.loss, scores.entropy, scores.p_max, scores.rank)
        tokens = Tokens(on + a, y[a:b][on], on, *(field[on] for field in fields))
        parts.append(Totals.of(tokens, int(b - a - on.size)))
    return parts


def same(a, b):
    """Bit for bit, NaN included."""
    return a.to_json() == b.to_json()


X = logits(120, 500, np.float32, seed=1)
Y = labels(X, on_masked=True)
X[17], X[93, 5] = np.nan, np.nan
Y[[17, 93]] = 3


def test_any_grouping_and_order_gives_the_same_bits():
    whole = totals_of(X, Y, [(0, 120)])[0]
    for seed in range(10):
        rng = random.Random(seed)
        edges = [0, *sorted(rng.sample(range(1, 120), rng.randint(1, 20))), 120]
        parts = totals_of(X, Y, list(itertools.pairwise(edges)))
        rng.shuffle(parts)
        assert same(reduce(Totals.merge, parts), whole)
    assert same(Totals.identity().merge(whole), whole)
    assert (whole.nan.count, whole.nan.first) == (2, 17)
    assert whole.infinite.count > 0


def test_json_round_trip():
    whole = totals_of(X, Y, [(0, 120)])[0]
    again = Totals.from_json(whole.to_json())
    assert same(again, whole)
    assert repr(again) == repr(whole)
    assert again.merge(whole).scored == 2 * whole.scored
    with pytest.raises(ValueError, match="not of the format 'gpuxent totals, version 2'"):
        Totals.from_json(json.dumps({"format": "gpuxent totals, version 1"}))
    with pytest.raises(ValueError, match=r"cannot merge totals of topk=\(1, 5\) with 15 bins and topk=\(1, 3\)"):
        whole.merge(Totals.identity(topk=(3,)))


@DTYPES
def test_statistics(dtype):
    x = logits(200, 300, dtype, seed=3)
    y = labels(x)
    on = y >= 0
    result = gx.evaluate(x, y, topk=(3, 10), bins=7)
    main, _ = oracle.row_losses(x, y)
    losses = np.asarray(main)[on]
    assert (result.scored, result.ignored) == (on.sum(), (~on).sum())
    eps = np.float32 if dtype != np.float64 else dtype
    assert_close(np.float64(result.cross_entropy), losses.mean(), 4, eps)
    assert_close(np.float64(result.bits_per_token), losses.mean() / np.log(np.longdouble(2)), 4, eps)
    assert_close(np.float64(result.stderr_iid), losses.std(ddof=1) / np.sqrt(losses.size), 16, eps)
    assert result.perplexity == math.exp(result.cross_entropy)
    ranks = oracle.label_ranks(x, y)[on]
    assert result.accuracy == result.topk_accuracy[1] == (ranks == 0).mean()
    assert result.topk_accuracy == {k: (ranks < k).mean() for k in (1, 3, 10)}
    assert_close(np.float64(result.entropy), oracle.entropy(x)[on].mean(), 16, eps)
    confidence = oracle.p_max_rows(x)[on].astype(np.float64)
    assert_close(np.float64(result.ece), np.float64(oracle.ece(confidence, ranks == 0, 7)), 64, eps)
    assert sum(b.count for b in result.bins) == on.sum()
    assert [b.lower for b in result.bins] == np.linspace(0, 1, 8)[:-1].tolist()


def test_cross_entropy_is_the_rounded_mean_of_the_row_losses():
    x = logits(500, 50, np.float64, seed=4)
    y = labels(x)
    losses = gx.cross_entropy(x, y, reduction="none")[y >= 0]
    assert gx.cross_entropy(x, y, reduction="sum") == math.fsum(losses)
    for rows in range(7, 500):  # rounding the sum and then the quotient is off for a third of these
        mean = float(sum(map(Fraction, losses[:rows].tolist())) / rows)
        on = np.flatnonzero(y >= 0)[:rows]
        if rows <= losses.size:
            assert gx.cross_entropy(x[on], y[on]) == mean
            assert rows % 50 or gx.evaluate(x[on], y[on]).cross_entropy == mean
            assert rows % 50 or gx.perplexity(x[on], y[on]) == math.exp(mean)


def tokens_of(loss, p_max, rank):
    loss = np.asarray(loss, np.float64)
    row = np.arange(loss.size)
    return Tokens(row, row, row, loss, np.zeros(loss.size), np.asarray(p_max, np.float64), np.asarray(rank))


def test_variance_cannot_come_out_negative():
    """E[x**2] - E[x]**2 in floats does, for equal losses this large."""
    loss = np.full(1000, 123456.789)
    assert Totals.of(tokens_of(loss, loss * 0, loss * 0), 0).stderr_iid == 0.0


def test_bins_are_closed_on_the_right():
    p = [0.0, 1 / 15, np.nextafter(1 / 15, 1), 14 / 15, 1.0]
    bins = Totals.of(tokens_of([1.0] * 5, p, [0, 1, 0, 1, 0]), 0).bins
    assert [b.count for b in bins] == [2, 1] + [0] * 11 + [1, 1]
    assert [b.hits for b in bins] == [1, 1] + [0] * 11 + [0, 1]
    assert [b.confidence.value for b in bins] == [p[1], p[2]] + [0] * 11 + [p[3], 1.0]


@pytest.mark.parametrize("bins", [3, 10, 15, 20])
def test_the_edges_that_are_shown_are_those_that_are_used(bins):
    """A p_max equal to an upper edge is in that bin, and the next number in the next one."""
    shown = Totals.identity(bins=bins).calibration_bins
    edges = np.array([b.upper for b in shown[:-1]])
    p = np.concatenate([edges, np.nextafter(edges, 1)])
    row = np.arange(p.size)
    found = Totals.of(Tokens(row, row, row, -np.log(p), p, p, row), 0, bins=bins)
    assert [b.count for b in found.calibration_bins] == [1, *[2] * (bins - 2), 1]
    assert [b.lower for b in shown] == [0.0, *edges]
    assert shown[-1].upper == 1.0


def test_counts_of_billions():
    """Float32 counts stop at 2**24, and sums of twos at 2**25: here each merge doubles them, and one more row shows."""
    (one,) = totals_of(np.log([[0.75, 0.25], [0.25, 0.75]]), np.array([0, 0]), [(0, 2)])
    many = one
    for _ in range(40):
        many = many.merge(many)
    many = many.merge(one)
    count = 2**40 + 1
    filled = [b for b in many.calibration_bins if b.count]
    assert [(b.count, many.hits[0]) for b in filled] == [(2 * count, count)]
    assert (filled[0].accuracy, filled[0].confidence) == (0.5, one.calibration_bins[11].confidence)
    assert many.calibration_error == one.calibration_error
    assert Totals.from_json(many.to_json()) == many


def test_a_row_of_nan_is_in_no_bin_and_no_hit():
    totals = Totals.of(tokens_of([np.nan, np.inf, 1.0], [np.nan, 0.5, 0.5], [0, 0, 0]), 4)
    assert (totals.scored, totals.ignored, totals.hits, totals.nan.first, totals.infinite.first) == (3, 4, (1, 1), 0, 1)
    assert sum(b.count for b in totals.bins) == 2
    assert sum(b.hits for b in totals.bins) == 1


def test_a_label_of_probability_0_is_no_hit():
    x = np.array([[0.0, -np.inf, -np.inf]])
    result = gx.evaluate(x, np.array([2]))
    assert result.topk_accuracy == {1: 0.0, 5: 0.0}
    assert (result.infinite_rows, result.first_infinite_row, result.cross_entropy) == (1, 0, math.inf)


def test_nothing_scored():
    result = gx.evaluate(np.zeros((3, 4)), np.full(3, -100))
    assert (result.scored, result.ignored) == (0, 3)
    for name in ("cross_entropy", "perplexity", "stderr_iid", "accuracy", "entropy", "ece"):
        assert math.isnan(getattr(result, name))
    assert gx.evaluate(np.zeros((0, 4)), np.zeros(0, int)).scored == 0
    assert math.isnan(gx.perplexity(np.zeros((0, 4)), np.zeros(0, int)))


def test_perplexity_overflows_to_inf_and_the_cross_entropy_does_not():
    x = np.array([[0.0, 2000.0]])
    assert gx.perplexity(x, np.array([0])) == math.inf
    assert gx.evaluate(x, np.array([0])).cross_entropy == 2000


def test_to_dict_is_strict_json():
    x, y = X.copy(), Y.copy()
    data = gx.evaluate(x, y).to_dict()
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text)["cross_entropy"] is None
    assert data["nan_rows"] == 2
    assert {"scored", "ignored", "perplexity", "bits_per_token", "stderr_iid", "accuracy", "top5_accuracy"} <= set(data)


def test_options_reach_the_rows():
    x = logits(30, 40, np.float32, kinds="ordinary")
    y = labels(x, ignore=False)
    y[3] = 7
    options = {"ignore_index": 7, "temperature": 0.5, "softcap": 20.0}
    assert gx.evaluate(x, y, **options).cross_entropy == gx.cross_entropy(x, y, **options)
    assert gx.perplexity(x, y, **options) == math.exp(gx.cross_entropy(x, y, **options))
