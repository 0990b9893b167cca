"""A run that is killed or interrupted, again and again, ends as one that was left alone: every bit of every token."""

import json
import random
import re
import time

import numpy as np
import psutil
import pytest
from killing import has_written, interrupt, kill, rows_of, run_command, start_command, wait_until

from gpuxent.evaluation.runs.directory import Run, read_tokens

ROWS, VOCAB, KILLS = 20_000, 40, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    np.save(folder / "logits.npy", rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32))
    np.save(folder / "labels.npy", np.where(rng.random(ROWS) < 0.1, -100, rng.integers(0, VOCAB, ROWS)))
    np.save(folder / "documents.npy", np.cumsum(rng.random(ROWS) < 0.01))
    return folder


def arguments(data, *options):
    files = [data / "logits.npy", "--labels", data / "labels.npy", "--documents", data / "documents.npy"]
    how = ["--shift", 1, "--format", "json", "--backend", "numpy"]  # it starts in no time
    return ["perplexity", *files, *how, *options]


def start(data, *options, **where):
    return start_command(*arguments(data, *options), **where)


def command(data, *options):
    return run_command(*arguments(data, *options))


@pytest.fixture(scope="module")
def left_alone(data, tmp_path_factory):
    """The folder of a run in one go and few blocks, and what the command printed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = command(data, "-o", run)
    assert code == 0, err
    return run, out


def all_tokens(run):
    parts = list(read_tokens(run))
    return {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}


def assert_same(run, out, left_alone):
    whole, printed = left_alone
    assert out == printed
    assert json.loads((run / "result.json").read_text()) == json.loads((whole / "result.json").read_text())
    found, expected = all_tokens(run), all_tokens(whole)
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert found[name].dtype == column.dtype
        assert found[name].tobytes() == column.tobytes(), name


def test_killed_twenty_times_at_any_moment(data, left_alone, tmp_path):
    """By SIGKILL: before the first block, in the middle of writing, with other workers and memory each time."""
    run, chance, finished, kills = tmp_path / "run", random.Random(7), set(), 0
    while kills < KILLS:
        workers = ["--workers", 2] if kills in (5, 11) else []
        memory = chance.choice(["1kB", "2kB", "4kB"])
        process = start(data, "-o", run, "--memory", memory, *(["--resume"] if kills else []), *workers)
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, 0.7))
        else:
            wait_until(has_written(run, chance.randint(1, 25)), process)
        assert process.poll() is None, process.communicate()[1]
        kill(process)
        kills += 1
        now = rows_of(run)
        assert now >= finished
        assert max(now, default=-1) + 1 - len(now) <= 250  # blocks of some rows, of which a dozen are in flight
        finished = now
    assert 100 < len(finished) < ROWS
    code, out, err = command(data, "-o", run, "--resume")
    assert code == 0, err
    assert_same(run, out, left_alone)


def test_two_at_once_an_interruption_and_the_end(data, left_alone, tmp_path):
    run, err = tmp_path / "run", tmp_path / "err"
    with open(err, "w") as file:
        process = start(data, "-o", run, "--memory", "1kB", err=file)
    wait_until(has_written(run, 5), process)
    code, out, said = command(data, "-o", run, "--resume")
    assert (code, out) == (3, "")
    assert re.fullmatch(rf"gpuxent: {run} is in use by another run \(process {process.pid} on .*\)\n", said)
    code, out, said = interrupt(process, err)
    assert code == 4, said
    with Run.open(run) as left:
        assert left.finished == [range(left.finished_rows)]  # of blocks begun in order, all that were begun
        share = left.finished_rows / ROWS
    assert 0 < share < 1
    assert json.loads(out)["share"] == share
    assert json.loads((run / "result.json").read_text())["share"] == share
    code, out, said = command(data, "-o", run)
    assert (code, out) == (3, "")
    assert re.search(r"holds a run \(\d+ % done\); give --resume to go on with it, or another folder", said)
    for _ in range(2):  # the second time there is nothing left to do
        code, out, said = command(data, "-o", run, "--resume")
        assert code == 0, said
        assert_same(run, out, left_alone)


def test_ctrl_c_twice_stops_now(tmp_path):
    """The blocks in flight, of which each takes a while, are dropped."""
    rows, err, run = 64, tmp_path / "err", tmp_path / "run"
    logits = np.lib.format.open_memmap(tmp_path / "logits.npy", mode="w+", dtype=np.float32, shape=(rows, 2_000_000))
    logits[:, 5] = np.arange(rows)  # the rest is a hole in the file
    np.save(tmp_path / "labels.npy", np.full(rows, 5))
    np.save(tmp_path / "documents.npy", np.arange(rows) // 7)
    with open(err, "w") as file:
        process = start(tmp_path, "-o", run, "--memory", "100MB", "--softcap", 5, err=file)
    wait_until(has_written(run, 1), process)
    memory = psutil.Process(process.pid)
    wait_until(lambda: any(part.path.endswith("logits.npy") for part in memory.memory_maps()), process)
    code, out, said = interrupt(process, err, times=2)
    assert (code, out) == (4, ""), said
    assert said.endswith("gpuxent: stopped\n")
    assert len(rows_of(run)) < rows


def test_other_inputs_are_refused(data, tmp_path):
    for name in ("logits", "labels", "documents"):
        (tmp_path / f"{name}.npy").write_bytes((data / f"{name}.npy").read_bytes())
    run = tmp_path / "run"
    process = start(tmp_path, "-o", run, "--memory", "1kB")
    wait_until(has_written(run, 5), process)
    kill(process)
    finished = rows_of(run)
    code, out, said = command(tmp_path, "-o", run, "--resume", "--temperature", 2)
    assert (code, out) == (3, "")
    assert re.search(r"cannot go on with what is not the same run: .*temperature", said)
    labels = np.load(tmp_path / "labels.npy")
    labels[0] ^= 1
    np.save(tmp_path / "labels.npy", labels)
    code, out, said = command(tmp_path, "-o", run, "--resume")
    assert (code, out) == (3, "")
    assert re.search(r"cannot go on with what is not the same run: .*labels", said)
    assert rows_of(run) == finished
