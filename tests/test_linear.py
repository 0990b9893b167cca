"""Cross-entropy from hidden states against the oracle, on parameters whose products are exact."""

import tracemalloc
from functools import cache

import dask.array as da
import ml_dtypes
import numpy as np
import pytest
import torch
from makers import class_weight, soft_labels
from oracle import assert_close
from oracle import cross_entropy as true_cross_entropy
from oracle import cross_entropy_grad as true_grad

import gpuxent as gx
from gpuxent import backends
from gpuxent.backends import _linear, _products

pytestmark = pytest.mark.usefixtures("backend")

ROWS, VOCAB, FEATURES = 25, 37, 6
DTYPES = pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name
)
OPTIONS = [
    {"reduction": "sum"},
    {"reduction": "mean", "label_smoothing": 0.1, "class_weight": class_weight(VOCAB)},
    {"reduction": "none", "label_smoothing": 0.05, "z_loss": 1e-2, "softcap": 30.0, "temperature": 1.5},
]


def parameters(dtype, rows=ROWS, vocab=VOCAB, seed=0):
    """Eighths, few and small: every product is exact in float32. Some rows are confident."""
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-24, 25, (rows, FEATURES)) / 8
    classifier = rng.integers(-16, 17, (vocab, FEATURES)) / 8
    hidden[::5] *= 4
    bias = rng.integers(-8, 9, vocab) / 8
    y = rng.integers(0, vocab, rows)
    y[::5] = (hidden[::5] @ classifier.T + bias).argmax(axis=1)
    y[3::7] = -100
    return hidden.astype(dtype), classifier.astype(dtype), bias.astype(dtype), y


def product(hidden, classifier, bias=0.0):
    return np.asarray(hidden, np.float64) @ np.asarray(classifier, np.float64).T + np.asarray(bias, np.float64)


def put(home, hidden, classifier):
    """The classifier of Dask hidden states comes in both kinds."""
    whole = home.name != "dask, rows and vocabulary"
    return home.put(hidden), classifier if whole else home.put(classifier)


def work_dtype(dtype):
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def assert_parameter_grad(found, dlogits, other, dtype):
    """Within the rounding of a sum of products in float32 (float64), and of the result in its dtype."""
    expected = dlogits.T @ other
    size = np.abs(dlogits).T @ np.abs(other)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = np.abs(np.asarray(found, np.float64) - expected)
    allowed = 64 * np.finfo(work_dtype(dtype)).eps * size + ml_dtypes.finfo(dtype).eps * np.abs(expected)
    if np.dtype(dtype) == np.float16:
        allowed += 6e-8  # subnormal
    assert (error <= allowed).all(), error.max()


@cache
def truth_of(case, soft, dtype):
    """(loss, dlogits) by the oracle; the logits are the same in all dtypes."""
    hidden, classifier, bias, y = parameters(np.float64)
    x = product(hidden, classifier, bias).astype(dtype)
    assert (x == product(hidden, classifier, bias)).all()
    y = soft_labels(ROWS, VOCAB, dtype) if soft else y
    dlogits = np.asarray(true_grad(x, y, **OPTIONS[case]), np.float64).reshape(x.shape)
    return true_cross_entropy(x, y, **OPTIONS[case]), dlogits


@DTYPES
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("case", range(len(OPTIONS)))
def test_losses_and_gradients(case, soft, dtype, home):
    hidden, classifier, bias, y = parameters(dtype)
    options = OPTIONS[case]
    y = soft_labels(ROWS, VOCAB, work_dtype(dtype)) if soft else y
    truth, dlogits = truth_of(case, soft, work_dtype(dtype))
    h, w = put(home, hidden, classifier)
    loss, grad = gx.linear_cross_entropy_and_grad(h, w, y, bias=bias, memory=1, **options)
    alone = gx.linear_cross_entropy(h, w, y, bias=bias, memory=1, **options)
    loss, alone, grad = home.compute((loss, alone, vars(grad)))
    for found in (loss, alone):
        assert_close(found, truth, 16 if "softcap" in options or soft else 4, work_dtype(dtype))
        assert found.dtype == (work_dtype(dtype) if options["reduction"] == "none" else np.float64)
    assert_parameter_grad(grad["hidden"].T, np.asarray(classifier, float), dlogits.T, dtype)
    assert_parameter_grad(grad["classifier"], dlogits, np.asarray(hidden, float), dtype)
    assert_parameter_grad(grad["bias"][None], np.ones((ROWS, 1)), dlogits, dtype)


def test_more_axes_upstream_gradients_and_statistics(home):
    hidden, classifier, bias, y = parameters(np.float32, rows=60)
    x = product(hidden, classifier, bias).astype(np.float32)
    upstream = np.random.default_rng(1).random((4, 3, 5))
    h, w = put(home, hidden.reshape(4, 3, 5, FEATURES), classifier)
    options = {"reduction": "none", "grad_output": upstream, "return_stats": True}
    loss, grad, summary = gx.linear_cross_entropy_and_grad(h, w, y.reshape(4, 3, 5), bias=bias, **options)
    expected, dlogits, rows = gx.cross_entropy_and_grad(x, y, **options | {"grad_output": upstream.ravel()})
    assert loss.shape == (4, 3, 5)
    assert_close(home.compute(loss).ravel(), expected, 4)
    counted = y != -100  # the others' logits are never made
    assert (home.compute(summary.argmax).ravel()[counted] == rows.argmax[counted]).all()
    assert_close(home.compute(summary.lse).ravel()[counted], rows.lse[counted], 4)
    assert_close(home.compute(summary.p_max).ravel()[counted], rows.p_max[counted], 4)
    found = home.compute(grad.hidden)
    assert found.shape == h.shape
    assert np.allclose(found.reshape(60, -1), dlogits @ classifier, rtol=1e-5, atol=1e-6)
    assert np.allclose(home.compute(grad.classifier), dlogits.T @ hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrt", [("hidden",), "classifier", ["bias", "hidden"], None])
def test_only_what_is_asked_for(wrt, home):
    hidden, classifier, bias, y = parameters(np.float32)
    h, w = put(home, hidden, classifier)
    _, all_of_them = gx.linear_cross_entropy_and_grad(hidden, classifier, y, bias=bias)
    _, grad = gx.linear_cross_entropy_and_grad(h, w, y, bias=bias, wrt=wrt)
    names = ("hidden", "classifier", "bias") if wrt is None else (wrt,) if isinstance(wrt, str) else wrt
    for name, found in vars(grad).items():
        assert (found is not None) == (name in names)
        if found is not None:
            assert np.allclose(home.compute(found), getattr(all_of_them, name), rtol=1e-5, atol=1e-7)
    _, grad = gx.linear_cross_entropy_and_grad(hidden, classifier, y)
    assert grad.bias is None


def test_rows_that_do_not_count_are_not_multiplied(monkeypatch):
    hidden, classifier, bias, y = parameters(np.float32)
    hidden[y == -100] = np.nan
    seen = []
    made = _products.logits_of
    monkeypatch.setattr(_products, "logits_of", lambda h, *others: (seen.append(len(h)), made(h, *others))[1])
    loss, grad = gx.linear_cross_entropy_and_grad(hidden, classifier, y, bias=bias)
    assert sum(seen) == np.count_nonzero(y != -100) < ROWS
    assert np.isfinite(loss)
    assert np.isfinite(grad.classifier).all()
    assert (grad.hidden[y == -100] == 0).all()
    seen.clear()
    loss, grad = gx.linear_cross_entropy_and_grad(hidden, classifier, np.full(ROWS, -100), bias=bias)
    assert np.isnan(loss)
    assert not seen
    assert not any(getattr(grad, name).any() for name in ("hidden", "classifier", "bias"))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, home):
    hidden, classifier, _, _ = parameters(np.float32, rows=3)
    h, w = put(home, hidden[:rows], classifier)
    y = np.array([4, 5, 6])[:rows]
    loss, grad = gx.linear_cross_entropy_and_grad(h, w, y, reduction="sum")
    x = product(hidden[:rows], classifier).astype(np.float32)
    assert_close(home.compute(loss), gx.cross_entropy(x, y, reduction="sum"), 4)
    assert home.compute(grad.hidden).shape == (rows, FEATURES)
    assert home.compute(grad.classifier).any() == (rows > 0)


def test_sums_over_many_tiles_are_rounded_once():
    """Thousands of pushes of one size: in bfloat16 their sum would stop at 256 of them."""
    rows = 128 * 40
    hidden = np.ones((rows, 1), ml_dtypes.bfloat16)
    classifier = np.zeros((2, 1), ml_dtypes.bfloat16)
    loss, grad = gx.linear_cross_entropy_and_grad(
        hidden, classifier, np.zeros(rows, int), bias=classifier[:, 0], memory=1, reduction="sum"
    )
    assert float(loss) == pytest.approx(rows * np.log(2))
    assert grad.classifier.tolist() == [[-rows / 2], [rows / 2]]
    assert grad.bias.tolist() == [-rows / 2, rows / 2]


def test_the_same_bits_every_time_and_nearly_the_same_with_other_tiles(monkeypatch):
    rng = np.random.default_rng(0)
    hidden, classifier = rng.standard_normal((700, 64), np.float32), rng.standard_normal((999, 64), np.float32)
    y = rng.integers(0, 999, 700)
    loss, grad = gx.linear_cross_entropy_and_grad(hidden, classifier, y, memory=1)
    again, grad_again = gx.linear_cross_entropy_and_grad(hidden, classifier, y, memory=1)
    assert loss == again
    assert (grad.hidden == grad_again.hidden).all()
    assert (grad.classifier == grad_again.classifier).all()
    whole, grad_of_whole = gx.linear_cross_entropy_and_grad(hidden, classifier, y)
    assert whole == pytest.approx(loss, rel=1e-6)
    assert np.allclose(grad.classifier, grad_of_whole.classifier, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", backends.BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_memory_is_a_tile(backend, dtype):
    rows, vocab, features = 8192, 8192, 16
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((rows, features)).astype(dtype)
    classifier = rng.standard_normal((vocab, features)).astype(dtype)
    y = rng.integers(0, vocab, rows)
    tile, logits = _linear.LEAST_ROWS * vocab * 4, rows * vocab * 4
    gx.linear_cross_entropy_and_grad(hidden[:9], classifier, y[:9])  # compiled
    for call in (gx.linear_cross_entropy, gx.linear_cross_entropy_and_grad):
        tracemalloc.start()
        try:
            call(hidden, classifier, y, memory=tile)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * tile + 8 * 2**20 < logits / 8


def test_strided_parameters():
    hidden, classifier, bias, y = parameters(np.float32, rows=30)
    expected = gx.linear_cross_entropy_and_grad(hidden, classifier, y, bias=bias)
    twice = np.repeat(hidden, 2, axis=1)[:, ::2]
    read_only = np.asfortranarray(classifier)
    read_only.flags.writeable = False
    loss, grad = gx.linear_cross_entropy_and_grad(twice, read_only, y, bias=bias[::-1].copy()[::-1])
    assert loss == pytest.approx(expected[0], rel=1e-7)
    assert np.allclose(grad.classifier, expected[1].classifier, rtol=1e-5, atol=1e-7)


def test_as_torch_has_it():
    hidden, classifier, bias, y = parameters(np.float64)
    h, w, b = (torch.tensor(a, requires_grad=True) for a in (hidden, classifier, bias))
    theirs = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(h, w, b), torch.tensor(y), label_smoothing=0.1
    )
    theirs.backward()
    loss, grad = gx.linear_cross_entropy_and_grad(hidden, classifier, y, bias=bias, label_smoothing=0.1)
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-12)
    for found, parameter in ((grad.hidden, h), (grad.classifier, w), (grad.bias, b)):
        assert np.allclose(found, parameter.grad.numpy(), rtol=1e-10, atol=1e-15)


def test_a_graph_is_built_without_computing(no_compute):
    hidden, classifier, bias, y = parameters(np.float32)
    with no_compute():
        loss, grad = gx.linear_cross_entropy_and_grad(
            da.from_array(hidden, chunks=(7, 4)), da.from_array(classifier, chunks=(20, 3)), y, bias=bias
        )
    assert grad.hidden.chunks[0] == (7, 7, 7, 4)
    assert grad.classifier.chunks[0] == (20, 17)
    assert loss.shape == ()
    assert grad.bias.dtype == np.float32


def test_a_bad_label_is_named_when_it_is_computed():
    hidden, classifier, _, y = parameters(np.float32)
    y[17] = VOCAB
    with pytest.raises(IndexError, match=r"labels\[17\] is 37, expected a class in \[0, 37\)"):
        gx.linear_cross_entropy(hidden, classifier, y)
    loss = gx.linear_cross_entropy(da.from_array(hidden, chunks=(10, 6)), classifier, y)
    with pytest.raises(IndexError, match=r"labels\[17\] is 37"):
        loss.compute()
    assert gx.linear_cross_entropy(hidden, classifier, y, check_labels=False) == np.inf


H, W, Y = np.zeros((3, 4), np.float32), np.zeros((5, 4), np.float32), np.zeros(3, int)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((H.astype(int), W, Y), {}, TypeError, "hidden must be float16, bfloat16, float32 or float64, got int64"),
        ((np.zeros((3, 0)), W, Y), {}, ValueError, r"hidden must have shape \(..., features\) with at least one"),
        ((np.float32(1), W, Y), {}, ValueError, r"hidden must have shape \(..., features\)"),
        (
            (H, W.T, Y),
            {},
            ValueError,
            r"classifier must have shape \(vocab, 4\) for hidden of shape \(3, 4\), got \(4, 5\)",
        ),
        ((H, W.astype(float), Y), {}, TypeError, "classifier must have the dtype of hidden, float32, got float64"),
        (
            (H, W, Y),
            {"bias": np.zeros(4, np.float32)},
            ValueError,
            r"bias must have shape \(5,\), one number per class",
        ),
        ((H, W, Y), {"bias": np.zeros(5)}, TypeError, "bias must have the dtype of hidden, float32, got float64"),
        ((H, da.from_array(W), Y), {}, TypeError, "classifier is a Dask array but hidden is not"),
        ((H, W, Y[:2]), {}, ValueError, r"labels of dtype int64 must have shape \(3,\) for logits of shape \(3, 5\)"),
        ((H, W, Y), {"memory": 0}, ValueError, "memory must be a positive integer, got 0"),
        ((H, W, Y), {"wrt": "bias"}, ValueError, "wrt must be some of 'hidden', 'classifier', each once, got 'bias'"),
        ((H, W, Y), {"wrt": 3}, ValueError, "wrt must be some of 'hidden', 'classifier', each once, got 3"),
        ((H, W, Y), {"wrt": ()}, ValueError, "wrt must be some of"),
        ((H, W, Y), {"wrt": ("hidden", "hidden")}, ValueError, "wrt must be some of"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gx.linear_cross_entropy_and_grad(*arguments, **options)
