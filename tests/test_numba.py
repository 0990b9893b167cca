"""What is peculiar to the Numba backend: its arithmetic, its cache on disk, threads and forks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import mpmath
import numba
import numpy as np
import pytest

import gpuxent as gx
from gpuxent import backends
from gpuxent.backends import _numba
from gpuxent.backends import _numba_core as core
from gpuxent.backends import _numba_tiles as tiles

# ---- arithmetic ----


@numba.njit
def exps(x, power, out):
    shift, scale, lowest = tiles.scale(x, 0.0, power)
    for j in range(x.size):
        out[j] = core.scaled_exp(x[j], shift, scale, lowest)


@numba.njit
def log1ps(u, out):
    for j in range(u.size):
        out[j] = core.log1p_of(u[j])


@numba.njit
def tanhs(x, out):
    for j in range(x.size):
        out[j] = core.tanh(x[j])


@numba.njit
def stored(x, out):
    for j in range(x.size):
        core.store(out, j, x[j])


@numba.njit
def loaded(x, out):
    for j in range(x.size):
        out[j] = core.load(x, j)


def worst(actual, function, x, dtype):
    """The largest relative error in eps of the dtype."""
    with mpmath.workdps(40):
        errors = [
            abs(mpmath.mpf(float(a)) / function(mpmath.mpf(float(b))) - 1) for a, b in zip(actual, x, strict=True)
        ]
    return float(max(errors)) / np.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "eps"), [(np.float32, 1.5), (np.float64, 1.0)])
@pytest.mark.parametrize("centre", [0, 10000, -10000, 60000])
def test_exp_needs_no_difference(dtype, eps, centre):
    x = (centre + np.random.default_rng(0).uniform(-30, 30, 1000)).astype(dtype)
    power = float(round(centre / np.log(2)))
    out = np.empty_like(x)
    exps(x, power, out)
    assert worst(out, lambda v: mpmath.exp(v) / mpmath.mpf(2) ** power, x, dtype) < eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_of_special_values(dtype):
    x = np.array([-np.inf, np.nan, -1e30, 0, -np.finfo(dtype).max, np.inf], dtype)
    out = np.empty_like(x)
    exps(x, 0.0, out)
    assert out[0] == out[2] == out[4] == 0
    assert out[3] == 1
    assert np.isnan(out[1])
    assert not np.isfinite(out[5])


@pytest.mark.parametrize(("dtype", "eps"), [(np.float32, 2), (np.float64, 2)])
def test_log1p(dtype, eps):
    u = np.concatenate([np.linspace(0, 1, 500)[1:], 10.0 ** np.arange(-30, 0)]).astype(dtype)
    out = np.empty_like(u)
    log1ps(u, out)
    assert worst(out, mpmath.log1p, u, dtype) < eps


def test_tanh():
    x = np.concatenate([np.linspace(-25, 25, 500), 10.0 ** np.arange(-300, 0, 10), [1e30, -1e30]])
    out = np.empty_like(x)
    tanhs(x, out)
    assert worst(out, mpmath.tanh, x, np.float64) < 3


@pytest.mark.parametrize(("dtype", "stand_in"), [(ml_dtypes.bfloat16, np.uint16), (np.float16, np.int16)])
def test_16_bit_floats_are_widened_and_rounded_as_numpy_does(dtype, stand_in):
    every = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(2**16, np.float32)
    loaded(every.view(stand_in), wide)
    assert np.array_equal(wide, every.view(dtype).astype(np.float32), equal_nan=True)

    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    narrow = np.empty(4 * 10**5 + 2 * 2**16, stand_in)
    with np.errstate(all="ignore"):
        halfway = (wide + np.nextafter(every.view(dtype), dtype(np.inf)).astype(np.float32)) / 2
        x = np.concatenate([x, wide, halfway, rng.normal(0, 1, 3 * 10**5).astype(np.float32)])
        stored(x, narrow)
        assert np.array_equal(narrow.view(dtype).astype(np.float32), x.astype(dtype).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1000, 1024, 1025, 5000])
def test_bits_depend_on_no_option(dtype, columns):
    x = np.random.default_rng(0).normal(0, 3, (9, columns)).astype(dtype)
    labels = np.arange(9) % columns
    plain = _numba.row_stats(x, labels)
    rich = _numba.row_stats(x, labels, also=("argmax", "moment", "rank"))
    for name in ("max", "rest", "label_logit"):
        assert np.array_equal(getattr(plain, name), getattr(rich, name))
    alone = _numba.row_stats(x[4:5], labels[4:5])
    assert alone.rest[0] == plain.rest[4]


@pytest.mark.parametrize("gap", [50, 90, 200, 700])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_the_rest_of_a_row_is_kept_however_small(gap, dtype):
    x = np.zeros((1, 3000), dtype)
    x[0, 1500] = gap
    gap = float(x[0, 1500])
    assert _numba.row_stats(x).rest == pytest.approx(2999 * np.exp(-gap), rel=1e-6)


@pytest.mark.parametrize("top", [65536.0, 70000.0, 1e30])
def test_huge_logits(top):
    x = np.full((1, 2000), -np.inf, np.float32)
    x[0, [7, 1100, 1999]] = [np.float32(top), np.nextafter(np.float32(top), np.float32(0)), -3e38]
    expected = np.exp(float(x[0, 1100]) - float(x[0, 7]))
    assert _numba.row_stats(x).rest == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("top", "others"), [(0, -88), (-31, -105), (14, -60), (-10, -85)])
def test_entropy_of_a_confident_row(top, others):
    x = np.full((1, 100), others, np.float32)
    x[0, 3] = top
    with mpmath.workdps(60):
        weight = mpmath.exp(others - top)
        total = 1 + 99 * weight
        expected = float(mpmath.log(total) - 99 * weight * (others - top) / total)
    assert gx.entropy(x, backend="numba")[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("others", "gap", "vocab"), [(10005.763, 6.8359375, 960), (2.923396, 6.889886, 1023)])
def test_many_equal_logits(others, gap, vocab):
    x = np.full((1, vocab), others, np.float32)
    x[0, 0] += np.float32(gap)
    expected = np.log1p((vocab - 1) * np.exp(float(x[0, 1]) - float(x[0, 0])))
    loss = gx.cross_entropy(x, [0], backend="numba")
    assert abs(loss - expected) / expected < 4 * np.finfo(np.float32).eps


def test_logits_too_far_apart_for_float64():
    x = np.array([[1.7e308, -1.7e308]])
    loss, dlogits = gx.cross_entropy_and_grad(x, [0], backend="numba")
    assert loss == 0
    assert (dlogits == 0).all()


def test_softmax_is_at_most_1():
    x = np.random.default_rng(0).normal(0, 5, (2000, 50)).astype(np.float32)
    assert gx.softmax(x, backend="numba").max() <= 1
    _, dlogits = gx.cross_entropy_and_grad(x, x.argmax(axis=1), reduction="sum", backend="numba")
    assert np.abs(dlogits).max() <= 1


# ---- choice ----


def test_numba_is_chosen_where_it_is_installed():
    assert backends.backend_of(np.zeros(3)) is _numba
    assert backends.backend_of(np.zeros(3), "numpy").__name__.endswith("_numpy")


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    backends._in_memory.cache_clear()
    yield
    backends._in_memory.cache_clear()


def test_without_numba_numpy_does_all(without_numba):
    assert backends.backend_of(np.zeros(3)).__name__.endswith("_numpy")
    with pytest.raises(ModuleNotFoundError, match=r"^backend 'numba' needs Numba, .*: pip install 'gpuxent\[cpu\]'$"):
        gx.cross_entropy(np.zeros((2, 3)), [0, 1], backend="numba")


def test_a_numba_that_cannot_be_loaded_is_warned_of(monkeypatch):
    def broken(name):
        if name.endswith("_numba"):
            raise ImportError("Numba needs NumPy 1.0 or less")
        return real(name)

    real = backends.import_module
    monkeypatch.setattr(backends, "import_module", broken)
    backends._in_memory.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="needs NumPy 1.0 or less"):
            assert gx.logsumexp(np.zeros(1)) == 0
        assert gx.logsumexp(np.zeros(1)) == 0  # warned of once
        with pytest.raises(ImportError, match=r"needs NumPy 1.0 or less"):
            gx.logsumexp(np.zeros(1), backend="numba")
    finally:
        backends._in_memory.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("NUMBA_DISABLE_JIT", "1", "only compiled"), ("NUMBA_CPU_NAME", "generic", "no FMA")],
)
def test_numba_that_cannot_compile_the_loops_is_not_used(variable, value, reason):
    code = """
import warnings, numpy, gpuxent
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(gpuxent.softmax(numpy.zeros(2, numpy.float16)), *[warning.message for warning in caught])
"""
    printed = " ".join(run(code, **{variable: value}))
    assert printed.startswith("[0.5 0.5] Numba is installed but cannot be loaded (")
    assert reason in printed


# ---- the cache on disk ----

SCORE = """
import numpy as np, gpuxent as gx
assert gx.cross_entropy(np.zeros((2, 4), np.float32), [0, 1]).round(6) == np.log(4).round(6)
from gpuxent.backends import _numba_rows as loops
hits, misses = loops.measure_rows.stats.cache_hits, loops.measure_rows.stats.cache_misses
print(sum(hits.values()), sum(misses.values()))
"""


def run(code, **environment):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.split()


def test_a_second_process_does_not_compile_again(tmp_path):
    """Unless a source is another one, also of what the function calls; or a file of the cache is broken."""
    copy = tmp_path / "copy"
    shutil.copytree(Path(gx.__file__).parent, copy / "gpuxent", ignore=shutil.ignore_patterns("__pycache__"))
    here = {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    sources = copy / "gpuxent" / "backends"
    assert run(SCORE, **here) == ["0", "1"]
    os.utime(sources / "_numba_rows.py", (0, 0))  # as in another checkout
    assert run(SCORE, **here) == ["1", "0"]
    for suffix in ("nbc", "nbi"):
        for file in (tmp_path / "cache").rglob(f"*measure_rows*.{suffix}"):
            file.write_bytes(b"")
        assert run(SCORE, **here) == ["0", "1"]
    assert run(SCORE, **here) == ["1", "0"]
    with (sources / "_numba_tiles.py").open("a") as file:
        file.write("\n")
    assert run(SCORE, **here) == ["0", "1"]


def test_code_for_another_signature_is_not_taken_from_the_cache(tmp_path):
    """Two processes that save at once can leave an index in which two signatures have one file."""
    code = """
import numpy as np, ml_dtypes, gpuxent as gx
x = np.random.default_rng(0).normal(0, 3, (4, 100)).astype(DTYPE)
print(gx.cross_entropy(x, [0, 1, 2, 3]).round(6))
"""
    bfloat16, float16 = (code.replace("DTYPE", name) for name in ("ml_dtypes.bfloat16", "np.float16"))
    expected = run(bfloat16, NUMBA_CACHE_DIR=str(tmp_path))
    run(float16, NUMBA_CACHE_DIR=str(tmp_path))
    first, second = sorted(tmp_path.rglob("*measure_rows*.nbc"))
    first.write_bytes(second.read_bytes())
    assert run(bfloat16, NUMBA_CACHE_DIR=str(tmp_path)) == expected


NOWHERE = """
import numba.core.caching as caching
def refuse(self):
    raise PermissionError("read-only")
caching._CacheLocator.ensure_cache_path = refuse
"""
FULL = """
import numba.core.caching as caching
def full(self, *arguments):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = full
"""


@pytest.mark.parametrize("trouble", [NOWHERE, FULL], ids=["no folder is writable", "the disk is full"])
def test_without_a_cache_it_compiles_in_memory(trouble, tmp_path):
    code = trouble + SCORE.replace("print(sum(hits.values()), sum(misses.values()))", "print(gx.__version__)")
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)) == [gx.__version__]
    assert not list(tmp_path.rglob("*.nb?"))


# ---- threads and forks ----

FORK = """
import os, threading, time, numpy as np, gpuxent as gx
x, labels = np.random.default_rng(0).normal(size=(64, 8192)).astype(np.float32), np.arange(64)
{before}
child = os.fork()
if child == 0:
    os._exit(0 if gx.cross_entropy(x, labels) > 0 else 1)
deadline = time.monotonic() + 120
while True:
    done, status = os.waitpid(child, os.WNOHANG)
    if done or time.monotonic() > deadline:
        break
    time.sleep(0.05)
os.kill(child, 9) if not done else None
print(done == child and status == 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    "before",
    [
        "gx.cross_entropy(x, labels)  # the pool has threads",
        "threading.Thread(target=gx.cross_entropy, args=(x.astype(np.float64), labels)).start(); time.sleep(1)",
    ],
    ids=["after a call", "while another thread compiles"],
)
def test_a_forked_child_works(before, tmp_path):
    assert run(FORK.format(before=before), NUMBA_CACHE_DIR=str(tmp_path)) == ["True"]
