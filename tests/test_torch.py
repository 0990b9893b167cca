"""Every option against PyTorch, also combined."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from makers import class_weight, soft_labels

import gpuxent as gx

pytestmark = pytest.mark.usefixtures("backend")

ROWS, VOCAB = 24, 333


def torch_loss_and_grad(function, logits, labels, upstream=None, **options):
    x = torch.tensor(logits, requires_grad=True)
    options = {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    loss = function(x, torch.tensor(labels), **options)
    loss.backward(torch.ones_like(loss) if upstream is None else torch.tensor(upstream))
    return loss.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("weighted", "smoothing", "reduction", "soft", "ignore_index"),
    [
        options
        for options in product([False, True], [0.0, 0.1, 1.0], ["mean", "sum", "none"], [False, True], [-100, 7])
        if not (options[3] and options[4] != -100)
    ],
)
def test_cross_entropy(dtype, weighted, smoothing, reduction, soft, ignore_index):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 4, (ROWS, VOCAB)).astype(dtype)
    y = soft_labels(ROWS, VOCAB, dtype) if soft else rng.integers(0, VOCAB, ROWS)
    if not soft:
        y[::5] = ignore_index
    options = {"label_smoothing": smoothing, "reduction": reduction, "ignore_index": ignore_index}
    weight = class_weight(VOCAB).astype(dtype) if weighted else None
    expected, expected_grad = torch_loss_and_grad(F.cross_entropy, x, y, weight=weight, **options)
    loss, dlogits = gx.cross_entropy_and_grad(x, y, class_weight=weight, **options)
    eps = np.finfo(dtype).eps
    # PyTorch sums in the logits' dtype
    np.testing.assert_allclose(loss, expected, rtol=64 * eps)
    np.testing.assert_allclose(dlogits, expected_grad, rtol=128 * eps, atol=8 * eps * np.abs(expected_grad).max())


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_options_that_pytorch_composes(z_loss, softcap, temperature, smoothing):
    def composed(x, y, weight):
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        z = z / temperature
        loss = F.cross_entropy(z, y, weight=weight, label_smoothing=smoothing)
        counted = y != -100
        return loss + z_loss * (torch.logsumexp(z, 1) ** 2)[counted].mean()

    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 6, (ROWS, VOCAB)), rng.integers(0, VOCAB, ROWS)
    y[3] = -100
    weight = class_weight(VOCAB)
    expected, expected_grad = torch_loss_and_grad(composed, x, y, weight=weight)
    loss, dlogits = gx.cross_entropy_and_grad(
        x,
        y,
        class_weight=weight,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        label_smoothing=smoothing,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    np.testing.assert_allclose(dlogits, expected_grad, rtol=1e-11, atol=1e-16)


def test_upstream_gradient():
    rng = np.random.default_rng(2)
    x, y, upstream = rng.normal(0, 4, (ROWS, VOCAB)), rng.integers(0, VOCAB, ROWS), rng.normal(0, 1, ROWS)
    _, expected = torch_loss_and_grad(F.cross_entropy, x, y, upstream, reduction="none")
    _, dlogits = gx.cross_entropy_and_grad(x, y, reduction="none", grad_output=upstream)
    np.testing.assert_allclose(dlogits, expected, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("pos_weight", [None, 3.0, "columns"])
@pytest.mark.parametrize("weight", [None, "columns"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_cross_entropy(reduction, pos_weight, weight, dtype):
    rng = np.random.default_rng(3)
    x, y = rng.normal(0, 8, (ROWS, 11)).astype(dtype), rng.random((ROWS, 11)).astype(dtype)
    columns = rng.uniform(0, 3, 11).astype(dtype)
    pos = columns if pos_weight == "columns" else None if pos_weight is None else np.array(pos_weight, dtype)
    per_class = columns[::-1].copy() if weight else None
    expected, expected_grad = torch_loss_and_grad(
        F.binary_cross_entropy_with_logits, x, y, pos_weight=pos, weight=per_class, reduction=reduction
    )
    loss, dlogits = gx.binary_cross_entropy_and_grad(x, y, pos_weight=pos, class_weight=per_class, reduction=reduction)
    eps = np.finfo(dtype).eps
    # PyTorch's formula, (1 - y) x + (1 + (pos_weight - 1) y) softplus(-x), cancels; the oracle judges ours
    np.testing.assert_allclose(loss, expected, rtol=32 * eps, atol=64 * eps)
    np.testing.assert_allclose(dlogits, expected_grad, rtol=32 * eps, atol=8 * eps * np.abs(expected_grad).max())


def test_all_rows_ignored_is_nan_in_both():
    x, y = np.zeros((2, 3)), np.array([-100, -100])
    expected, _ = torch_loss_and_grad(F.cross_entropy, x, y)
    loss, dlogits = gx.cross_entropy_and_grad(x, y)
    assert np.isnan(expected)
    assert np.isnan(loss)
    assert (dlogits == 0).all()
