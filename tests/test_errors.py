"""Bad input gets an error that names the argument, what was found and what was expected, the same everywhere."""

import dask.array as da
import numpy as np
import pytest

import gpuxent as gx

pytestmark = pytest.mark.usefixtures("backend")

LOGITS = np.zeros((3, 4), np.float32)
LABELS = np.array([0, 1, 2])
SOFT = np.full((3, 4), 0.25)


def soft_with(value):
    return np.where(np.arange(12).reshape(3, 4) == 6, value, 0.25)


CASES = [
    ("label too large", LOGITS, [0, 4, 1], {}, IndexError, r"labels\[1\] is 4, expected a class in \[0, 4\) or ignore_index=-100"),
    ("-1 never wraps", LOGITS, [0, 1, -1], {}, IndexError, r"labels\[2\] is -1, expected a class in \[0, 4\) or ignore_index=-100"),
    ("no ignore_index", LOGITS, [0, -100, 1], {"ignore_index": None}, IndexError, r"labels\[1\] is -100, expected a class in \[0, 4\)$"),
    ("labels' shape", LOGITS, [0, 1], {}, ValueError, r"labels of dtype int64 must have shape \(3,\) for logits of shape \(3, 4\), got \(2,\)"),
    ("integer one-hot", LOGITS, np.eye(4, dtype=int)[:3], {}, ValueError, r"got \(3, 4\); one-hot rows must be floats"),
    ("float class ids", LOGITS, [0.0, 1.0, 2.0], {}, ValueError, r"labels of dtype float64 are soft and must have the shape of logits, \(3, 4\), got \(3,\); class ids must be integers"),
    ("bool labels", LOGITS, [True, False, True], {}, TypeError, r"labels must be integers \(classes\) or floats \(soft rows\), got dtype bool"),
    ("negative soft", LOGITS, soft_with(-0.25), {}, ValueError, r"labels\[1, :\] has 1 entry negative, expected probabilities that sum to 1 within 0.0001"),
    ("NaN soft", LOGITS, soft_with(np.nan), {}, ValueError, r"labels\[1, :\] has a NaN"),
    ("soft sum", LOGITS, soft_with(0.35), {}, ValueError, r"labels\[1, :\] sums to 1.1, expected"),
    ("soft and ignore_index", LOGITS, SOFT, {"ignore_index": 0}, ValueError, r"ignore_index must be left at its default with soft labels, got 0"),
    ("integer logits", np.zeros((3, 4), int), LABELS, {}, TypeError, r"logits must be float16, bfloat16, float32 or float64, got int64"),
    ("complex logits", np.zeros((3, 4), complex), LABELS, {}, TypeError, r"got complex128"),
    ("long double", np.zeros((3, 4), np.longdouble), LABELS, {}, TypeError, r"got float128"),
    ("empty vocabulary", np.zeros((3, 0)), LABELS, {}, ValueError, r"logits must have at least one class on the last axis, got shape \(3, 0\)"),
    ("scalar logits", np.zeros(()), LABELS, {}, ValueError, r"logits must have shape \(..., vocab\), got a scalar"),
    ("reduction", LOGITS, LABELS, {"reduction": "avg"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ("no reduction", LOGITS, LABELS, {"reduction": None}, ValueError, r"reduction must be one of .*, got None"),
    ("temperature 0", LOGITS, LABELS, {"temperature": 0}, ValueError, r"temperature must be a number above 0, got 0"),
    ("negative temperature", LOGITS, LABELS, {"temperature": -1.0}, ValueError, r"temperature must be a number above 0, got -1.0"),
    ("temperature as text", LOGITS, LABELS, {"temperature": "1"}, TypeError, r"temperature must be a number above 0, got '1'"),
    ("softcap", LOGITS, LABELS, {"softcap": 0}, ValueError, r"softcap must be a number above 0, got 0"),
    ("smoothing", LOGITS, LABELS, {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number of at least 0 and at most 1, got 1.5"),
    ("NaN smoothing", LOGITS, LABELS, {"label_smoothing": np.nan}, ValueError, r"label_smoothing must be .*, got nan"),
    ("z_loss", LOGITS, LABELS, {"z_loss": -1}, ValueError, r"z_loss must be a number of at least 0, got -1"),
    ("class_weight's shape", LOGITS, LABELS, {"class_weight": [1.0]}, ValueError, r"class_weight must have shape \(4,\), one weight per class, got \(1,\)"),
    ("negative class_weight", LOGITS, LABELS, {"class_weight": [1, 1, -2, 1]}, ValueError, r"class_weight\[2\] is -2, expected a finite weight of at least 0"),
    ("class_weight of text", LOGITS, LABELS, {"class_weight": ["a"] * 4}, TypeError, r"class_weight must be numbers, got dtype <U1"),
    ("ignore_index", LOGITS, LABELS, {"ignore_index": 1.5}, TypeError, r"ignore_index must be an integer or None, got 1.5"),
    ("backend", LOGITS, LABELS, {"backend": "cuda"}, ValueError, r"backend must be None or one of 'numba', 'numpy', 'cupy', got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
@pytest.mark.parametrize("kind", ["numpy", "dask"])
def test_cross_entropy(logits, labels, options, error, message, kind):
    """Shapes and dtypes at once, values when they are computed."""
    labels = np.array(labels)
    if kind == "dask":
        logits, labels = (da.from_array(a, chunks=2) for a in (logits, labels))
    with pytest.raises(error, match=message):
        gx.cross_entropy(logits, labels, **options).compute()
    with pytest.raises(error, match=message):
        gx.cross_entropy_and_grad(logits, labels, **options)[1].compute()


def test_leading_axes_are_named_by_their_index():
    x, y = np.zeros((2, 5, 3)), np.zeros((2, 5), int)
    y[1, 4] = 3
    for logits in (x, da.from_array(x, chunks=(1, 2, 2))):
        with pytest.raises(IndexError, match=r"labels\[1, 4\] is 3"):
            gx.cross_entropy(logits, y).compute()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grad_output": np.ones(3)}, ValueError, r"grad_output must be a number with reduction='mean', got shape \(3,\)"),
        ({"grad_output": np.ones(2), "reduction": "none"}, ValueError, r"grad_output must be a number or have shape \(3,\), got shape \(2,\)"),
        ({"grad_output": "x"}, TypeError, r"grad_output must be a NumPy, CuPy or Dask array, got builtins.str"),
        ({"denominator": 3, "reduction": "sum"}, ValueError, r"denominator goes with reduction='mean', got reduction='sum'"),
        ({"denominator": 0}, ValueError, r"denominator must be a number above 0, got 0"),
        ({"out": np.zeros((3, 4))}, ValueError, r"out must be an array of shape \(3, 4\) and dtype float32, got shape \(3, 4\) and dtype float64"),
        ({"out": np.zeros((4, 3), np.float32)}, ValueError, r"out must be an array of shape \(3, 4\)"),
        ({"out": [0]}, ValueError, r"out must be an array .*, got list"),
    ],
)  # fmt: skip
def test_arguments_of_the_gradient(options, error, message):
    with pytest.raises(error, match=message):
        gx.cross_entropy_and_grad(LOGITS, LABELS, **options)


def test_out_may_not_overlap_by_half_or_be_read_only():
    wide = np.zeros((3, 8), np.float32)
    with pytest.raises(ValueError, match="out must be logits itself or share no memory with it"):
        gx.cross_entropy_and_grad(wide[:, :4], LABELS, out=wide[:, 2:6])
    memory = np.full(16, 0.25)
    with pytest.raises(ValueError, match="out must share no memory with the labels or targets"):
        gx.cross_entropy_and_grad(np.zeros((3, 4)), memory[:12].reshape(3, 4), out=memory[4:].reshape(3, 4))
    frozen = np.zeros((3, 4), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable"):
        gx.cross_entropy_and_grad(LOGITS, LABELS, out=frozen)
    with pytest.raises(TypeError, match="out must be None for Dask logits"):
        gx.cross_entropy_and_grad(da.zeros((3, 4), dtype=np.float32), LABELS, out=np.zeros((3, 4), np.float32))


def test_a_bad_label_leaves_out_untouched():
    work = np.full((3, 4), 7, np.float32)
    with pytest.raises(IndexError):
        gx.cross_entropy_and_grad(work, np.array([0, 9, 0]), out=work)
    assert (work == 7).all()


def test_kinds_of_arrays():
    with pytest.raises(TypeError, match="logits is a masked array, whose mask would be lost"):
        gx.cross_entropy(np.ma.masked_array(LOGITS), LABELS)
    with pytest.raises(TypeError, match=r"logits must be a NumPy, CuPy or Dask array, got builtins\.str"):
        gx.cross_entropy("logits.npy", LABELS)
    with pytest.raises(TypeError, match="labels is a Dask array but logits is not"):
        gx.cross_entropy(LOGITS, da.from_array(LABELS))
    with pytest.raises(TypeError, match="class_weight must be a NumPy array or a sequence, got a Dask array"):
        gx.cross_entropy(LOGITS, LABELS, class_weight=da.ones(4))
    unknown = da.from_array(LOGITS, chunks=2)
    unknown = unknown[unknown[:, 0] == 0]
    with pytest.raises(ValueError, match="logits has chunks of unknown size"):
        gx.cross_entropy(unknown, LABELS)


def test_threads():
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="n must be a positive number of threads"), gx.threads(bad):
            pass


def test_evaluate():
    for options, error, message in (
        ({"topk": (0,)}, ValueError, "topk must be a positive integer, got 0"),
        ({"topk": 5}, TypeError, "topk must be a tuple of positive integers, got 5"),
        ({"bins": 0}, ValueError, "bins must be a positive integer, got 0"),
    ):
        with pytest.raises(error, match=message):
            gx.evaluate(LOGITS, LABELS, **options)
    with pytest.raises(TypeError, match="labels is a Dask array but logits is not"):
        gx.evaluate(LOGITS, da.from_array(LABELS))
    with pytest.raises(TypeError, match=r"labels \(labels\) must be integers, got float64"):
        gx.evaluate(da.from_array(LOGITS), SOFT)
    with pytest.raises(TypeError, match="logits is a masked array"):
        gx.cross_entropy(da.ma.masked_greater(da.from_array(LOGITS), 1), LABELS)


def test_out_that_overlaps_itself():
    x = np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (3, 4), (8, 4))
    with pytest.raises(ValueError, match=r"^out must be an array whose entries share no memory, got strides \(8, 4\)$"):
        gx.cross_entropy_and_grad(x, [0, 1, 2], out=x)
    every_other = np.zeros((6, 8), np.float32)[::-2, ::-2]  # any other strides are fine
    gx.cross_entropy_and_grad(every_other, [0, 1, 2], out=every_other)
