"""What is said where CuPy, its driver, a device or the compiler is missing, and what `gpuxent info` shows."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import gpuxent as gx
from gpuxent import backends
from gpuxent.backends import _cupy_found
from gpuxent.cli import app

INSTALL = "pip install 'gpuxent[cuda13]', or 'gpuxent[cuda12]' for an older driver"
CACHES = (_cupy_found.trouble, backends._in_memory, backends._in_gpu_memory)


@pytest.fixture
def put(monkeypatch):
    """Puts a module in CuPy's place; None: there is none."""

    def put(module):
        monkeypatch.setitem(sys.modules, "cupy", module)
        for cache in CACHES:
            cache.cache_clear()

    yield put
    for cache in CACHES:
        cache.cache_clear()


class CUDARuntimeError(RuntimeError):
    pass


ATTRIBUTES = {
    "MultiProcessorCount": 132,
    "L2CacheSize": 50 * 2**20,
    "MaxSharedMemoryPerBlockOptin": 227 * 2**10,
    "MemoryClockRate": 2619000,
    "GlobalMemoryBusWidth": 5120,
}


def cupy_with(version="14.2.0", devices=1, driver=13000, runtime=13020, nvrtc=(13, 2), attributes=ATTRIBUTES):
    """Enough of CuPy for these questions; errors are raised where they are given instead of an answer."""
    asked = []

    def answer(value):
        def call(*_):
            asked.append(value)
            if isinstance(value, Exception):
                raise value
            return value

        return call

    def device(number):
        memory = ((10 + number) * 2**30, 80 * 2**30)
        return SimpleNamespace(mem_info=memory, attributes=attributes, compute_capability="90")

    calls = {
        "getDeviceCount": devices,
        "driverGetVersion": driver,
        "runtimeGetVersion": runtime,
        "getDeviceProperties": {"name": b"NVIDIA H100"},
    }
    return SimpleNamespace(
        __version__=version,
        asked=asked,
        cuda=SimpleNamespace(
            runtime=SimpleNamespace(**{name: answer(value) for name, value in calls.items()}),
            nvrtc=SimpleNamespace(getVersion=answer(nvrtc)),
            Device=device,
        ),
    )


INSUFFICIENT = CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
TROUBLES = {
    "no CuPy": (None, f"the GPU needs CuPy, which is not installed: {INSTALL}"),
    "too old": (
        cupy_with("14.0.0"),
        "the installed CuPy 14.0.0 will not do: gpuxent needs 14.0.1 or later, but not 14.1.0",
    ),
    "much too old": (
        cupy_with("13.6.0"),
        "the installed CuPy 13.6.0 will not do: gpuxent needs 14.0.1 or later, but not 14.1.0",
    ),
    "excluded": (
        cupy_with("14.1.0"),
        "the installed CuPy 14.1.0 will not do: gpuxent needs 14.0.1 or later, but not 14.1.0",
    ),
    "no driver": (cupy_with(devices=INSUFFICIENT, driver=0), "the GPU needs NVIDIA's driver, and there is none"),
    "old driver": (
        cupy_with(devices=INSUFFICIENT, driver=12040),
        "NVIDIA's driver is of CUDA 12.4, and the installed CuPy is for CUDA 13: update the driver, or pip install"
        " 'gpuxent[cuda12]'",
    ),
    "no device": (
        cupy_with(devices=CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")),
        "CuPy has no CUDA device to use: cudaErrorNoDevice: no CUDA-capable device is detected",
    ),
    "none visible": (cupy_with(devices=0), "CuPy has no CUDA device to use: it finds none"),
    "no compiler": (
        cupy_with(nvrtc=RuntimeError("libnvrtc.so.13: cannot open shared object file")),
        f"CuPy does not find NVRTC, which compiles the kernels: {INSTALL}",
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_one_sentence_wherever_the_gpu_is_needed(name, put):
    module, sentence = TROUBLES[name]
    put(module)
    x, y = np.zeros((2, 3)), np.zeros(2, int)
    kind = ModuleNotFoundError if module is None else RuntimeError
    for call in (
        lambda: gx.cross_entropy(x, y, backend="cupy"),
        lambda: gx.softmax(x, backend="cupy"),
        lambda: gx.evaluate(x, y, backend="cupy"),
        lambda: backends.backend_of(type("ndarray", (), {"__module__": "cupy"})()),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == sentence
    assert gx.cross_entropy(x, y) == pytest.approx(np.log(3), rel=1e-15)  # NumPy arrays need none of it


def test_a_cupy_that_cannot_be_imported(put, monkeypatch, tmp_path):
    """CuPy says at length what to do, and last what went wrong."""
    text = "====\\nFailed to import CuPy.\\n\\nOriginal error:\\n  ImportError: libfoo.so\\n====\\n"
    (tmp_path / "cupy.py").write_text(f'raise ImportError("{text}")')
    monkeypatch.syspath_prepend(tmp_path)
    put(None)
    monkeypatch.delitem(sys.modules, "cupy")
    assert repr(_cupy_found.trouble()) == repr(
        RuntimeError("CuPy is installed but cannot be imported: ImportError: libfoo.so")
    )


@pytest.mark.parametrize("version", ["14.0.1", "14.1.1", "14.2.0", "15.0.0a1", "15.1"])
def test_versions_that_will_do(version, put):
    put(cupy_with(version))
    assert _cupy_found.trouble() is None


def test_it_is_asked_once_per_process(put):
    module = cupy_with(devices=CUDARuntimeError("cudaErrorNoDevice"))
    put(module)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="CuPy has no CUDA device"):
            gx.cross_entropy(np.zeros((2, 3)), [0, 0], backend="cupy")
    assert len([answer for answer in module.asked if answer is module.asked[0]]) == 1


def info(*arguments):
    done = CliRunner().invoke(app, ["info", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def shown(text):
    """The table's cells in one line: a long sentence is broken in the table."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("name", TROUBLES)
def test_info_says_what_is_missing(name, put):
    module, sentence = TROUBLES[name]
    put(module)
    table = info()
    assert max(map(len, table.splitlines())) <= 80
    assert sentence in shown(table)
    facts = json.loads(info("--format", "json"))
    assert facts["cuda"]["problem"] == sentence
    assert facts["cuda"]["devices"] == []
    assert facts["cuda"]["cupy"] == (None if module is None else module.__version__)
    assert facts["backends"]["cupy"] is None


def test_info_shows_the_devices(put):
    put(cupy_with(devices=2))
    facts = json.loads(info("--format", "json"))
    assert facts["gpuxent"] == gx.__version__
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["backends"]["cupy"] == "cupy"
    cuda = facts["cuda"]
    assert [cuda[name] for name in ("cupy", "driver", "runtime", "nvrtc", "problem")] == [
        "14.2.0",
        "13.0",
        "13.2",
        "13.2",
        None,
    ]
    assert [device["memory_free"] for device in cuda["devices"]] == [10 * 2**30, 11 * 2**30]
    assert cuda["devices"][1] | {"memory_free": 0} == {
        "number": 1,
        "name": "NVIDIA H100",
        "compute_capability": "9.0",
        "memory_free": 0,
        "memory_total": 80 * 2**30,
        "multiprocessors": 132,
        "l2_cache": 50 * 2**20,
        "shared_memory_per_block": 227 * 2**10,
        "bandwidth": 3352320000000.0,
    }
    table = shown(info())
    for text in (
        "GPU 1 NVIDIA H100, compute capability 9.0 memory 11.0 of 80.0 GiB free",
        "bandwidth by specification 3.35 TB/s multiprocessors 132 L2 cache 50 MiB shared memory per block 227 KiB",
        "backend cupy found, used for CuPy arrays",
    ):
        assert text in table


@pytest.mark.parametrize("clock", [{}, {"MemoryClockRate": 0}])
def test_a_device_that_keeps_its_bandwidth_to_itself(clock, put):
    attributes = {name: value for name, value in ATTRIBUTES.items() if name != "MemoryClockRate"} | clock
    put(cupy_with(attributes=attributes))
    assert json.loads(info("--format", "json"))["cuda"]["devices"][0]["bandwidth"] is None
    assert "bandwidth by specification unknown" in shown(info())


def test_info_outlives_a_device_that_fails(put):
    module = cupy_with()
    module.cuda.Device = lambda number: (_ for _ in ()).throw(CUDARuntimeError("cudaErrorECCUncorrectable"))
    put(module)
    assert "cudaErrorECCUncorrectable" in shown(info())
