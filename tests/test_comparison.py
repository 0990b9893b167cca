"""Two runs on the same tokens, against NumPy's own statistics, and intervals against simulation."""

import json
import math
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import gpuxent as gx
from gpuxent.cli import app
from gpuxent.evaluation import comparison, comparison_report
from gpuxent.evaluation.comparison import Pairs
from gpuxent.evaluation.tokens import Tokens

QUANTILES = comparison.QUANTILES


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


def pairs_of(base, other, cuts=()):
    found = Pairs()
    for start, stop in zip((0, *cuts), (*cuts, len(base)), strict=True):
        found.add(*(comparison._sliced(side, slice(start, stop)) for side in (base, other)))
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
    worst, best = np.argsort(-change)[: comparison.LISTED], np.argsort(change)[: comparison.LISTED]
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
    expected = [d for mean, d in sorted(means, reverse=True) if mean > 0][: comparison.LISTED]
    assert [d.document for d in r.worse_documents] == expected
    assert [d.document for d in r.better_documents] == [d for m, d in sorted(means) if m < 0][: comparison.LISTED]


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
    from gpuxent.evaluation.fingerprint import fingerprint
    from gpuxent.evaluation.run import RunDirectory

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
