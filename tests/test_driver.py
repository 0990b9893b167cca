"""The driver: every row once, in order, a bounded number of blocks in flight, and the same bits however it cuts."""

import threading
import time

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import labels, logits

import gpuxent as gx
from gpuxent.evaluation.driver import plan_blocks, score_blocks
from gpuxent.evaluation.sources import ArraySource
from gpuxent.evaluation.totals import Totals

X = logits(300, 200, np.float32, seed=1)
Y = labels(X)


class Counting(ArraySource):
    """Counts the reads, and fails or waits at one of them."""

    def __init__(self, array, fail_at=None, row_chunk=1):
        super().__init__(array, "counted", row_chunk)
        object.__setattr__(self, "reads", [])
        object.__setattr__(self, "fail_at", fail_at)

    def read(self, rows, columns=slice(None)):
        self.reads.append(rows[0].start)
        if self.fail_at is not None and rows[0].start >= self.fail_at:
            raise OSError("the disk is gone")
        return super().read(rows, columns)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.integers(1, 200),
    st.integers(1, 5),
)
def test_blocks_cover_every_row_once_and_in_order(lead, block_rows, chunk):
    array = np.empty((*lead, 3), np.float32)
    numbers = np.arange(int(np.prod(lead))).reshape(lead)
    seen = []
    for first, rows in plan_blocks(ArraySource(array, row_chunk=chunk), block_rows * 12):
        piece = numbers[rows].ravel()
        assert piece[0] == first
        assert piece.size <= max(block_rows, 1) * (4 if chunk > 1 else 1)
        seen += piece.tolist()
    assert seen == list(range(numbers.size))


def test_blocks_begin_where_chunks_do():
    starts = [first for first, _ in plan_blocks(ArraySource(X, row_chunk=16), 50 * 800)]
    assert starts == list(range(0, 300, 48))


def totals(x=X, y=Y, **how):
    result = Totals.identity()
    for block in score_blocks(ArraySource(x), ArraySource(y), **how):
        result = result.with_rows(block.scores, block.numbers)
    return result.to_json()


def test_block_size_and_threads_do_not_change_a_bit():
    expected = totals()
    for block_bytes in (1, 800, 7 * 800, 100 * 800):
        for n in (1, 2, 5):
            with gx.threads(n):
                assert totals(block_bytes=block_bytes) == expected
    assert totals(X.reshape(3, 100, 200), Y.reshape(3, 100), block_bytes=30 * 800) == expected


def test_few_blocks_are_in_flight():
    """A slow consumer holds the readers back."""
    source = Counting(X)
    with gx.threads(2):
        for n, _block in enumerate(score_blocks(source, ArraySource(Y), block_bytes=800)):
            if n == 20:
                time.sleep(0.3)
                assert len(source.reads) <= 20 + 1 + 5
                break
    assert len(source.reads) < 40


class Meeting(ArraySource):
    """Each read waits for another one at the same time, and counts how many there are."""

    def __init__(self, array):
        super().__init__(array)
        object.__setattr__(self, "door", threading.Barrier(2, timeout=30))
        object.__setattr__(self, "inside", [0, 0])  # now, at most
        object.__setattr__(self, "lock", threading.Lock())

    def read(self, rows, columns=slice(None)):
        with self.lock:
            self.inside[0] += 1
            self.inside[1] = max(self.inside)
        self.door.wait()
        time.sleep(0.01)
        with self.lock:
            self.inside[0] -= 1
        return super().read(rows, columns)


def test_as_many_blocks_at_once_as_there_are_threads():
    source = Meeting(X)
    with gx.threads(2):
        assert len(list(score_blocks(source, ArraySource(Y), block_bytes=30 * 800))) == 10
    assert source.inside[1] == 2


def test_blocks_bear_the_numbers_of_their_rows():
    losses = gx.cross_entropy(X.astype(np.float64), Y, reduction="none")
    blocks = list(score_blocks(ArraySource(X), ArraySource(Y), ArraySource(np.arange(300)), block_bytes=7 * 800))
    assert np.array_equal(np.concatenate([block.numbers for block in blocks]), np.arange(300))
    assert np.array_equal(np.concatenate([block.documents for block in blocks]), np.arange(300))
    scored = np.concatenate([block.scores.scored for block in blocks])
    assert np.array_equal(scored, Y >= 0)
    found = np.concatenate([block.scores.loss for block in blocks])
    np.testing.assert_allclose(found[scored], losses[scored], rtol=1e-5)


class Waiting(Counting):
    """The first block is there at once, the others when `ready` is set."""

    def __init__(self, array):
        super().__init__(array)
        object.__setattr__(self, "ready", threading.Event())

    def read(self, rows, columns=slice(None)):
        block = super().read(rows, columns)
        assert rows[0].start == 0 or self.ready.wait(30)
        return block


def test_a_consumer_that_stops_waits_only_for_what_is_being_read():
    source = Waiting(X)
    with gx.threads(2):
        blocks = score_blocks(source, ArraySource(Y), block_bytes=800)
        next(blocks)
        threading.Timer(0.5, source.ready.set).start()
        blocks.close()
    assert set(source.reads) <= {0, 1, 2}  # and not 3 and 4, which waited for a thread


def test_an_error_reaches_the_caller_and_a_consumer_may_stop():
    source = Counting(X, fail_at=100)
    blocks = []
    with pytest.raises(OSError, match="the disk is gone"):
        blocks += score_blocks(source, ArraySource(Y), block_bytes=8000)
    assert len(source.reads) < 30
    running = threading.active_count()
    for _block in score_blocks(Counting(X), ArraySource(Y), block_bytes=8000):
        break
    deadline = time.monotonic() + 10
    while threading.active_count() > running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= running


def test_a_bad_label_is_named_by_its_row_in_the_data_set():
    y = Y.copy()
    y[217] = 200
    with pytest.raises(IndexError, match=r"labels\[217\] is 200"):
        list(score_blocks(ArraySource(X), ArraySource(y), block_bytes=8000))


def test_evaluate_takes_arrays_paths_and_sources(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    expected = gx.evaluate(X, Y)
    assert gx.evaluate(tmp_path / "x.npy", str(tmp_path / "y.npy")) == expected
    assert gx.evaluate(tmp_path / "x.npy", Y) == expected
    assert gx.evaluate(ArraySource(X), ArraySource(Y)) == expected
    assert gx.evaluate(da.from_array(X, chunks=(40, 200)), Y) == expected
    with pytest.raises(TypeError, match="labels must be an array beside Dask logits"):
        gx.evaluate(da.from_array(X), str(tmp_path / "y.npy"))
    with pytest.raises(
        ValueError, match=r"labels \(labels\) must have shape \(300,\) for logits of shape \(300, 200\)"
    ):
        gx.evaluate(X, Y[:-1])
    with pytest.raises(TypeError, match=r"labels \(labels\) must be integers, got float64"):
        gx.evaluate(X, Y.astype(np.float64))
    with pytest.raises(ValueError, match=r"must have shape \(rows, vocab\)"):
        gx.evaluate(X[0], Y)
