"""Two runs on the same tokens, against NumPy's own statistics, and intervals against simulation."""

import json
import math
import re

import dask.array as da
import numpy as np
import oracle
import pytest
from conftest import BACKENDS
from makers import FLOAT_DTYPES, logits
from typer.testing import CliRunner

import gpuxent as gx
from gpuxent.cli import app
from gpuxent.evaluation.comparison import report as comparison_report
from gpuxent.evaluation.comparison.pairs import LISTED, QUANTILES, Pairs
from gpuxent.evaluation.statistics.tokens import Tokens


def tokens(nll, documents=None, seed=0, rank=None):
    n = len(nll)
    rng = np.random.default_rng(seed)
    return Tokens(
        row=np.arange(n) * 2,
        label=np.arange(n) % 7,
        position=np.arange(n),
        nll=np.asarray(nll, np.float64),
        entropy=rng.random(n),
        p_max=rng.random(n),
        rank=rng.integers(0, 3, n) if rank is None else rank,
        document=documents,
    )


def pairs_of(base, other, cuts=(), exact=True):
    found = Pairs()
    for start, stop in zip((0, *cuts), (*cuts, len(base)), strict=True):
        found = found.merge(Pairs.of(*(side.take(slice(start, stop)) for side in (base, other)), exact=exact))
    return found.result()


@pytest.fixture
def two():
    rng = np.random.default_rng(1)
    n = 500
    base = rng.gamma(2, 1.5, n)
    documents = np.sort(rng.integers(0, 40, n))
    return tokens(base, documents, 2), tokens(np.maximum(base + rng.normal(0.02, 0.3, n), 0), documents, 3)


def test_means_errors_and_correlation(two):
    base, other = two
    a, b, n = base.nll, other.nll, len(base)
    r = pairs_of(base, other)
    assert (r.scored, r.bad, r.first_bad_row, r.documents) == (n, 0, None, len(np.unique(base.document)))
    se = lambda x: x.std(ddof=1) / math.sqrt(n)  # noqa: E731
    delta = np.exp(-b) - np.exp(-a)
    rms = math.sqrt((delta**2).mean())
    ppl_a, ppl_b = math.exp(a.mean()), math.exp(b.mean())
    for estimate, value, error in (
        (r.base, a.mean(), se(a)),
        (r.other, b.mean(), se(b)),
        (r.base_perplexity, ppl_a, ppl_a * se(a)),
        (r.log_ratio, (b - a).mean(), se(b - a)),
        (r.ratio, ppl_b / ppl_a, ppl_b / ppl_a * se(b - a)),
        (r.difference, ppl_b - ppl_a, se(ppl_b * b - ppl_a * a)),
        (r.delta_p, delta.mean(), se(delta)),
        (r.delta_p_rms, rms, se(delta**2) / (2 * rms)),
    ):
        assert estimate.value == pytest.approx(value, rel=1e-12)
        assert estimate.stderr_iid == pytest.approx(error, rel=1e-9)
    assert r.correlation == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-12)
    for q, value in r.delta_p_quantiles.items():
        assert value == pytest.approx(np.quantile(delta, q), rel=1e-12)
    assert set(r.delta_p_quantiles) == set(QUANTILES)
    right = base.rank == 0, other.rank == 0
    assert r.both_right == (right[0] & right[1]).sum()
    assert r.only_base_right == (right[0] & ~right[1]).sum()
    assert r.only_other_right == (~right[0] & right[1]).sum()
    assert r.neither_right == (~right[0] & ~right[1]).sum()
    assert (r.base_entropy, r.other_entropy) == pytest.approx((base.entropy.mean(), other.entropy.mean()))


def test_errors_by_document(two):
    """The sandwich of a ratio of means, written out."""
    base, other = two
    a, b, d, n = base.nll, other.nll, base.document, len(base)
    r = pairs_of(base, other)
    groups = len(np.unique(d))
    ppl_a, ppl_b = math.exp(a.mean()), math.exp(b.mean())
    delta = np.exp(-b) - np.exp(-a)
    for estimate, x in (
        (r.base, a),
        (r.log_ratio, b - a),
        (r.delta_p, delta),
        (r.difference, ppl_b * b - ppl_a * a),
        (r.ratio, (b - a) * ppl_b / ppl_a),
        (r.delta_p_rms, delta**2 / (2 * r.delta_p_rms.value)),
    ):
        sums = np.bincount(d, weights=x - x.mean())
        expected = math.sqrt(groups / (groups - 1) * (sums**2).sum()) / n
        assert estimate.stderr_cluster == pytest.approx(expected, rel=1e-9)


def test_how_the_tokens_are_cut_up_changes_nothing(two):
    assert pairs_of(*two) == pairs_of(*two, cuts=(1, 77, 300, 301))


def test_what_changed_most(two):
    base, other = two
    r = pairs_of(base, other)
    change = other.nll - base.nll
    worst, best = np.argsort(-change)[:LISTED], np.argsort(change)[:LISTED]
    assert [t.row for t in r.worse_tokens] == base.row[worst].tolist()
    assert [t.row for t in r.better_tokens] == base.row[best].tolist()
    first = r.worse_tokens[0]
    i = worst[0]
    assert (first.label, first.document, first.base, first.other) == (
        base.label[i],
        base.document[i],
        base.nll[i],
        other.nll[i],
    )
    means = [
        (change[base.document == d].mean(), int(d)) for d in np.unique(base.document) if (base.document == d).any()
    ]
    expected = [d for mean, d in sorted(means, reverse=True) if mean > 0][:LISTED]
    assert [d.document for d in r.worse_documents] == expected
    assert [d.document for d in r.better_documents] == [d for m, d in sorted(means) if m < 0][:LISTED]


def test_nearly_equal_models_keep_the_digits_of_their_difference():
    """Naively, the variance of the difference of perplexities is 0 or negative here."""
    rng = np.random.default_rng(0)
    a = rng.gamma(2, 1.5, 1000)
    shift = rng.normal(0, 1e-9, 1000)
    r = pairs_of(tokens(a), tokens(a + shift))
    change = (a + shift) - a
    assert r.log_ratio.value == pytest.approx(change.mean(), rel=1e-12)
    assert r.log_ratio.stderr_iid == pytest.approx(change.std(ddof=1) / math.sqrt(1000), rel=1e-9)
    assert r.difference.stderr_iid == pytest.approx(math.exp(a.mean()) * r.log_ratio.stderr_iid, rel=1e-3)


def test_equal_models(two):
    base, _ = two
    r = pairs_of(base, base)
    for name in ("log_ratio", "difference", "delta_p", "delta_p_rms"):
        estimate = getattr(r, name)
        assert (estimate.value, estimate.stderr_iid, estimate.stderr_cluster) == (0, 0, 0)
    assert (r.ratio.value, r.correlation) == (1, pytest.approx(1))
    assert r.worse_tokens == r.better_tokens == r.worse_documents == r.better_documents == ()
    assert comparison_report.verdict(r) == "The two models have the same losses."


def test_losses_that_are_not_finite():
    a, b = np.array([1.0, np.inf, 2.0, np.nan, 3.0]), np.array([1.5, np.inf, np.inf, 1.0, 3.0])
    r = pairs_of(tokens(a, np.arange(5)), tokens(b, np.arange(5)))
    assert (r.scored, r.bad, r.first_bad_row) == (5, 3, 2)
    assert math.isnan(r.log_ratio.value)
    assert comparison_report.verdict(r) == "The losses are not all finite: their means say nothing."
    assert [t.row for t in r.worse_tokens] == [4, 0]
    json.dumps(r.to_dict(), allow_nan=False)
    assert math.isnan(pairs_of(tokens([]), tokens([])).log_ratio.value)
    one = pairs_of(tokens([1.0]), tokens([2.0]))
    assert one.log_ratio.value == 1.0
    assert "too few tokens for an error" in comparison_report.verdict(one)


@pytest.mark.parametrize("clustered", [False, True], ids=["independent", "clustered"])
def test_intervals_hold_what_they_promise(clustered):
    """Of 1000 data sets, 95 % intervals of the difference hold its true value in 93 to 97 %."""
    rng = np.random.default_rng(7)
    true, held, wrong = 0.05, 0, 0
    for _ in range(1000):
        sizes = rng.integers(1, 9, 300)
        d = np.repeat(np.arange(300), sizes)
        common = rng.gamma(2, 1, d.size)  # both models find the same tokens hard
        effect = rng.normal(0, 0.3, 300)[d] if clustered else 0.0  # a document is worse as a whole
        a, b = common + rng.normal(0, 0.2, d.size), common + true + effect + rng.normal(0, 0.2, d.size)
        change = pairs_of(tokens(a, d), tokens(b, d)).log_ratio
        held += abs(change.value - true) < 1.96 * change.stderr_cluster
        wrong += abs(change.value - true) >= 1.96 * change.stderr_iid
    assert 930 <= held <= 970
    if clustered:
        assert wrong > 150  # tokens are not independent, and their error knows nothing of it


def test_quantiles_from_histograms_are_within_their_error(two):
    exact, found = pairs_of(*two), pairs_of(*two, exact=False)
    assert exact.quantile_error == 0
    for q, value in exact.delta_p_quantiles.items():
        assert found.delta_p_quantiles[q] == pytest.approx(value, rel=found.quantile_error)
    assert pairs_of(*two, cuts=(5, 400), exact=False) == found
    assert min(found.delta_p_quantiles.values()) < 0 < max(found.delta_p_quantiles.values())


# ---- logits ----


def two_models(dtype=np.float32, rows=60, vocab=37):
    x = logits(rows, vocab, dtype, seed=1, kinds="ordinary")
    noise = np.random.default_rng(2).normal(0, 0.5, x.shape)
    y = np.random.default_rng(3).integers(0, vocab, rows)
    y[::9] = -100
    return x, (x.astype(np.float64) + noise).astype(dtype), y, np.repeat(np.arange(rows // 6), 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
def test_divergences_against_the_oracle(dtype, backend):
    p, q, y, d = two_models(dtype)
    r = gx.compare(p, q, y, documents=d, backend=backend)
    on = y != -100
    n = on.sum()
    eps = 2e-6 if np.dtype(dtype) != np.float64 else 1e-13
    of_rows = (
        *(oracle.kl_divergence(p, q), oracle.kl_divergence(q, p)),
        *(oracle.js_divergence(p, q), oracle.total_variation(p, q)),
    )
    kl, reverse, js, tv = (np.asarray(f, np.float64)[on] for f in of_rows)
    same = (p.astype(np.float64).argmax(1) == q.astype(np.float64).argmax(1))[on]
    for estimate, x in ((r.kl, kl), (r.reverse_kl, reverse), (r.js, js), (r.tv, tv), (r.same_top, same.astype(float))):
        assert estimate.value == pytest.approx(x.mean(), rel=eps)
        assert estimate.stderr_iid == pytest.approx(x.std(ddof=1) / math.sqrt(n), rel=10 * eps, abs=1e-15)
        sums = np.bincount(d[on], weights=x - x.mean())
        groups = len(np.unique(d[on]))
        assert estimate.stderr_cluster == pytest.approx(
            math.sqrt(groups / (groups - 1) * (sums**2).sum()) / n, rel=10 * eps, abs=1e-15
        )
    for level, value in r.kl_quantiles.items():
        assert value == pytest.approx(np.quantile(kl, level), rel=2 * r.quantile_error)
    for side, x in ((r.base, p), (r.other, q)):
        alone = gx.evaluate(x, y, documents=d, backend=backend)
        # on a GPU float64 logits are added up in another order
        same = pytest.approx if backend == "cupy" and dtype == np.float64 else lambda value, rel: value
        assert side.value == same(alone.cross_entropy, rel=1e-15)
        assert side.stderr_cluster == same(alone.stderr_cluster, rel=1e-14)
        assert side.stderr_iid == same(alone.stderr_iid, rel=1e-14)
    assert r.base_entropy == same(gx.evaluate(p, y, backend=backend).entropy, rel=1e-14)
    assert (r.scored, r.documents) == (n, groups)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
def test_softcap_and_temperature(dtype, backend):
    """As if the logits had been changed before, in float64."""
    p, q, y, d = two_models(dtype)

    def changed(x, softcap, temperature):
        return softcap * np.tanh(x.astype(np.float64) / softcap) / temperature

    found = gx.compare(p, q, y, documents=d, softcap=5.0, temperature=0.7, backend=backend)
    assert_close(found, gx.compare(changed(p, 5.0, 0.7), changed(q, 5.0, 0.7), y, documents=d))
    alone = gx.evaluate(p, y, softcap=5.0, temperature=0.7, backend=backend)
    assert (found.base.value, found.base_entropy) == pytest.approx((alone.cross_entropy, alone.entropy), rel=1e-6)
    sides = p.astype(np.float64), q.astype(np.float64) / 1.5
    found = gx.compare(p, q, y, documents=d, other_temperature=1.5, backend=backend)
    assert_close(found, gx.compare(*sides, y, documents=d), rel=2e-6)  # base is still in float32
    found = gx.compare(p, q, y, documents=d, temperature=2.0, other_temperature=1.0, backend=backend)
    assert_close(found, gx.compare(p.astype(np.float64) / 2, q.astype(np.float64), y, documents=d), rel=2e-6)


def assert_close(found, expected, rel=1e-11):
    for name in ("base", "other", "log_ratio", "kl", "reverse_kl", "js", "delta_p", "same_top", "difference"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.value == pytest.approx(b.value, rel=rel, abs=rel), name
        assert a.stderr_iid == pytest.approx(b.stderr_iid, rel=100 * rel), name
        assert (a.stderr_cluster or 0) == pytest.approx(b.stderr_cluster or 0, rel=100 * rel), name


def test_a_temperature_of_lazy_logits_and_in_the_command(tmp_path):
    p, q, y, _ = two_models()
    for name, array in (("p", p), ("q", q), ("y", y)):
        np.save(tmp_path / f"{name}.npy", array)
    how = {"softcap": 8.0, "temperature": 2.0, "other_temperature": 1.5}
    expected = gx.compare(p, q, y, **how)
    assert_close(gx.compare(*(da.from_array(a, chunks=(17, 10)) for a in (p, q)), y, **how), expected)
    paths = [tmp_path / "p.npy", tmp_path / "q.npy", "--labels", tmp_path / "y.npy", "--format", "json"]
    options = [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", value)]
    found = json.loads(run(*paths, *options)[1])
    assert (found["kl"]["value"], found["log_ratio"]["value"]) == (expected.kl.value, expected.log_ratio.value)
    assert {name: found["run"][name] for name in how} == how


def test_a_model_against_itself():
    p, _, y, d = two_models()
    r = gx.compare(p, p, y, documents=d)
    assert (r.kl.value, r.reverse_kl.value, r.js.value, r.tv.value, r.log_ratio.value) == (0, 0, 0, 0, 0)
    assert (r.same_top.value, r.correlation) == (1, pytest.approx(1))
    assert set(r.kl_quantiles.values()) == {0.0}


def test_every_kind_of_source_gives_the_same(tmp_path):
    p, q, y, d = two_models()
    expected = gx.compare(p, q, y, documents=d)
    for name, array in (("p", p), ("q", q), ("y", y), ("d", d)):
        np.save(tmp_path / f"{name}.npy", array)
    files = [tmp_path / f"{name}.npy" for name in "pqy"]
    assert gx.compare(*files, documents=tmp_path / "d.npy") == expected
    assert gx.compare(*files, documents=tmp_path / "d.npy", memory=2000) == expected
    lazy = [da.from_array(a, chunks=(17, -1)) for a in (p, q)]
    assert gx.compare(*lazy, y, documents=d) == expected
    short = gx.compare(p, q, y, documents=d, limit=30)
    assert short == gx.compare(p[:30], q[:30], y[:30], documents=d[:30])
    cut = [da.from_array(a, chunks=(17, 10)) for a in (p, q)]
    assert gx.compare(*cut, y, documents=d).kl.value == pytest.approx(expected.kl.value, rel=1e-7)  # float32 in slices


def test_a_larger_vocabulary_is_cropped_on_request(tmp_path):
    p, q, y, _ = two_models()
    more = np.concatenate([q, np.full((60, 3), 9.0, np.float32)], axis=1)
    with pytest.warns(UserWarning, match=r"the last 3 of 40 classes of other \(other\) are left out") as seen:
        assert gx.compare(p, more, y, vocab_align="crop") == gx.compare(p, q, y)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="the last 3 of 40 classes of base"):
        assert gx.compare(more, p, y, vocab_align="crop") == gx.compare(q, p, y)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(IndexError, match=r"is 38, expected a class in \[0, 37\)"),
    ):
        gx.compare(p, more, np.full(60, 38), vocab_align="crop")
    with pytest.raises(ValueError, match="vocab_align must be one of 'error', 'crop', got 'pad'"):
        gx.compare(p, more, y, vocab_align="pad")
    for name, array in (("p", p), ("more", more), ("y", y)):
        np.save(tmp_path / f"{name}.npy", array)
    paths = [tmp_path / "p.npy", tmp_path / "more.npy", "--labels", tmp_path / "y.npy"]
    assert run(*paths)[0] == 3
    status, _, err = run(*paths, "--vocab-align", "crop")
    assert status == 0
    assert "the last 3 of 40 classes" in " ".join(err.split())


def test_hidden_states_on_either_side():
    rng = np.random.default_rng(0)
    hidden, classifier = rng.integers(-8, 9, (50, 6)) / 8, rng.integers(-8, 9, (37, 6)) / 4
    p = hidden @ classifier.T  # exact
    q, y = p + rng.normal(0, 0.3, p.shape), rng.integers(0, 37, 50)
    expected, lazy = gx.compare(p, q, y), gx.linear_logits(hidden, classifier)
    assert gx.compare(lazy, q, y) == expected
    assert gx.compare(q, lazy, y) == gx.compare(q, p, y)
    assert gx.compare(lazy, lazy, y).kl.value == 0


def test_arrays_on_a_gpu():
    cupy = pytest.importorskip("cupy")
    p, q, y, d = two_models()
    on_gpu, expected = gx.compare(cupy.asarray(p), cupy.asarray(q), cupy.asarray(y), documents=d), gx.compare(p, q, y)
    assert on_gpu.kl.value == pytest.approx(expected.kl.value, rel=1e-6)
    assert on_gpu.log_ratio.value == pytest.approx(expected.log_ratio.value, rel=1e-5)


def test_special_rows():
    """A class that only one model excludes; a row of NaN, and one that does not count whatever it holds."""
    p = np.array([[0.0, 0.0, -np.inf], [0.0, 0.0, 0.0], [np.nan, 0.0, 0.0], [np.nan, 0.0, 0.0]])
    q = np.array([[0.0, -np.inf, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    r = gx.compare(p, q, np.array([0, 1, -100, -100]))
    assert (r.scored, r.bad) == (2, 0)
    assert r.kl.value == math.inf
    assert r.js.value == pytest.approx(math.log(2) / 4)  # half of each row lies where the other has nothing
    bad = gx.compare(p, q, np.array([1, 1, 0, -100]))
    assert (bad.scored, bad.bad, bad.first_bad_row) == (3, 2, 0)
    assert math.isnan(bad.kl.value)
    nothing = gx.compare(p, q, np.full(4, -100))
    assert (nothing.scored, nothing.kl) == (0, None)


LOGITS = np.zeros((4, 3))
BAD = [
    (
        (LOGITS, np.zeros((4, 5)), np.zeros(4, int)),
        {},
        ValueError,
        "must have the vocabulary of base, 3 classes, got 5",
    ),
    ((LOGITS, np.zeros((5, 3)), np.zeros(4, int)), {}, ValueError, r"must have the rows of base, \(4,\), got \(5,\)"),
    ((LOGITS, np.zeros((4, 3), int), np.zeros(4, int)), {}, TypeError, r"other \(other\) must be float16, bfloat16"),
    ((LOGITS, LOGITS, np.array([0, 1, 2, 3])), {}, IndexError, r"labels\[3\] is 3, expected a class in \[0, 3\)"),
    ((LOGITS, LOGITS), {}, ValueError, "labels must be given to compare logits"),
    ((LOGITS, LOGITS), {"limit": 3}, ValueError, "limit goes with labels"),
    (("a", "b"), {"shift": 1}, ValueError, "shift goes with labels, and logits to compare; got shift=1 without labels"),
    (("a", "b"), {"temperature": 2.0}, ValueError, "temperature goes with labels"),
    (("a", "b"), {"softcap": 2.0}, ValueError, "softcap goes with labels"),
    (
        (LOGITS, LOGITS, np.zeros(4, int)),
        {"temperature": 0.0},
        ValueError,
        "temperature must be a number above 0, got 0",
    ),
    ((LOGITS, LOGITS, np.zeros(4, int)), {"other_temperature": -1}, ValueError, "other_temperature must be a number"),
    (("a", "b"), {"ignore_index": None}, ValueError, "ignore_index goes with labels"),
    (("a", "b"), {"documents": np.zeros(4, int)}, ValueError, "documents goes with labels"),
    ((LOGITS, LOGITS, np.zeros(4, int)), {"client": object()}, TypeError, "base must be a file or an array of Dask"),
]


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), BAD)
def test_bad_input(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        gx.compare(*arguments, **options)


# ---- runs ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs: a and b on the same tokens, others that differ in something."""
    path = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, (90, 11)).astype(np.float32)
    y = rng.integers(0, 11, 90)
    y[5] = -100
    d = np.repeat(np.arange(9), 10)
    gx.evaluate(x, y, documents=d, run=path / "a")
    gx.evaluate(1.3 * x, y, documents=d, run=path / "b", memory=1000)
    gx.evaluate(x, y, run=path / "no documents")
    gx.evaluate(x, np.where(np.arange(90) == 8, (y + 1) % 11, y), documents=d, run=path / "other label")
    gx.evaluate(x, y, documents=np.where(np.arange(90) >= 80, 99, d), run=path / "other document")
    gx.evaluate(x, np.where(np.arange(90) == 70, -100, y), documents=d, run=path / "one less")
    gx.evaluate(x, np.where(np.arange(90) == 89, -100, y), documents=d, run=path / "last less")
    gx.evaluate(x[:80], y[:80], documents=d[:80], run=path / "shorter")
    return path, x, y, d


def test_runs(folder):
    path, x, y, d = folder
    r = gx.compare(path / "a", path / "b")
    own, other = (gx.evaluate(scale * x, y, documents=d) for scale in (np.float32(1), 1.3))
    assert r.base.value == own.cross_entropy
    assert r.other_perplexity.value == other.perplexity
    assert (r.base.stderr_iid, r.base.stderr_cluster) == (own.stderr_iid, own.stderr_cluster)
    assert r.scored == 89
    assert r.both_right + r.only_base_right == round(own.accuracy * 89)
    assert r.log_ratio.value == pytest.approx(other.cross_entropy - own.cross_entropy, rel=1e-12)
    assert gx.compare(path / "b", path / "a").log_ratio.value == -r.log_ratio.value


ERRORS = [
    ("no documents", "a has document ids, but .*no documents has none"),
    ("other label", r"row 8 has label \d+ in .*a, but \d+ in .*other label"),
    ("other document", "row 80 has document 8 in .*a, but 99 in .*other document"),
    ("one less", "row 70 counts in .*a, but not in .*one less"),
    ("last less", "row 89 counts in .*a, but not in .*last less"),
    ("shorter", "shorter must have the 90 rows of .*a, got 80"),
]


@pytest.mark.parametrize(("name", "message"), ERRORS)
def test_runs_of_other_tokens(name, message, folder):
    path = folder[0]
    with pytest.raises(ValueError, match=message):
        gx.compare(path / "a", path / name)


def test_folders_without_a_finished_run(folder, tmp_path):
    path, x, y, _ = folder
    with pytest.raises(OSError, match="nothing"):
        gx.compare(path / "a", tmp_path / "nothing")
    from gpuxent.evaluation.evaluate import open_job
    from gpuxent.evaluation.runs.directory import RunDirectory
    from gpuxent.evaluation.runs.fingerprint import fingerprint

    job = open_job(x, y)
    with RunDirectory(tmp_path / "begun", fingerprint(job.inputs, job.options), 90):
        pass
    with pytest.raises(ValueError, match="begun must be finished, got 0 of 90 rows"):
        gx.compare(path / "a", tmp_path / "begun")
    with RunDirectory(tmp_path / "no tokens", fingerprint(job.inputs, job.options), 90, tokens=False):
        pass
    with pytest.raises(ValueError, match="no tokens has no record of its tokens"):
        gx.compare(path / "a", tmp_path / "no tokens")


# ---- the command line ----


def run(*arguments):
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command(folder, tmp_path):
    path = folder[0]
    status, out, _ = run(path / "a", path / "b")
    assert status == 0
    assert re.match(r"scored 89  bad 0  docs 9\nother is worse than base by [\d.]+ nats per token", out)
    for name in ("PPL(base)", "ln(PPL(other)/PPL(base))", "RMS Δp", "correlation of the losses", "99.9 %", "median"):
        assert name in out
    assert "± cluster(doc)" in out
    status, out, _ = run(path / "a", path / "b", "--format", "json")
    found, r = json.loads(out), gx.compare(path / "a", path / "b")
    assert found["log_ratio"]["value"] == r.log_ratio.value
    assert found["run"]["base"] == str(path / "a")
    status, out, _ = run(path / "a", path / "b", "--format", "csv")
    rows = [line.split(",") for line in out.splitlines()]
    (line,) = (row for row in rows if row[2] == "log_ratio")
    assert float(line[3]) == r.log_ratio.value
    assert float(line[4]) == r.log_ratio.stderr_cluster
    for option in ("--documents", "--base-classifier", "--memory"):
        status, out, err = run(path / "a", path / "b", option, "1")
        assert (status, out) == (3, "")
        assert f"{option[2:].replace('-', '_')} goes with labels" in err
    target = tmp_path / "out.md"
    assert run(path / "a", path / "b", "--format", "markdown", "--output", target)[0] == 0
    assert "| --- | ---: | ---: | ---: |" in target.read_text()


def test_the_command_on_what_is_no_run(folder, tmp_path):
    path = folder[0]
    status, out, err = run(path / "a", tmp_path)
    assert (status, out) == (3, "")
    assert err.startswith("gpuxent: ")
    assert err.count("\n") == 1
    with pytest.raises(ValueError, match="form must be one of table, json, csv, markdown, got 'xml'"):
        comparison_report.write(gx.compare(path / "a", path / "b"), "xml", {}, None)


def test_the_command_on_logits(tmp_path):
    p, q, y, d = two_models()
    for name, array in (("p", p), ("q", q), ("y", y), ("d", d), ("h", p @ np.eye(37, dtype=np.float32))):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "w.npy", np.eye(37, dtype=np.float32))
    paths = [tmp_path / "p.npy", tmp_path / "q.npy", "--labels", tmp_path / "y.npy", "--documents", tmp_path / "d.npy"]
    status, out, err = run(*paths)
    assert status == 0
    assert "difference +0.1438 nats" in err
    for name in (
        "mean KLD(base||other)",
        "mean KLD(other||base)",
        "mean JS divergence",
        "same top class",
        "within 0.39 %",
    ):
        assert name in out
    found = json.loads(run(*paths, "--format", "json")[1])
    assert found["kl"]["value"] == gx.compare(p, q, y, documents=d).kl.value
    hidden = [tmp_path / "h.npy", *paths[1:], "--base-classifier", tmp_path / "w.npy", "--format", "json"]
    assert json.loads(run(*hidden)[1])["kl"]["value"] == pytest.approx(found["kl"]["value"], rel=1e-6)
    status, _, err = run(*paths[:2])
    assert status == 3
    assert "--labels must be given" in err
    np.save(tmp_path / "none.npy", np.full(60, -100))
    status, out, err = run(*paths[:2], "--labels", tmp_path / "none.npy")
    assert (status, out) == (3, "")
    assert "no token to compare: none counts" in err


@pytest.mark.parametrize("workers", [2])
def test_the_command_on_processes(workers, tmp_path):
    p, q, y, _ = two_models()
    for name, array in (("p", p), ("q", q), ("y", y)):
        np.save(tmp_path / f"{name}.npy", array)
    paths = [tmp_path / "p.npy", tmp_path / "q.npy", "--labels", tmp_path / "y.npy", "--format", "json"]
    status, out, err = run(*paths, "--workers", workers)
    assert status == 0, err
    assert json.loads(out) == json.loads(run(*paths)[1])
