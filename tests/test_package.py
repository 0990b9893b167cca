"""What importing costs, what is public, and that threads are safe to use from anywhere."""

import os
import subprocess
import sys
import threading

import dask
import distributed
import numpy as np
import pytest

import gpuxent as gx

HEAVY = (
    "cupy",
    "dask",
    "distributed",
    "jax",
    "matplotlib",
    "numba",
    "scipy",
    "sklearn",
    "torch",
    "zarr",
    "typer",
    "rich",
)


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_is_light():
    loaded = run(f"import sys, gpuxent; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_numpy_work_does_not_import_dask():
    code = "import sys, numpy, gpuxent; gpuxent.cross_entropy(numpy.zeros((2, 3)), numpy.zeros(2, int));"
    assert run(code + "print('dask' in sys.modules)") == "False"


def test_every_public_function_is_documented_with_an_example():
    assert len(gx.__all__) >= 20
    for name in gx.__all__:
        item = getattr(gx, name)
        if not isinstance(item, type):
            assert ">>> " in item.__doc__, f"{name} has no example"


def test_all_says_what_is_public():
    found = {name for name, item in vars(gx).items() if callable(item) and not name.startswith("_")}
    assert found == set(gx.__all__)


X = np.random.default_rng(0).normal(0, 3, (64, 20000)).astype(np.float32)
Y = np.arange(64)


def test_the_number_of_threads_does_not_change_a_bit():
    expected = gx.cross_entropy_and_grad(X, Y)
    for n in (1, 2, 3, 7):
        with gx.threads(n):
            loss, dlogits = gx.cross_entropy_and_grad(X, Y)
        assert loss == expected[0]
        assert np.array_equal(dlogits, expected[1])


def test_many_callers_at_once():
    expected = gx.cross_entropy(X, Y)
    results = []
    callers = [threading.Thread(target=lambda: results.append(gx.cross_entropy(X, Y))) for _ in range(12)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert results == [expected] * 12


def test_limit_belongs_to_the_context():
    from gpuxent.backends._threads import thread_count

    seen = []
    with gx.threads(1):
        other = threading.Thread(target=lambda: seen.append(thread_count()))
        other.start()
        other.join()
        assert thread_count() == 1
    assert seen == [thread_count()]


def count_threads(_=None):
    from gpuxent.backends._threads import thread_count

    return thread_count()


def test_one_thread_inside_tasks_of_dask():
    tasks = [dask.delayed(count_threads)(i) for i in range(8)]
    assert dask.compute(*tasks, scheduler="threads") == (1,) * 8
    with gx.threads(3):
        assert dask.compute(*tasks, scheduler="threads") == (3,) * 8  # who says a number gets it
    assert count_threads() == len(os.sched_getaffinity(0))


def test_one_thread_on_workers_of_distributed():
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        assert client.gather(client.map(count_threads, range(4))) == [1] * 4
        assert count_threads() == len(os.sched_getaffinity(0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_works():
    code = """
import os, numpy as np, gpuxent as gx
x, y = np.zeros((64, 20000), np.float32), np.zeros(64, int)
expected = gx.cross_entropy(x, y)  # starts the threads, which do not survive the fork
child = os.fork()
if child == 0:
    os._exit(0 if gx.cross_entropy(x, y) == expected else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0"


def test_an_error_in_a_thread_reaches_the_caller():
    from gpuxent.backends import _threads

    def work(items):
        if 50 in items:
            raise RuntimeError("in a thread")

    with gx.threads(2), pytest.raises(RuntimeError, match="in a thread"):
        _threads.run(work, list(range(100)))


def test_a_call_while_python_shuts_down():
    code = """
import atexit, numpy as np, gpuxent as gx
x = np.zeros((400, 3000), np.float32)
for backend in ("numba", "numpy"):
    atexit.register(lambda backend=backend: print(gx.cross_entropy(x, np.zeros(400, int), backend=backend).round(3)))
"""
    assert run(code).split() == ["8.006"] * 2
