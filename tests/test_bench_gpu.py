"""The benchmark on a GPU: on one that is emulated where there is none, with a clock that is made up."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import ON_GPU
from typer.testing import CliRunner

import bench.__main__ as command
from bench import devices, problems, report, results, run, torch_rivals
from bench import oracle as bench_oracle
from bench.cases import COPY, LIMIT, OURS, OURS_KERNEL, TASKS, Case
from bench.contenders import Prepared
from bench.timing import Plan, Timed

cupy = pytest.importorskip("cupy")  # the real one on a GPU, else the emulation that conftest installs
pytestmark = [pytest.mark.gpu] if ON_GPU else []

ONCE = Plan(seconds=0, least=1, most=1)
TINY = Case("loss", "f32", 9, 40)


@pytest.fixture(scope="module")
def gpu():
    return devices.device("gpu")


@pytest.fixture
def clock(monkeypatch):
    """The emulation has no clock: what is recorded and held is only written down, and every turn takes 2 s."""
    from bench.gpu import timing

    log = []
    if not ON_GPU:
        monkeypatch.setattr(timing, "elapsed", lambda start, end: 2.0)
        monkeypatch.setattr(timing, "hold", lambda seconds: log.append(("hold", seconds)))
    return log


@pytest.fixture
def few_places(monkeypatch):
    from bench.gpu import problems as gpu_problems

    monkeypatch.setattr(gpu_problems, "MOST", 3)
    gpu_problems._places.cache_clear()
    yield
    gpu_problems._places.cache_clear()


@pytest.fixture
def torch_here(monkeypatch):
    """PyTorch on the CPU stands in for PyTorch on the GPU."""
    if not ON_GPU:
        tensor = torch_rivals.tensor
        monkeypatch.setattr(torch_rivals, "tensor", lambda array: tensor(array.get()))


# ---- cases ----


def test_cases_are_those_that_the_issue_asks_for(gpu):
    for cases in (gpu.cases, gpu.quick):
        assert len({case.name for case in cases}) == len(cases)
        assert {case.dtype for case in cases} == set(problems.DTYPES)
        assert {case.task for case in cases} == set(TASKS)
    vocabularies = {256, 1000, 4096, 16384, 32000, 50257, 65536, 128256, 151936, 256000}
    for task, dtypes in {"loss": ("f32", "bf16", "f16"), "inplace": ("f32", "bf16"), "grad": ("bf16",)}.items():
        for dtype in dtypes:
            assert {case.vocab for case in gpu.cases if (case.task, case.dtype) == (task, dtype)} >= vocabularies
    few = {case.rows for case in gpu.cases if case.task == "loss" and case.vocab == 128256 and case.rows < 100}
    assert few == {1, 4, 16, 64}
    for case in gpu.cases:
        assert case.rows < 100 or 0.9e9 < case.logits_bytes < 2.3e9, case.name
        assert case.rows * case.vocab < 2**31  # what rivals can count


def test_targets_are_those_of_the_design_and_can_be_judged(gpu):
    def targets(task, dtype, vocab, rows=None):
        found = [c for c in gpu.cases if (c.task, c.dtype, c.vocab) == (task, dtype, vocab) and rows in (None, c.rows)]
        return {(target.against, target.at_least) for target in found[0].targets}

    for vocab in (16384, 32000, 50257, 65536, 128256, 151936, 256000):
        assert targets("loss", "bf16", vocab, None) == {(COPY, 0.92)}
        assert targets("inplace", "bf16", vocab) == {(LIMIT, 0.88)}
    for vocab in (256, 1000, 4096):
        assert targets("loss", "bf16", vocab) == {(COPY, 0.75)}
        assert targets("inplace", "bf16", vocab) == {(LIMIT, 0.75)}
    for rows in (1, 4, 16, 64):
        assert targets("loss", "bf16", 128256, rows) == {("torch compiled", 2)}
    for case in gpu.cases:
        known = {LIMIT, *run.taking_part(case, gpu)} | ({COPY} if TASKS[case.task].limit == "read" else set())
        assert {target.against for target in case.targets} <= known, case.name
        assert {target.ours for target in case.targets} <= known, case.name


# ---- data ----


@pytest.mark.parametrize(("task", "dtype"), [("loss", "f32"), ("grad", "bf16"), ("soft", "f16"), ("binary", "f32")])
def test_oracle_of_repeated_rows_is_that_of_all_rows(few_places, monkeypatch, task, dtype):
    from bench.gpu import problems as gpu_problems

    monkeypatch.setattr(gpu_problems, "DISTINCT_ROWS", 8)
    case = Case(task, dtype, 27, 50)
    places = gpu_problems.make(case)
    assert len(places) == 3
    logits, labels = (numbers(array) for array in (places[0].logits, places[0].labels))
    assert logits.shape == (27, 50)
    for place in places:
        np.testing.assert_array_equal(numbers(place.logits), logits)
        np.testing.assert_array_equal(numbers(place.labels), labels)
        np.testing.assert_array_equal(numbers(place.scratch), logits)
    np.testing.assert_array_equal(logits[8:16], logits[:8])
    assert not np.array_equal(logits[1:9], logits[:8])
    found = bench_oracle.answer(places[0])
    value = oracle.binary_cross_entropy if task == "binary" else oracle.cross_entropy
    assert found.value == pytest.approx(float(value(logits, labels)), rel=1e-12)
    if task == "grad":
        expected = np.asarray(oracle.cross_entropy_grad(logits, labels), np.float64)
        np.testing.assert_allclose(found.entries, expected, rtol=1e-12)
    if task == "loss":
        np.testing.assert_allclose(found.rows, np.asarray(sum(oracle.row_losses(logits, labels)), float), rtol=1e-12)


def numbers(array):
    found = array.view(np.uint16).get().view(array.dtype) if array.dtype.itemsize == 2 else array.get()
    return found.astype(np.float64) if found.dtype.kind != "i" else found


def test_tasks_on_class_labels_share_their_data(few_places, gpu):
    loss, inplace, soft = (gpu.make(replace(TINY, task=task)) for task in ("loss", "inplace", "soft"))
    assert loss[0].pool is inplace[0].pool
    assert inplace[0].case.task == "inplace"
    assert soft[0].pool is not loss[0].pool
    assert soft[0].labels.shape == soft[0].logits.shape


def test_small_arrays_take_turns_beyond_the_l2_cache(monkeypatch):
    from bench.gpu import problems as gpu_problems

    gpu_problems._places.cache_clear()
    monkeypatch.setattr(gpu_problems, "l2_bytes", lambda: 50_000)
    assert len(gpu_problems.make(Case("loss", "f32", 10, 100))) == 50
    assert len(gpu_problems.make(Case("loss", "f32", 1000, 100))) == 2
    gpu_problems._places.cache_clear()


# ---- limits and timing ----


@pytest.mark.parametrize("size", [16, 4096 * 16, (1 << 20) + 48])
def test_the_read_touches_every_byte(size, gpu):
    from bench.gpu import limits

    words = np.random.default_rng(size).integers(0, 1 << 32, size // 4, dtype=np.uint32)
    totals = cupy.zeros(limits.TOTALS, np.uint32)
    for _ in range(2):
        limits.add_words(cupy.asarray(words), totals)
    assert np.sum(totals.get(), dtype=np.uint64) % 2**32 == 2 * np.sum(words, dtype=np.uint64) % 2**32


def test_limits_move_what_the_task_does_from_and_to_other_places_each_time(few_places, gpu, monkeypatch):
    from bench.gpu import limits

    moved = []

    def spans(*arrays):
        moved.append([(array.data.ptr, array.nbytes) for array in arrays])

    monkeypatch.setattr(limits, "add_words", lambda data, totals: spans(data))
    monkeypatch.setattr(limits.cupy, "copyto", lambda target, source: spans(target, source), raising=False)
    for task in TASKS:
        case = Case(task, "f32", 8, 40)
        places = gpu.make(case)
        for name, timed in gpu.limits(places).items():
            moved.clear()
            for _ in range(4):
                timed.call()
            kind = TASKS[task].limit if name == LIMIT else "copy"
            assert {len(spans) for spans in moved} == {2 if kind == "copy" else 1}
            assert {sum(size for _, size in spans) for spans in moved} == {case.traffic}, (task, name)
            if TASKS[task].read == 1:
                assert moved[0] != moved[1]


def test_turns_time_as_many_calls_as_one_restoring_serves(gpu, clock):
    log = []
    timed = Timed(lambda: log.append("call"), lambda: log.append("before"), calls=4)
    assert gpu.turn(timed) == (0.5 if not ON_GPU else pytest.approx(0, abs=1))
    assert log == ["before", *["call"] * 4]
    log.clear()
    gpu.busy_turn(timed)
    assert log == ["before", *["call"] * 4] * 2
    if not ON_GPU:
        ((what, seconds),) = clock
        assert what == "hold"
        assert 1e-3 <= seconds <= 50e-3


# ---- one case from beginning to end ----


def measure(gpu, case, *names, **more):
    contenders = {name: gpu.contenders[case.task][name] for name in names} | more
    left_out = Counter()
    return run.measure(case, gpu, ONCE, left_out=left_out, contenders=contenders), left_out


@pytest.mark.parametrize(("task", "dtype"), [*((task, "bf16") for task in TASKS), ("loss", "f16"), ("inplace", "f32")])
def test_contenders_answer_and_are_timed(task, dtype, gpu, clock, few_places, torch_here):
    names = [name for name in (OURS, OURS_KERNEL, "torch", "cupy") if name in gpu.contenders[task]]
    result, left_out = measure(gpu, Case(task, dtype, 70, 300), *names)
    assert result.faults == ()
    assert left_out == {}
    extra = [COPY] if TASKS[task].limit == "read" else []
    assert [found.name for found in result.contenders] == [*names, *extra]
    if not ON_GPU:
        assert result.limit.median == result.contender(OURS).busy == pytest.approx(2 / 3)
    for name in names[-2:]:
        if name in ("torch", "cupy") and task == "loss":
            assert 0.99 < result.contender(name).worst_error < 1.01  # p = 1 - 1e-12 is 1 to them
        elif name in ("torch", "cupy"):
            assert result.contender(name).worst_error < 1.01


@pytest.mark.parametrize("name", [OURS, OURS_KERNEL])
def test_a_wrong_answer_of_ours_is_refused(name, gpu, clock, few_places):
    honest = gpu.contenders["loss"][name]

    def wrong(problem):
        prepared = honest(problem)
        answer = prepared.answer()
        return Prepared(prepared.call, lambda: replace(answer, value=answer.value * (1 + 2e-6)))

    result, _ = measure(gpu, TINY, **{name: wrong})
    assert len(result.faults) == 1
    assert result.faults[0].startswith(f"{name}: mean off by")
    assert result.contenders == ()


def test_a_rival_that_fails_is_left_out_with_its_words(gpu, clock, few_places):
    def breaks(problem):
        raise RuntimeError("CUDA error: no luck\nmore")

    result, left_out = measure(gpu, TINY, OURS, "cupyx", odd=breaks)
    assert result.contenders[0].name == OURS
    assert left_out["odd: RuntimeError: CUDA error: no luck"] == 1


def test_the_command_names_its_results_after_the_device(gpu, clock, few_places, monkeypatch, tmp_path):
    device = replace(gpu, quick=(replace(TINY, compiling=False),), quick_plan=ONCE)
    only = {"loss": {name: gpu.contenders["loss"][name] for name in (OURS, OURS_KERNEL, "cupy")}}
    monkeypatch.setattr(devices, "device", lambda name: replace(device, contenders=only))
    monkeypatch.setattr(report, "draw", lambda run, path: None)
    done = CliRunner().invoke(command.app, ["--device", "gpu", "--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 120
    (path,) = tmp_path.iterdir()
    found = results.from_json(path.read_text())
    if not ON_GPU:
        assert path.name == "gpu-emulated-gpu.json"
        assert found.device["caches"] == {"L2": "50M"}
        assert found.device["compute capability"] == "9.0"
        assert "Emulated GPU, 132 multiprocessors, L2 50M" in done.stdout
    assert [each.name for each in found.cases[0].contenders] == [OURS, OURS_KERNEL, "cupy", COPY]


def test_a_picture_is_drawn(gpu, clock, few_places, tmp_path):
    case = Case("loss", "f32", 9, 40, targets=gpu.cases[0].targets)
    result, _ = measure(gpu, case, OURS_KERNEL, OURS, "cupy")
    made = results.Run(gpu.describe(), {"torch": "2"}, {}, "2026-01-01", "bench", (result,))
    report.draw(made, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_without_cupy_or_a_gpu_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    done = CliRunner().invoke(command.app, ["--device", "gpu"])
    assert done.exit_code == 2
    assert done.stderr.startswith("bench: a GPU is measured through CuPy, which cannot be imported")
    assert done.stderr.count("\n") == 1


# ---- scripts/gpu ----

PYTHON = """#!/usr/bin/env bash
# A Python that finds a GPU, and says what it is asked to run; "racecheck" and "bench" fail.
if [[ $1 == - ]]; then cat >/dev/null; exit 0; fi
echo "python $*"
[[ "$*" == *"-m bench"* ]] && exit 7
exit 0
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $2"
[[ $2 == racecheck ]] && exit 9
exit 0
"""


@pytest.fixture
def script(tmp_path):
    """scripts/gpu with these two: (status, lines of stdout, stderr)."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)

    def run(*arguments, python=str(tmp_path / "python")):
        environment = {**os.environ, "PYTHON": python, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = [str(Path(__file__).parents[1] / "scripts" / "gpu"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def test_the_script_runs_all_parts_and_ends_with_the_status_of_the_first_that_failed(script):
    status, lines, errors = script("--quick")
    assert status == 9
    parts = ["tests", "sanitize", "bench", "linear"]
    assert [line for line in lines if line.startswith("====")] == [f"==== {part}" for part in parts]
    assert [line for line in lines if line.startswith("sanitizer")] == ["sanitizer memcheck", "sanitizer racecheck"]
    assert "python -m bench --device gpu --minutes 8 --quick" in lines
    assert lines[-1] == "python -m bench.linear --device gpu --quick"
    failed = ("sanitize failed with status 9", "bench failed with status 7", "linear failed with status 7")
    assert errors == "".join(f"gpu: {what}\n" for what in failed)


def test_one_part_takes_arguments(script):
    status, lines, _ = script("tests", "tests/test_gpu.py", "-k", "graphs")
    assert status == 0
    assert lines[1:] == ["python -m pytest -m gpu -W default -p no:cacheprovider tests/test_gpu.py -k graphs"]
    assert script("bench", "--output", "here", "loss-*")[1][-1].endswith(" --minutes 8 --output here loss-*")
    status, lines, errors = script("loss-*")
    assert (status, lines) == (2, [])
    assert errors.startswith("gpu: arguments go to one part")


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_in_a_sentence(script):
    status, lines, errors = script("tests", python=sys.executable)
    assert (status, lines) == (2, [])
    assert errors.startswith(("gpu: there is no GPU that CuPy", f"gpu: {sys.executable} lacks cupy"))
    assert errors.count("\n") == 1
