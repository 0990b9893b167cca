"""Which rows count, by which label, and where they lie in their document: against plain Python."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import labels, logits

import gpuxent as gx
from gpuxent import calibration
from gpuxent._records import IGNORED
from gpuxent.evaluation import job as jobs
from gpuxent.evaluation.calibration.sigmoids import pairs
from gpuxent.evaluation.evaluate import open_job
from gpuxent.evaluation.sources import ArraySource

VOCAB = 11


def expected(lead, y, ids, mask, shift, min_context, ignore=-100):
    """(class or None, position) of each row, one row at a time."""
    rows, length = int(np.prod(lead)), lead[-1]
    flat = [None if a is None else np.ravel(a) for a in (y, ids, mask)]
    found = []
    for row in range(rows):
        begin = row - row % length
        if ids is not None:
            while begin < row and any(flat[1][i] != flat[1][row] for i in range(begin, row)):
                begin += 1
        target = row + shift
        inside = target < rows and target // length == row // length
        if inside and ids is not None:
            inside = flat[1][target] == flat[1][row]
        counts = inside and row - begin >= min_context and (mask is None or bool(flat[2][target]))
        label = int(flat[0][target]) if counts and flat[0][target] != ignore else None
        found.append((label, row - begin))
    return found


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_labels_and_positions_of_any_block(data):
    lead = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    rows = int(np.prod(lead))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    y = np.where(rng.random(lead) < 0.2, -100, rng.integers(0, VOCAB, lead))
    ids = np.cumsum(rng.random(rows) < 0.3).reshape(lead) * 5 - 7 if data.draw(st.booleans()) else None
    mask = rng.random(lead) < 0.7 if data.draw(st.booleans()) else None
    shift, min_context = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3))
    job = open_job(
        np.zeros((*lead, VOCAB), np.float32), y, documents=ids, mask=mask, shift=shift, min_context=min_context
    )
    first = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(first + 1, rows))
    found = job.labelled(first, stop)
    classes = [None if c == IGNORED else c for c in found.classes.tolist()]
    want = expected(lead, y, ids, mask, shift, min_context)[first:stop]
    assert list(zip(classes, found.positions.tolist(), strict=True)) == want
    assert found.documents is None if ids is None else found.documents.tolist() == ids.ravel()[first:stop].tolist()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [1, 7, 30, 100])
def test_a_block_read_piece_by_piece_leaves_the_same_behind(size, keep):
    x = logits(30, VOCAB, np.float32)
    job = replace(open_job(x, labels(x), documents=np.arange(30) // 8, shift=1), keep_tokens=keep)
    whole, pieces = (replace(job, rows_at_once=rows).score(3, 29) for rows in (None, size))
    assert (pieces.first, pieces.rows, pieces.computed_by) == (3, 26, whole.computed_by)
    assert pieces.summary.to_json() == whole.summary.to_json()
    if keep:
        assert {n: c.tolist() for n, c in pieces.tokens.columns.items()} == {
            n: c.tolist() for n, c in whole.tokens.columns.items()
        }
    else:
        assert pieces.tokens is None


def test_the_start_of_a_long_document_is_found():
    ids = np.repeat([3, 4, 5], [7, 30_000, 10])
    job = open_job(np.broadcast_to(np.float32(0), (ids.size, VOCAB)), np.zeros(ids.size, int), documents=ids)
    assert job.labelled(30_000, 30_002).positions.tolist() == [30_000 - 7, 30_001 - 7]
    assert job.labelled(7, 8).positions.tolist() == [0]


def test_shift_scores_what_slicing_scores():
    x = logits(60, 40, np.float32, seed=3).reshape(3, 20, 40)
    tokens = np.random.default_rng(0).integers(0, 40, (3, 20))
    shifted = gx.evaluate(x, tokens, shift=1)
    sliced = gx.evaluate(x[:, :-1], tokens[:, 1:])
    assert (shifted.cross_entropy, shifted.scored, shifted.ignored) == (sliced.cross_entropy, 57, 3)


def test_what_does_not_count_is_not_checked():
    x, y = np.zeros((6, VOCAB), np.float32), np.array([0, 1, VOCAB, -1, 3, 4])
    mask = np.array([1, 1, 0, 0, 1, 1])
    assert gx.evaluate(x, y, mask=mask).scored == 4
    with pytest.raises(IndexError, match=r"labels\[2\] is 11, expected a class in \[0, 11\) or ignore_index=-100"):
        gx.evaluate(x, y)


def test_a_bad_label_is_named_by_its_index():
    x, y = np.zeros((2, 3, 4, VOCAB), np.float32), np.zeros((2, 3, 4), np.int64)
    y[1, 2, 3] = 99
    for shift in (0, 1):
        with pytest.raises(IndexError, match=r"labels\[1, 2, 3\] is 99"):
            gx.evaluate(x, y, shift=shift)


def test_limit():
    x = logits(50, 30, np.float32, seed=5)
    y = labels(x)
    assert gx.evaluate(x, y, limit=17).cross_entropy == gx.evaluate(x[:17], y[:17]).cross_entropy
    assert gx.evaluate(x, y, limit=1000).rows == 50
    # the label of the last row that is read may lie beyond it
    assert gx.evaluate(x, np.maximum(y, 0), limit=17, shift=1).scored == 17


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"shift": 2}, ValueError, "shift must be an integer from 0 to 1, got 2"),
        ({"min_context": -1}, ValueError, "min_context must be an integer of at least 0, got -1"),
        ({"limit": 0}, ValueError, "limit must be a positive integer, got 0"),
        ({"mask": np.zeros(3)}, TypeError, r"mask \(mask\) must be integers or booleans, got float64"),
        ({"documents": np.zeros(2, int)}, ValueError, r"documents \(documents\) must have shape \(3,\)"),
        ({"documents": np.zeros(3)}, TypeError, r"documents \(documents\) must be integers, got float64"),
        ({"memory": 0}, ValueError, "memory must be a positive integer, got 0"),
        ({"group_by": "x"}, ValueError, "metadata"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        gx.evaluate(np.zeros((3, VOCAB), np.float32), np.zeros(3, int), **options)


class Failing(ArraySource):
    """Fails so many times, then reads."""

    def __init__(self, array, failures, error):
        super().__init__(array, "failing")
        object.__setattr__(self, "left", [failures])
        object.__setattr__(self, "error", error)

    def read(self, rows, columns=None):
        if self.left[0]:
            self.left[0] -= 1
            raise self.error
        return super().read(rows, columns)


X = logits(20, 30, np.float32, seed=1)


def test_errors_that_may_pass_are_tried_again(monkeypatch):
    monkeypatch.setattr(jobs, "RETRY_AFTER", (0.0, 0.0, 0.0))
    y, stale = labels(X), OSError(116, "Stale file handle")
    assert gx.evaluate(Failing(X, 3, stale), y) == gx.evaluate(X, y)
    with pytest.raises(OSError, match=r"failing, rows 0 to 20: .*Stale file handle \(tried 4 times\)"):
        gx.evaluate(Failing(X, 4, stale), y)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), ValueError("corrupt")])
def test_errors_that_stay_are_not(error, monkeypatch):
    monkeypatch.setattr(jobs, "RETRY_AFTER", (1e9,))
    with pytest.raises(type(error), match=r"gone|corrupt"):
        gx.evaluate(Failing(X, 1, error), labels(X))


def test_shards_are_scored_as_one_array(tmp_path):
    """Through all that a command does: they have parts, but are no products."""
    x = logits(30, 11, np.float32, kinds="ordinary")
    for side, array in (("base", x), ("other", x[::-1])):
        (tmp_path / side).mkdir()
        for first in (0, 12):
            np.save(tmp_path / side / f"{first}.npy", array[first : 12 if first == 0 else 30])
    y, d = labels(x), np.arange(30) // 8
    found = gx.evaluate(tmp_path / "base", y, documents=d, run=tmp_path / "run")
    assert found == gx.evaluate(x, y, documents=d)
    assert gx.compare(tmp_path / "base", tmp_path / "other", y) == gx.compare(x, x[::-1], y)
    checked = [calibration.reliability(rows, y, resamples=20) for rows in (tmp_path / "base", x)]
    assert (checked[0].ece, checked[0].nll) == (checked[1].ece, checked[1].nll)


def test_products_are_read_from_their_factors_whatever_is_made_of_them():
    rng, y = np.random.default_rng(0), np.arange(400) % 4
    lazy = gx.linear_logits(rng.normal(size=(400, 6)), rng.normal(size=(4, 6)))
    scaled = calibration.fit_vector_scaling(rng.normal(size=(400, 4)), y).apply(lazy)
    for source in (lazy, scaled):
        job = open_job(source, y)
        assert job.has_products
        assert job.inputs.keys() >= {"hidden", "classifier"}
    assert pairs(lazy, False).factors.keys() >= {"hidden", "classifier"}
