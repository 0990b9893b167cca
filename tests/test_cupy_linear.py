"""Linear cross-entropy of arrays on a GPU: its products on tensor cores, and its gradients against the oracle's."""

import ml_dtypes
import numpy as np
import pytest
from conftest import ON_GPU
from oracle import assert_close
from oracle import cross_entropy as true_cross_entropy
from oracle import cross_entropy_grad as true_grad

import gpuxent as gx

cupy = pytest.importorskip("cupy")
from gpuxent.backends import _cublas, _products  # noqa: E402  # need the module above

pytestmark = [pytest.mark.gpu] if ON_GPU else []
SIXTEEN_BITS = [np.float16, ml_dtypes.bfloat16]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def eighths(shape, dtype, seed=0):
    """Few and small: every product and sum of them is exact in float32."""
    return (np.random.default_rng(seed).integers(-16, 17, shape) / 8).astype(dtype)


def laid_out(array, how):
    if how == "by column":
        return cupy.asarray(np.ascontiguousarray(array.T)).T
    if how == "in wider rows":
        wide = cupy.zeros((array.shape[0], array.shape[1] + 3), array.dtype)
        wide[:, : array.shape[1]] = cupy.asarray(array)
        return wide[:, : array.shape[1]]
    if how == "every other":
        wide = cupy.zeros((array.shape[0], 2 * array.shape[1]), array.dtype)
        wide[:, ::2] = cupy.asarray(array)
        return wide[:, ::2]
    return cupy.asarray(array)


LAYOUTS = ["by row", "by column", "in wider rows", "every other"]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize(
    "sizes", [(5, 7, 4), (1, 7, 4), (5, 1, 4), (5, 7, 1), (1, 1, 1), (0, 7, 4), (5, 0, 4)], ids=str
)
def test_products(sizes, of_a, of_b, dtype):
    m, k, n = sizes
    a, b, before = eighths((m, k), dtype), eighths((k, n), dtype, 1), eighths((m, n), np.float32, 2)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    wide = cupy.asarray(np.full((m, n + 2), 7, np.float32))
    out = wide[:, :n]
    for add in (False, True):
        out[...] = cupy.asarray(before if add else np.full((m, n), np.nan, np.float32))
        _cublas.product(laid_out(a, of_a), laid_out(b, of_b), out, add=add)
        np.testing.assert_array_equal(out.get(), expected + before if add else expected)
    assert (wide.get()[:, n:] == 7).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, *SIXTEEN_BITS], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("tensor_cores", [True, False], ids=["tensor cores", "none"])
def test_losses_and_gradients(dtype, tensor_cores, monkeypatch):
    rows, vocab, features = 300, 37, 6  # three tiles
    if not tensor_cores:
        monkeypatch.setattr(_cublas, "has_tensor_cores", lambda array: False)
    hidden, classifier, bias = (
        eighths(shape, dtype, i) for i, shape in enumerate([(rows, features), (vocab, features), vocab])
    )
    y = np.random.default_rng(1).integers(0, vocab, rows)
    y[3::7] = -100
    work = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    x = (hidden.astype(np.float64) @ classifier.astype(np.float64).T + bias.astype(np.float64)).astype(work)
    options = {"reduction": "mean", "label_smoothing": 0.1}
    on_gpu = [cupy.asarray(array) for array in (hidden, classifier, y, bias)]
    loss, grad = gx.linear_cross_entropy_and_grad(*on_gpu[:3], bias=on_gpu[3], memory=1, **options)
    alone = gx.linear_cross_entropy(*on_gpu[:3], bias=on_gpu[3], memory=1, **options)
    truth = true_cross_entropy(x, y, **options)
    for found in (loss, alone):
        assert isinstance(found, cupy.ndarray)
        assert_close(found.get(), truth, 4, work)
    dlogits = np.asarray(true_grad(x, y, **options), np.float64)
    narrow = tensor_cores and np.dtype(dtype) == BFLOAT16
    assert_product(grad.hidden, dlogits, classifier, narrow)
    assert_product(grad.classifier, dlogits.T, hidden, narrow)
    assert_product(grad.bias[:, None], dlogits.T, np.ones((rows, 1), dtype), False)


def assert_product(found, dlogits, other, narrow):
    """Within the rounding of the sum in float32 (float64), of each factor if it is narrow, and of the result."""
    other = other.astype(np.float64)
    expected, size = dlogits @ other, np.abs(dlogits) @ np.abs(other)
    dtype = found.dtype
    assert dtype == found.get().dtype
    eps = np.finfo(np.float64 if dtype == np.float64 else np.float32).eps
    allowed = 64 * eps * size + float(ml_dtypes.finfo(dtype).eps) * np.abs(expected) + narrow * 2.0**-8 * size
    if dtype == np.float16:
        allowed = allowed + 6e-8  # subnormal
    error = np.abs(found.get().astype(np.float64) - expected)
    assert (error <= allowed).all(), (error / size).max()


def test_what_runs_on_tensor_cores(monkeypatch):
    calls = []
    product = _cublas.product
    monkeypatch.setattr(_cublas, "product", lambda *factors, **how: calls.append(1) or product(*factors, **how))
    for dtype, expected in ((np.float32, 0), (np.float16, 1), (ml_dtypes.bfloat16, 3)):
        calls.clear()
        hidden, classifier = cupy.asarray(eighths((9, 4), dtype)), cupy.asarray(eighths((5, 4), dtype))
        gx.linear_cross_entropy_and_grad(hidden, classifier, cupy.asarray(np.arange(9) % 5))
        assert len(calls) == expected
    assert not _products._on_tensor_cores(eighths((9, 4), np.float16))


@pytest.mark.filterwarnings("ignore:.*has not converged")
@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_softmax_regression(solver):
    pytest.importorskip("sklearn")
    X = np.random.default_rng(0).normal(size=(60, 4))
    y = (X[:, :3] + np.random.default_rng(1).gumbel(size=(60, 3))).argmax(axis=1)
    how = {"solver": solver, "random_state": 0, "early_stopping": solver == "sgd", "max_iter": 8}
    reference = gx.SoftmaxRegression(**how).fit(X, y)
    gpu = cupy.asarray(X)
    for targets, weight in ((y, None), (cupy.asarray(y), cupy.ones(len(y))), (np.array(["a", "b", "c"])[y], None)):
        model = gx.SoftmaxRegression(**how).fit(gpu, targets, sample_weight=weight)
        assert isinstance(model.coef_, cupy.ndarray)
        np.testing.assert_allclose(model.coef_.get(), reference.coef_, rtol=1e-6)
        assert isinstance(model.predict_proba(gpu), cupy.ndarray)
        numbers = np.asarray(model.classes_).dtype.kind != "U"
        assert isinstance(model.predict(gpu), cupy.ndarray if numbers else np.ndarray)
        assert model.score(gpu, targets) == reference.score(X, y)
        np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(X), rtol=1e-6)
