"""The failures of others: each shows what it claims, its truth is the truth, and it says so if gpuxent is wrong."""

import math
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import mpmath
import numpy as np
import pytest

import gpuxent
from bench.failures import calibration_counts, frame, perplexity_counts, truth
from bench.failures.__main__ import FAILURES, main
from bench.failures.frame import Failure, Line, Missing, Raised
from gpuxent.evaluation.statistics.totals import Totals

ROOT = Path(__file__).parents[1]

# What rivals of a pinned version give, and NumPy's own arithmetic.
CLAIMS = {
    "softmax_then_log": [math.inf, math.inf],
    "perplexity_counts": [34.3161, 298_673_760],
    "calibration_counts": [0.266983],
    "float16_means": [math.nan, None, math.inf, 0.0205078, math.inf],
    "negative_label": [1.69031] * 3,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer samples for us to score; theirs fails from 6 million on."""
    monkeypatch.setattr(calibration_counts, "QUICK", 6_000_000)


@pytest.fixture(scope="module")
def quick():
    """The lines of every failure, once."""
    found = {}

    def lines(name):
        if name not in found:
            found[name] = list(FAILURES[name].lines(True))
        return found[name]

    return lines


@pytest.mark.parametrize("name", FAILURES)
def test_gpuxent_is_right_and_the_rivals_are_not(name, quick):
    for line in quick(name):
        assert line.right, line
        assert line.fails in (True, None), line


@pytest.mark.parametrize("name", CLAIMS)
def test_rivals_give_what_is_claimed(name, quick):
    for line, claim in zip(quick(name), CLAIMS[name], strict=True):
        if claim is not None and not isinstance(line.theirs, Missing):
            assert line.theirs == pytest.approx(claim, rel=1e-4, nan_ok=True)


def test_scikit_learn_clips_to_the_eps_of_the_dtype(quick):
    eps = [float(np.finfo(dtype).eps) for dtype in (np.float64, np.float32, np.float16)]
    expected = [(math.log(2) - math.log(e)) / 2 for e in eps]
    for line, value in zip(quick("clipped_log_loss"), expected, strict=True):
        assert line.theirs == pytest.approx(value, rel=1e-3)


def test_dask_ml_takes_the_mean_of_means(quick):
    if find_spec("dask_ml") is None:
        pytest.skip("dask-ml is not installed")
    assert quick("block_means")[1].theirs == pytest.approx(-(math.log(0.891) + math.log(0.3765)) / 2)


# ---- what is printed ----


def text_of(lines, capsys, quick=False):
    """The exit status of a failure with these lines, and what it prints."""
    status = frame.report([Failure("made_up", "why", lambda quick: lines)], quick)
    return status, capsys.readouterr().out


def line(theirs, ours, truth, **options):
    return Line("mean", "rival 1.0", theirs, ours, truth, **options)


def test_numbers_are_printed_beside_each_other(capsys):
    status, out = text_of([line(0.54612, 0.12402, 0.12402)], capsys)
    assert status == 0
    assert "mean  rival 1.0  0.54612  0.12402  0.12402  theirs wrong, ours right" in out
    assert "gpuxent right in 1 of 1; rivals wrong in 1 of 1" in out


@pytest.mark.parametrize(
    ("ours", "truth"),
    [
        (2 * (1 + 1.1e-12), 2.0),
        (math.nan, 2.0),
        (2.0, math.nan),
        (math.inf, 2.0),
        (2.0, math.inf),
        (-math.inf, math.inf),
        (1e-300, 0.0),
        (Raised("IndexError", "labels[1] is -1"), 2.0),
        (1.69, Raised("IndexError", "labels[1] is -1")),
        (Raised("ValueError", "labels[1] is -1"), Raised("IndexError", "labels[1] is -1")),
        (Raised("IndexError", "list index out of range"), Raised("IndexError", "labels[1] is -1")),
    ],
)
def test_status_is_1_where_gpuxent_is_wrong(ours, truth, capsys):
    status, out = text_of([line(1.0, 3.0, 3.0), line(1.0, ours, truth)], capsys)
    assert status == 1
    assert "OURS WRONG" in out
    assert "gpuxent right in 1 of 2" in out


def test_a_rival_that_fails_no_longer_is_news_and_no_error(capsys):
    status, out = text_of([line(2.0005, 2.0, 2.0)], capsys)
    assert status == 0
    assert "theirs no longer fails, ours right" in out
    assert "no longer failing: rival 1.0" in out


def test_a_rival_that_is_not_installed_is_one_line(capsys, monkeypatch):
    for module in ("torchmetrics", "torchmetrics.text", "torchmetrics.functional.text.perplexity"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["softmax_then_log", "perplexity_counts", "--quick"]) == 0
    out = capsys.readouterr().out
    assert out.count("torchmetrics is not installed, so its side is not shown: pip install 'gpuxent[failures]'") == 2
    assert "gpuxent right in 4 of 4; rivals wrong in 0 of 0; not installed in 4" in out


def test_what_a_rival_raises_is_shown(capsys):
    def refused():
        raise TypeError("got an unexpected keyword argument 'eps'\nand more")

    status, out = text_of([line(frame.rival(refused), 2.0, 2.0)], capsys)
    assert status == 0
    assert "TypeError: got an unexpected keyword argument 'eps'" in out
    assert "and more" not in out
    assert "theirs raises, ours right" in out


def test_commands(capsys):
    assert main(["clipped_log_loss", "negative_label"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{number:.6g}" in shown for number in (18.3684, 8.31777, 3.8125))
    alone = subprocess.run(
        [sys.executable, "-m", "bench.failures.clipped_log_loss", "--quick"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    table = [text for text in alone.splitlines() if "scikit-learn" in text]
    assert len(table) == 3
    assert all(text in shown for text in table)
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])
    assert "there is no 'nothing'; there are softmax_then_log, " in capsys.readouterr().err


# ---- a gpuxent that is wrong is seen ----


@pytest.fixture
def alone(monkeypatch):
    """Without the rivals, and with as few samples as will do."""
    monkeypatch.setattr(frame, "rival", lambda call: Missing("all"))
    monkeypatch.setattr(perplexity_counts, "check_added", lambda: None)
    monkeypatch.setattr(calibration_counts, "QUICK", 1000)


def scaled(function, factor):
    return lambda *arguments, **options: function(*arguments, **options) * factor


WRONG = {
    "softmax_then_log": ("perplexity", lambda f: scaled(f, 1 + 1e-4)),
    "block_means": ("cross_entropy_from_probs", lambda f: scaled(f, 1 + 2e-12)),
    "float16_means": ("cross_entropy", lambda f: scaled(f, 1 + 1e-6)),
    "clipped_log_loss": ("cross_entropy_from_probs", lambda f: lambda *a, **k: min(f(*a, **k), 18.4)),
    "negative_label": ("perplexity", lambda f: lambda logits, labels: f(logits, labels % logits.shape[1])),
    "calibration_counts": (
        "evaluate",
        lambda f: lambda *a, **k: replace(found := f(*a, **k), ece=found.ece * (1 + 2e-12)),
    ),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gpuxent_is_seen(name, monkeypatch, capsys):
    function, change = WRONG[name]
    monkeypatch.setattr(gpuxent, function, change(getattr(gpuxent, function)))
    assert main([name, "--quick"]) == 1
    assert "OURS WRONG" in capsys.readouterr().out


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("field", ["scored", "loss"])
def test_wrong_merging_is_seen(field, monkeypatch):
    honest = Totals.merge

    def merge(self, other):
        merged = honest(self, other)
        return replace(merged, scored=merged.scored + 1) if field == "scored" else replace(merged, loss=self.loss)

    monkeypatch.setattr(Totals, "merge", merge)
    mean, count = FAILURES["perplexity_counts"].lines(True)
    assert not mean.right
    assert count.right == (field == "loss")


def test_the_quick_way_is_the_metrics_own_arithmetic(monkeypatch):
    pytest.importorskip("torchmetrics")
    perplexity_counts.check_added()
    honest = perplexity_counts.added
    monkeypatch.setattr(perplexity_counts, "added", lambda batches: honest(batches - 1))
    with pytest.raises(RuntimeError, match="torchmetrics has"):
        perplexity_counts.check_added()


# ---- the truth ----


def test_losses_against_mpmath():
    logits = np.array([[120, 0, -3], [0.25, -1, 60], [-400, -401, -402.5], [0, 0, 0]])
    labels = [1, 2, 0, 2]
    with mpmath.workdps(60):
        exact = [
            mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(x)) for x in row)) - mpmath.mpf(row[label])
            for row, label in zip(logits.tolist(), labels, strict=True)
        ]
    found = truth.losses(logits, labels)
    assert all(abs(a - b) <= 4e-16 * b for a, b in zip(found, exact, strict=True))
    assert truth.mean(found) == math.fsum(found) / 4


def test_quick_and_full_ways_agree():
    assert perplexity_counts.merged(7) == perplexity_counts.evaluated(7)
