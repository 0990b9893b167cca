"""The benchmark harness: it refuses wrong answers, counts and times as it says, and the README says what it found."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
from typer.testing import CliRunner

import bench.__main__ as command
from bench import devices, problems, report, results, run, timing
from bench import oracle as bench_oracle
from bench.cases import OURS, OURS_NUMPY, TASKS, Case, Target, select
from bench.contenders import Contenders, Prepared, Refused, rotating
from bench.cpu import CPU, limits
from bench.cpu import timing as cpu_timing
from bench.cpu.memory import CLEAR_REFS, peak_growth
from bench.cpu.rivals import CONTENDERS
from bench.results import CaseResult, Measurement, Run, judged
from bench.timing import Plan, Timed

ROOT = Path(__file__).parents[1]
ONCE = Plan(seconds=0, least=1, most=1)
CASES, QUICK = CPU.cases, CPU.quick
HONEST = {task: CONTENDERS[task][OURS] for task in TASKS}
TINY = {task: Case(task, "f32", 9, 40) for task in TASKS}


def measure(case, plan=ONCE, **options):
    return run.measure(case, CPU, plan, **options)


def answering(change):
    """Our own contender, its answer changed."""

    def prepare(problem):
        prepared = HONEST[problem.case.task](problem)
        return Prepared(prepared.call, lambda: change(prepared.answer()), prepared.before)

    return prepare


def off(array, index, factor):
    array = array.copy()
    array[index] *= factor
    return array


# ---- nothing wrong is timed ----

WRONG = {
    "mean": ("loss", lambda found: replace(found, value=found.value * (1 + 2e-6))),
    "one row": ("loss", lambda found: replace(found, rows=off(found.rows, 4, 1 + 2e-6))),
    "a confident row": ("loss", lambda found: replace(found, rows=off(found.rows, 0, 0))),
    "NaN": ("loss", lambda found: replace(found, value=float("nan"))),
    "no rows": ("loss", lambda found: replace(found, rows=None)),
    "a row missing": ("soft", lambda found: replace(found, rows=found.rows[1:])),
    "one element": ("binary", lambda found: replace(found, rows=off(found.rows, (3, 7), 1 + 2e-6))),
    "the loss of a gradient": ("grad", lambda found: replace(found, value=found.value * (1 - 2e-6))),
    "the label's entry": ("grad", lambda found: replace(found, entries=off(found.entries, 0, 1 + 2e-6))),
    "one lse": ("logsumexp", lambda found: replace(found, rows=off(found.rows, 8, 1 + 2e-6))),
    "softmax of one row": ("softmax", lambda found: replace(found, entries=off(found.entries, 5, 1 + 2e-6))),
}


@pytest.mark.parametrize(("task", "change"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_of_ours_is_refused(task, change):
    result = measure(TINY[task], contenders={OURS: answering(change)})
    assert len(result.faults) == 1
    assert result.faults[0].startswith("gpuxent: ")
    assert (result.limit, result.contenders) == (None, ())


def test_an_error_of_ours_is_a_fault():
    def broken(problem):
        raise ZeroDivisionError("no luck")

    assert measure(TINY["loss"], contenders={OURS: broken}).faults == ("gpuxent: ZeroDivisionError: no luck",)


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("task", TASKS)
def test_our_contenders_and_torch_answer_every_task(task, dtype):
    contenders = {name: CONTENDERS[task][name] for name in (OURS, OURS_NUMPY, "torch")}
    result = measure(Case(task, dtype, 70, 300), contenders=contenders)
    assert result.faults == ()
    assert [found.name for found in result.contenders] == list(contenders)
    torch = result.contender("torch")
    assert torch.mean_error is None or 0 < torch.mean_error < 0.02
    if task == "loss":
        assert 0.99 < torch.worst_error < 1.01  # p = 1 - 1e-12 is 1 to PyTorch: measured all the same


def test_rivals_that_do_not_take_part_are_counted_with_the_reason():
    def refuses(problem):
        raise Refused("not today")

    def missing(problem):
        import a_library_that_nobody_has  # noqa: F401

    def breaks(problem):
        raise RuntimeError("first line\nsecond line")

    rivals = {"a": refuses, "b": missing, "c": breaks}
    left_out = Counter()
    for _ in range(2):
        result = measure(TINY["loss"], left_out=left_out, contenders=rivals)
        assert result.contenders == ()
        assert result.limit.median > 0
    reasons = ["a: not today", "b: a_library_that_nobody_has is not installed", "c: RuntimeError: first line"]
    assert left_out == dict.fromkeys(reasons, 2)


# ---- the oracle and the data ----


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("task", TASKS)
def test_oracle_agrees_with_the_oracle_of_the_tests(task, dtype):
    problem = problems.make(Case(task, dtype, 70, 120))
    logits, labels, sample = problem.logits, problem.labels, problem.sample
    assert len(sample) == problems.SAMPLE < len(logits)
    found = bench_oracle.answer(problem)
    value = rows = entries = None
    if task == "logsumexp":
        rows = oracle.logsumexp_rows(logits)
    elif task == "softmax":
        entries = oracle.softmax_rows(logits)
    elif task == "pairs":
        rows = np.asarray(oracle.js_divergence(logits, labels), np.float64)
        value = rows.mean()
    elif task == "binary":
        value, rows = oracle.binary_cross_entropy(logits, labels), oracle.binary_losses(logits, labels)
    else:
        value, rows = oracle.cross_entropy(logits, labels), sum(oracle.row_losses(logits, labels))
    if task in ("grad", "inplace", "separate"):
        rows, entries = None, oracle.cross_entropy_grad(logits, labels)
    for mine, theirs in ((found.value, value), (found.rows, rows), (found.entries, entries)):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            theirs = theirs if np.ndim(theirs) == 0 else theirs[sample]
            np.testing.assert_allclose(mine, np.asarray(theirs, dtype=np.float64), rtol=1e-13)


def test_data_can_fail_and_are_the_same_every_time():
    case = Case("loss", "f32", 60, 1000)
    problem, again = problems.make(case), problems.make(case)
    np.testing.assert_array_equal(problem.logits, again.logits)
    np.testing.assert_array_equal(problem.labels, again.labels)
    assert (problem.logits.max(axis=1) > 9000).sum() == 12
    right = problem.logits.argmax(axis=1) == problem.labels
    assert 20 <= right.sum() < 25
    losses = bench_oracle.answer(problem).rows
    assert 0 < losses.min() < 2e-12
    assert problems.make(replace(case, dtype="bf16")).logits.astype(np.float32).max() < 100


# ---- cases and targets ----


def test_names_are_unique_and_targets_can_be_judged():
    for cases in (CASES, QUICK):
        assert len({case.name for case in cases}) == len(cases)
        assert {case.task for case in cases} == set(TASKS) - {"separate"}
        assert {case.dtype for case in cases} == set(problems.DTYPES)
    for case in CASES:
        for target in case.targets:
            assert target.against == "limit" or target.against in CONTENDERS[case.task]
            assert target.ours in CONTENDERS[case.task]


def test_names_and_globs_select_cases_in_their_own_order():
    assert select([], CASES) == list(CASES)
    assert [case.name for case in select(["loss-f32-8192x1000"], CASES)] == ["loss-f32-8192x1000"]
    few = select(["inplace-*", "loss-f32-[18]x*"], CASES)
    assert [case.name for case in few] == [
        "inplace-f32-1024x128256",
        "inplace-bf16-1024x128256",
        "loss-f32-1x128256",
        "loss-f32-8x128256",
    ]
    with pytest.raises(ValueError, match="no case is named 'loss-f32-8192x1001'; close to it: loss-f32-8192x1000"):
        select(["loss-*", "loss-f32-8192x1001"], CASES)


def test_traffic_is_what_has_to_be_moved():
    assert Case("loss", "f32", 3, 5).traffic == 60
    assert Case("soft", "bf16", 3, 5).traffic == 60
    assert Case("grad", "f16", 3, 5).traffic == 60


def result_of(case=TINY["loss"], limit=1.0, **medians):
    measured = tuple(Measurement(name.replace("_", " "), s, s, s, rounds=1) for name, s in medians.items())
    return CaseResult.of(case, limit=Measurement("limit", limit, limit, limit, rounds=1), contenders=measured)


def test_targets_are_judged_by_medians():
    result = result_of(gpuxent=2.0, gpuxent_numpy=5.0, torch=10.0)
    targets = Target("torch", 5.0), Target("limit", 0.6), Target("torch", 1.9, OURS_NUMPY), Target("jax/optax", 1)
    verdicts = judged(result, targets)
    assert [(verdict.reached, verdict.met) for verdict in verdicts] == [(5.0, True), (0.5, False), (2.0, True)]


# ---- timing, limits, memory ----


def test_only_the_call_is_timed_and_turns_are_interleaved(monkeypatch):
    clock = [0.0]
    log = []

    def act(what, takes):
        def run():
            log.append(what)
            clock[0] += takes

        return run

    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cpu_timing, "perf_counter", lambda: clock[0])
    calls = {"slow": Timed(act("slow", 3.0), before=act("before", 100.0)), "quick": Timed(act("quick", 0.008))}
    found = timing.interleaved(calls, Plan(seconds=0, least=20, most=50), CPU.turn)
    assert found["slow"] == pytest.approx((3.0, 3.0, 3.0, 20))
    assert found["quick"] == pytest.approx((0.008, 0.008, 0.008, 20))
    assert log.count("slow") == log.count("before") == 40  # one off the clock, one on it
    assert log.count("quick") == 80  # one off the clock, and three that fill a turn
    assert all(log[i - 1] == "before" for i, what in enumerate(log) if what == "slow")
    turns = "".join(log).replace("beforeslow" * 2, "S").replace("quick" * 4, "Q")
    assert Counter(turns) == {"S": 20, "Q": 20}
    assert "SS" in turns
    started = clock[0]
    timing.interleaved(calls, Plan(seconds=700, least=2, most=50), CPU.turn)
    assert 4 * 206 < clock[0] - started < 5 * 206  # the round that is begun is finished
    assert timing.interleaved(calls, Plan(seconds=1e9, least=2, most=7), CPU.turn)["slow"].rounds == 7


def test_spread_is_median_and_quartiles():
    assert timing.spread([9.0, 1.0, 3.0, 5.0, 7.0]) == (5.0, 3.0, 7.0, 5)


@pytest.mark.parametrize("size", [0, 3, 8, 1 << 18, (3 << 20) + 5])
def test_limits_touch_every_byte(size):
    array = np.random.default_rng(size).integers(0, 1 << 16, size, dtype=np.uint16)
    words = np.frombuffer(array.tobytes()[: array.nbytes // 8 * 8], dtype=np.uint64)
    assert limits.parallel_sum(array) == int(np.sum(words, dtype=np.uint64))
    target = np.zeros_like(array)
    limits.parallel_copy(array, target)
    np.testing.assert_array_equal(target, array)


def test_limit_reads_or_copies_what_the_task_does(monkeypatch):
    moved = []
    monkeypatch.setattr(limits, "parallel_sum", lambda array: moved.append(array.nbytes))
    monkeypatch.setattr(limits, "parallel_copy", lambda source, target: moved.append(source.nbytes + target.nbytes))
    for case in TINY.values():
        if case.task == "separate":  # two reads and a write, which no case asks of a CPU
            continue
        moved.clear()
        limits.limit_of(problems.make(case))()
        assert sum(moved) == case.traffic


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="Linux only")
def test_peak_memory_counts_what_a_call_takes_for_a_while():
    def call():
        np.ones(8 << 20)  # 64 MiB, freed at once
        return np.ones(2 << 20)

    assert 60 << 20 < peak_growth(call) < 80 << 20
    assert peak_growth(lambda: None) < 4 << 20


# ---- the command ----


@pytest.fixture
def tiny(monkeypatch):
    """`--quick` runs one tiny case with our own contenders and torch; the picture is only noted."""
    drawn = []
    device = replace(CPU, quick=(TINY["loss"],), quick_plan=ONCE)
    monkeypatch.setattr(devices, "device", lambda name: device)
    monkeypatch.setattr(report, "draw", lambda run, path: drawn.append(path))
    monkeypatch.setitem(CONTENDERS, "loss", {name: CONTENDERS["loss"][name] for name in (OURS, OURS_NUMPY, "torch")})
    return drawn


def test_command_prints_a_table_and_writes_where_it_is_told(tiny, tmp_path):
    done = CliRunner().invoke(command.app, ["--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    for name in ("loss-f32-9x40", "gpuxent", "gpuxent numpy", "torch"):
        assert any(line.strip().startswith(name) for line in lines), name
    run = results.from_json((tmp_path / "cpu.json").read_text())
    assert [case.name for case in run.cases] == ["loss-f32-9x40"]
    assert run.versions["numpy"] == np.__version__
    assert tiny == [tmp_path / "cpu.png"]


def test_command_fails_if_ours_is_wrong(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(CONTENDERS["loss"], OURS, answering(WRONG["one row"][1]))
    done = CliRunner().invoke(command.app, ["--quick", "--output", str(tmp_path)])
    assert done.exit_code == 1
    assert "loss-f32-9x40: FAILED, not timed" in done.stdout
    assert re.search(r"gpuxent: a row off by (1.9|2.0|2.1)e-06, allowed 9.5e-07", done.stdout)
    found = results.from_json((tmp_path / "cpu.json").read_text())  # what was found is not lost
    assert found.failed
    assert found.cases[0].contenders == ()


def test_a_failed_run_does_not_touch_committed_results(tiny, monkeypatch):
    monkeypatch.setitem(CONTENDERS["loss"], OURS, answering(WRONG["one row"][1]))
    monkeypatch.setattr(results, "write", lambda run, path: pytest.fail(f"wrote {path}"))
    device = replace(devices.device("cpu"), cases=(TINY["loss"],), plan=ONCE)
    monkeypatch.setattr(devices, "device", lambda name: device)
    assert CliRunner().invoke(command.app, []).exit_code == 1
    assert tiny == []


def test_no_case_begins_when_time_is_up(tiny, tmp_path):
    done = CliRunner().invoke(command.app, ["--quick", "--minutes", "0", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "left out of 1 case: all: no time was left" in done.stdout
    assert results.from_json((tmp_path / "cpu.json").read_text()).cases == ()


@pytest.mark.parametrize("arguments", [["--quick"], ["--quick", "loss-*"]])
def test_a_quick_run_does_not_touch_committed_results(tiny, monkeypatch, arguments):
    monkeypatch.setattr(results, "write", lambda run, path: pytest.fail(f"wrote {path}"))
    assert CliRunner().invoke(command.app, arguments).exit_code == 0
    assert tiny == []


def test_usage_errors_are_one_line():
    for arguments, message in {
        ("nonsense",): "bench: no case is named 'nonsense'; --list shows them all\n",
    }.items():
        done = CliRunner().invoke(command.app, arguments)
        assert (done.exit_code, done.stderr) == (2, message)


def test_list_shows_the_cases():
    done = CliRunner().invoke(command.app, ["--list", "inplace-*"])
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        case.name for case in select(["inplace-*"], CASES)
    ]


# ---- contenders ----


def test_a_rotating_contender_takes_the_next_place_with_every_call():
    places = [problems.make(replace(TINY["loss"], rows=rows)) for rows in (2, 3, 4)]
    seen = []

    def prepare(problem):
        def note(what):
            return lambda: seen.append((what, problem.case.rows))

        return Prepared(note("call"), lambda: seen.append("answer"), note("before"))

    prepared = rotating(prepare, places)
    assert prepared.calls == 3
    prepared.before()
    for _ in range(4):
        prepared.call()
    prepared.answer()
    assert seen == [*(("before", n) for n in (2, 3, 4)), *(("call", n) for n in (2, 3, 4, 2)), "answer"]
    assert rotating(prepare, places * 100).calls == 32  # as many as are asked for in a row


def test_contenders_that_compile_stay_out_of_cases_without_time_for_it():
    case = replace(TINY["loss"], compiling=False)
    assert set(CONTENDERS["loss"]) - set(run.taking_part(case, CPU)) == {"torch compiled", "torch lse-gather compiled"}
    assert run.taking_part(TINY["loss"], CPU) == CONTENDERS["loss"]


def test_contenders_keep_the_order_in_which_they_are_added():
    first, second = Contenders(), Contenders()
    first.add("a", "loss", "grad")(None)
    second.add("b", "loss")(None)
    first.include(second)
    assert list(first["loss"]) == ["a", "b"]
    assert list(first["grad"]) == ["a"]


# ---- results and the README ----


@pytest.fixture
def a_run():
    big = replace(TINY["loss"], rows=1024, vocab=128256, headline=True)
    case = result_of(big, limit=0.0161234567, gpuxent=0.02, torch=0.2, torch_compiled=0.04)
    case = replace(case, verdicts=judged(case, (Target("torch", 9),)))
    odd = replace(case.contenders[0], name="odd", worst_error=float("inf"), peak_memory=12, mean_error=1e-7)
    return Run(
        device={"model": "A fine CPU", "cores": 2, "caches": {"L2": "1024K"}},
        versions={"python": "3.11.7", "numpy": "2.4.6"},
        commit={"id": "0123456789abcdef", "dirty": False},
        date="2026-01-31",
        command="python -m bench",
        cases=(replace(case, contenders=(*case.contenders, odd)), CaseResult.of(TINY["grad"], faults=("gpuxent: no",))),
        left_out={"scipy: is not installed": 3},
    )


def test_results_go_to_json_and_back(a_run):
    text = results.to_json(a_run)
    again = results.from_json(text)
    assert again == replace(a_run, cases=(replace(a_run.cases[0], limit=again.cases[0].limit), a_run.cases[1]))
    assert again.cases[0].limit.median == 0.0161235  # six digits
    assert results.to_json(again) == text
    json.loads(text, parse_constant=pytest.fail)
    with pytest.raises(ValueError, match="format"):
        results.from_json(text.replace('"format": 1', '"format": 2'))


def readme_table(*arguments):
    script = [sys.executable, str(ROOT / "scripts" / "readme-table"), *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True, timeout=60)


def test_readme_table_is_written_and_a_changed_number_is_found(a_run, tmp_path):
    readme, cpu = tmp_path / "README.md", tmp_path / "cpu.json"
    files = "--readme", readme, "--results", cpu
    results.write(a_run, cpu)
    readme.write_text("# Title\n")
    assert "must have these two lines" in readme_table(*files).stderr
    markers = readme_table(*files).stderr.splitlines()[-2:]
    readme.write_text("\n".join(["# Title", *markers, "The end.\n"]))
    assert readme_table(*files, "--check").returncode == 1
    assert readme_table(*files).returncode == 0
    text = readme.read_text()
    assert "| loss, float32 | 1024 x 128256 | 20 ms | 81% | 10x | 2.0x |  |" in text
    assert "A fine CPU, 2 cores; python 3.11.7, numpy 2.4.6; commit 0123456789, 2026-01-31; `python -m bench`." in text
    assert text.startswith("# Title\n")
    assert text.endswith("The end.\n")
    assert readme_table(*files, "--check").returncode == 0
    for old, new in {"81%": "82%", "| 10x": "| 11x", "2026-01-31": "2026-02-01"}.items():
        readme.write_text(text.replace(old, new))
        done = readme_table(*files, "--check")
        assert done.returncode == 1
        assert new in done.stderr
        assert readme.read_text() == text.replace(old, new)


def test_readme_says_what_the_committed_results_say():
    committed = (ROOT / "bench" / "results" / "cpu.json").exists()
    assert committed == ("<!-- speed: begin" in (ROOT / "README.md").read_text(encoding="utf-8"))
    if committed:
        done = readme_table("--check")
        assert done.returncode == 0, done.stderr
