"""The laws of the records: identity, order, any partition of a row; exact sums."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from makers import logits, soft_labels
from oracle import argmax_rows, assert_close, label_ranks
from oracle import entropy as true_entropy

from gpuxent import _row_loss
from gpuxent._records import NO_CLASS, Divergences, ExactSum, RowStats, Spread
from gpuxent.backends import backend_of
from gpuxent.evaluation.statistics.totals import Totals

pytestmark = pytest.mark.usefixtures("backend")

ALSO = ("argmax", "moment")


def row_stats(x, *arguments, **options):
    return backend_of(x).row_stats(x, *arguments, **options)


def stats_of(x, labels, soft, start=0, stop=None):
    """RowStats of some columns, asked for everything."""
    columns = slice(start, stop)
    spread = Spread(np.ascontiguousarray(soft[:, columns]), 0.5, 0.125)
    return row_stats(x[:, columns], labels, start, spread=spread, also=ALSO)


def assert_same(a, b, eps=0.0):
    """Equal where there is a distribution or nothing; else `rest` is NaN in both, and the other fields mean nothing."""
    assert np.array_equal(np.isnan(a.rest), np.isnan(b.rest))
    good = ~np.isnan(a.rest)
    for name in vars(a):
        p, q = getattr(a, name)[good], getattr(b, name)[good]
        if name == "moment":  # used beside rest, and both make the entropy larger: nothing cancels in rest - moment
            p, q = a.rest[good] - p, b.rest[good] - q
        assert_close(p, q, eps, np.float64, floor=1e-280)


special = st.sampled_from([-np.inf, -1e30, -50.0, -1.0, 0.0, 1.0, 3.5, 60.0, 1e30, np.nan, np.inf])
numbers = st.floats(-100, 100)


@settings(deadline=None, max_examples=150)
@given(arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.one_of(special, numbers)))
def test_identity(x):
    labels, soft = np.zeros(len(x), np.int64), np.full(x.shape, 1 / x.shape[1])
    record, nothing = stats_of(x, labels, soft), RowStats.identity((len(x),))
    assert_same(record.merge(nothing), record)
    assert_same(nothing.merge(record), record)
    assert_same(nothing.merge(nothing), nothing)


@settings(deadline=None, max_examples=150)
@given(arrays(np.float64, (2, 8), elements=st.one_of(special, numbers)), st.integers(1, 7))
def test_merge_commutes(x, cut):
    labels, soft = np.array([0, 5]), np.full(x.shape, 1 / 8)
    a, b = stats_of(x, labels, soft, 0, cut), stats_of(x, labels, soft, cut)
    assert_same(a.merge(b), b.merge(a), 4)  # to rounding: of equal maxima either may lead


@settings(deadline=None, max_examples=150)
@given(
    arrays(np.float64, (3, 12), elements=st.one_of(special, numbers)),
    st.lists(st.integers(1, 11), max_size=4, unique=True),
    st.randoms(),
)
def test_any_partition_in_any_order_gives_the_row(x, cuts, random):
    labels, soft = np.array([0, 5, 11]), soft_labels(3, 12, np.float64, seed=len(cuts))
    edges = [0, *sorted(cuts), 12]
    slices = [stats_of(x, labels, soft, a, b) for a, b in itertools.pairwise(edges)]
    random.shuffle(slices)
    assert_same(RowStats.merge_all(slices), stats_of(x, labels, soft), 64)


def test_merge_all_is_left_to_right():
    x = np.random.default_rng(0).normal(0, 5, (4, 40))
    labels, soft = np.zeros(4, np.int64), np.full(x.shape, 1 / 40)
    parts = [stats_of(x, labels, soft, a, a + 10) for a in range(0, 40, 10)]
    assert_same(RowStats.merge_all(parts), parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3]))


def test_a_nan_survives_every_merge():
    for bad in (np.nan, np.inf):
        x = np.array([[0.0, bad, -np.inf, -np.inf, 1e30]])
        parts = [row_stats(x[:, i : i + 1], None, i) for i in range(5)]
        assert np.isnan(RowStats.merge_all(parts).rest).all()
        assert np.isnan(RowStats.merge_all(parts[::-1]).rest).all()


def test_identity_is_what_an_all_masked_slice_leaves():
    masked, nothing = row_stats(np.full((2, 7), -np.inf), None), RowStats.identity((2,))
    for name in ("max", "rest", "label_logit", "spread_gap", "moment"):
        assert np.array_equal(getattr(masked, name), getattr(nothing, name))
    assert (nothing.argmax == NO_CLASS).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_argmax_rank_and_entropy(dtype):
    x = logits(48, 700, dtype, seed=1)
    labels = np.random.default_rng(0).integers(0, 700, 48)
    stats = row_stats(x, labels, also=("argmax", "moment", "rank"))
    assert np.array_equal(stats.argmax, argmax_rows(x))
    assert np.array_equal(stats.rank, label_ranks(x, labels))
    assert_close(_row_loss.entropy(stats), true_entropy(x), 8, np.float32 if dtype != np.float64 else dtype)


def test_rank_breaks_ties_by_index():
    x = np.array([[1.0, 2.0, 2.0, 0.0, -np.inf, -np.inf]] * 6)
    assert row_stats(x, np.arange(6), also=("rank",)).rank.tolist() == [2, 0, 1, 3, 4, 5]


def test_divergences_merge_by_addition():
    a, b = Divergences(np.array([1.0, 2.0]), js=np.ones(2)), Divergences(np.array([0.5, 0.25]), np.full(2, 3.0))
    merged = a.merge(b)
    assert (merged.kl.tolist(), merged.reverse_kl.tolist(), merged.js.tolist()) == ([1.5, 2.25], [3.0, 3.0], [1.0, 1.0])
    same = a.merge(Divergences.identity((2,)))
    assert (same.kl.tolist(), same.reverse_kl.tolist(), same.js.tolist()) == ([1.0, 2.0], [0.0, 0.0], [1.0, 1.0])


# ---- exact sums ----

finite = st.floats(allow_nan=False, allow_infinity=False)


def as_fraction(total):
    return Fraction(total.units, 2**total.scale)


@settings(deadline=None)
@given(st.lists(finite, max_size=40))
def test_sum_is_exact_and_rounds_as_fsum(values):
    total = ExactSum.of(np.array(values))
    assert as_fraction(total) == sum(map(Fraction, values))
    try:
        rounded = float(sum(map(Fraction, values)))  # as math.fsum, which overflows on the way
    except OverflowError:
        rounded = math.inf if total.units > 0 else -math.inf
    assert total.value == rounded
    squares = ExactSum.of_squares(np.array(values))
    assert as_fraction(squares) == sum(Fraction(v) ** 2 for v in values)


@settings(deadline=None)
@given(st.lists(st.floats(), max_size=30), st.lists(st.integers(0, 30), max_size=3), st.randoms())
def test_sum_does_not_depend_on_grouping_or_order(values, cuts, random):
    values = np.array(values)
    parts = [ExactSum.of(part) for part in np.split(values, sorted(cuts))]
    random.shuffle(parts)
    total = ExactSum()
    for part in parts:
        total = total.merge(part)
    whole = ExactSum.of(values)
    assert total.units == whole.units
    assert np.array_equal(total.value, whole.value, equal_nan=True)


def test_sum_over_the_whole_range():
    values = np.array([5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 2.0**-1060, 1.0])
    assert ExactSum.of(values).value == math.fsum(values)
    assert as_fraction(ExactSum.of(values)) == sum(map(Fraction, values.tolist()))
    assert ExactSum.of(np.full(4, 1.7976931348623157e308)).value == math.inf
    assert ExactSum.of(np.full(4, 1.7976931348623157e308)).divided_by(4) == 1.7976931348623157e308
    assert math.isnan(ExactSum().divided_by(0))


def test_more_values_than_one_batch_holds():
    values = np.random.default_rng(0).exponential(5, 3 * 2**21 // 2)
    assert ExactSum.of(values).value == math.fsum(values.tolist())


def test_sums_in_other_units_do_not_merge():
    with pytest.raises(ValueError, match=r"units of 2\*\*-1126 and 2\*\*-2252"):
        ExactSum().merge(ExactSum.of_squares(np.ones(1)))


def test_totals_are_plain_json():
    assert json.loads(Totals.identity().to_json())["scored"] == 0
