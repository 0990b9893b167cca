"""The driver: every row once, a bounded number of blocks in flight, and the same bits however it cuts."""

import os
import signal
import threading
import time
from math import ceil

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import labels, logits

import gpuxent as gx
from gpuxent.evaluation import job as jobs
from gpuxent.evaluation.driver import (
    READERS,
    ROW_BYTES,
    CallerWorkers,
    Done,
    Stop,
    ThreadWorkers,
    WorkerDied,
    levelled,
    plan,
    rows_per_block,
    run_blocks,
)
from gpuxent.evaluation.evaluate import open_job
from gpuxent.evaluation.score import evaluate_job, gaps, interruptible, score
from gpuxent.evaluation.sources import ArraySource

X = logits(300, 200, np.float32, seed=1)
Y = labels(X)
JOB = open_job(X, Y)


class Counting(ArraySource):
    """Counts the reads, and fails at one of them."""

    def __init__(self, array, fail_at=None, row_chunk=1):
        super().__init__(array, "counted", row_chunk)
        object.__setattr__(self, "reads", [])
        object.__setattr__(self, "fail_at", fail_at)

    def read(self, rows, columns=None):
        self.reads.append(rows.start)
        if self.fail_at is not None and rows.start >= self.fail_at:
            raise ValueError(f"chunk {rows.start} is broken")
        return super().read(rows, columns)


def blocks_of(rows, total=300):
    return plan([range(total)], rows)


def summary_of(job, rows, n):
    with gx.threads(n):
        summary = job.identity()
        for result in run_blocks(job, blocks_of(rows, job.rows), ThreadWorkers(1000)):
            summary = summary.merge(result.summary)
    return summary.to_json()


# ---- the plan ----


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=8), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1))
def test_a_plan_covers_what_is_to_do_once_and_in_order(lengths, rows, chunks):
    edges = np.cumsum(lengths).tolist()
    todo = [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    wanted = [row for part in todo for row in part]
    blocks = list(plan(todo, rows))
    assert [row for block in blocks for row in block] == wanted
    assert all(len(block) <= rows and block.start // rows == (block.stop - 1) // rows for block in blocks)
    ends = [0, *np.cumsum(chunks).tolist()]
    whole = list(plan([range(ends[-1])], rows, ends))
    assert [row for block in whole for row in block] == list(range(ends[-1]))
    assert all(block.start in ends and block.stop in ends for block in whole)
    assert all(len(block) <= max(rows, *chunks) for block in whole)


def test_blocks_begin_where_chunks_do():
    job = open_job(ArraySource(X, row_chunk=16), Y)
    row = 800 + ROW_BYTES
    assert rows_per_block(job, 50 * row) == 48
    assert rows_per_block(job, 5 * row) == 16
    assert rows_per_block(job, 3 * row) == 3  # such a chunk is too large to be read whole
    assert rows_per_block(open_job(X, Y), 1) == 1


@given(st.integers(1, 300), st.integers(1, 100_000), st.integers(1, 8), st.sampled_from([1, 16]))
def test_the_last_blocks_keep_as_many_workers_busy_as_the_first(rows, total, computing, step):
    rows *= step
    found = levelled(rows, total, computing, step)
    assert 0 < found <= rows
    assert found % step == 0
    before, rounds = (ceil(ceil(total / size) / computing) for size in (rows, found))
    assert rounds <= before
    assert rounds * computing * found < total + before * computing * step  # what idles is less than a step each


@given(st.lists(st.booleans(), max_size=30))
def test_gaps_are_what_is_not_finished(done):
    edges = [i for i in range(len(done)) if done[i] and (i == 0 or not done[i - 1])]
    finished = [range(i, next((j for j in range(i, len(done)) if not done[j]), len(done))) for i in edges]
    assert [row for gap in gaps(finished, len(done)) for row in gap] == [i for i, d in enumerate(done) if not d]


# ---- running ----


def test_block_size_and_threads_do_not_change_a_bit():
    expected = summary_of(JOB, 300, 1)
    for rows in (1, 7, 100):
        for n in (1, 2, 5):
            assert summary_of(JOB, rows, n) == expected
    assert summary_of(open_job(X.reshape(3, 100, 200), Y.reshape(3, 100)), 30, 2) != expected  # other positions
    whole = gx.evaluate(X, Y)
    assert gx.evaluate(X, Y, memory=1).cross_entropy == whole.cross_entropy
    assert gx.evaluate(X.reshape(3, 100, 200), Y.reshape(3, 100)).cross_entropy == whole.cross_entropy


def test_few_blocks_are_in_flight():
    """A slow consumer holds the readers back."""
    source = Counting(X)
    with gx.threads(2):
        for n, _block in enumerate(run_blocks(open_job(source, Y), blocks_of(1), ThreadWorkers(300))):
            if n == 20:
                time.sleep(0.3)
                assert len(source.reads) <= 20 + 1 + 2 + READERS
                break
    assert len(source.reads) < 40


class Meeting(ArraySource):
    """Each read waits for as many others as there should be, and counts how many there are."""

    def __init__(self, array, parties):
        super().__init__(array)
        object.__setattr__(self, "door", threading.Barrier(parties, timeout=30))
        object.__setattr__(self, "inside", [0, 0])  # now, at most
        object.__setattr__(self, "lock", threading.Lock())

    def read(self, rows, columns=None):
        with self.lock:
            self.inside[0] += 1
            self.inside[1] = max(self.inside)
        self.door.wait()
        time.sleep(0.01)
        with self.lock:
            self.inside[0] -= 1
        return super().read(rows, columns)


def test_two_more_read_than_compute():
    source = Meeting(X, 2 + READERS)
    with gx.threads(2):
        assert len(list(run_blocks(open_job(source, Y), blocks_of(25), ThreadWorkers(300)))) == 12
    assert source.inside[1] == 2 + READERS


def test_no_more_compute_than_there_are_threads(monkeypatch):
    inside, most, lock = 0, 0, threading.Lock()
    whole = type(JOB).row_scores

    def counted(self, *arguments):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        try:
            return whole(self, *arguments)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(type(JOB), "row_scores", counted)
    with gx.threads(2):
        list(run_blocks(JOB, blocks_of(10), ThreadWorkers(300)))
    assert most == 2


def test_tokens_are_those_that_count():
    losses = gx.cross_entropy(X.astype(np.float64), Y, reduction="none")
    job = type(JOB)(**vars(open_job(X, Y, documents=np.arange(300) // 7)) | {"keep_tokens": True})
    tokens = [result.tokens for result in run_blocks(job, blocks_of(7), ThreadWorkers(300))]
    tokens.sort(key=lambda t: t.row[0])
    columns = {name: np.concatenate([t.columns[name] for t in tokens]) for name in tokens[0].columns}
    on = np.flatnonzero(Y >= 0)
    assert np.array_equal(columns["row"], on)
    assert np.array_equal(columns["label"], Y[on])
    assert np.array_equal(columns["document"], on // 7)
    assert np.array_equal(columns["position"], on % 7)
    np.testing.assert_allclose(columns["nll"], losses[on], rtol=1e-5)
    assert columns["rank"].dtype == np.int64


# ---- errors and interruptions ----


def test_an_error_is_raised_after_what_was_in_flight():
    source = Counting(X, fail_at=100)
    results = []
    with pytest.raises(ValueError, match="chunk 100 is broken"), gx.threads(2):
        results += (result.first for result in run_blocks(open_job(source, Y), blocks_of(10), ThreadWorkers(30)))
    assert sorted(results) == list(range(0, 100, 10))
    assert len(source.reads) <= 10 + 1 + 2 + READERS


def test_a_consumer_may_stop():
    running = threading.active_count()
    for _block in run_blocks(open_job(Counting(X), Y), blocks_of(10), ThreadWorkers(30)):
        break
    deadline = time.monotonic() + 10
    while threading.active_count() > running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= running


def test_a_stop_lets_the_blocks_in_flight_finish():
    stop, seen = Stop(), []

    def watch(rows, summary):
        seen.append(rows)
        stop.request()

    with gx.threads(1):
        summary = score(JOB, memory=(1 + READERS) * 10 * (800 + ROW_BYTES), stop=stop, watch=watch)
    assert 10 <= sum(seen) <= 10 * (1 + 1 + READERS)
    assert summary.totals.scored + summary.totals.ignored == sum(seen)
    result = summary.result(rows=300)
    assert result.share == sum(seen) / 300


def test_ctrl_c_once_and_twice():
    stop, said = Stop(), []
    before = signal.getsignal(signal.SIGINT)
    with interruptible(stop, said.append):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Dying:
    """Workers that die of some rows, and of what flies beside them as often as not."""

    slots = at_once = 3

    def __init__(self, poison):
        self.poison, self.flying, self.alone = poison, [], []

    def submit(self, job, block):
        self.flying.append((job, block))

    def next(self, timeout):
        if not self.flying:
            return None
        alone = len(self.flying) == 1
        job, block = self.flying.pop(0)
        self.alone += [block] * alone
        if self.poison in block or (not alone and block.start % 20 == 0):
            return Done(block, error=WorkerDied("killed"))
        return Done(block, job.score(block.start, block.stop))

    def close(self):
        pass


def test_blocks_whose_workers_die_are_scored_alone_and_named():
    workers = Dying(poison=155)
    found = []
    with pytest.raises(RuntimeError, match="array: every worker that scored rows 150 to 160 alone died: killed"):
        found += (result.first for result in run_blocks(open_job(ArraySource(X), Y), blocks_of(10), workers))
    assert sorted(found) == [start for start in range(0, 300, 10) if start != 150]
    workers = Dying(poison=-1)
    results = list(run_blocks(JOB, blocks_of(10), workers))
    assert sorted(r.first for r in results) == list(range(0, 300, 10))


# ---- what no block can notice ----


class Moving(ArraySource):
    """A file that somebody writes to while it is computed with."""

    def check(self, rows, columns=None):
        raise ValueError("moving changed while it was read")


def test_a_file_that_changes_while_it_is_computed_with():
    with pytest.raises(ValueError, match="moving changed while it was read"):
        gx.evaluate(Moving(X, "moving"), Y)


def test_a_file_that_changed_after_its_block(tmp_path):
    np.save(tmp_path / "x.npy", X)
    job = open_job(tmp_path / "x.npy", Y)

    def touch(rows, summary):
        os.utime(tmp_path / "x.npy", (0, 0))

    with pytest.raises(ValueError, match=r"what was read changed meanwhile: logits"):
        evaluate_job(job, watch=touch)


def test_the_kinds_of_machines_are_named(monkeypatch):
    kinds = iter(["numpy on a", "numpy on b", "numpy on a"])
    monkeypatch.setattr(jobs, "computed_by", lambda backend: next(kinds))
    assert evaluate_job(JOB, memory=(1 + READERS) * 100 * (800 + ROW_BYTES), workers=CallerWorkers()).mixed == ()
    kinds = iter(["numpy on a", "numpy on b", "numpy on a"])
    assert evaluate_job(JOB, memory=100 * (800 + ROW_BYTES), workers=CallerWorkers()).mixed == (
        "numpy on a",
        "numpy on b",
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"resume": True}, "resume is about a run in a folder, but run is not given"),
        ({"allow_mixed": True}, "allow_mixed is about a run in a folder"),
        ({"bytes": 4000, "limit": 100}, "limit must not be given with bytes or words"),
        ({"documents": np.full(300, 2**63, np.uint64)}, r"documents \(documents\) must be below 2\*\*63, got 9223"),
    ],
)
def test_options_that_do_not_go_together(options, error):
    with pytest.raises(ValueError, match=error):
        gx.evaluate(X, Y, **options)


# ---- what evaluate takes ----


def test_evaluate_takes_arrays_paths_and_sources(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    expected = gx.evaluate(X, Y)
    assert gx.evaluate(tmp_path / "x.npy", str(tmp_path / "y.npy")) == expected
    assert gx.evaluate(tmp_path / "x.npy", Y) == expected
    assert gx.evaluate(ArraySource(X), ArraySource(Y)) == expected
    assert gx.evaluate(da.from_array(X, chunks=(40, 200)), Y) == expected
    assert gx.evaluate(da.from_array(X, chunks=(40, 200)), tmp_path / "y.npy") == expected
    with pytest.raises(TypeError, match="labels is a Dask array but logits is not"):
        gx.evaluate(X, da.from_array(Y, chunks=11))
    with pytest.raises(
        ValueError, match=r"labels \(labels\) must have shape \(300,\) for logits of shape \(300, 200\)"
    ):
        gx.evaluate(X, Y[:-1])
    with pytest.raises(TypeError, match=r"labels \(labels\) must be integers, got float64"):
        gx.evaluate(X, Y.astype(np.float64))
    with pytest.raises(ValueError, match=r"must have shape \(rows, vocab\)"):
        gx.evaluate(X[0], Y)


def test_arrays_of_dask_are_never_cut_inside_a_chunk():
    x = da.from_array(X, chunks=((130, 20, 150), (90, 110)))
    computed = []
    counted = x.map_blocks(lambda block: computed.append(block.shape) or block, dtype=x.dtype, meta=x._meta)
    whole = gx.evaluate(X, Y)
    result = gx.evaluate(counted, Y, memory=1)
    assert result.scored == whole.scored
    np.testing.assert_allclose(result.cross_entropy, whole.cross_entropy, rtol=1e-6)
    assert {shape for shape in computed if 0 not in shape} == {(n, v) for n in (130, 20, 150) for v in (90, 110)}
