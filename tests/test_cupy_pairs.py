"""The kernels over pairs of rows: each of them, in every order of threads and layout of memory.

On a GPU, or on the emulation, where nothing may be touched beside an array. The contract is tested in test_pairs.
"""

import emulation
import ml_dtypes
import numpy as np
import pytest
from conftest import ON_GPU
from makers import logits
from oracle import assert_close
from test_cupy import CHIPS, order  # noqa: F401  # a fixture

from gpuxent._records import DIVERGENCES, IDENTITY, NO_LABEL, Transform

cupy = pytest.importorskip("cupy")
from gpuxent.backends import _cupy, _cupy_core, _cupy_pairs, _numpy  # noqa: E402  # needs the module above

pytestmark = [pytest.mark.gpu] if ON_GPU else []

ALSO = ("argmax", "moment", "rank")
BF16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def nothing_written_beside_an_array():
    yield
    emulation.check_canaries()


@pytest.fixture
def chip(monkeypatch, request):
    """What the choice of kernels takes the device for."""
    if ON_GPU and int(cupy.cuda.Device().compute_capability) < request.param.arch:
        pytest.skip("this GPU cannot run the kernels of that one")
    monkeypatch.setattr(_cupy_pairs, "here", lambda: request.param)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names, find = [], _cupy_pairs.kernel_of
    monkeypatch.setattr(_cupy_pairs, "kernel_of", lambda name, *how: names.append(name) or find(name, *how))
    return names


def check(p, q, y=None, transforms=(IDENTITY, IDENTITY), put=cupy.asarray):
    """Both records and all divergences against the reference backend in float64."""
    wide = [x.astype(np.float64) for x in (p, q)]
    truth = _numpy.pair_stats(*wide, y, transforms=transforms, also=ALSO)
    found = _cupy.pair_stats(put(p), put(q), None if y is None else cupy.asarray(y), transforms=transforms, also=ALSO)
    for side, true, rows in ((found.base, truth.base, p), (found.other, truth.other, q)):
        own = np.float64 if rows.dtype == np.float64 else np.float32
        assert np.array_equal(side.argmax.get(), true.argmax)
        if y is not None:
            assert np.array_equal(side.rank.get(), true.rank)
        for name, floor in (("max", 0), ("label_logit", 1e-6), ("rest", 1e-9), ("moment", 1e-3)):
            assert_close(getattr(side, name).get(), getattr(true, name), 16, own, floor)
    given = _cupy.divergence_sums(put(p), put(q), found.base, found.other, transforms=transforms)
    exact = {p.dtype, q.dtype} == {np.dtype(np.float64)}  # the normalizer of any other type comes from float32
    for name in DIVERGENCES:
        true = getattr(truth.divergences, name)
        for sums in (found.divergences, given):
            actual = getattr(sums, name).get()
            assert_close(actual, true, 64, np.float64 if exact else np.float32, floor=1.0 if name == "tv" else 1e-2)
            assert not (actual < 0).any()


def pair(rows, vocab, dtype, seed=0):
    """Two models' rows, the last pair of them equal, and labels."""
    p, q = logits(rows, vocab, dtype, seed=seed), logits(rows, vocab, dtype, seed=seed + 1)
    q[-1] = p[-1] = np.sin(np.arange(vocab)).astype(dtype)
    y = np.random.default_rng(seed).integers(0, vocab, rows)
    y[0] = NO_LABEL
    return p, q, y


SHAPES = [  # chip, classes, and the kernel that has to run
    ("clusters", 70, "pair_rows", "true"),
    ("clusters", 3001, "pair_rows", "true"),
    ("clusters", 40009, "cluster_pairs", None),
    ("no clusters", 16007, "pair_rows", "true"),
    ("little", 16007, "pair_rows", "false"),
]
CASES = [(CHIPS[chip], *rest) for chip, *rest in SHAPES]


@pytest.mark.parametrize(("chip", "vocab", "kernel", "copied"), CASES, indirect=["chip"], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_every_kernel_in_every_order(dtype, chip, vocab, kernel, copied, order, launched):  # noqa: F811
    p, q, y = pair(3, vocab, dtype, seed=vocab)
    check(p, q, y)
    name, _, arguments = launched[0].partition("<")
    assert name == kernel
    assert copied is None or arguments.endswith(f"{copied}>")


@pytest.mark.parametrize(
    "types", [(np.float64, np.float64), (np.float16, np.float16), (np.float32, BF16), (np.float16, np.float64)], ids=str
)
@pytest.mark.parametrize("vocab", [1, 7, 333])
def test_types(vocab, types):
    p, q = logits(24, vocab, types[0], seed=1), logits(24, vocab, types[1], seed=2)
    check(p, q)


@pytest.mark.parametrize(
    "transforms", [(Transform(8.0, 0.7), IDENTITY), (Transform(None, 1.3), Transform(None, 0.6))], ids=str
)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_transforms(dtype, transforms):
    p, q, y = pair(4, 203, dtype)
    check(np.clip(p, -30, 30), np.clip(q, -30, 30), y, transforms)


def _inside(x, before, after):
    wide = np.full((len(x), x.shape[1] + before + after), np.nan, x.dtype)
    wide[:, before : wide.shape[1] - after] = x
    return cupy.asarray(wide)[:, before : wide.shape[1] - after]


@pytest.mark.parametrize(
    "put",
    [
        lambda x: _inside(x, 1, 2),
        lambda x: _inside(x, 3, 0),
        lambda x: cupy.asarray(np.ascontiguousarray(x.T)).T,
        lambda x: cupy.asarray(np.ascontiguousarray(x[::-1]))[::-1],
        lambda x: cupy.asarray(np.repeat(x, 2, axis=0))[::2],
    ],
    ids=["one in", "three in", "transposed", "reversed", "every second"],
)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_layouts(dtype, put):
    p, q, y = pair(4, 517, dtype, seed=3)
    check(p, q, y, put=put)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (2, 3, 5), (5,)])
def test_shapes(shape):
    x, y = cupy.zeros(shape, np.float32), cupy.ones(shape, np.float32)
    found = _cupy.pair_stats(x, y, also=("argmax",))
    assert found.base.max.shape == found.other.argmax.shape == found.divergences.js.shape == shape[:-1]
    assert _cupy.divergence_sums(x, y, found.base, found.other).tv.shape == shape[:-1]
    assert (found.divergences.kl.get() == 0).all()
    assert found.base.moment.get().size == found.base.max.size


def test_nothing_waits_for_the_device():
    x, y = cupy.zeros((3, 40), np.float32), cupy.zeros(3, np.int64)
    before = emulation.arrays.Counter.synchronisations
    found = _cupy.pair_stats(x, x, y, also=ALSO)
    _cupy.divergence_sums(x, x, found.base, found.other)
    assert emulation.arrays.Counter.synchronisations == before


def test_kernels_are_those_that_are_compiled_ahead(launched):
    """What a comparison launches is among the builds, whose registers are watched."""
    built = {name for build in _cupy_core.builds() for name in build.names}
    for dtype in (np.float32, BF16, np.float16, np.float64):
        x = cupy.zeros((2, 40), dtype)
        _cupy.pair_stats(x, x, cupy.zeros(2, np.int64), also=ALSO)
    assert set(launched) <= built
