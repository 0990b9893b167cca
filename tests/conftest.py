"""What every contract is tested on: each backend, and arrays in memory or of Dask, however they are chunked."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import emulation
import numpy as np
import pytest
from hypothesis import settings

from gpuxent import backends

# A change is judged on the same examples every time; at home every run tries new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def _pieces(size: int, parts: int) -> tuple[int, ...]:
    """An axis in a few uneven chunks."""
    edges = sorted({0, size, *(size * (2 * i + 1) // (2 * parts + 1) for i in range(1, parts))})
    return tuple(b - a for a, b in itertools.pairwise(edges)) or (size,)


def _rows_chunked(array: np.ndarray) -> da.Array:
    return da.from_array(array, chunks=tuple(_pieces(n, 3) for n in array.shape[:-1]) + array.shape[-1:])


def _all_chunked(array: np.ndarray) -> da.Array:
    return da.from_array(array, chunks=tuple(_pieces(n, 3) for n in array.shape))


@dataclass(frozen=True)
class Home:
    """`put` brings rows of logits (or soft labels) there, `compute` brings a result back, errors included."""

    name: str
    put: Callable[[np.ndarray], Any]
    same_bits: bool  # as in memory and in one piece

    def compute(self, result: Any) -> Any:
        return dask.compute(result, scheduler="synchronous")[0]


HOMES = (
    Home("in memory", lambda array: array, True),
    Home("dask, rows", _rows_chunked, True),
    Home("dask, rows and vocabulary", _all_chunked, False),
)


def _has_gpu() -> bool:
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:  # CuPy and its driver have many ways to be absent
        return False


# Without a GPU the CUDA sources run on the CPU, under a module that takes CuPy's place.
ON_GPU = _has_gpu()
if not ON_GPU:
    emulation.install()

BACKENDS = [*backends.BACKENDS, pytest.param("cupy", marks=[pytest.mark.gpu] if ON_GPU else [])]


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that arrays in memory, and blocks of Dask arrays, go to where none is named.

    With "cupy" NumPy arrays go to the GPU and the results come back.
    """
    choose = backends._in_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_in_memory", lambda name: choose(name or request.param))
        yield request.param


@pytest.fixture(params=HOMES, ids=lambda home: home.name)
def home(request: pytest.FixtureRequest) -> Home:
    return request.param


@pytest.fixture
def no_compute():
    """Any computation of a Dask graph inside is an error."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("building the graph computed something")

    return lambda: dask.config.set(scheduler=never)
