"""Shards of the vocabulary against the whole: the same losses and gradients from records alone."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from makers import class_weight, labels, logits

import gpuxent as gx
from gpuxent import vocab_parallel as vp

pytestmark = pytest.mark.usefixtures("backend")

VOCAB = 151
CUTS = [(0, VOCAB), (0, 1, VOCAB), (0, 60, 100, VOCAB), (0, 7, 8, 150, VOCAB)]
OPTIONS = [
    {},
    {"reduction": "none", "label_smoothing": 0.1, "class_weight": class_weight(VOCAB)},
    {"reduction": "sum", "z_loss": 1e-2, "softcap": 30.0, "temperature": 1.5},
]


def shards(array, cuts, axis=-1):
    return [(part, start) for part, start in zip(np.split(array, cuts[1:-1], axis), cuts, strict=False)]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.get("reduction", "mean"))
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_shards_give_what_the_whole_gives(cuts, options, dtype):
    x = logits(20, VOCAB, dtype, seed=3).reshape(5, 4, VOCAB)
    y = labels(x.reshape(20, VOCAB), seed=1).reshape(5, 4)
    record = vp.merge([vp.shard_stats(part, y, start, VOCAB, **options) for part, start in shards(x, cuts)])
    assert record.shape == (5, 4, 8)
    with np.errstate(all="ignore"):
        loss, dlogits = gx.cross_entropy_and_grad(x, y, **options)
    found = vp.loss_of(record, y, VOCAB, **options)
    assert found.dtype == np.float64
    eps = np.finfo(np.float64 if dtype == np.float64 else np.float32).eps
    assert np.allclose(found, loss, rtol=8 * eps, atol=0, equal_nan=True)
    parts = [vp.shard_grad(part, y, record, start, VOCAB, **options) for part, start in shards(x, cuts)]
    whole = np.concatenate(parts, axis=-1)
    assert whole.dtype == dtype
    a, b = whole.astype(np.float64), dlogits.astype(np.float64)
    assert np.allclose(a, b, rtol=8 * float(ml_dtypes.finfo(dtype).eps), atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.get("reduction", "mean"))
def test_shards_of_a_classifier(options):
    rng = np.random.default_rng(0)
    hidden, classifier = rng.standard_normal((30, 9)), rng.standard_normal((VOCAB, 9))
    bias, y = rng.standard_normal(VOCAB), rng.integers(0, VOCAB, 30)
    y[::4] = -100
    loss, grad = gx.linear_cross_entropy_and_grad(hidden, classifier, y, bias=bias, **options)
    parts = [(c, b, s) for (c, s), (b, _) in zip(shards(classifier, CUTS[2], 0), shards(bias, CUTS[2]), strict=True)]
    record = vp.merge([vp.linear_shard_stats(hidden, c, y, s, VOCAB, bias=b, **options) for c, b, s in parts])
    assert np.allclose(vp.loss_of(record, y, VOCAB, **options), loss, rtol=1e-12)
    grads = [vp.linear_shard_grad(hidden, c, y, record, s, VOCAB, bias=b, **options) for c, b, s in parts]
    assert np.allclose(sum(g.hidden for g in grads), grad.hidden, rtol=1e-10, atol=1e-14)
    assert np.allclose(np.concatenate([g.classifier for g in grads]), grad.classifier, rtol=1e-10, atol=1e-14)
    assert np.allclose(np.concatenate([g.bias for g in grads]), grad.bias, rtol=1e-10, atol=1e-14)


def test_upstream_gradient_denominator_and_out():
    x = logits(6, VOCAB, np.float32, kinds="ordinary")
    y = labels(x, ignore=False)
    _, expected = gx.cross_entropy_and_grad(x, y, grad_output=3.0, denominator=10)
    record = vp.merge([vp.shard_stats(part, y, start, VOCAB) for part, start in shards(x, CUTS[1])])
    for part, start in shards(x, CUTS[1]):
        own = part.copy()
        found = vp.shard_grad(own, y, record, start, VOCAB, grad_output=3.0, denominator=10, out=own)
        assert found is own
        assert np.allclose(own, expected[:, start : start + own.shape[1]], rtol=1e-5, atol=1e-9)


X, Y = np.zeros((3, 4), np.float32), np.zeros(3, int)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: vp.shard_stats(X, Y, 7, 10),
            ValueError,
            "a shard of 4 columns from class 7 on does not lie in vocab=10",
        ),
        (lambda: vp.shard_stats(X, Y, -1, 10), ValueError, "start must be an integer of at least 0, got -1"),
        (lambda: vp.shard_stats(X, Y + 10, 0, 10), IndexError, r"labels\[0\] is 10, expected a class in \[0, 10\)"),
        (
            lambda: vp.shard_stats(X, np.full((3, 10), 0.1), 0, 10),
            ValueError,
            "labels must be integers, classes of the",
        ),
        (lambda: vp.merge([]), ValueError, "records must be those of shards of the same rows"),
        (lambda: vp.merge([np.zeros((3, 8)), np.zeros((4, 8))]), ValueError, r"got shapes \(3, 8\), \(4, 8\)"),
        (lambda: vp.shard_stats(X, Y, 0, 10, label_smooth=1), TypeError, "label_smooth"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


RANK = """
import sys
import numpy as np, torch, torch.distributed as dist
from gpuxent.vocab_parallel import loss_of, merge, shard_grad, shard_stats

rank, ranks, folder = int(sys.argv[1]), 2, sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
x, labels = np.load(f"{folder}/x.npy"), np.load(f"{folder}/labels.npy")
vocab = x.shape[1]
start, stop = vocab * rank // ranks, vocab * (rank + 1) // ranks
logits = x[:, start:stop]

record = torch.from_numpy(shard_stats(logits, labels, start, vocab))
every = [torch.empty_like(record) for _ in range(ranks)]
dist.all_gather(every, record)
record = merge([t.numpy() for t in every])
np.savez(
    f"{folder}/rank{rank}.npz",
    loss=loss_of(record, labels, vocab),
    dlogits=shard_grad(logits, labels, record, start, vocab),
)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("backend", ["numba"], indirect=True)
def test_two_processes_exchange_records(tmp_path, backend):
    """The recipe of the docstring, over gloo."""
    x = logits(20, VOCAB, np.float32, seed=2, kinds="ordinary")
    y = labels(x)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "labels.npy", y)
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    first, second = (np.load(tmp_path / f"rank{rank}.npz") for rank in range(2))
    loss, dlogits = gx.cross_entropy_and_grad(x, y)
    assert first["loss"] == second["loss"] == pytest.approx(float(loss), rel=1e-6)
    found = np.concatenate([first["dlogits"], second["dlogits"]], axis=1)
    assert np.allclose(found, dlogits, rtol=1e-5, atol=1e-9)
