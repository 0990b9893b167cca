"""`pair_stats` and `divergence_sums`, the primitives of two models' rows, on every backend and in every home."""

import itertools

import ml_dtypes
import numpy as np
import oracle
import pytest
from makers import FLOAT_DTYPES, labels, logits, strided
from oracle import assert_close

import gpuxent as gx
from gpuxent._records import DIVERGENCES, IDENTITY, NO_LABEL, RowStats, Transform
from gpuxent.backends import backend_of

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = np.inf, np.nan
ALSO = ("argmax", "moment", "rank")
TRUTH = {
    "kl": oracle.kl_divergence,
    "reverse_kl": lambda p, q: oracle.kl_divergence(q, p),
    "js": oracle.js_divergence,
    "tv": oracle.total_variation,
}


def work_dtype(*arrays):
    return np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32


def classes(p, q):
    """Labels as backends take them, of classes that both have."""
    y = np.maximum(labels(p), 0)
    at = [np.take_along_axis(x.astype(np.float64), y[:, None], axis=1)[:, 0] for x in (p, q)]
    return np.where((labels(p) < 0) | np.isneginf(at).any(axis=0), NO_LABEL, y)


def pair(p, q, y=None, home=None, **options):
    """PairStats in memory."""
    put, compute = (home.put, home.compute) if home else (lambda x: x, lambda x: x)
    a, b = put(p), put(q)
    owner = backend_of(a)
    found = owner.pair_stats(a, b, None if y is None else owner.laid_out_as(a, y), **options)
    sides = [
        RowStats(**{name: compute(value) for name, value in vars(side).items()}) for side in (found.base, found.other)
    ]
    return *sides, {name: compute(value) for name, value in vars(found.divergences).items()}


def assert_divergences(found, p, q, count=32):
    """Those of whole distributions; total variation is off by what the normalizers are off by."""
    dtype = work_dtype(p, q)
    for name in DIVERGENCES:
        assert_close(found[name], TRUTH[name](p, q), count, dtype, floor=1.0 if name == "tv" else 1e-3)


def near(p, distance, seed=1):
    return (p.astype(np.float64) + distance * np.random.default_rng(seed).normal(0, 1, p.shape)).astype(p.dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("vocab", [1, 63, 700])
def test_both_records_and_all_divergences(vocab, dtype, home, backend):
    p, q = logits(16, vocab, dtype, seed=1), logits(16, vocab, dtype, seed=2)
    y = classes(p, q)
    *sides, found = pair(p, q, y, home, also=ALSO)
    for side, rows in zip(sides, (p, q), strict=True):
        alone = backend_of(rows).row_stats(rows, y, also=ALSO)
        for name, values in vars(alone).items():
            if home.same_bits and not (backend == "cupy" and dtype == np.float64):  # whose sums have another order
                assert np.array_equal(getattr(side, name), values, equal_nan=True)
        assert np.array_equal(side.rank, alone.rank)
        assert np.array_equal(side.argmax, alone.argmax)
        assert_close(side.max + np.log1p(side.rest), oracle.logsumexp_rows(rows), 4, work_dtype(rows), floor=1.0)
    assert_divergences(found, p, q)


@pytest.mark.parametrize("types", [(np.float32, ml_dtypes.bfloat16), (np.float16, np.float64)], ids=str)
def test_two_dtypes(types):
    p, q = logits(8, 130, types[0], seed=1), logits(8, 130, types[1], seed=2)
    *_, found = pair(p, q)
    for name in DIVERGENCES:
        # the normalizers of the narrower one come from float32
        assert_close(found[name], TRUTH[name](p.astype(np.float64), q.astype(np.float64)), 32, floor=1e-2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 7, 60, -10000, 1e6])
@pytest.mark.parametrize("distance", [1.0, 1e-2])
def test_close_models_however_far_their_logits_are_apart(distance, offset, dtype):
    p = np.random.default_rng(0).normal(0, 4, (2, 300)).astype(dtype)
    q = near(p.astype(np.float64) + offset, distance).astype(dtype)
    *_, found = pair(p, q)
    for name in ("kl", "reverse_kl", "js"):
        truth = TRUTH[name](p, q).astype(np.float64)
        assert (np.abs(found[name] - truth) <= 64 * np.finfo(dtype).eps / min(1, distance * 10) * truth).all()
    assert_divergences(found, p, q)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
def test_equal_rows_diverge_by_0_and_none_by_less(dtype, home):
    p = logits(16, 130, dtype, seed=1)
    *_, same = pair(p, p.copy(), home=home)
    proper = np.isfinite(oracle.logsumexp_rows(p).astype(np.float64))
    assert proper.any()
    for name in DIVERGENCES:
        assert (same[name][proper] == 0).all()
        assert np.isnan(same[name][~proper]).all()
    for distance in (1e-7, 1e-3):
        *_, close = pair(p, near(p, distance), home=home)
        assert all((close[name][proper] >= 0).all() for name in DIVERGENCES)


SPECIAL = [  # p, q, and their four divergences
    ([0.0, -INF], [0.0, -INF], (0.0, 0.0, 0.0, 0.0)),
    ([0.0, 0.0], [0.0, -INF], (INF, np.log(2), 0.75 * np.log(4 / 3), 0.5)),
    ([0.0, -INF], [-INF, 0.0], (INF, INF, np.log(2), 1.0)),
    ([0.0, -1000.0], [0.0, -INF], (INF, 0.0, 0.0, 0.0)),  # p > 0, if less than a float holds
    ([0.0, -1000.0], [0.0, -1000.0], (0.0, 0.0, 0.0, 0.0)),
    ([-INF, -INF], [0.0, 0.0], (NAN,) * 4),
    ([NAN, 0.0], [0.0, 0.0], (NAN,) * 4),
    ([0.0, 0.0], [NAN, 0.0], (NAN,) * 4),
    ([INF, 0.0], [0.0, 0.0], (NAN,) * 4),
    ([0.0, 0.0], [INF, INF], (NAN,) * 4),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [2, 130])
@pytest.mark.parametrize(("p", "q", "truth"), SPECIAL)
def test_special_values(p, q, truth, width, dtype, home):
    """Alone, and after classes that both exclude."""
    p, q = (np.array([[-INF] * (width - 2) + row, [0.0] * width], dtype) for row in (p, q))
    *_, found = pair(p, q, home=home)
    for name, value in zip(DIVERGENCES, truth, strict=True):
        assert_close(found[name][:1], np.array([value]), 8, dtype)
        assert found[name][1] == 0


TRANSFORMS = [
    (Transform(None, 0.37), IDENTITY),
    (Transform(30.0, 2.0), Transform(None, 1.6)),
    (Transform(4.0, 0.5), Transform(4.0, 0.5)),
]


@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_each_side_has_its_transform(dtype, transforms, home):
    p, q = logits(4, 300, dtype, seed=1, kinds="ordinary"), logits(4, 300, dtype, seed=2, kinds="ordinary")
    y = classes(p, q)
    *sides, found = pair(p, q, y, home, transforms=transforms, also=ALSO)
    meant = []
    for side, rows, transform in zip(sides, (p, q), transforms, strict=True):
        x = rows.astype(np.float64)
        x = x if transform.softcap is None else transform.softcap * np.tanh(x / transform.softcap)
        meant.append(x / transform.temperature)
        alone = backend_of(rows).row_stats(rows, y, transform=transform, also=ALSO)
        assert np.array_equal(side.rank, alone.rank)
        assert_close(side.label_logit, alone.label_logit, 4, floor=1.0)
    for name in DIVERGENCES:
        assert_close(found[name], TRUTH[name](*meant), 64, work_dtype(p), floor=1e-2)


def test_slices_of_the_vocabulary_add_up():
    p, q = logits(16, 1000, seed=1), logits(16, 1000, seed=2)
    base, other, whole = pair(p, q)
    owner, cuts = backend_of(p), (0, 64, 301, 1000)
    parts = [owner.divergence_sums(p[:, a:b], q[:, a:b], base, other) for a, b in itertools.pairwise(cuts)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for name in DIVERGENCES:
        assert_close(getattr(merged, name), whole[name], 4, floor=1e-3)
    only = owner.divergence_sums(p, q, base, other, divergences=("js",))
    assert (only.kl, only.tv) == (0, 0)
    assert np.array_equal(only.js, whole["js"], equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_bits_do_not_depend_on_the_rows_around(dtype):
    p, q = logits(12, 1000, dtype, seed=1), logits(12, 1000, dtype, seed=2)
    y = classes(p, q)
    *sides, found = pair(p, q, y, also=ALSO)
    for rows in (slice(0, 1), slice(5, 12)):
        *own_sides, own = pair(p[rows], q[rows], y[rows], also=ALSO)
        for name in DIVERGENCES:
            assert np.array_equal(own[name], found[name][rows], equal_nan=True)
        for mine, whole in zip(own_sides, sides, strict=True):
            for name, values in vars(mine).items():
                assert np.array_equal(values, getattr(whole, name)[rows], equal_nan=True)


@pytest.mark.parametrize(
    "how", ["every second column", "unaligned", "padded rows", "read-only", "non-native byte order"]
)
def test_layouts(how):
    p, q = logits(8, 131, seed=1), logits(8, 131, seed=2)
    *_, found = pair(p, q)
    *_, other = pair(strided(p, how), q)
    for name in DIVERGENCES:
        assert_close(other[name], found[name], 4, floor=1e-3)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (5,), (2, 3, 7)])
def test_shapes(shape):
    p, q = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    base, other, found = pair(p, q, np.zeros(shape[:-1], np.int64), also=ALSO)
    for name in DIVERGENCES:
        assert found[name].shape == shape[:-1]
    assert base.rank.shape == other.argmax.shape == shape[:-1]
    assert (other.label_logit == 1).all()


def test_probabilities():
    p, q = np.array([[0.5, 0.5, 0.0]]), np.array([[0.25, 0.0, 0.75]])
    owner = backend_of(p)
    found = owner.divergence_sums(p, q)
    assert (found.kl, found.reverse_kl) == (INF, INF)
    assert found.tv == 0.75
    assert found.js == pytest.approx(oracle.js_divergence_from_probs(p, q)[0], rel=1e-15)
    assert gx.js_divergence_from_probs(p, q) == found.js
