"""The driver's benchmark: it refuses what differs from the serial run, measures what it says, and writes it down."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

import bench.driver.__main__ as command
from bench import clock, figures
from bench.driver import blocks, data, processes, threads
from bench.figures import Figure, Report, Target
from bench.machine import ROOT
from bench.timing import Plan
from gpuxent.evaluation.cluster import ClientWorkers
from gpuxent.evaluation.driver import ThreadWorkers

ONCE = Plan(seconds=0, least=1, most=1)
TINY = {
    "backend": partial(threads.against_the_backend, 300_000, ONCE),
    "overlap": partial(threads.overlap, 4, 200_000, ONCE),
    "processes": partial(processes.two_against_one, 2_000_000, ONCE),
    "overhead": partial(blocks.overhead, 20, ONCE),
    "memory": partial(blocks.memory, 200, 150, 120),
}
FOUND = {"backend": 6, "overlap": 2, "processes": 2, "overhead": 3 if blocks.MEMORY_DISK.is_dir() else 2, "memory": 3}


@contextmanager
def workers_in_this_process(count, computing):
    from distributed import Client, LocalCluster

    options = {"processes": False, "dashboard_address": None, "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
    with LocalCluster(n_workers=count, threads_per_worker=2, **options) as cluster, Client(cluster) as client:
        yield ClientWorkers(client, computing)


@pytest.fixture
def tiny(monkeypatch):
    """Every part, so small and so near that all take a few seconds."""
    monkeypatch.setattr(threads, "VOCABS", (300, 200, 100))
    monkeypatch.setattr(ThreadWorkers, "read_bytes", 100_000)
    monkeypatch.setattr(processes, "local_workers", workers_in_this_process)
    monkeypatch.setattr(processes, "TINY_BLOCKS", 10)
    monkeypatch.setattr(blocks, "ProcessPoolExecutor", lambda size, mp_context: ThreadPoolExecutor(size))
    monkeypatch.setattr(command, "PARTS", {name: (pytest.fail, part) for name, part in TINY.items()})


def run(*arguments):
    return CliRunner().invoke(command.app, [*arguments])


def test_all_parts_run_and_are_written(tiny, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(figures, "write", lambda report, path: written.append((report, path)))
    result = run("--quick", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    ((report, path),) = written
    assert path == tmp_path / "driver.json"
    found = [figure.part for figure in report.figures]
    assert len(found) == sum(FOUND.values())
    assert [found.count(part) for part in dict.fromkeys(found)] == list(FOUND.values())
    for figure in report.figures:
        assert np.isfinite(figure.value), figure
        assert figure.value > 0 or figure.part == "memory", figure
    text = json.loads(figures.to_json(report))
    assert text["format"] == figures.FORMAT
    assert text["device"]["cores"] > 0
    assert {"numpy", "distributed", "pyarrow"} <= text["versions"].keys()
    assert all(figure["met"] in (None, True, False) for figure in text["figures"])
    assert "backend" in result.output
    assert "of ideal" in result.output


def test_a_quick_run_does_not_touch_committed_results(tiny, monkeypatch):
    monkeypatch.setattr(figures, "write", lambda report, path: pytest.fail(f"wrote {path}"))
    assert run("overhead", "--quick").exit_code == 0
    assert run("none", "--quick").exit_code == 2


LOSING = {
    "backend": (threads, "score"),
    "overlap": (threads, "score"),
    "processes": (processes, "score"),
    "overhead": (blocks, "score"),
    "memory": (blocks, "score"),
}


@pytest.mark.parametrize(("part", "module", "name"), [(part, *place) for part, place in LOSING.items()], ids=LOSING)
def test_a_result_that_differs_is_not_timed(tiny, monkeypatch, part, module, name):
    """A road that loses the last row."""
    score = getattr(module, name)
    monkeypatch.setattr(module, name, lambda job, *args, **kw: score(replace(job, limit=job.rows - 1), *args, **kw))
    monkeypatch.setattr(clock, "_pass", lambda call: pytest.fail("was timed"))
    result = run(part, "--quick")
    assert result.exit_code == 1
    assert type(result.exception) is SystemExit


def test_rounds_are_interleaved_and_the_best_counts():
    calls = []
    waits = iter((0.02, 0.001, 0.03))

    def first():
        calls.append("a")
        time.sleep(next(waits))

    found = clock.rounds({"a": first, "b": lambda: calls.append("b")}, Plan(seconds=0, least=3, most=9))
    assert [sorted(calls[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
    assert found["a"].rounds == 3
    assert 0.001 <= found["a"].best < 0.02 <= found["a"].median
    assert found["a"].cpu < 0.02  # it slept
    assert found["a"].others is None or found["a"].others >= 0


def test_a_late_source_takes_its_time_and_gives_the_same(tmp_path):
    job = data.tiny_job(3, 4)
    late = replace(job, logits=data.Late(job.logits, 0.01))
    start = time.perf_counter()
    found = data.serial(late, 4)
    assert time.perf_counter() - start >= 0.03
    data.agree("late", found, data.serial(job, 4))
    with pytest.raises(data.WrongResult, match=r"^late: the result differs"):
        data.agree("late", found, found.merge(found))


@pytest.mark.parametrize(("dtype", "stored"), [("f32", "float32"), ("bf16", "bfloat16")])
def test_files_are_what_they_are_said_to_be(tmp_path, dtype, stored):
    logits, labels = data.write(tmp_path, 50, dtype, 20_000)
    from gpuxent.evaluation.sources import open_source

    source = open_source(logits)
    rows = 20_000 // (50 * (4 if dtype == "f32" else 2))
    assert (source.shape, source.dtype.name) == ((rows, 50), stored)
    found = np.asarray(source.read(slice(0, rows), slice(None)), np.float32)
    assert len({row.tobytes() for row in found}) == rows  # none like another
    assert 2 < found.std() < 4
    assert np.load(labels).shape == (rows,)


def test_tiny_blocks_are_all_scored_once_with_their_documents():
    job = data.tiny_job(blocks=10, rows=16, documents=True)
    summary = blocks.drive(job, 16)
    assert (summary.totals.scored, len(summary.documents)) == (160, 20)
    assert {document.scored for document in summary.documents} == {8}
    seen = []
    blocks.drive(job, 16, watch=lambda rows, summary: seen.append(rows))
    assert seen == [16] * 10


def test_memory_is_looked_at_as_blocks_go_by():
    seen = blocks.watched(1200, documents=True, directory=False)
    assert [count for count, _, _ in seen] == [100, 300, 1000, 1200]
    assert all(a[1] < b[1] for a, b in pairwise(seen))
    assert min(size for _, _, size in seen) > 2**24


def test_targets():
    figure = Figure("part", "what", 0.89, "x", Target(0.9))
    assert figure.met is False
    assert replace(figure, value=0.9).met is True
    assert replace(figure, target=Target(2, at_most=True)).met is True
    assert replace(figure, target=None).met is None
    report = Report({}, {}, {}, "2026-01-01", "command", (figure, replace(figure, value=float("nan"), target=None)))
    found = json.loads(figures.to_json(report))["figures"]
    assert [(f["value"], f["met"]) for f in found] == [(0.89, False), ("nan", None)]
    assert found[0]["target"] == {"value": 0.9, "at_most": False}


def test_committed_results_are_of_all_parts():
    data = json.loads((ROOT / "bench" / "results" / "driver.json").read_text())
    assert data["format"] == figures.FORMAT
    assert len({figure["part"] for figure in data["figures"]}) == len(command.PARTS)
    assert data["command"] == "python -m bench.driver"
