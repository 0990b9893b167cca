"""What a run depends on: any change is noticed and named; and which machines give the same last bits."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import dask.array as da
import numpy as np
import pytest

import gpuxent
from gpuxent.evaluation.runs import fingerprint as module
from gpuxent.evaluation.runs.fingerprint import computed_by, differences, fingerprint
from gpuxent.evaluation.sources import ArraySource, DaskSource, FileStamp, open_source


def recorded(sources, **options):
    """As it comes back from the ledger."""
    return json.loads(json.dumps(fingerprint(sources, options), allow_nan=False))


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "logits.npy", np.zeros((16, 64), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(16, np.int64))
    return tmp_path


def of_files(folder, **options):
    return recorded({name: open_source(folder / f"{name}.npy") for name in ("logits", "labels")}, **options)


def touch(path, seconds=0):
    """Another time of change; the content stays."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1000 + seconds * 10**9))


def test_the_same_files(files):
    assert differences(of_files(files), of_files(files)) == []
    about = of_files(files)["sources"]["logits"]
    size = (files / "logits.npy").stat().st_size
    assert (about["name"], about["files"], about["bytes"]) == (str(files / "logits.npy"), 1, size)
    assert (about["shape"], about["dtype"]) == ([16, 64], "float32")


def test_a_relative_name_is_the_same_file(files, monkeypatch):
    absolute = of_files(files)
    monkeypatch.chdir(files.parent)
    assert differences(absolute, of_files(files.relative_to(files.parent))) == []


def test_changed_files(files, tmp_path):
    before = of_files(files)
    np.save(files / "logits.npy", np.zeros((16, 128), np.float32))
    touch(files / "labels.npy")
    found = differences(before, of_files(files))
    assert found == [
        "logits changed: shape (16, 64) -> shape (16, 128)",
        "logits changed: 4,224 bytes -> 8,320 bytes",
        "labels changed: a file was written to again (256 bytes as before)",
    ]
    np.save(files / "labels.npy", np.zeros(16, np.int32))
    assert "labels changed: int64 -> int32" in differences(before, of_files(files))


def test_another_file(files):
    before = of_files(files)
    (files / "logits.npy").rename(files / "other.npy")
    sources = {"logits": open_source(files / "other.npy"), "labels": open_source(files / "labels.npy")}
    assert differences(before, recorded(sources)) == [f"logits: {files}/logits.npy -> {files}/other.npy"]


def test_sources_that_come_and_go(files):
    labels = open_source(files / "labels.npy")
    without, given = recorded({"documents": None}), recorded({"documents": labels})
    assert differences(without, given) == [f"documents: none -> {files}/labels.npy"]
    assert differences(given, without) == [f"documents: {files}/labels.npy -> none"]
    assert differences(without, recorded({})) == []


@dataclass(frozen=True)
class Shards:
    """A source of several files."""

    stamps: list
    name: str = "shards"
    shape = (4,)
    dtype = np.dtype(np.int64)

    def files(self):
        return self.stamps


def test_many_files():
    def of(*stamps):
        return recorded({"logits": Shards([FileStamp(f"/data/{path}", size, time) for path, size, time in stamps])})

    one, two = ("a/0", 10, 5), ("b/1", 20, 6)
    assert differences(of(one, two), of(two, one)) == []
    assert differences(of(one, two), of(one)) == [
        "logits changed: 2 files -> 1 files",
        "logits changed: 30 bytes -> 10 bytes",
    ]
    again = ["logits changed: a file was written to again (30 bytes as before)"]
    for changed in [("b/1", 20, 7)], [("b/2", 20, 6)], [("b/1", 20, 6), ("a/0", 10, 6)]:
        others = [stamp for stamp in (one, two) if stamp[0] not in [path for path, *_ in changed]][: 2 - len(changed)]
        assert differences(of(one, two), of(*others, *changed)) == again
    swapped = of(("a/0", 20, 5), ("b/1", 10, 6))
    assert differences(of(one, two), swapped) == again


def test_arrays_in_memory(monkeypatch):
    monkeypatch.setattr(module, "HASHED_AT_ONCE", 100)
    logits = np.arange(7 * 3 * 5, dtype=np.float32).reshape(7, 3, 5)
    before = recorded({"logits": ArraySource(logits)})
    assert before["sources"]["logits"]["sha256"] == hashlib.sha256(logits.tobytes()).hexdigest()
    fortran = np.asfortranarray(logits)
    for same in (logits.copy(), fortran, np.repeat(logits, 2, axis=1)[:, ::2]):
        assert differences(before, recorded({"logits": ArraySource(same)})) == []
    changed = logits.copy()
    changed[6, 2, 4] += 1
    assert differences(before, recorded({"logits": ArraySource(changed)})) == [
        "logits changed: the array has other values (420 bytes as before)"
    ]
    labels = np.arange(1000)
    digest = recorded({"labels": ArraySource(labels)})["sources"]["labels"]["sha256"]
    assert digest == hashlib.sha256(labels.tobytes()).hexdigest()
    for empty in (np.zeros(0, np.int64), np.zeros((0, 5)), np.zeros((5, 0))):
        digest = recorded({"a": ArraySource(empty)})["sources"]["a"]["sha256"]
        assert digest == hashlib.sha256(b"").hexdigest()


def test_arrays_of_dask_are_not_computed(no_compute):
    logits = np.arange(15.0).reshape(3, 5)
    with no_compute():
        one, same, other = (recorded({"a": DaskSource(da.from_array(x) * 2)}) for x in (logits, logits.copy(), -logits))
    assert differences(one, same) == []
    assert differences(one, other) == ["a changed: the array has other values (120 bytes as before)"]


def test_options():
    def of(**options):
        return recorded({}, **options)

    before = of(temperature=1.0, topk=(1, 5), softcap=None, weight=np.ones(3))
    assert differences(before, of(temperature=np.float64(1), topk=[1, 5], softcap=None, weight=np.ones(3))) == []
    assert differences(before, of(temperature=0.8, topk=(1,), softcap=30.0, weight=np.zeros(3))) == [
        "option temperature: 1.0 -> 0.8",
        "option topk: [1, 5] -> [1]",
        "option softcap: None -> 30.0",
        f"option weight: {before['options']['weight']} -> {of(w=np.zeros(3))['options']['w']}",
    ]
    assert differences(of(), of(shift=1)) == ["option shift: not given -> 1"]
    assert differences(of(clip=np.inf), of(clip=np.inf)) == []
    assert differences(of(clip=np.nan), of(clip=np.nan)) == []
    with pytest.raises(TypeError, match="option thing must be made of numbers, strings and arrays, got object"):
        of(thing=object())


def test_versions(monkeypatch):
    before = recorded({})
    monkeypatch.setattr(gpuxent, "__version__", "99.0")
    after = recorded({})
    assert differences(before, after) == [f"gpuxent {before['gpuxent']} -> 99.0"]
    assert differences({"format": 0}, after) == ["format 0 -> 1"]


# ---- who computes ----


def test_the_kinds_of_backends():
    from importlib.metadata import version

    numpy, numba = computed_by("numpy"), computed_by("numba")
    assert computed_by(None) == numba
    for text, name in ((numpy, "numpy"), (numba, "numba")):
        assert text.startswith(f"{name} on {platform.machine()} ")
        assert f"gpuxent {gpuxent.__version__}, numpy {np.__version__}" in text
    assert f"numba {version('numba')}, llvmlite {version('llvmlite')}" in numba
    assert "numba" not in numpy
    with pytest.raises(ValueError, match="backend must be None or one of"):
        computed_by("torch")


@pytest.mark.parametrize(
    ("backend", "setting"),
    [
        ("numpy", {"NPY_DISABLE_CPU_FEATURES": "X86_V4 X86_V3 AVX512_ICL AVX512F AVX2"}),
        ("numba", {"NUMBA_CPU_NAME": "haswell"}),
        ("numba", {"NUMBA_CPU_FEATURES": "+sse2"}),
    ],
)
def test_other_code_is_another_kind(backend, setting):
    """As on an older CPU: NumPy and Numba take the loops that it can run."""
    if backend == "numpy" and platform.machine() != "x86_64":
        pytest.skip("the names of features are those of x86-64")
    code = f"from gpuxent.evaluation.runs.fingerprint import computed_by; print(computed_by({backend!r}))"
    found = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=os.environ | env,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for env in ({}, setting)
    ]
    assert found[0] == computed_by(backend)
    assert found[1].startswith(f"{backend} on {platform.machine()} ")
    assert found[1] != found[0]


def test_the_kind_of_a_gpu():
    from gpuxent.backends import _cupy_found

    text = computed_by("cupy")
    device = _cupy_found.devices()[0]
    assert text.startswith(f"cupy on {device.name} (compute capability {device.compute_capability}), gpuxent ")
    assert f"cupy {_cupy_found.versions()['cupy']}" in text


@pytest.mark.parametrize(
    ("cpuinfo", "says"),
    [
        (
            "vendor_id: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n\nprocessor: 1\n",
            "GenuineIntel family 6 model 143",
        ),
        ("CPU implementer : 0x41\nCPU part\t: 0xd40\n", "implementer 0x41 part 0xd40"),
        ("model name : SiFive\n", "SiFive"),
        ("processor: 0\n", ""),
    ],
)
def test_names_of_cpus(monkeypatch, cpuinfo, says):
    monkeypatch.setattr(module.Path, "read_text", lambda path: cpuinfo)
    assert " ".join(module._cpu_model()) == says
