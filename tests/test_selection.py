"""Which backend an array goes to, which kinds go together, and that results are of the caller's kind."""

import pickle
import subprocess
import sys
import types
from functools import cache

import dask.array as da
import numpy as np
import pytest
from conftest import ON_GPU
from makers import labels, logits, soft_labels
from oracle import assert_close

import gpuxent as gx
from gpuxent import backends
from gpuxent.backends import backend_of, is_cupy, on_host
from gpuxent.evaluation.driver import CallerWorkers

cupy = pytest.importorskip("cupy")  # the real one on a GPU, else the emulation that conftest installs
pytestmark = [pytest.mark.gpu] if ON_GPU else []

ROWS, VOCAB = 12, 70
X = logits(ROWS, VOCAB, np.float32, seed=1, kinds="ordinary")
Y = labels(X)
SOFT = soft_labels(ROWS, VOCAB, np.float32)
TARGETS = (SOFT > 0.01).astype(np.int8)
CHUNKS = ((5, 7), (40, 30))

FUNCTIONS = {
    "cross_entropy": lambda x, y, s, t: gx.cross_entropy(x, y),
    "cross_entropy, none": lambda x, y, s, t: gx.cross_entropy(x, y, reduction="none", z_loss=1e-3),
    "cross_entropy, weights": lambda x, y, s, t: gx.cross_entropy(x, y, class_weight=np.arange(VOCAB)),
    "cross_entropy, soft": lambda x, y, s, t: gx.cross_entropy(x, s, label_smoothing=0.1),
    "gradient": lambda x, y, s, t: gx.cross_entropy_and_grad(x, y, grad_output=3)[1],
    "summary": lambda x, y, s, t: gx.cross_entropy_and_grad(x, y, return_stats=True)[2].argmax,
    "from_probs": lambda x, y, s, t: gx.cross_entropy_from_probs(s, y, label_format="index", reduction="none"),
    "from_probs, soft": lambda x, y, s, t: gx.cross_entropy_from_probs(s, s, label_format="soft"),
    "logsumexp": lambda x, y, s, t: gx.logsumexp(x),
    "logsumexp, axis 0": lambda x, y, s, t: gx.logsumexp(x, axis=0),
    "softmax": lambda x, y, s, t: gx.softmax(x),
    "log_softmax": lambda x, y, s, t: gx.log_softmax(x),
    "entropy": lambda x, y, s, t: gx.entropy(x),
    "kl_divergence": lambda x, y, s, t: gx.kl_divergence(x, s),
    "js_divergence_from_probs": lambda x, y, s, t: gx.js_divergence_from_probs(s, s[::-1]),
    "binary": lambda x, y, s, t: gx.binary_cross_entropy(x, t, pos_weight=np.arange(VOCAB)),
    "binary, vector": lambda x, y, s, t: gx.binary_cross_entropy(x[0], t[0], reduction="none"),
    "binary gradient": lambda x, y, s, t: gx.binary_cross_entropy_and_grad(x, t, pos_weight=2)[1],
}
SLICING = ("binary, vector", "js_divergence_from_probs")


def agrees(actual, expected):
    if expected.dtype.kind == "f":
        floor = float(np.abs(expected[np.isfinite(expected)]).max()) / 64
        assert_close(actual, expected, 16, np.float32, floor=floor)
    else:
        assert np.array_equal(actual, expected)


# ---- what goes in comes out ----


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_cupy_array_in_a_cupy_array_out(name):
    function = FUNCTIONS[name]
    expected = function(X, Y, SOFT, TARGETS)
    actual = function(*map(cupy.asarray, (X, Y, SOFT, TARGETS)))
    assert is_cupy(actual)
    assert (actual.shape, actual.dtype) == (np.shape(expected), expected.dtype)
    agrees(actual.get(), expected)


def test_lists_of_labels_and_plain_numbers_are_moved():
    x = cupy.asarray(X)
    assert is_cupy(gx.cross_entropy(x, Y.tolist(), class_weight=[1] * VOCAB))
    assert is_cupy(gx.cross_entropy(x[0], 3))
    assert is_cupy(gx.binary_cross_entropy(x, TARGETS.tolist(), class_weight=np.float32(2)))
    gradient = gx.cross_entropy_and_grad(x, Y.tolist(), reduction="none", grad_output=[2] * ROWS)[1]
    agrees(gradient.get(), gx.cross_entropy_and_grad(X, Y, reduction="none", grad_output=2)[1])


NAMED = {
    "cross_entropy": lambda b: gx.cross_entropy(X, Y, class_weight=np.arange(VOCAB), backend=b),
    "cross_entropy, soft": lambda b: gx.cross_entropy(X, SOFT, reduction="none", label_smoothing=0.1, backend=b),
    "gradient": lambda b: gx.cross_entropy_and_grad(X, Y, backend=b)[1],
    "summary": lambda b: gx.cross_entropy_and_grad(X, Y, return_stats=True, backend=b)[2].lse,
    "softmax": lambda b: gx.softmax(X, axis=0, backend=b),
    "log_softmax": lambda b: gx.log_softmax(X, backend=b),
    "kl_divergence": lambda b: gx.kl_divergence(X, SOFT, backend=b),
    "binary": lambda b: gx.binary_cross_entropy(X[0], TARGETS[0], backend=b),
    "binary gradient": lambda b: gx.binary_cross_entropy_and_grad(X, TARGETS, backend=b)[1],
    "big endian": lambda b: gx.softmax(X.astype(">f4"), backend=b),
}


@pytest.mark.parametrize("name", NAMED)
def test_numpy_arrays_go_to_the_gpu_by_name_and_come_back(name):
    function = NAMED[name]
    before = [a.tobytes() for a in (X, Y, SOFT, TARGETS)]
    expected, actual = function(None), function("cupy")
    assert type(actual) is type(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    agrees(actual, expected)
    assert [a.tobytes() for a in (X, Y, SOFT, TARGETS)] == before


def test_out_of_numpy_arrays_on_the_gpu():
    expected = gx.cross_entropy_and_grad(X, Y)[1]
    for order in ("C", "F"):
        out = np.full_like(X, 7, order=order)
        assert gx.cross_entropy_and_grad(X, Y, out=out, backend="cupy")[1] is out
        agrees(out, expected)
    work = X.copy()
    assert gx.cross_entropy_and_grad(work, Y, out=work, backend="cupy")[1] is work
    agrees(work, expected)


def test_errors_are_the_same_by_name():
    with pytest.raises(IndexError, match=r"^labels\[1\] is 70, expected a class in \[0, 70\) or ignore_index=-100$"):
        gx.cross_entropy(X, np.where(np.arange(ROWS) == 1, VOCAB, Y), backend="cupy")
    with pytest.raises(ValueError, match=r"^labels\[0, :\] sums to "):
        gx.cross_entropy(X, np.abs(X) + 1, backend="cupy")


# ---- which backend ----


class Pretender:
    """Of CuPy's package, but no array."""

    __module__ = "cupy.cuda.memory"


def test_an_array_is_known_by_its_type():
    x = cupy.asarray(X)
    assert is_cupy(x)
    assert not any(is_cupy(value) for value in (X, X.tolist(), 1.0, None, Pretender()))
    assert backend_of(x).__name__ == "gpuxent.backends._cupy"
    assert backend_of(x, "cupy") is backend_of(x)
    assert backend_of(X, "cupy").__name__ == "gpuxent.backends._cupy_host"
    assert backend_of(X).__name__ in ("gpuxent.backends._numba", "gpuxent.backends._numpy")
    assert backend_of(da.from_array(x), "cupy").block_backend == "cupy"


@pytest.mark.parametrize("name", backends.BACKENDS)
@pytest.mark.parametrize("lazy", [False, True])
def test_the_cpu_does_not_take_arrays_off_the_gpu(name, lazy):
    x = da.from_array(cupy.asarray(X), chunks=5) if lazy else cupy.asarray(X)
    message = rf"^backend must be None or 'cupy' for CuPy arrays, got '{name}'; cupy\.asnumpy makes NumPy arrays$"
    for call in (
        lambda: gx.cross_entropy(x, cupy.asarray(Y), backend=name),
        lambda: gx.softmax(x, backend=name),
        lambda: gx.entropy(x, backend=name),
        lambda: (
            gx.binary_cross_entropy(x, cupy.asarray(TARGETS), backend=name) if not lazy else gx.softmax(x, backend=name)
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_numpy_work_imports_no_cupy():
    code = "import sys, numpy, gpuxent; gpuxent.evaluate(numpy.zeros((2, 3)), numpy.zeros(2, int));"
    done = subprocess.run([sys.executable, "-c", code + "print('cupy' in sys.modules)"], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# ---- what goes together ----


def lazily(array):
    return da.from_array(array, chunks=(5, 40)[: array.ndim])


@cache
def on_device():
    return tuple(map(cupy.asarray, (X, Y, SOFT, TARGETS)))


THERE = "logits is on the GPU but {0} is not; cupy.asarray({0}) moves it there"
HERE = "{0} is on the GPU but logits is not; cupy.asnumpy({0}) brings it over"
THERE_LAZY = "logits is on the GPU but {0} is not; {0}.map_blocks(cupy.asarray) moves it there"
HERE_LAZY = "{0} is on the GPU but logits is not; {0}.map_blocks(cupy.asnumpy) brings it over"


def refused_pairs():
    """(call, message)."""
    x, y, s, t = on_device()
    ones, per_row = np.ones(VOCAB), np.ones(ROWS)
    none = {"reduction": "none"}
    yield lambda: gx.cross_entropy(x, Y), THERE.format("labels")
    yield lambda: gx.cross_entropy(x, SOFT), THERE.format("labels")
    yield lambda: gx.cross_entropy(X, y), HERE.format("labels")
    yield lambda: gx.cross_entropy(X, s), HERE.format("labels")
    yield lambda: gx.cross_entropy(lazily(X), y), HERE.format("labels")
    yield lambda: gx.cross_entropy(lazily(X), lazily(y)), HERE_LAZY.format("labels")
    yield lambda: gx.cross_entropy(lazily(x), SOFT), THERE.format("labels")
    yield lambda: gx.cross_entropy(lazily(x), lazily(SOFT)), THERE_LAZY.format("labels")
    yield lambda: gx.cross_entropy(x, lazily(y)), "labels is a Dask array but logits is not"
    yield lambda: gx.binary_cross_entropy(x, TARGETS), THERE.format("targets")
    yield lambda: gx.binary_cross_entropy(X, t), HERE.format("targets")
    yield lambda: gx.kl_divergence(x, X), THERE.replace("logits", "p").format("q")
    yield lambda: gx.kl_divergence(X, x), HERE.replace("logits", "p").format("q")
    yield (
        lambda: gx.cross_entropy_from_probs(s, Y, label_format="index"),
        THERE.replace("logits", "probs").format("labels"),
    )
    yield lambda: gx.cross_entropy(X, Y, class_weight=cupy.asarray(ones)), HERE.format("class_weight")
    yield lambda: gx.binary_cross_entropy(X, TARGETS, pos_weight=cupy.asarray(ones)), HERE.format("pos_weight")
    yield lambda: gx.cross_entropy_and_grad(x, y, grad_output=per_row, **none), THERE.format("grad_output")
    yield lambda: gx.cross_entropy_and_grad(X, Y, grad_output=cupy.asarray(per_row), **none), HERE.format("grad_output")
    yield lambda: gx.evaluate(x, Y), THERE.format("labels")
    yield lambda: gx.evaluate(X, y), HERE.format("labels")


def test_kinds_that_do_not_go_together_are_named():
    for call, message in refused_pairs():
        with pytest.raises(TypeError) as caught:
            call()
        assert message in str(caught.value)


def test_weights_may_be_on_either_side_of_cupy_logits():
    x, y, _, t = on_device()
    weights = np.linspace(0, 2, VOCAB, dtype=np.float32)
    expected = gx.cross_entropy(X, Y, class_weight=weights)
    for given in (weights, cupy.asarray(weights), weights.tolist()):
        agrees(gx.cross_entropy(x, y, class_weight=given).get(), expected)
        agrees(gx.cross_entropy(lazily(x), Y, class_weight=given).compute(scheduler="synchronous"), expected)
    expected = gx.binary_cross_entropy(X, TARGETS, pos_weight=weights)
    for given in (weights, cupy.asarray(weights)):
        agrees(gx.binary_cross_entropy(x, t, pos_weight=given).get(), expected)
    agrees(
        gx.binary_cross_entropy(x, t, class_weight=cupy.asarray(2.0)).get(),
        gx.binary_cross_entropy(X, TARGETS, class_weight=2),
    )


def test_weights_on_the_gpu_are_checked_with_the_labels():
    x, y, _, t = on_device()
    bad = -cupy.arange(VOCAB, dtype=np.float32)
    with pytest.raises(ValueError, match=r"^class_weight\[1\] is -1, expected a finite weight of at least 0$"):
        gx.cross_entropy(x, y, class_weight=bad)
    gx.cross_entropy(x, y, class_weight=bad, check_labels=False)
    with pytest.raises(ValueError, match=r"^class_weight\[1\] is -1"):
        gx.cross_entropy(x, y, class_weight=bad.get(), check_labels=False)  # costs nothing on the CPU
    with pytest.raises(ValueError, match=r"^pos_weight\[1\] is -1"):
        gx.binary_cross_entropy(x, t, pos_weight=bad)
    with pytest.raises(ValueError, match=r"^class_weight must have shape \(70,\), one weight per class, got \(69,\)$"):
        gx.cross_entropy(x, y, class_weight=-bad[1:])


def test_a_denominator_on_the_gpu():
    x, y, _, _ = on_device()
    for denominator in (cupy.asarray(7), np.array(7), 7):
        assert float(gx.cross_entropy_and_grad(x, y, denominator=denominator)[0]) == float(
            gx.cross_entropy_and_grad(x, y, denominator=7.0)[0]
        )


@pytest.mark.skipif(ON_GPU, reason="the emulation counts what is waited for")
def test_nothing_waits_but_the_check():
    x, y, _, _ = on_device()
    weights, upstream = cupy.ones(VOCAB), cupy.ones(ROWS)

    def waits(**options):
        before = cupy.synchronisations
        gx.cross_entropy_and_grad(x, y, class_weight=weights, return_stats=True, **options)
        return cupy.synchronisations - before

    assert waits(check_labels=False) == 0
    assert waits(check_labels=False, reduction="none", grad_output=upstream) == 0
    assert waits() > 0


# ---- out ----


def test_out_on_the_gpu():
    y = cupy.asarray(Y)
    expected = gx.cross_entropy_and_grad(X, Y)[1]
    work, out = cupy.asarray(X), cupy.zeros((ROWS, VOCAB), np.float32)
    assert gx.cross_entropy_and_grad(work, y, out=out)[1] is out
    agrees(out.get(), expected)
    assert gx.cross_entropy_and_grad(work, y, out=work)[1] is work
    agrees(work.get(), expected)
    every_other = cupy.zeros((2 * ROWS, 2 * VOCAB), np.float32)[::-2, ::-2]
    gx.cross_entropy_and_grad(cupy.asarray(X), y, out=every_other)
    agrees(every_other.get(), expected)


def bad_outputs():
    """(logits, labels, out, message)."""
    y = cupy.asarray(Y)
    x = cupy.asarray(X)
    wide = cupy.zeros((ROWS, 2 * VOCAB), np.float32)
    memory = cupy.full(2 * ROWS * VOCAB, 1 / VOCAB, np.float32)
    soft, over_soft = (memory[i : i + ROWS * VOCAB].reshape(ROWS, VOCAB) for i in (0, 4))
    expected = r"must be a CuPy array of shape \(12, 70\) and dtype float32, got "
    yield x, y, np.zeros_like(X), expected + r"numpy\.ndarray"
    yield X, Y, x, r"must be an array of shape \(12, 70\) and dtype float32, got cupy\.ndarray"
    yield x, y, [0], expected + "list"
    yield x, y, cupy.zeros((ROWS, VOCAB)), expected + r"shape \(12, 70\) and dtype float64"
    yield x, y, cupy.zeros((VOCAB, ROWS), np.float32), expected + r"shape \(70, 12\)"
    yield wide[:, :VOCAB], y, wide[:, 2 : 2 + VOCAB], "must be logits itself or share no memory with it"
    yield wide[:, VOCAB:], y, wide[:, VOCAB - 1 : -1], "must be logits itself or share no memory with it"
    yield wide[::-1, :VOCAB], y, wide[:, :VOCAB], "must be logits itself or share no memory with it"
    rows = memory.reshape(2 * ROWS, VOCAB)
    yield rows[:ROWS], y, rows[ROWS + 3 : 3 : -1], "must be logits itself or share no memory with it"
    yield x, soft, over_soft, "must share no memory with the labels or targets"
    same = cupy.broadcast_to(cupy.zeros(VOCAB, np.float32), (ROWS, VOCAB))
    yield x, y, same, r"must be an array whose entries share no memory, got strides \(0, 4\)"


def test_out_that_cannot_be_written():
    for x, y, out, message in bad_outputs():
        with pytest.raises(ValueError, match=f"^out {message}"):
            gx.cross_entropy_and_grad(x, y, out=out)
    with pytest.raises(TypeError, match=r"^out must be None for Dask logits"):
        gx.cross_entropy_and_grad(lazily(on_device()[0]), on_device()[1], out=on_device()[0])


def test_neighbours_in_memory_do_not_overlap():
    memory = cupy.zeros(2 * ROWS * VOCAB, np.float32)
    first, second = memory.reshape(2, ROWS, VOCAB)
    first[:] = cupy.asarray(X)
    gx.cross_entropy_and_grad(first, on_device()[1], out=second)
    gx.cross_entropy_and_grad(first[::-1], on_device()[1], out=second[::-1])
    gx.cross_entropy_and_grad(second, on_device()[1], out=first)


# ---- Dask arrays of CuPy blocks ----


def in_blocks():
    x, y, s, t = on_device()
    chunks = (CHUNKS, 4, CHUNKS, (3, 70))
    return tuple(da.from_array(a, chunks=c) for a, c in zip((x, y, s, t), chunks, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_blocks_on_the_gpu(name, no_compute):
    """Arrays stay there; a mean or a sum comes to the CPU."""
    function = FUNCTIONS[name]
    x, y, s, t = in_blocks()
    expected = function(X, Y, SOFT, TARGETS)
    with no_compute():
        lazy = function(x, y, s, t)
    actual = lazy.compute(scheduler="synchronous")
    assert (lazy.shape, lazy.dtype) == (np.shape(expected), expected.dtype)
    assert is_cupy(lazy._meta) == is_cupy(actual) == bool(lazy.ndim)
    assert (actual.shape, actual.dtype) == (lazy.shape, lazy.dtype)
    agrees(on_host(actual), expected)


def test_chunks_of_labels_and_weights_may_be_numpy():
    x, *_ = in_blocks()
    given = {"class_weight": np.arange(VOCAB), "reduction": "none", "grad_output": np.arange(ROWS)}
    expected = gx.cross_entropy_and_grad(X, Y, **given)
    for y in (Y, Y.tolist(), da.from_array(Y, chunks=3)):
        lazy = gx.cross_entropy_and_grad(x, y, **given)
        for actual, wanted in zip(lazy, expected, strict=True):
            found = actual.compute(scheduler="synchronous")
            assert is_cupy(found)
            agrees(found.get(), wanted)


def test_bad_values_in_blocks_on_the_gpu_bear_their_place_in_the_whole_array():
    x, _, s, _ = in_blocks()
    bad = Y.copy()
    bad[9] = VOCAB
    message = r"^labels\[9\] is 70, expected a class in \[0, 70\) or ignore_index=-100$"
    for given in (bad, cupy.asarray(bad), da.from_array(cupy.asarray(bad), chunks=4)):
        for lazy in gx.cross_entropy_and_grad(x, given):
            with pytest.raises(IndexError, match=message):
                lazy.compute(scheduler="synchronous")
    with pytest.raises(ValueError, match=r"^labels\[8, :\] sums to 2, expected probabilities"):
        gx.cross_entropy(x, s * da.from_array(cupy.asarray(1.0 + (np.arange(ROWS) == 8)[:, None]))).compute(
            scheduler="synchronous"
        )


def test_numpy_blocks_go_to_the_gpu_by_name():
    x = da.from_array(X, chunks=CHUNKS)
    loss, dlogits = gx.cross_entropy_and_grad(x, Y, backend="cupy")
    expected = gx.cross_entropy_and_grad(X, Y)
    agrees(loss.compute(scheduler="synchronous"), expected[0])
    gradient = dlogits.compute(scheduler="synchronous")
    assert type(gradient) is type(dlogits._meta) is np.ndarray
    agrees(gradient, expected[1])


def test_a_graph_has_names_in_it_and_no_kernels():
    x, y, *_ = in_blocks()
    gx.cross_entropy(x, y).compute(scheduler="synchronous")  # the kernels exist
    big = da.zeros((ROWS, VOCAB), chunks=CHUNKS, dtype=np.float32, meta=x._meta)
    lazy = gx.cross_entropy_and_grad(big, da.zeros(ROWS, dtype=int, chunks=CHUNKS[0]), class_weight=np.ones(VOCAB))
    packed = b"".join(cloudpickled(part.__dask_graph__()) for part in lazy)
    for word in (b"RawModule", b"RawKernel", b"ElementwiseKernel", b"__global__"):
        assert word not in packed
    assert gx.cross_entropy(x, y).name == gx.cross_entropy(x, y).name


def cloudpickled(graph):
    import cloudpickle

    return cloudpickle.dumps(dict(graph), protocol=pickle.HIGHEST_PROTOCOL)


# ---- data sets ----


def test_evaluate_and_perplexity(tmp_path, monkeypatch):

    x, y, _, _ = on_device()
    np.save(tmp_path / "y.npy", Y)
    whole = gx.evaluate(x, y)
    expected = gx.evaluate(X, Y)
    assert (whole.accuracy, whole.topk_accuracy, whole.scored, whole.ignored) == (
        expected.accuracy,
        expected.topk_accuracy,
        expected.scored,
        expected.ignored,
    )
    for name in ("cross_entropy", "stderr_iid", "entropy", "ece"):
        assert getattr(whole, name) == pytest.approx(getattr(expected, name), rel=1e-6)
    assert gx.evaluate(x, str(tmp_path / "y.npy")) == whole
    assert gx.evaluate(x, Y.tolist()) == whole
    np.save(tmp_path / "x.npy", X)
    assert gx.evaluate(X, Y, backend="cupy") == whole
    assert gx.evaluate(tmp_path / "x.npy", tmp_path / "y.npy", backend="cupy", memory=1) == whole
    rows = da.from_array(x, chunks=(5, VOCAB))
    for given in (y, Y, da.from_array(y, chunks=4)):
        assert gx.evaluate(rows, given) == whole
    monkeypatch.setattr(CallerWorkers, "read_bytes", 3 * VOCAB * 4)
    assert gx.evaluate(x, y) == whole
    bad = Y.copy()
    bad[10] = -3
    with pytest.raises(IndexError, match=r"labels\[10\] is -3, .* \(in labels\)"):
        gx.evaluate(x, cupy.asarray(bad))
    for perplexity in (gx.perplexity(x, y), gx.perplexity(rows, Y), gx.perplexity(X, Y, backend="cupy")):
        assert type(perplexity) is float
        assert perplexity == pytest.approx(gx.perplexity(X, Y), rel=1e-6)


def test_cupy_arrays_are_scored_by_the_calling_thread(monkeypatch):
    """Its current stream is the one on which they are ready."""
    import threading

    from gpuxent.evaluation import job

    seen = set()
    score_rows = job.score_rows
    monkeypatch.setattr(CallerWorkers, "read_bytes", 3 * VOCAB * 4)
    monkeypatch.setattr(job, "score_rows", lambda *a, **k: (seen.add(threading.get_ident()), score_rows(*a, **k))[1])
    gx.evaluate(on_device()[0], on_device()[1])
    assert seen == {threading.get_ident()}


# ---- tensors of other libraries ----


class Tensor:
    """As PyTorch's: of a module with from_dlpack, on a device that DLPack has a number for."""

    requires_grad = False

    def __init__(self, array, device=2):
        self.array, self.device = array, device

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, **_):
        return self.array


class Immutable(Tensor):
    """As JAX's, which have a namespace."""

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=Immutable)


Tensor.__module__, Immutable.__module__ = "tensors", "jaxlib._jax"


@pytest.fixture
def tensors(monkeypatch):
    """A library of tensors, whose from_dlpack counts what it is given."""
    library = types.ModuleType("tensors")
    library.from_dlpack = Tensor
    monkeypatch.setitem(sys.modules, "tensors", library)
    monkeypatch.setattr(cupy, "from_dlpack", lambda tensor: tensor.__dlpack__(), raising=False)


@pytest.mark.parametrize("kind", [Tensor, Immutable])
@pytest.mark.parametrize("device", [2, 13])
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in SLICING])
def test_tensors_on_a_gpu_come_back_as_their_own_kind(name, kind, device, tensors):
    function = FUNCTIONS[name]
    arrays = on_device()
    actual = function(*(kind(array, device) for array in arrays))
    assert type(actual) is kind
    assert is_cupy(actual.array)
    agrees(actual.array.get(), function(X, Y, SOFT, TARGETS))


def test_all_results_are_of_the_first_arguments_kind(tensors):
    x, y, _, _ = (Tensor(array) for array in on_device())
    loss, dlogits, summary = gx.cross_entropy_and_grad(x, y, return_stats=True)
    assert {type(value) for value in (loss, dlogits, *vars(summary).values())} == {Tensor}
    assert type(gx.cross_entropy(logits=x, labels=y)) is Tensor
    assert type(gx.cross_entropy(x, on_device()[1])) is Tensor
    assert is_cupy(gx.cross_entropy(on_device()[0], y))
    assert gx.evaluate(x, y) == gx.evaluate(*on_device()[:2])
    assert type(gx.perplexity(x, y)) is float


def test_out_may_be_the_tensor_of_the_logits(tensors):
    x, y = Tensor(cupy.asarray(X)), Tensor(on_device()[1])
    assert gx.cross_entropy_and_grad(x, y, out=x)[1] is x
    agrees(x.array.get(), gx.cross_entropy_and_grad(X, Y)[1])
    out = Tensor(cupy.zeros((ROWS, VOCAB), np.float32))
    assert gx.cross_entropy_and_grad(Tensor(on_device()[0]), y, out=out)[1] is out
    agrees(out.array.get(), gx.cross_entropy_and_grad(X, Y)[1])


def test_tensors_that_are_refused(tensors):
    x, y = Tensor(on_device()[0]), Tensor(on_device()[1])
    x.requires_grad = True
    detach = r"requires gradients, which would be lost: pass logits\.detach\(\), or use gpuxent\.torch, whose losses"
    with pytest.raises(TypeError, match=rf"^logits is a tensors\.Tensor that {detach} autograd differentiates$"):
        gx.cross_entropy(x, y)
    with pytest.raises(TypeError, match=r"^out must be writable, got an immutable jaxlib\._jax\.Immutable$"):
        gx.cross_entropy_and_grad(Immutable(on_device()[0]), y, out=Immutable(on_device()[0]))
    with pytest.raises(
        TypeError, match=r"^logits must be a NumPy, CuPy or Dask array, got tensors\.Tensor; convert it"
    ):
        gx.cross_entropy(Tensor(X, device=1), Tensor(Y, device=1))
    with pytest.raises(TypeError, match=r"^labels must be a NumPy, CuPy or Dask array, got tensors\.Tensor"):
        gx.cross_entropy(X, y)


def test_a_library_without_from_dlpack_gets_cupy_arrays(tensors, monkeypatch):
    monkeypatch.delattr(sys.modules["tensors"], "from_dlpack")
    assert is_cupy(gx.softmax(Tensor(on_device()[0])))


def test_without_cupy_a_tensor_gets_the_sentence(tensors, monkeypatch):
    from gpuxent.backends import _cupy_found

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", None)
        _cupy_found.trouble.cache_clear()
        with pytest.raises(ModuleNotFoundError, match=r"^the GPU needs CuPy, which is not installed"):
            gx.softmax(Tensor(on_device()[0]))
    _cupy_found.trouble.cache_clear()
