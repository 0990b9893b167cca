"""The kernels over rows: every shape of kernel, order of threads and layout of memory; on a GPU, or on the emulation.

The contract itself is tested with the other backends' tests, where NumPy arrays go through these kernels.
"""

from dataclasses import replace

import emulation
import ml_dtypes
import numpy as np
import pytest
from conftest import ON_GPU
from makers import class_weight, labels, logits, soft_labels
from oracle import assert_close, errors_in_eps

import gpuxent as gx
from gpuxent._records import GradWeights, Transform
from gpuxent.backends import _cupy_core as core

cupy = pytest.importorskip("cupy")
from gpuxent.backends import _cupy, _cupy_jobs, _numpy  # noqa: E402  # needs the module above

pytestmark = [pytest.mark.gpu] if ON_GPU else []
emulated = pytest.mark.skipif(ON_GPU, reason="shows what the emulation of a GPU finds")

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
BIG = _cupy_jobs.Chip(90, 132, 227 << 10, 228 << 10, 50 << 20)  # an H200
CHIPS = {
    "clusters": BIG,
    "no clusters": replace(
        BIG, arch=80, multiprocessors=1, shared_per_block=163 << 10, shared_per_multiprocessor=164 << 10
    ),
    "little": replace(BIG, arch=75, multiprocessors=1, shared_per_block=64 << 10, shared_per_multiprocessor=64 << 10),
    "many": replace(BIG, arch=75, multiprocessors=300, shared_per_block=64 << 10, shared_per_multiprocessor=64 << 10),
}


@pytest.fixture(params=["forward", "backward", "shuffled"])
def order(request):
    """In which order threads take turns; a GPU has its own."""
    if ON_GPU:
        if request.param != "forward":
            pytest.skip("a GPU has an order of its own")
        yield
    else:
        with emulation.schedule(request.param):
            yield


@pytest.fixture
def chip(monkeypatch, request):
    """What the choice of kernels takes the device for."""
    if not ON_GPU or int(cupy.cuda.Device().compute_capability) >= request.param.arch:
        monkeypatch.setattr(_cupy, "here", lambda: request.param)
        return request.param
    pytest.skip("this GPU cannot run the kernels of that one")


def kernels_of(monkeypatch):
    """The names of the kernels that are launched from now on."""
    names, find = [], _cupy_jobs.kernel_of
    monkeypatch.setattr(
        _cupy_jobs, "kernel_of", lambda name, *how: names.append(name.partition("<")[0]) or find(name, *how)
    )
    return names


def work_dtype(dtype):
    return np.float64 if np.dtype(dtype).itemsize == 8 else np.float32


def reference(x, y, **options):
    """By the reference backend, in float64."""
    how = {"reduction": "none", "return_stats": True, "backend": "numpy"} | options
    return gx.cross_entropy_and_grad(np.asarray(x, np.float64), y, **how)


def check(x, y, **options):
    """Loss, gradient and statistics against the reference."""
    dtype = x.dtype
    on_gpu = {name: cupy.asarray(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    loss, grad, stats = gx.cross_entropy_and_grad(
        cupy.asarray(x), cupy.asarray(y), reduction="none", return_stats=True, **on_gpu
    )
    true_loss, true_grad, true_stats = reference(x, y, **options)
    assert_close(loss.get(), true_loss, 16 if "softcap" in options else 4, work_dtype(dtype))
    assert grad.dtype == dtype
    assert_close(grad.get(), true_grad, 8, dtype, floor=1 / 8)
    assert stats.argmax.get().tolist() == true_stats.argmax.tolist()
    alone = gx.cross_entropy(cupy.asarray(x), cupy.asarray(y), reduction="none", **on_gpu)
    assert_close(alone.get(), true_loss, 16 if "softcap" in options else 4, work_dtype(dtype))


# ---- every kernel ----

SHAPES = [  # chip, bytes of a row, and what has to run: for the statistics, and with the gradient
    ("clusters", 300, "small_rows"),
    ("clusters", 1000, "small_rows"),
    ("clusters", 2000, "small_rows"),
    ("clusters", 12006, "block_rows"),
    ("clusters", 60000, "kept_rows"),
    ("clusters", 140000, "cluster_rows"),
    ("no clusters", 140000, "kept_rows"),
    ("little", 70000, "kept_rows"),
    ("many", 70000, "piece_tops piece_sums merge_pieces"),
]


@pytest.mark.parametrize(
    ("chip", "size", "kernels"), [(CHIPS[c], *rest) for c, *rest in SHAPES], indirect=["chip"], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_in_every_order(dtype, chip, size, kernels, order, monkeypatch):
    x = logits(5, size // np.dtype(dtype).itemsize, dtype, seed=size)
    names = kernels_of(monkeypatch)
    check(x, labels(x, seed=1))
    if dtype != np.float64:  # float64 rows are not split: their sums depend on who adds up what
        assert set(kernels.split()) <= set(names)


FEATURES = {
    "smoothing": {"label_smoothing": 0.1},
    "class weights": {"class_weight": "by class"},
    "class weights and smoothing": {"class_weight": "by class", "label_smoothing": 0.3},
    "temperature": {"temperature": 0.37},
    "softcap": {"softcap": 20.0},
    "low softcap": {"softcap": 2.0},  # a class too many, at -2, would be seen
    "all": {"class_weight": "by class", "label_smoothing": 0.2, "softcap": 15.0, "temperature": 1.7, "z_loss": 1e-3},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("chip", CHIPS.values(), indirect=True, ids=CHIPS.keys())
@pytest.mark.parametrize("size", [300, 12006, 140000])
def test_features(features, chip, size):
    x = logits(4, size // 4, np.float32, seed=size, kinds="ordinary")
    weights = class_weight(x.shape[-1])
    features = {name: weights if value == "by class" else value for name, value in features.items()}
    check(x, labels(x, seed=1), **features)


@pytest.mark.parametrize("low", np.linspace(-3.0, 0.0, 7))
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_many_small_terms_beside_two_large_ones(dtype, low):
    """Added one after another, each would be rounded at the size of the maximum: 5.7 eps were seen."""
    x = np.full((8, 511), low, dtype)
    x[:, 288], x[:, 289] = 9.25, 9.0
    check(x, np.full(8, 288), temperature=0.959030135579978)


@pytest.mark.parametrize("soft_dtype", [np.float32, np.float16, np.float64])
def test_soft_labels(soft_dtype):
    x, y = logits(4, 700, np.float16, seed=3, kinds="ordinary"), soft_labels(4, 700, soft_dtype)
    check(x, y, label_smoothing=0.1)


@pytest.mark.parametrize("chip", CHIPS.values(), indirect=True, ids=CHIPS.keys())
@pytest.mark.parametrize("size", [300, 12006, 140000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_statistics(dtype, chip, size):
    x = logits(6, size // np.dtype(dtype).itemsize, dtype, seed=9)
    y = np.asarray(x, np.float64).argsort(axis=1)[:, x.shape[1] // 2]
    also = ("argmax", "moment", "rank")
    found = _cupy.row_stats(cupy.asarray(x), cupy.asarray(y), also=also)
    truth = _numpy.row_stats(np.asarray(x, np.float64), y, also=also)
    for field in ("max", "label_logit", "argmax", "rank"):
        assert getattr(found, field).get().tolist() == getattr(truth, field).tolist(), field
    assert_close(found.rest.get(), truth.rest, 8, work_dtype(dtype))
    assert_close(found.moment.get(), truth.moment, 32, work_dtype(dtype), floor=1e-3)


def test_an_empty_batch_and_one_class():
    assert gx.cross_entropy(cupy.zeros((0, 7), np.float32), cupy.zeros(0, np.int64), reduction="none").shape == (0,)
    loss, grad = gx.cross_entropy_and_grad(cupy.zeros((3, 1), np.float32), cupy.zeros(3, np.int64))
    assert float(loss) == 0
    assert grad.get().tolist() == [[0.0]] * 3


# ---- the bits of a row ----


def bits(values):
    return values.get().view(np.int64).tolist()


def rest_of(x, **options):
    return _cupy.row_stats(x, **options).rest


@pytest.mark.parametrize("size", [404, 12006, 70000, 140000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_wherever_it_lies(dtype, size):
    vocab = size // np.dtype(dtype).itemsize | 1
    x = logits(9, vocab, dtype, seed=2, kinds="ordinary")
    whole = bits(rest_of(cupy.asarray(x)))
    assert [bits(rest_of(cupy.asarray(x[i : i + 1]))) for i in range(9)] == [[w] for w in whole]
    for shift in range(1, 9):
        buffer = cupy.zeros(x.size + shift, dtype)
        moved = buffer[shift:].reshape(x.shape)
        moved[...] = cupy.asarray(x)
        assert bits(rest_of(moved)) == whole
    wide = cupy.zeros((9, 2 * vocab), dtype)
    wide[:, ::2] = cupy.asarray(x)
    labelled = {"labels": cupy.zeros(9, np.int64)}  # without labels CuPy's reduction would do it
    assert bits(rest_of(wide[:, ::2], **labelled)) == whole


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_row_has_the_same_bits_on_every_chip(dtype, monkeypatch):
    x = cupy.asarray(logits(3, 70001, dtype, seed=2, kinds="ordinary"))
    found = []
    for chip in CHIPS.values():
        if not ON_GPU or int(cupy.cuda.Device().compute_capability) >= chip.arch:
            monkeypatch.setattr(_cupy, "here", lambda chip=chip: chip)
            found.append(bits(rest_of(x)))
    assert found == found[:1] * len(found)


@pytest.mark.parametrize("rows", [1, 33, 500])
@pytest.mark.parametrize("vocab", [20, 80, 260])
def test_short_rows_one_after_another(rows, vocab, monkeypatch, order):
    """Lanes that take several rows each, with a last warp that has rows for some of them."""
    x = logits(rows, vocab, np.float32, seed=8)
    y = labels(x, seed=8, ignore=False)
    one_by_one = _cupy.row_stats(cupy.asarray(x), cupy.asarray(y), also=("argmax", "rank"))
    for steps in (2, 5, 8):
        monkeypatch.setattr(_cupy, "_steps", lambda rows, lanes, steps=steps: steps)
        found = _cupy.row_stats(cupy.asarray(x), cupy.asarray(y), also=("argmax", "rank"))
        for field in ("max", "rest", "label_logit", "argmax", "rank"):
            assert bits(getattr(found, field)) == bits(getattr(one_by_one, field)), field


def test_the_gradient_of_a_row_does_not_depend_on_the_others():
    x = logits(6, 1003, np.float32, seed=4)
    y = labels(x, seed=4)
    whole = gx.cross_entropy_and_grad(cupy.asarray(x), cupy.asarray(y), reduction="sum")[1].get()
    for i in range(6):
        part = gx.cross_entropy_and_grad(cupy.asarray(x[i:]), cupy.asarray(y[i:]), reduction="sum")[1].get()
        assert (part.view(np.int32) == whole[i:].view(np.int32)).all()


# ---- where arrays lie ----


@pytest.mark.parametrize("vocab", [5, 101, 1001, 9001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_rows_in_place(dtype, vocab, order):
    """The gradient over the logits, with something on both sides that has to stay."""
    x = logits(7, vocab, dtype, seed=5)
    y = labels(x, seed=5)
    buffer = cupy.full(x.size + 6, 7, dtype)
    inside = buffer[3:-3].reshape(x.shape)
    inside[...] = cupy.asarray(x)
    _, grad = gx.cross_entropy_and_grad(inside, cupy.asarray(y), reduction="none", out=inside)
    assert grad is inside
    assert_close(inside.get(), reference(x, y)[1], 8, dtype, floor=1 / 8)
    assert buffer[:3].get().tolist() == buffer[-3:].get().tolist() == [7, 7, 7]


def test_any_strides_of_rows_and_classes():
    x = logits(24, 333, np.float32, seed=6).reshape(2, 3, 4, 333)
    y = labels(x.reshape(24, 333), seed=6).reshape(2, 3, 4)
    on_gpu = cupy.asarray(x)
    for view, of_labels in (
        (lambda a: a.transpose(2, 0, 1, 3), lambda a: a.transpose(2, 0, 1)),
        (lambda a: a[:, ::2, ::-1], lambda a: a[:, ::2, ::-1]),
        (lambda a: a[..., 1:, ::3], lambda a: a[..., 1:] // 3),
        (lambda a: a[:, 1, 1:], lambda a: a[:, 1, 1:]),
        (lambda a: a[1, 2, 3:], lambda a: a[1, 2, 3:]),
    ):
        some, some_y = view(x), of_labels(y).copy()
        some_y = np.where(some_y < 0, -100, some_y)
        loss, grad = gx.cross_entropy_and_grad(view(on_gpu), cupy.asarray(some_y), reduction="none")[:2]
        truth = reference(some, some_y)
        assert_close(loss.get(), truth[0], 4)
        assert_close(grad.get(), truth[1], 8, floor=1 / 8)
        out = cupy.zeros_like(on_gpu)
        gx.cross_entropy_and_grad(view(on_gpu), cupy.asarray(some_y), reduction="none", out=view(out))
        assert (view(out).get() == grad.get()).all()


def test_rows_more_than_2_to_the_31_elements_apart():
    x, y = logits(2, 1003, np.float16, kinds="ordinary"), np.array([3, 1002])
    far = cupy.empty((2, 2**31 + 11), np.float16)[:, :1003]  # only what is touched takes memory in the emulation
    far[...] = cupy.asarray(x)
    loss, grad = gx.cross_entropy_and_grad(far, cupy.asarray(y), reduction="none", out=far)
    truth = reference(x, y)
    assert_close(loss.get(), truth[0], 4)
    assert_close(grad.get(), truth[1], 8, np.float16, floor=1 / 8)


def test_slices_of_the_vocabulary_with_rank():
    x = logits(4, 1501, np.float32, seed=7)
    y = np.array([0, 700, 1500, 33])
    whole = _numpy.row_stats(np.asarray(x, np.float64), y, also=("argmax", "rank"))
    label_logit = cupy.asarray(whole.label_logit)
    parts = [
        _cupy.row_stats(cupy.asarray(x[:, a:b]), cupy.asarray(y), a, label_logit=label_logit, also=("argmax", "rank"))
        for a, b in ((0, 512), (512, 513), (513, 1501))
    ]
    on_host = [type(whole)(**{name: values.get() for name, values in vars(part).items()}) for part in parts]
    merged = type(whole).merge_all(on_host)
    for field in ("max", "label_logit", "argmax", "rank"):
        assert getattr(merged, field).tolist() == getattr(whole, field).tolist()
    assert errors_in_eps(merged.rest, whole.rest).max() < 8


# ---- what is promised beside numbers ----


@emulated
def test_nothing_waits_for_the_gpu_but_the_check_of_labels():
    x, y = cupy.zeros((3, 70), np.float16), cupy.zeros(3, np.int64)
    for function in (gx.cross_entropy, gx.cross_entropy_and_grad):
        before = cupy.synchronisations
        function(x, y, check_labels=False, label_smoothing=0.1, z_loss=1e-4)
        assert cupy.synchronisations == before
        function(x, y)
        assert cupy.synchronisations == before + 1


@emulated
def test_the_struct_is_that_of_the_source():
    """A member too many or in another place would be read as something else."""
    members = [name for line in _members() for name in line]
    assert members == list(core.TASK.names)


def _members():
    text = core.source("task").partition("struct Task {")[2].partition("};")[0]
    for line in text.splitlines():
        declaration = line.partition("//")[0].strip().rstrip(";")
        if not declaration:
            continue
        kind, *names = declaration.removeprefix("const ").replace("long long", "long_long").replace(",", " ").split()
        names = [name.strip("*") for name in names if name != "*"]
        if kind.strip("*") == "Strides":
            names = [f"{name.removesuffix('_at')}_{step}" for name in names for step in ("outer", "step", "column")]
        yield names


@emulated
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 30.0}], ids=str)
def test_no_copy_of_the_logits_is_made(options, monkeypatch):
    x, y = cupy.asarray(logits(8, 20001, np.float32, kinds="ordinary")), cupy.zeros(8, np.int64)
    sizes, allocate = [], emulation.arrays.Memory.__init__
    monkeypatch.setattr(
        emulation.arrays.Memory, "__init__", lambda self, size: sizes.append(size) or allocate(self, size)
    )
    gx.cross_entropy_and_grad(x, y, out=x, **options)
    gx.cross_entropy(x[:, ::2], y, **options)
    assert 0 < sum(sizes) < x.nbytes / 10


def test_kernels_are_compiled_once_and_for_any_vocabulary(monkeypatch):
    _cupy_jobs.kernel_of.cache_clear()
    for vocab in (40, 41, 47):
        gx.cross_entropy(cupy.zeros((2, vocab), np.float32), cupy.zeros(2, np.int64))
    assert _cupy_jobs.kernel_of.cache_info().misses == 1


def test_log_softmax_and_softmax_of_many_float16_classes():
    """cupyx sums float16 rows in float16: 70,000 equal logits overflow there."""
    x = cupy.zeros((2, 70000), np.float16)
    assert_close(gx.logsumexp(x).get(), np.full(2, np.log(70000.0)), 4)
    assert_close(gx.log_softmax(x).get(), np.full((2, 70000), -np.log(70000.0)), 1, np.float16)
    assert_close(gx.logsumexp(x.T.copy(), axis=0).get(), np.full(2, np.log(70000.0)), 4)


def test_the_push_of_a_temperature_is_in_the_gradient():
    x = logits(3, 50, np.float64, kinds="ordinary")
    weights = GradWeights(*(np.array([1.0, 0.5, 0.0]), np.array([0.0, 0.2, 0.0]), np.array([0.0, 0.1, 0.0])))
    there = GradWeights(*map(cupy.asarray, vars(weights).values()))
    how, y = {"transform": Transform(9.0, 2.5)}, np.array([1, 2, 3])
    truth = _numpy.row_stats_and_grad(x, y, weights, **how)[1]
    assert_close(
        _cupy.row_stats_and_grad(cupy.asarray(x), cupy.asarray(y), there, **how)[1].get(), truth, 8, np.float64
    )
