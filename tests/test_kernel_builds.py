"""scripts/compile_kernels.py finds what it is there for: spills, stack frames, too many registers, wrong code."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from gpuxent.backends import _cupy_core

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "scripts" / "compile_kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def nvrtc(script):
    try:
        return script.nvrtc()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def log(name, stack=0, stores=0, loads=0, registers=40, more=""):
    return (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"ptxas         .     {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers{more}\n"
    )


# ---- what the compiler says ----


def test_figures_are_read_from_the_log_of_the_compiler(script):
    text = "ptxas info    : 60 bytes gmem\n" + log("_Za") + log("_Zb", registers=255, stores=8, loads=16, stack=24)
    found = script.figures(text, {"_Za": "a<float>", "_Zb": "b"}, 90)
    assert found == [script.Kernel("a<float>", 90, 40, 0, 0), script.Kernel("b", 90, 255, 24, 16)]


def test_what_is_not_inlined_counts_for_its_kernel(script):
    called = (
        "ptxas info    : Function properties for _Zhelper\n"
        "ptxas         .     48 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n"
    )
    (found,) = script.figures(log("_Za") + called, {"_Za": "a"}, 75)
    assert (found.stack, found.spills) == (48, 4)
    (found,) = script.figures(log("_Za", more=", 512 bytes cumulative stack size"), {"_Za": "a"}, 75)
    assert found.stack == 512


@pytest.mark.parametrize("text", [log("_Za").replace("Used", "Took"), log("_Za").replace("stack frame", "frame"), ""])
def test_a_log_that_cannot_be_read_is_an_error(script, text):
    with pytest.raises(script.CompileError, match="of a<int>"):
        script.figures(text, {"_Za": "a<int>"}, 90)


# ---- judging ----


def test_faults_name_kernel_architecture_and_figure(script):
    kernels = [
        script.Kernel("good", 90, 40, 0, 0),
        script.Kernel("wide", 90, 41, 0, 0),
        script.Kernel("spilling", 75, 40, 0, 12),
        script.Kernel("framed", 80, 40, 16, 0),
        script.Kernel("new", 120, 33, 0, 0),
    ]
    ceilings = {name: {str(arch): 40 for arch in script.ARCHS} for name in ("good", "wide", "spilling", "framed")}
    assert script.faults(kernels, ceilings) == [
        "wide on sm_90: 41 registers, ceiling 40",
        "spilling on sm_75: 12 bytes of spills",
        "framed on sm_80: a stack frame of 16 bytes",
        "new on sm_120: 33 registers, and no ceiling is stored: --update stores it",
    ]


def test_new_ceilings_keep_what_was_not_compiled_and_drop_what_is_gone(script, tmp_path):
    old = {"kept": {"75": 30, "90": 50}, "gone": {"90": 10}}
    kernels = [script.Kernel("kept", 90, 48, 0, 0), script.Kernel("new", 100, 20, 0, 0)]
    new = script.updated(old, kernels, {"kept", "new"})
    assert new == {"kept": {"75": 30, "90": 48}, "new": {"100": 20}}
    path = tmp_path / "ceilings.json"
    script.write_ceilings(path, "13.0", new)
    assert script.read_ceilings(path) == ("13.0", new)
    assert len(path.read_text().splitlines()) == 7  # a kernel a line


def test_feature_combinations_are_compiled_for_one_architecture_unless_all_are_wanted(script):
    builds = [
        _cupy_core.Build(("a",), ("plain",), every_arch=True),
        _cupy_core.Build(("a",), ("feature",), every_arch=False),
        _cupy_core.Build(("a",), ("cluster",), every_arch=True, least_arch=90),
        _cupy_core.Build(("a",), ("newest",), every_arch=False, least_arch=100),
    ]

    def archs(everything):
        chosen = script.units(builds, script.ARCHS, everything)
        return {build.names[0]: [u.arch for u in chosen if u.names == build.names] for build in builds}

    all_of_them = [75, 80, 86, 89, 90, 100, 120]
    few = {"plain": all_of_them, "feature": [90], "cluster": [90, 100, 120], "newest": [100]}
    assert archs(False) == few
    every = {"plain": all_of_them, "feature": all_of_them, "cluster": [90, 100, 120], "newest": [100, 120]}
    assert archs(True) == every


def test_builds_name_every_kernel_of_every_file_once(script):
    builds = list(_cupy_core.builds())
    names = [name for build in builds for name in build.names]
    assert len(set(names)) == len(names)
    used = {file for build in builds for file in build.files}
    assert used == {path.stem for path in _cupy_core.FOLDER.glob("*.cu")}


# ---- with the compiler ----

SOURCES = {
    "fine": "template <typename T> __global__ void k(T* x) { x[threadIdx.x] += 1; }",
    "spills": """template <typename T> __global__ __launch_bounds__(1024, 2) void k(T* x) {
        T v[64];
        #pragma unroll
        for (int i = 0; i < 64; ++i) v[i] = x[threadIdx.x + i * 1024];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 64; ++i) x[threadIdx.x * 64 + i] = v[i] * v[(i * 7) % 64];
    }""",
    "frame": """template <typename T> __global__ void k(T* x, const int* where) {
        T v[16];
        for (int i = 0; i < 16; ++i) v[where[i] % 16] = x[i];
        for (int i = 0; i < 16; ++i) x[i] = v[where[i + 16] % 16];
    }""",
    "wrong": "template <typename T> __global__ void k(T* x) { x[0] = nothing; }",
}


@pytest.fixture
def run(script, nvrtc, monkeypatch, tmp_path, capsys):
    """The script on one of SOURCES: (status, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(which, *arguments):
        monkeypatch.setattr(_cupy_core, "source", lambda *files: SOURCES[which])
        builds = [_cupy_core.Build((which,), ("k<float>", "k<double>"), every_arch=True)]
        monkeypatch.setattr(_cupy_core, "builds", lambda: builds)
        given = ["--jobs", "1", "--ceilings", str(tmp_path / "ceilings.json"), "--arch", "75", "--arch", "90"]
        status = script.main([*given, *arguments])
        return status, *capsys.readouterr()

    return run


def test_kernels_within_their_ceilings_pass_and_one_register_more_fails(run, tmp_path):
    status, _, errors = run("fine")
    assert status == 1
    assert "k<float> on sm_75: " in errors
    assert "no ceiling is stored" in errors
    status, text, errors = run("fine", "--update")
    assert (status, errors) == (0, "")
    assert "k                          2" in text
    assert "4 kernels in 2 compilations" in text
    assert run("fine")[0] == 0
    path = tmp_path / "ceilings.json"
    stored = json.loads(path.read_text())
    stored["registers"]["k<double>"]["90"] -= 1
    path.write_text(json.dumps(stored))
    status, _, errors = run("fine")
    assert status == 1
    assert errors.startswith("FAILED: k<double> on sm_90: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(("which", "fault"), [("spills", "bytes of spills"), ("frame", "a stack frame of")])
def test_spills_and_frames_fail_even_as_new_ceilings(run, which, fault):
    status, _, errors = run(which, "--update")
    assert status == 1
    assert re.search(rf"FAILED: k<double> on sm_90: .*{fault}", errors)


def test_code_that_is_wrong_is_named(run):
    status, _, errors = run("wrong", "--update")
    assert status == 1
    assert "FAILED: k<float> (wrong) on sm_75:" in errors
    assert 'identifier "nothing" is undefined' in errors


def test_the_same_code_is_compiled_once(run, script, nvrtc, monkeypatch, tmp_path):
    compiled, compile = [], nvrtc.compile
    monkeypatch.setattr(nvrtc, "compile", lambda *what: compiled.append(what[2]) or compile(*what))
    tables = [run("fine", "--update")[1].partition("NVRTC")[0] for _ in range(2)]
    assert tables[0] == tables[1] != ""
    assert compiled == [75, 90]
    for path in (tmp_path / "gpuxent" / "nvrtc").iterdir():
        path.write_bytes(path.read_bytes()[:-20])  # a disk that was full
    assert run("fine")[0] == 0
    monkeypatch.setattr(script, "wheels", lambda: ["another compiler"])
    assert run("fine")[0] == 0
    monkeypatch.setitem(SOURCES, "fine", SOURCES["fine"].replace("+= 1", "+= 2"))
    assert run("fine")[0] == 0
    assert compiled == [75, 90] * 4
    assert [run("wrong")[0] for _ in range(2)] == [1, 1]  # what is refused is refused again


def test_the_benchmark_s_own_kernels_compile(script, nvrtc):
    source = (ROOT / "bench" / "gpu" / "kernels.cu").read_text()
    for arch in script.ARCHS:
        text, names = nvrtc.compile(source, [], arch, _cupy_core.OPTIONS)
        assert names == []
        found = script.figures(text, {"read_all": "read_all", "hold": "hold"}, arch)
        assert {(kernel.spills, kernel.stack) for kernel in found} == {(0, 0)}
        assert max(kernel.registers for kernel in found) <= 64


def test_without_the_compiler_the_script_says_what_to_install(script, monkeypatch, capsys):
    script.nvrtc.cache_clear()
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert script.main([]) == 2
    assert "the wheel nvidia-cuda-nvrtc is not installed" in capsys.readouterr().err
    script.nvrtc.cache_clear()
