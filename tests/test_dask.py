"""Dask arrays: lazy in, lazy out, any chunks, the same numbers."""

import os
import subprocess
import sys

import dask
import dask.array as da
import numpy as np
import pytest
from makers import class_weight, labels, logits, soft_labels
from oracle import assert_close

import gpuxent as gx

pytestmark = pytest.mark.usefixtures("backend")

ROWS, VOCAB = 40, 3000
CHUNKINGS = {
    "one": ((40,), (3000,)),
    "rows": ((13, 1, 26), (3000,)),
    "vocabulary": ((40,), (7, 1993, 1000)),
    "both": ((11, 20, 9), (1, 1499, 1500)),
}
SMOOTH = {"label_smoothing": 0.1, "z_loss": 1e-3}

X = logits(ROWS, VOCAB, np.float32, seed=1)
Y = labels(X)
SOFT = soft_labels(ROWS, VOCAB, np.float32)
FINITE = logits(ROWS, VOCAB, np.float32, seed=2, kinds="ordinary")

FUNCTIONS = {
    "cross_entropy": lambda x, y, s: gx.cross_entropy(x, y),
    "cross_entropy, none": lambda x, y, s: gx.cross_entropy(x, y, reduction="none"),
    "cross_entropy, options": lambda x, y, s: gx.cross_entropy(x, y, class_weight=class_weight(VOCAB), z_loss=1e-3),
    "cross_entropy, soft": lambda x, y, s: gx.cross_entropy(x[:, ::-1], s),
    "gradient": lambda x, y, s: gx.cross_entropy_and_grad(x, y, class_weight=class_weight(VOCAB))[1],
    "gradient, soft": lambda x, y, s: gx.cross_entropy_and_grad(x, s, softcap=30.0, **SMOOTH)[1],
    "lse": lambda x, y, s: gx.cross_entropy_and_grad(x, y, return_stats=True)[2].lse,
    "logsumexp": lambda x, y, s: gx.logsumexp(x),
    "softmax": lambda x, y, s: gx.softmax(x),
    "log_softmax": lambda x, y, s: gx.log_softmax(x),
    "entropy": lambda x, y, s: gx.entropy(x),
    "kl_divergence": lambda x, y, s: gx.kl_divergence(x, x[::-1]),
    "js_divergence": lambda x, y, s: gx.js_divergence(x, x[::-1]),
    "cross_entropy_between": lambda x, y, s: gx.cross_entropy_between(x, x[::-1]),
    "kl_divergence_from_probs": lambda x, y, s: gx.kl_divergence_from_probs(s, s[::-1]),
    "cross_entropy_from_probs": lambda x, y, s: gx.cross_entropy_from_probs(s, y, label_format="index"),
    "binary_cross_entropy": lambda x, y, s: gx.binary_cross_entropy(x, s),
    "binary gradient": lambda x, y, s: gx.binary_cross_entropy_and_grad(x, s, pos_weight=2)[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lazy_and_the_same_under_four_chunkings(name, no_compute):
    function = FUNCTIONS[name]
    expected = function(FINITE, Y, SOFT)
    for how, chunks in CHUNKINGS.items():
        x = da.from_array(FINITE, chunks=chunks)
        y = da.from_array(Y, chunks=17)  # not as the logits
        s = da.from_array(SOFT, chunks=(9, 1100))
        with no_compute():
            lazy = function(x, y, s)
        assert isinstance(lazy, da.Array)
        assert (lazy.shape, lazy.dtype) == (np.shape(expected), expected.dtype)
        actual = lazy.compute(scheduler="synchronous")
        assert actual.dtype == expected.dtype
        if how in ("one", "rows"):
            assert np.array_equal(actual, expected, equal_nan=True), f"{name}: other bits when chunked by {how}"
        elif expected.dtype == np.float32:
            assert_close(
                actual, expected, 8, np.float32, floor=float(np.abs(expected[np.isfinite(expected)]).max()) / 64
            )
        else:
            assert_close(actual, expected, 2, np.float32)


def test_gradient_keeps_the_chunks_of_the_logits():
    x = da.from_array(X, chunks=CHUNKINGS["both"])
    loss, dlogits, stats = gx.cross_entropy_and_grad(x, Y, reduction="none", return_stats=True)
    assert dlogits.chunks == x.chunks
    assert loss.chunks == stats.lse.chunks == x.chunks[:1]


def test_threads_and_synchronous_give_the_same_bits():
    x = da.from_array(X, chunks=(7, 3000))
    loss, dlogits = gx.cross_entropy_and_grad(x, Y, **{"label_smoothing": 0.0})
    for scheduler in ("threads", "synchronous"):
        a, b = dask.compute(loss, dlogits, scheduler=scheduler)
        expected = gx.cross_entropy_and_grad(X, Y)
        assert a == expected[0]
        assert np.array_equal(b, expected[1])


def test_evaluate_and_perplexity_compute():
    for chunks in (CHUNKINGS["one"], CHUNKINGS["rows"]):
        x = da.from_array(X, chunks=chunks)
        assert gx.evaluate(x, da.from_array(Y, chunks=17)) == gx.evaluate(X, Y)
        perplexity = gx.perplexity(x, Y)
        assert type(perplexity) is float
        assert perplexity == gx.perplexity(X, Y)
    x = da.from_array(X, chunks=CHUNKINGS["both"])
    split, whole = gx.evaluate(x, Y), gx.evaluate(X, Y)
    assert (split.accuracy, split.topk_accuracy, split.scored) == (whole.accuracy, whole.topk_accuracy, whole.scored)
    assert abs(split.cross_entropy - whole.cross_entropy) < 1e-6 * whole.cross_entropy


def test_a_slice_of_the_vocabulary_is_read_once_for_the_loss():
    """One task per block of logits, and no task that holds all of a row's blocks."""
    reads = []

    def block(block_info):
        reads.append(block_info[None]["chunk-location"])
        shape = block_info[None]["chunk-shape"]
        return np.zeros(shape, np.float32)

    x = da.map_blocks(block, chunks=CHUNKINGS["both"], dtype=np.float32, meta=np.empty((0, 0), np.float32))
    loss = gx.cross_entropy(x, Y).compute(scheduler="synchronous")
    assert abs(loss - np.log(VOCAB)) < 1e-6
    assert sorted(reads) == [(i, j) for i in range(3) for j in range(3)]


def test_empty_chunks_and_zero_rows():
    x = da.from_array(np.zeros((3, 5)), chunks=((0, 3, 0), (5,)))
    assert gx.cross_entropy(x, np.zeros(3, int)).compute().round(4) == 1.6094
    empty = da.zeros((0, 5))
    assert np.isnan(gx.cross_entropy(empty, np.zeros(0, int)).compute())
    assert gx.cross_entropy(empty, np.zeros(0, int), reduction="none").compute().shape == (0,)


def test_names_are_deterministic():
    x = da.from_array(X, chunks=CHUNKINGS["both"])
    assert gx.cross_entropy(x, Y).name == gx.cross_entropy(x, Y).name
    assert gx.cross_entropy(x, Y).name != gx.cross_entropy(x, Y, temperature=2.0).name


def test_errors_in_values_wait_for_compute(no_compute):
    bad = Y.copy()
    bad[31] = VOCAB
    with no_compute():
        lazy = gx.cross_entropy_and_grad(da.from_array(X, chunks=CHUNKINGS["both"]), bad)
    for result in lazy:
        with pytest.raises(IndexError, match=r"labels\[31\] is 3000, expected a class in \[0, 3000\)"):
            result.compute()


def test_blocks_use_one_thread_each(monkeypatch, backend):
    from gpuxent.backends import _threads

    if backend == "cupy":
        pytest.skip("a GPU's threads are not counted")
    seen = []
    run = _threads.run
    monkeypatch.setattr(_threads, "run", lambda work, items: (seen.append(_threads.thread_count()), run(work, items)))
    big = np.zeros((400, VOCAB), np.float32)  # no backend does so much on one thread, unless it is told to
    gx.cross_entropy(da.from_array(big, chunks=(400, VOCAB)), np.zeros(400, int)).compute()
    assert seen
    assert set(seen) == {1}


def test_query_planning():
    """Dask's other array engine, which has to be chosen before Dask is imported."""
    code = """
import dask.array as da, numpy as np, gpuxent as gx
x, y = np.random.default_rng(0).normal(0, 3, (10, 50)), np.arange(10)
lazy = da.from_array(x, chunks=(3, 17))
assert "expr" in type(lazy).__module__
loss, dlogits = gx.cross_entropy_and_grad(lazy, y, label_smoothing=0.1)
expected = gx.cross_entropy_and_grad(x, y, label_smoothing=0.1)
assert abs(loss.compute() - expected[0]) < 1e-14
assert abs(dlogits.compute() - expected[1]).max() < 1e-15
assert abs(gx.kl_divergence(lazy, lazy[::-1]).compute() - gx.kl_divergence(x, x[::-1])).max() < 1e-13
assert gx.evaluate(lazy, y).accuracy == gx.evaluate(x, y).accuracy
print("same")
"""
    environment = os.environ | {"DASK_ARRAY__QUERY_PLANNING": "True"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "same", done.stderr
