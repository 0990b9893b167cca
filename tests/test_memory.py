"""Peak extra memory is O(N) plus tiles: no N x V temporary is ever made. Measured, not believed."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import gpuxent as gx
from gpuxent.backends import BACKENDS

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

ROWS, VOCAB = 1024, 128256
LIMIT = 32 * 2**20


def peak(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def logits():
    x = np.empty((ROWS, VOCAB), np.float32)
    x[:] = np.random.default_rng(0).standard_normal(VOCAB, np.float32)
    return x


LABELS = np.arange(ROWS) * 100


def test_tracemalloc_sees_numpy(logits):
    assert peak(lambda: logits[:200] * 2) > LIMIT


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "class_weight": np.ones(VOCAB)}, {"softcap": 30.0}], ids=str
)
def test_loss_and_gradient_in_place(logits, options):
    rows = 256 if "softcap" in options else ROWS
    assert peak(lambda: gx.cross_entropy(logits[:rows], LABELS[:rows], **options)) < LIMIT
    assert peak(lambda: gx.cross_entropy_and_grad(logits[:rows], LABELS[:rows], out=logits[:rows], **options)) < LIMIT


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda d: np.dtype(d).name)
def test_other_dtypes(logits, dtype):
    x = logits[:256].astype(dtype)
    assert peak(lambda: gx.cross_entropy_and_grad(x, LABELS[:256], out=x)) < LIMIT


@pytest.mark.parametrize(
    "function",
    [
        gx.logsumexp,
        gx.entropy,
        lambda x: gx.kl_divergence(x, x[::-1]),
        lambda x: gx.js_divergence(x, x[::-1]),
        lambda x: gx.cross_entropy(x, x, check_labels=False),
        lambda x: gx.logsumexp(x.T, axis=0),
        lambda x: gx.binary_cross_entropy(x, np.broadcast_to(np.float32(0.5), x.shape)),
        lambda x: gx.evaluate(x, LABELS[: len(x)]),
    ],
    ids=["logsumexp", "entropy", "kl", "js", "soft", "transposed", "binary", "evaluate"],
)
def test_the_rest(logits, function):
    assert peak(lambda: function(logits[:256])) < LIMIT


def test_a_view_that_cannot_be_flattened_is_not_copied(logits):
    view = logits.reshape(4, 256, VOCAB)[:, :-1]
    assert peak(lambda: gx.cross_entropy(view, np.zeros((4, 255), int))) < LIMIT
