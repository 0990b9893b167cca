"""What rows leave behind: exact under any grouping and order; errors by document; quantiles; and what is made of it."""

import itertools
import json
import math
import pickle
import random
from collections import defaultdict
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuxent.backends import BACKENDS, _numpy_sums, backend_of
from gpuxent.evaluation.statistics import documents, sums
from gpuxent.evaluation.statistics.clustered import mean_of_means, ratio
from gpuxent.evaluation.statistics.documents import DocumentSums, Run
from gpuxent.evaluation.statistics.histogram import RELATIVE_ERROR, LossHistogram
from gpuxent.evaluation.statistics.metadata import Metadata, open_metadata
from gpuxent.evaluation.statistics.summary import Summary
from gpuxent.evaluation.statistics.sums import sums_by_group
from gpuxent.evaluation.statistics.tokens import Tokens

sizes = st.one_of(
    st.sampled_from([0.0, 5e-324, 2.0**-1022, 1e-200, 2.0**-60, 1e-17, 0.1, 1.0, 3.0, 1e16, 2.0**53, 1e300, np.inf]),
    st.floats(0, 40),
    st.floats(0, 1e300),
)
places = st.integers(0, 300)
ids = st.one_of(st.integers(-3, 3), st.sampled_from([-(2**63), 2**63 - 1]))
rows = st.lists(st.tuples(sizes, places, ids), min_size=1, max_size=60)


def tokens(nll, position=None, document=None, first=0):
    n = len(nll)
    row = np.arange(first, first + n)
    nll = np.asarray(nll, np.float64)
    p_max = (row * 0.618) % 1
    position = row if position is None else np.asarray(position, np.int64)
    document = None if document is None else np.asarray(document, np.int64)
    return Tokens(row, row % 7, position, nll, nll * 0.5, p_max, row % 9, document)


def summary(*columns, first=0, ignored=0):
    return Summary.of(tokens(*columns, first=first), ignored)


def in_a_tree(parts, rng):
    """Merged two at a time, any two, either one first."""
    parts = list(parts)
    while len(parts) > 1:
        rng.shuffle(parts)
        parts.append(parts.pop().merge(parts.pop()))
    return parts[0]


def exact_mean(losses):
    """Rounded once, as `math.fsum` rounds the sum."""
    if not all(map(math.isfinite, losses)):
        return sum(losses)
    return float(sum(map(Fraction, losses)) / len(losses)) if losses else math.nan


def by_key(keys, losses):
    found = defaultdict(list)
    for key, loss in zip(keys, losses, strict=True):
        found[key].append(loss)
    return dict(sorted(found.items()))


# ---- exact, in any grouping ----


@settings(deadline=None, max_examples=60)
@given(rows, st.randoms(use_true_random=False), st.booleans())
def test_any_grouping_and_order_gives_the_same_bits(rows, rng, with_nan):
    nll, position, document = map(list, zip(*rows, strict=True))
    if with_nan:
        nll[rng.randrange(len(nll))] = math.nan
    whole = summary(nll, position, document, ignored=len(nll))
    cuts = sorted(rng.sample(range(1, len(nll) + 1), rng.randint(0, min(9, len(nll) - 1))))
    edges = [0, *cuts, len(nll)]
    parts = [
        Summary.of(tokens(nll[a:b], position[a:b], document[a:b], first=a), b - a) for a, b in itertools.pairwise(edges)
    ]
    parts.append(Summary.identity(documents=True))
    assert in_a_tree(parts, rng).to_json() == whole.to_json()
    assert in_a_tree([Summary.from_json(part.to_json()) for part in parts], rng).to_json() == whole.to_json()


@settings(deadline=None, max_examples=60)
@given(rows)
def test_means_are_rounded_once(rows):
    nll, position, document = map(list, zip(*rows, strict=True))
    made = summary(nll, position, document)
    assert made.totals.mean_loss == exact_mean(nll)
    octaves = by_key((p.bit_length() for p in position), nll)
    assert {i: p.mean for i, p in enumerate(made.positions) if p.count} == {
        i: exact_mean(losses) for i, losses in octaves.items()
    }
    assert [(d.document, d.scored, d.cross_entropy) for d in made.documents] == [
        (name, len(losses), exact_mean(losses)) for name, losses in by_key(document, nll).items()
    ]


signed = st.one_of(
    st.floats(), st.floats(-1e-300, 1e-300), st.sampled_from([0.0, -0.0, 5e-324, -(2.0**-1022), 1.5e308])
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("squared", [False, True])
@settings(deadline=None, max_examples=200)
@given(pairs=st.lists(st.tuples(signed, st.integers(0, 3)), max_size=50))
def test_sums_by_group_are_those_of_fractions(backend, squared, pairs):
    values = np.array([value for value, _ in pairs])
    groups = np.array([group for _, group in pairs], np.int64)
    low, limbs, nonfinite = backend_of(values, backend).limb_sums(values, groups, 4, squared)
    scale = 2252 if squared else 1126
    for group in range(4):
        own = values[groups == group]
        finite = (Fraction(value) ** (1 + squared) for value in own[np.isfinite(own)].tolist())
        units = sum(limb << 32 * i for i, limb in enumerate(limbs[:, group].tolist()))
        assert Fraction(units) * Fraction(2) ** (32 * low - scale) == sum(finite)
        bad = own[~np.isfinite(own)]
        assert str(nonfinite[group]) == str(float(sum(np.abs(bad) if squared else bad)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(-1e300, 1e300), st.integers(0, 3)), max_size=50))
def test_means_of_documents_are_exact_for_either_sign(pairs):
    values = np.array([value for value, _ in pairs])
    groups = np.array([group for _, group in pairs], np.int64)
    sums = [total.value for total in sums_by_group(values, groups, 4)]
    assert sums == [math.fsum(values[groups == group]) for group in range(4)]
    run = Run.of(groups, values)
    half = len(pairs) // 2
    again = Run.merge_all([Run.of(groups[:half], values[:half]), Run.of(groups[half:], values[half:])]) if half else run
    for made in (run, again):
        means = DocumentSums((made,)).means() if len(made) else np.zeros(0)
        assert means.tolist() == [exact_mean(values[groups == group].tolist()) for group in np.unique(groups)]
    assert np.array_equal(run.limbs, again.limbs)
    assert run.low == again.low


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_values_than_a_batch(backend, monkeypatch):
    for module in (sums, documents):
        monkeypatch.setattr(module, "limb_sums", backend_of(np.zeros(1), backend).limb_sums)
    monkeypatch.setattr(_numpy_sums, "BATCH", 100)
    monkeypatch.setattr(documents, "BATCH", 7)
    rng = np.random.default_rng(0)
    loss, document = rng.lognormal(0, 9, 1234), rng.integers(0, 40, 1234)
    made = summary(loss, None, document)
    assert made.totals.mean_loss == exact_mean(loss.tolist())
    assert made.documents.means().tolist() == [exact_mean(v) for v in by_key(document, loss.tolist()).values()]


# ---- documents ----


def documents_of(blocks):
    return [DocumentSums.of(np.asarray(names, np.int64), np.asarray(losses)) for names, losses in blocks]


def test_thousands_of_blocks_whose_documents_come_again():
    rng = np.random.default_rng(1)
    blocks = []
    for i in range(1500):
        names = rng.choice([i // 3, i // 3 + 1, 7, -(10**12) - i], 5)  # of neighbours, of many, of one
        blocks.append((names, rng.exponential(2, 5) * 10.0 ** rng.integers(-30, 3)))
    parts = documents_of(blocks)
    merged = reduce(DocumentSums.merge, parts, DocumentSums())
    assert len(merged.runs) <= documents.MOST_RUNS
    names, losses = (np.concatenate(column) for column in zip(*blocks, strict=True))
    expected = by_key(names.tolist(), losses.tolist())
    assert [(d.document, d.scored) for d in merged] == [(name, len(values)) for name, values in expected.items()]
    assert merged.means().tolist() == [exact_mean(values) for values in expected.values()]
    assert len(merged) == len(expected)
    shuffled = list(parts)
    random.Random(0).shuffle(shuffled)
    assert reduce(DocumentSums.merge, shuffled, DocumentSums()) == merged
    assert in_a_tree(parts, random.Random(1)) == merged
    assert merged != parts[0]
    assert pickle.loads(pickle.dumps(merged)) == merged


def test_a_document_is_moved_seldom(monkeypatch):
    """However many blocks are merged: otherwise a million of them would take days."""
    moved, merge_all = [], Run.merge_all
    monkeypatch.setattr(Run, "merge_all", lambda runs: (moved.append(sum(map(len, runs))), merge_all(runs))[1])
    total = DocumentSums()
    for i in range(0, 20000, 2):
        total = total.merge(DocumentSums.of(np.array([i, i + 1]), np.ones(2)))
    assert sum(moved) < 20000 * math.log2(20000)
    assert len(moved) < 10000 / 32
    assert len(total) == 20000


def test_a_document_takes_few_bytes():
    rng = np.random.default_rng(0)
    sums = DocumentSums.of(np.arange(20000) // 10, rng.exponential(2.0, 20000))
    run = sums.run
    assert sum(column.nbytes for column in (run.ids, run.counts, run.limbs, run.nonfinite)) <= 60 * len(sums)


def test_losses_that_are_not_finite_stay_with_their_documents():
    made = summary([1.0, np.inf, 2.0, np.nan, 3.0], None, [4, 4, 2, 9, 2])
    table = made.result().by_document
    assert table.document.tolist() == [2, 4, 9]
    assert table.cross_entropy.tolist()[:2] == [2.5, np.inf]
    assert math.isnan(table.cross_entropy[2])
    assert [d.document for d in table.worst(2)] == [9, 4]
    assert [d.document for d in table.best(2)] == [2, 4]
    assert math.isnan(made.result().stderr_cluster)


# ---- standard errors ----


def plain_ratio(sums, weights):
    """The sandwich estimator in plain floats."""
    total, weight, count = math.fsum(sums), math.fsum(weights), len(sums)
    mean = total / weight
    meat = math.fsum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True))
    return mean, math.sqrt(count / (count - 1) * meat) / weight


def test_errors_by_document():
    rng = np.random.default_rng(3)
    document = rng.integers(0, 37, 900) * 10**10
    loss = rng.exponential(2, 900) + document / 1e11
    groups = by_key(document.tolist(), loss.tolist())
    sums, counts = [math.fsum(v) for v in groups.values()], [len(v) for v in groups.values()]
    size, words = rng.integers(10, 99, len(groups)), rng.integers(1, 9, len(groups))
    table = {"document": list(groups), "n": size, "w": words}
    result = summary(loss, None, document).result(metadata=open_metadata(table, bytes="n", words="w"))
    assert result.stderr_cluster == pytest.approx(plain_ratio(sums, counts)[1], rel=1e-13)
    for unit, weights in (("byte", size), ("word", words)):
        mean, stderr = plain_ratio(sums, weights.tolist())
        assert getattr(result, f"bits_per_{unit}") == pytest.approx(mean / math.log(2), rel=1e-14)
        assert getattr(result, f"bits_per_{unit}_stderr") == pytest.approx(stderr / math.log(2), rel=1e-13)
    assert result.word_perplexity == pytest.approx(math.exp(math.fsum(sums) / int(words.sum())), rel=1e-13)
    means = np.array(sums) / counts
    assert result.document_cross_entropy == pytest.approx(means.mean(), rel=1e-14)
    assert result.document_stderr == pytest.approx(means.std(ddof=1) / math.sqrt(means.size), rel=1e-13)
    assert result.stderr_iid == pytest.approx(loss.std(ddof=1) / 30, rel=1e-13)


def test_one_token_per_document_is_as_independent_tokens():
    loss = np.random.default_rng(0).exponential(2, 300)
    result = summary(loss, None, np.arange(300)).result()
    assert result.stderr_cluster == pytest.approx(result.stderr_iid, rel=1e-14)


def test_documents_of_equal_means_have_no_error_at_all():
    """S - n * mean in floats leaves a rounding error here."""
    result = summary([0.1, 0.1, 0.1, 0.1, 0.1, 0.1], None, [1, 1, 2, 2, 2, 3]).result()
    assert (result.stderr_cluster, result.document_stderr) == (0.0, 0.0)


def test_one_document_has_no_error():
    result = summary([1.0, 2.0], None, [5, 5]).result()
    assert math.isnan(result.stderr_cluster)
    assert result.documents == 1
    assert not math.isnan(result.stderr_iid)
    without = summary([1.0, 2.0]).result()
    assert (without.stderr_cluster, without.documents, without.document_cross_entropy, without.by_document) == (
        None,
        None,
        None,
        None,
    )


def test_intervals_cover_as_often_as_they_say():
    """95 % intervals of 1000 data sets whose documents differ; with independent tokens they miss half of the time."""
    rng = np.random.default_rng(2024)
    covered = {"token": 0, "document": 0, "byte": 0, "iid": 0}
    for _ in range(1000):
        lengths = rng.integers(5, 40, 150)
        document = np.repeat(np.arange(150), lengths)
        loss = rng.normal(3, 0.7, 150)[document] + rng.normal(0, 1, document.size)
        size = 4 * lengths + rng.integers(0, 9, 150)
        run = Run.of(document, loss)
        for name, (mean, stderr), truth in (
            ("token", ratio(run, run.counts), 3),
            ("byte", ratio(run, size), 3 * 22 / 92),  # lengths are 22 on average, sizes 4 * 22 + 4
            ("document", mean_of_means(DocumentSums((run,)).means()), 3),
            ("iid", (loss.mean(), loss.std(ddof=1) / math.sqrt(loss.size)), 3),
        ):
            covered[name] += abs(mean - truth) < 1.959964 * stderr
    assert all(930 <= covered[name] <= 970 for name in ("token", "document", "byte")), covered
    assert covered["iid"] < 700


# ---- quantiles ----


def nasty_losses():
    rng = np.random.default_rng(5)
    yield "exponential", rng.exponential(2, 5000)
    yield "over 60 orders of magnitude", rng.lognormal(0, 35, 5000)
    yield "one value", np.full(17, 0.1)
    yield "two values", np.array([1e-9] * 50 + [11.0] * 51)
    yield "zeros and ones", np.array([0.0] * 5 + [1.0])
    yield "powers of two", 2.0 ** rng.integers(-70, 10, 300)
    yield "lower ends of bins", 2.0**-3 * (1 + np.arange(128) / 128)
    yield "upper ends of bins", np.nextafter(2.0**-3 * (1 + np.arange(1, 129) / 128), 0)
    yield "tiny", rng.random(100) * 1e-19
    yield "smaller than normal", np.array([5e-324, 1e-310, 3.0])
    yield "huge", np.array([1e308, 1.7e308, 3.0])
    yield "one loss", np.array([2.5])


@pytest.mark.parametrize("losses", [losses for _, losses in nasty_losses()], ids=[name for name, _ in nasty_losses()])
def test_quantiles_are_within_the_stated_error(losses):
    levels = np.concatenate((np.linspace(0, 1, 101), [0.001, 0.999, 1 / 3]))
    found = summary(losses).result(quantiles=tuple(levels.tolist()))
    assert found.quantile_error == RELATIVE_ERROR == 2**-8
    for level, true in zip(levels, np.quantile(losses, levels), strict=True):
        assert abs(found.quantiles[level] - true) <= max(2**-8 * true, 2**-60)


def test_quantiles_with_losses_that_are_not_finite():
    made = LossHistogram.of(np.array([0.0, 1.0, 2.0, np.inf, np.inf]))
    assert made.quantiles((0, 0.5, 0.6, 0.75, 1)) == {0: 0.0, 0.5: made.quantiles([0.5])[0.5], 0.6: math.inf} | {
        0.75: math.inf,
        1: math.inf,
    }
    assert made.quantiles([0.5])[0.5] == pytest.approx(2, rel=2**-8)
    assert math.isnan(LossHistogram.of(np.array([1.0, np.nan])).quantiles([0.5])[0.5])
    assert math.isnan(LossHistogram().quantiles([0.5])[0.5])


def test_special_losses_have_bins_of_their_own():
    made = LossHistogram.of(np.array([0.0, -0.0, 1e-30, -1e-9, 5e-324, np.inf, np.nan, 1.0, 1.001]))
    assert (made.zero, made.tiny, made.infinite, made.nan, made.counts.tolist()) == (2, 3, 1, 1, [2])
    assert LossHistogram.of(np.array([2.0**-60])).counts.tolist() == [1]
    assert LossHistogram.of(np.array([1.0])) == LossHistogram.of(np.array([1.001]))
    assert LossHistogram.of(np.array([1.0])) != LossHistogram.of(np.array([1.01]))


# ---- as text ----


def test_json_of_a_block_is_small():
    """There is one for each of a million blocks."""
    rng = np.random.default_rng(0)
    for n, most in ((64, 2000), (1000, 5000), (100_000, 20_000)):
        text = summary(rng.exponential(2, n), np.arange(n) % 900, np.arange(n) // 900).to_json()
        assert len(text) < most


def test_json_of_other_formats_is_refused():
    whole = summary([1.0, 2.0])
    assert json.loads(whole.to_json())["format"] == "gpuxent summary, version 1"
    for text in (whole.totals.to_json(), "[]", "no JSON", '{"format": "gpuxent summary, version 2"}'):
        with pytest.raises(ValueError, match="not of the format 'gpuxent summary, version 1'"):
            Summary.from_json(text)


def test_what_does_not_belong_together_is_not_merged():
    with pytest.raises(ValueError, match="with documents and one without"):
        Summary.identity(documents=True).merge(summary([1.0]))
    with pytest.raises(ValueError, match=r"topk=\(1, 5\) with 15 bins and topk=\(1, 5\) with 7 bins"):
        Summary.identity().merge(Summary.identity(bins=7))


# ---- the result ----


def test_positions_are_in_octaves():
    result = summary(np.arange(40.0), np.arange(40)).result()
    assert [(p.first, p.last, p.scored) for p in result.by_position] == [
        (0, 0, 1),
        (1, 1, 1),
        (2, 3, 2),
        (4, 7, 4),
        (8, 15, 8),
        (16, 31, 16),
        (32, 63, 8),
    ]
    last = np.arange(32.0, 40)
    assert result.by_position[-1].cross_entropy == last.mean()
    assert result.by_position[-1].stderr_iid == pytest.approx(last.std(ddof=1) / math.sqrt(8), rel=1e-14)
    assert [p.first for p in summary([1.0], [64]).result().by_position] == [64]


def test_share_of_an_interrupted_run():
    made = summary([1.0, 2.0, 4.0], None, [1, 1, 2], ignored=5)
    about = Metadata("metadata", bytes=10)
    assert (made.result().rows, made.result().share) == (8, 1.0)
    assert made.result(rows=8, metadata=about).bits_per_byte == 0.7 / math.log(2)
    partial = made.result(rows=12, metadata=about, mixed=["numpy", "numba"])
    assert (partial.rows, partial.share, partial.mixed) == (12, 8 / 12, ("numpy", "numba"))
    assert partial.bits_per_byte is None  # the bytes are those of the whole text
    assert Summary.identity().result(rows=0).share == 1.0


def test_nothing_scored():
    result = Summary.identity(documents=True).result()
    for name in ("cross_entropy", "perplexity", "stderr_iid", "stderr_cluster", "document_cross_entropy", "ece"):
        assert math.isnan(getattr(result, name))
    assert (result.documents, result.by_position, len(result.by_document)) == (0, (), 0)
    json.dumps(result.to_dict(), allow_nan=False)


TABLE = {"document": [3, 1, 2, 99], "n": [30, 10, 20, 999], "of": ["b", "a", "b", "unused"]}


def test_groups():
    made = summary([1.0, 2.0, 4.0, 8.0], None, [1, 2, 2, 3])
    result = made.result(metadata=open_metadata(TABLE, bytes="n", group_by="of"))
    assert result.bits_per_byte == 0.25 / math.log(2)  # of 60 bytes: document 99 has no scored token
    a, b = result.groups
    assert (a.group, a.documents, a.scored, a.cross_entropy, a.bits_per_byte) == ("a", 1, 1, 1.0, 0.1 / math.log(2))
    assert math.isnan(a.stderr_cluster)
    assert (b.group, b.documents, b.scored) == ("b", 2, 3)
    assert (b.cross_entropy, b.perplexity) == (14 / 3, math.exp(14 / 3))
    assert b.stderr_cluster == pytest.approx(plain_ratio([6, 8], [2, 1])[1], rel=1e-14)
    assert b.bits_per_byte == 14 / 50 / math.log(2)
    assert b.bits_per_word is None
    total = made.result(metadata=open_metadata(words=7))
    assert (total.bits_per_word, total.bits_per_word_stderr) == (15 / 7 / math.log(2), None)
    assert total.groups == ()


def test_documents_that_the_table_lacks_are_named():
    made = summary([1.0, 2.0, 4.0], None, [1, 5, 8])
    with pytest.raises(ValueError, match="metadata has no record of document 5 and 1 more, which have scored tokens"):
        made.result(metadata=open_metadata(TABLE, bytes="n"))
    with pytest.raises(ValueError, match="metadata is about documents, but the rows have no document ids"):
        summary([1.0]).result(metadata=open_metadata(TABLE, bytes="n"))


def test_results_compare():
    columns = ([1.0, np.nan, 4.0], None, [1, 1, 5])
    table = summary(*columns).result().by_document
    assert table == summary(*columns).result().by_document
    assert table != summary([1.0, 2.0, 4.0], None, [1, 1, 5]).result().by_document
    assert table != summary([1.0, np.nan, 4.0], None, [1, 5, 5]).result().by_document
    good = ([1.0, 3.0, 4.0], None, [1, 1, 5])
    assert summary(*good).result() == summary(*good).result()
    assert summary(*good).result() != summary([1.0, 3.0, 4.0], None, [1, 1, 6]).result()
    assert "by_document" not in repr(summary(*good).result())
