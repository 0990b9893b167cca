"""A run's folder: what is finished stays finished, whoever is killed when; and nothing else goes on in it."""

import copy
import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import run_child
from run_child import MACHINE, WHAT, result_of, tokens_of

from gpuxent.evaluation.runs import directory as run
from gpuxent.evaluation.runs import ledger, token_parts, token_record
from gpuxent.evaluation.runs.directory import Run, RunDirectory, read_tokens
from gpuxent.evaluation.statistics.summary import Summary
from gpuxent.evaluation.statistics.tokens import Tokens

IDENTITY = Summary.identity(documents=True)


@pytest.fixture(autouse=True)
def parts_as_they_were(monkeypatch):
    monkeypatch.setattr(token_record, "PART_TOKENS", token_record.PART_TOKENS)  # `work` changes it


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(token_record, "PART_TOKENS", 200)


def fill(directory, *blocks):
    for first, stop in blocks:
        directory.add(result_of(first, stop))


def expected_numbers(rows):
    """By name, all that was scored in rows 0 to `rows`; without code of the run."""
    return {name: column.tobytes() for name, column in tokens_of(0, rows).columns.items()}


def numbers(run):
    parts = list(read_tokens(run))
    return {name: b"".join(part.columns[name].tobytes() for part in parts) for name in parts[0].columns}


def check_whole(folder, rows):
    """Every row once: tokens bit for bit, in order, and counts and sums."""
    assert numbers(folder) == expected_numbers(rows)
    truth = tokens_of(0, rows)
    check_files(folder, len(truth))
    finite = truth.nll[np.isfinite(truth.nll)].tolist()
    with Run.open(folder) as opened:
        assert opened.complete
        assert opened.finished == [range(rows)]
        totals = opened.summary(IDENTITY).totals
    assert (totals.scored, totals.ignored) == (len(truth), rows - len(truth))
    assert totals.nan.count + totals.infinite.count + len(finite) == len(truth)
    assert replace(totals.loss, nonfinite=0.0).value == math.fsum(finite)


def check_files(folder, tokens):
    """Nothing waits, and each file of tokens has the rows that its name says."""
    parts = sorted((folder / "tokens").glob("0*"))
    rows = [pq.read_table(part)["row"].to_pylist() for part in parts]
    assert sum(map(len, rows)) == tokens
    for part, found in zip(parts, rows, strict=True):
        first, stop = map(int, part.stem.split("-"))
        assert first <= found[0]
        assert found[-1] < stop
    names = {path.name for path in folder.iterdir()} - {"result.json"}
    assert names == {"ledger.sqlite", "tokens"}


# ---- a run from the beginning to the end ----


def test_blocks_in_any_order(tmp_path, small_parts):
    blocks = [(start, start + 60) for start in range(0, 1200, 60)]
    random.Random(1).shuffle(blocks)
    with RunDirectory(tmp_path / "run", WHAT, 1200) as directory:
        fill(directory, *blocks)
        assert directory.summary(IDENTITY).to_json() == result_of(0, 1200).summary.to_json()
        directory.write_result({"perplexity": 7.5})
    check_whole(tmp_path / "run", 1200)
    with Run.open(tmp_path / "run") as opened:
        assert opened.result == {"perplexity": 7.5}
        assert (opened.rows, opened.fingerprint, opened.computed_by, opened.mixed) == (1200, WHAT, (MACHINE,), ())


def test_parts_can_be_read_by_others_and_do_not_overlap(tmp_path, small_parts):
    with RunDirectory(tmp_path, WHAT, 1200) as directory:
        fill(directory, *((start, start + 60) for start in (*range(0, 600, 60), *range(1140, 540, -60))))
    paths = sorted((tmp_path / "tokens").iterdir())
    assert len(paths) > 2
    rows = [pq.read_table(path)["row"].to_pylist() for path in paths]
    assert [row for some in rows for row in some] == tokens_of(0, 1200).row.tolist()
    assert pq.read_schema(paths[0]).names == list(Tokens.names())


def test_tokens_that_wait_are_read_too(tmp_path, small_parts):
    """Those beside an unfinished block wait for it; `flush` does not."""
    with RunDirectory(tmp_path, WHAT, 1200) as directory:
        fill(directory, *((start, start + 60) for start in range(0, 1200, 60) if start != 60))
        written = sorted(path.name for path in (tmp_path / "tokens").iterdir())
        assert written
        assert all(int(name[:12]) > 60 for name in written)
        expected = np.concatenate([tokens_of(0, 60).nll, tokens_of(120, 1200).nll])
        assert np.concatenate([tokens.nll for tokens in directory.tokens()]).tobytes() == expected.tobytes()
        directory.flush()
        assert (tmp_path / "tokens" / token_parts.part_name(0, 60)).exists()
        assert np.concatenate([tokens.nll for tokens in directory.tokens()]).tobytes() == expected.tobytes()
        fill(directory, (60, 120))
    check_whole(tmp_path, 1200)


def test_tokens_that_waited_before_a_resume_count(tmp_path, small_parts):
    with RunDirectory(tmp_path, WHAT, 1200) as directory:
        fill(directory, (0, 270))
    assert list((tmp_path / "tokens").iterdir()) == []
    with RunDirectory(tmp_path, WHAT, 1200, resume=True) as directory:
        fill(directory, (270, 330))
        assert [path.name for path in (tmp_path / "tokens").iterdir()] == [token_parts.part_name(0, 330)]


def test_a_block_larger_than_a_part(tmp_path, monkeypatch, small_parts):
    monkeypatch.setattr(token_parts.split, "__defaults__", (64,))
    with RunDirectory(tmp_path, WHAT, 2000) as directory:
        fill(directory, (0, 1500), (1500, 2000))
    assert len(list((tmp_path / "tokens").iterdir())) >= 5
    check_whole(tmp_path, 2000)


def test_tokens_in_files_leave_the_ledger(tmp_path):
    with RunDirectory(tmp_path, WHAT, 30_000) as directory:
        fill(directory, (0, 30_000))
    assert (tmp_path / "ledger.sqlite").stat().st_size < 400_000  # of 1.3 MB of tokens
    check_whole(tmp_path, 30_000)


def test_blocks_without_tokens_and_tokens_without_documents(tmp_path):
    ignored = tokens_of(0, 30)
    nothing = Tokens(**{name: column[:0] for name, column in ignored.columns.items() if name != "document"})
    some = replace(ignored, document=None)
    with RunDirectory(tmp_path, WHAT, 60) as directory:
        directory.add(replace(result_of(30, 60), tokens=nothing))
        assert list(directory.tokens()) == []
        directory.flush()
        assert list(directory.tokens()) == []
        directory.add(replace(result_of(0, 30), tokens=some))
    (found,) = read_tokens(tmp_path)
    assert found.document is None
    assert found.columns.keys() == some.columns.keys()
    assert found.nll.tobytes() == some.nll.tobytes()


def test_a_run_that_keeps_no_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # and needs no package
    with RunDirectory(tmp_path, WHAT, 60, tokens=False) as directory:
        directory.add(replace(result_of(0, 60), tokens=None))
        assert directory.complete
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]
    assert list(read_tokens(tmp_path)) == []


def test_no_rows(tmp_path):
    for resume in (False, True):
        with RunDirectory(tmp_path, WHAT, 0, resume=resume) as directory:
            assert directory.complete
            assert directory.finished == []
            assert directory.summary(IDENTITY).to_json() == IDENTITY.to_json()


def test_a_finished_run_can_be_resumed(tmp_path):
    with RunDirectory(tmp_path, WHAT, 60) as directory:
        fill(directory, (0, 60))
        directory.write_result({"a": 1})
    with RunDirectory(tmp_path, WHAT, 60, resume=True) as directory:
        assert directory.complete
        assert directory.result == {"a": 1}
        directory.write_result({"a": 2})
    check_whole(tmp_path, 60)
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 2}


def test_a_result_is_whole_or_the_one_before(tmp_path, monkeypatch):
    with RunDirectory(tmp_path, WHAT, 60) as directory:
        directory.write_result({"a": 1})
        with pytest.raises(ValueError, match="JSON compliant"):
            directory.write_result({"a": math.inf})
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="cannot be written"):
            directory.write_result({"a": 2})
        assert directory.result == {"a": 1}


def test_finished_rows_are_coalesced(tmp_path):
    with RunDirectory(tmp_path, WHAT, 100) as directory:
        fill(directory, (50, 60), (10, 20), (20, 30), (90, 100), (60, 61))
        assert directory.finished == [range(10, 30), range(50, 61), range(90, 100)]
        assert directory.finished_rows == 41
        assert not directory.complete


# ---- what must not be added ----


@pytest.mark.parametrize("block", [(40, 50), (30, 70), (59, 61), (0, 41), (40, 41), (0, 100)])
def test_rows_are_not_counted_twice(tmp_path, block):
    with RunDirectory(tmp_path, WHAT, 100) as directory:
        fill(directory, (40, 60), (80, 90))
        with pytest.raises(ValueError, match=rf"rows {block[0]} to {block[1]} cannot be added .* are finished"):
            fill(directory, block)
        assert directory.finished == [range(40, 60), range(80, 90)]
        fill(directory, (60, 80), (0, 40), (90, 100))
    check_whole(tmp_path, 100)


@pytest.mark.parametrize("block", [(90, 101), (-1, 5), (5, 5)])
def test_rows_outside_of_the_data_set(tmp_path, block):
    with RunDirectory(tmp_path, WHAT, 100) as directory, pytest.raises(ValueError, match="rows in 0 to 100"):
        directory.add(replace(result_of(0, 10), first=block[0], rows=block[1] - block[0]))


def test_tokens_of_other_rows(tmp_path):
    backwards = Tokens(**{name: column[::-1] for name, column in tokens_of(0, 30).columns.items()})
    with RunDirectory(tmp_path, WHAT, 100) as directory:
        for wrong in (tokens_of(1, 33), tokens_of(-3, 30), backwards):
            with pytest.raises(ValueError, match="tokens of rows 0 to 30 must be"):
                directory.add(replace(result_of(0, 30), tokens=wrong))
        with pytest.raises(ValueError, match="tokens of rows 0 to 30 are missing"):
            directory.add(replace(result_of(0, 30), tokens=None))
        assert directory.finished == []


def test_another_kind_of_machine(tmp_path):
    other = "numpy on aarch64"
    with RunDirectory(tmp_path, WHAT, 100) as directory:
        fill(directory, (0, 30))
        with pytest.raises(ValueError, match=rf"\[{MACHINE}\].*\[{other}\].*--allow-mixed"):
            directory.add(result_of(30, 60, other))
        assert directory.mixed == ()
    with RunDirectory(tmp_path, WHAT, 100, resume=True, allow_mixed=True) as directory:
        directory.add(result_of(30, 60, other))
        assert directory.mixed == (MACHINE, other)
    with RunDirectory(tmp_path, WHAT, 100, resume=True) as directory:
        assert directory.mixed == (MACHINE, other)  # for ever
        fill(directory, (60, 70))
        with pytest.raises(ValueError, match="--allow-mixed"):
            directory.add(result_of(70, 100, other))
    assert Run.open(tmp_path).mixed == (MACHINE, other)


def test_a_block_is_finished_with_its_tokens_or_not_at_all(tmp_path, monkeypatch):
    with RunDirectory(tmp_path, WHAT, 100) as directory:
        with monkeypatch.context() as patch:
            patch.setattr(token_parts, "to_bytes", lambda tokens: None)  # which the ledger does not take
            with pytest.raises(OSError, match="cannot be written"):
                fill(directory, (0, 50))
        assert (directory.finished, directory.finished_rows, directory.computed_by) == ([], 0, ())
        fill(directory, (0, 50), (50, 100))
    check_whole(tmp_path, 100)


# ---- what is in the folder ----


def test_a_run_is_not_begun_twice(tmp_path):
    with RunDirectory(tmp_path, WHAT, 1000) as directory:
        fill(directory, (0, 639))
    message = rf"^{tmp_path} holds a run \(63 % done\); give --resume to go on with it, or another folder$"
    with pytest.raises(ValueError, match=message):
        RunDirectory(tmp_path, WHAT, 1000)


CHANGES = [
    (lambda what: what["options"].update(temperature=0.8), "option temperature: 1.0 -> 0.8"),
    (lambda what: what["options"].pop("topk"), r"option topk: \[1, 5\] -> not given"),
    (lambda what: what.update(gpuxent="0.6"), "gpuxent 0.5 -> 0.6"),
    (lambda what: what["sources"]["logits"].update(bytes=8192), "logits changed: 4,096 bytes -> 8,192 bytes"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_another_run_does_not_go_on(tmp_path, change, says):
    with RunDirectory(tmp_path, WHAT, 100) as directory:
        fill(directory, (0, 50))
    other = copy.deepcopy(WHAT)
    change(other)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot go on with what is not the same run: {says}$"):
        RunDirectory(tmp_path, other, 100, resume=True)
    with RunDirectory(tmp_path, WHAT, 100, resume=True) as directory:  # and nothing is lost by it
        fill(directory, (50, 100))
    check_whole(tmp_path, 100)


def test_all_differences_are_named(tmp_path):
    RunDirectory(tmp_path, WHAT, 100).close()
    other = copy.deepcopy(WHAT)
    for change, _ in CHANGES:
        change(other)
    message = ".*".join(says for _, says in (CHANGES[2], CHANGES[3], CHANGES[0], CHANGES[1]))
    with pytest.raises(ValueError, match=f"{message}; rows: 100 -> 90; the record of tokens: kept -> not kept"):
        RunDirectory(tmp_path, other, 90, resume=True, tokens=False)


def test_resume_where_there_is_nothing_yet(tmp_path):
    """Killed before anything was written, or while the ledger was made: `until gpuxent ... --resume` goes on."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "made" / "tokens").mkdir(parents=True)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "ledger.sqlite").touch()
    (tmp_path / "half" / "running.json").write_text("{")
    (tmp_path / "tables").mkdir()
    with sqlite3.connect(tmp_path / "tables" / "ledger.sqlite") as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma page_size = 4096")
    connection.close()
    for name in ("empty", "made", "half", "tables", "new/and/deep"):
        with RunDirectory(tmp_path / name, WHAT, 60, resume=True) as directory:
            fill(directory, (0, 60))
        check_whole(tmp_path / name, 60)


def test_resume_in_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no run to go on with, but other files, such as notes\.txt"):
        RunDirectory(tmp_path, WHAT, 60, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    RunDirectory(tmp_path, WHAT, 60).close()  # a log, say
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run.open(tmp_path / "no such folder")


@pytest.mark.parametrize("name", ["result.json", "tokens/000000000000-000000000060.parquet"])
def test_what_a_run_left_behind_is_not_mixed_with_a_new_one(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="holds what a run left behind"):
        RunDirectory(tmp_path, WHAT, 60)


def test_files_of_parts_that_were_being_written(tmp_path, small_parts):
    with RunDirectory(tmp_path, WHAT, 1200) as directory:
        fill(directory, *((start, start + 60) for start in range(0, 600, 60)))
    folder = tmp_path / "tokens"
    part = next(folder.iterdir())
    orphans = ["000000000600-000000000660.parquet", "000000000000-000000000060.parquet.tmp"]
    for name in orphans:
        shutil.copy(part, folder / name)
    (folder / "mine.parquet").touch()
    with RunDirectory(tmp_path, WHAT, 1200, resume=True) as directory:
        names = {path.name for path in folder.iterdir()}
        assert not names & set(orphans)
        assert {part.name, "mine.parquet"} <= names
        fill(directory, *((start, start + 60) for start in range(600, 1200, 60)))
    check_whole(tmp_path, 1200)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_a_lost_part(tmp_path, small_parts, damage):
    with RunDirectory(tmp_path, WHAT, 1200) as directory:
        fill(directory, (0, 600))
    (part,) = (tmp_path / "tokens").iterdir()
    damage(part)
    with pytest.raises(ValueError, match=rf"{part} (is missing|has 100 bytes instead of [\d,]+): .* new folder"):
        RunDirectory(tmp_path, WHAT, 1200, resume=True)
    with pytest.raises(ValueError, match=f"{part} cannot be read"):
        list(read_tokens(tmp_path))


def test_a_part_of_something_else(tmp_path):
    with RunDirectory(tmp_path, WHAT, 60) as directory:
        fill(directory, (0, 60))
    (part,) = (tmp_path / "tokens").iterdir()
    pq.write_table(pq.read_table(part).replace_schema_metadata(None), part)
    with pytest.raises(ValueError, match=f"{part} cannot be read: its format is '', expected 'gpuxent tokens"):
        list(read_tokens(tmp_path))


# ---- ledgers that cannot be read ----


def spoil_header(path):
    path.write_bytes(b"no database at all" * 100)


def spoil_pages(path):
    content = path.read_bytes()
    path.write_bytes(content[:20000] + bytes(len(content) - 20000))


def spoil_tokens(path):
    """A page that nothing reads when the ledger is opened."""
    content = path.read_bytes()
    middle = len(content) // 2 // ledger.PAGE_BYTES * ledger.PAGE_BYTES
    path.write_bytes(content[:middle] + bytes(ledger.PAGE_BYTES) + content[middle + ledger.PAGE_BYTES :])


def spoil_end(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def other_format(path):
    with sqlite3.connect(path) as connection:
        connection.execute("update run set value = '99' where key = 'format'")
    connection.close()


def other_database(path):
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("create table addresses (name text)")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_header, r"is damaged \(file is not a database\): the run cannot go on, begin it in a new folder"),
        (spoil_pages, "is damaged"),
        (spoil_tokens, "is damaged"),
        (spoil_end, "is damaged"),
        (other_format, "has format 99, and this version reads format 1"),
        (other_database, "is not the ledger of a run"),
    ],
)
def test_a_spoiled_ledger(tmp_path, spoil, says):
    with RunDirectory(tmp_path, WHAT, 6000) as directory:
        fill(directory, *((start, start + 60) for start in range(0, 1200, 60)), (1200, 5000))
    spoil(tmp_path / "ledger.sqlite")
    for resume in (True, False):
        with pytest.raises(ValueError, match=rf"{tmp_path}/ledger\.sqlite {says}"):
            RunDirectory(tmp_path, WHAT, 6000, resume=resume)


# ---- killed ----


@pytest.fixture(scope="module")
def processes():
    """Children that have imported what they need already."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("killing needs POSIX")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["gpuxent.evaluation.runs.directory", "gpuxent.evaluation.statistics.summary", "pyarrow.parquet"]
    )
    return context


def test_killed_twenty_times_at_random_moments(tmp_path, processes):
    rng, rows, kills, runs = random.Random(5), 30_000, 0, 0
    while kills < 20:
        folder = tmp_path / f"run {runs}"
        child = processes.Process(target=run_child.work, args=(folder, rows, rng.randrange(10**6), 600))
        child.start()
        child.join(rng.uniform(0, 0.15))
        child.kill()
        child.join()
        if child.exitcode == 0:  # it was done before; once more, then
            check_whole(folder, rows)
            runs += 1
        else:
            assert child.exitcode == -signal.SIGKILL
            kills += 1
            check_nothing_was_lost(folder)
    run_child.work(folder, rows, seed=0, part_tokens=600)
    check_whole(folder, rows)


def check_nothing_was_lost(folder):
    """Blocks that were added before the process died are finished."""
    log = Path(f"{folder}.log")
    lines = log.read_text().splitlines() if log.exists() else []
    if lines:
        with Run.open(folder) as opened:
            finished = opened.finished
        assert not list(folder.glob("ledger.sqlite-*"))  # its log is where it belongs
        for first, stop in (map(int, line.split()) for line in lines):
            assert any(done.start <= first and stop <= done.stop for done in finished)


def test_killed_between_calls_that_change_files(tmp_path, processes):
    """Such as: a part has its name and the ledger does not know it yet."""
    outcomes = Counter()
    for moment in range(1, 230, 19):
        folder = tmp_path / str(moment)
        child = processes.Process(target=run_child.work, args=(folder, 400, 1, 60, moment))
        child.start()
        child.join()
        outcomes[child.exitcode] += 1
        check_nothing_was_lost(folder)
        run_child.work(folder, 400, moment, 60)
        check_whole(folder, 400)
    assert outcomes.keys() <= {0, -signal.SIGKILL}
    assert outcomes[-signal.SIGKILL] > 9


def test_two_runs_in_one_folder(tmp_path, processes):
    ready, leave = processes.Event(), processes.Event()
    child = processes.Process(target=run_child.hold, args=(tmp_path, ready, leave), daemon=True)
    child.start()
    assert ready.wait(60)
    for attempt in (lambda: RunDirectory(tmp_path, WHAT, 100, resume=True), lambda: Run.open(tmp_path)):
        with pytest.raises(OSError, match=rf"^{tmp_path} is in use by another run \(process {child.pid} on .+\)$"):
            attempt()
    leave.set()
    child.join()
    assert child.exitcode == 0
    with (
        RunDirectory(tmp_path, WHAT, 100, resume=True),
        pytest.raises(OSError, match="is in use by another run"),  # of the same process
    ):
        RunDirectory(tmp_path, WHAT, 100, resume=True)


def test_a_lock_that_is_about_to_go_is_waited_for(tmp_path, monkeypatch):
    first = RunDirectory(tmp_path, WHAT, 100)
    monkeypatch.setattr(ledger.time, "sleep", lambda seconds: first.close())
    RunDirectory(tmp_path, WHAT, 100, resume=True).close()


def test_two_readers(tmp_path):
    with RunDirectory(tmp_path, WHAT, 100) as directory:
        fill(directory, (0, 50))
    with Run.open(tmp_path) as one, Run.open(tmp_path) as other:
        assert one.finished == other.finished == [range(50)]
        assert numbers(one) == numbers(other) == expected_numbers(50)
    RunDirectory(tmp_path, WHAT, 100, resume=True).close()  # they let go


def test_without_a_write_ahead_log(tmp_path, monkeypatch, small_parts):
    monkeypatch.setattr(ledger, "JOURNAL", "truncate")
    with RunDirectory(tmp_path, WHAT, 1200) as directory:
        fill(directory, (0, 600))
        with pytest.raises(OSError, match="is in use by another run"):
            Run.open(tmp_path)
    with RunDirectory(tmp_path, WHAT, 1200, resume=True) as directory:
        fill(directory, (600, 1200))
    check_whole(tmp_path, 1200)


# ---- disks ----


def full_disk(*_args, **_named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=rf"^{path} cannot be made a folder that can be written: "):
            RunDirectory(path, WHAT, 100)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def denied(**_named):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(run.tempfile, "TemporaryFile", denied)  # root may write anywhere
    with pytest.raises(OSError, match=rf"^{tmp_path} cannot be made .*: Permission denied$"):
        RunDirectory(tmp_path, WHAT, 100)


def test_too_little_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20 * 10**9))
    message = r"needs about 32\.3 GB for the record of 1,000,000,000 tokens, and 20\.0 GB are free"
    with pytest.raises(OSError, match=message):
        RunDirectory(tmp_path, WHAT, 10**9)
    with RunDirectory(tmp_path, WHAT, 10**9, expected_tokens=5 * 10**8) as directory:
        block = result_of(0, 30)
        directory.add(replace(block, rows=6 * 10**8))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6 * 10**9))
    with pytest.raises(OSError, match=r"record of 400,000,000 tokens, and 6\.0 GB"):  # those still to come
        RunDirectory(tmp_path, WHAT, 10**9, resume=True)
    RunDirectory(tmp_path / "other", WHAT, 10**9, tokens=False).close()


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = rf"the record of tokens in {tmp_path}/run needs pyarrow: pip install 'gpuxent\[parquet\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        RunDirectory(tmp_path / "run", WHAT, 100)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_in_the_middle(tmp_path):
    message = (
        rf"^{tmp_path} cannot be written \(database or disk is full\): finished blocks are kept, and --resume goes on"
    )
    with pytest.raises(OSError, match=message), RunDirectory(tmp_path, WHAT, 100_000) as directory:  # noqa: PT012
        directory._ledger._connection.execute("pragma max_page_count = 20")
        for first in range(0, 100_000, 100):
            fill(directory, (first, first + 100))
    with RunDirectory(tmp_path, WHAT, 100_000, resume=True) as directory:
        (done,) = directory.finished
        assert done == range(first)
        fill(directory, (first, 100_000))
    check_whole(tmp_path, 100_000)


def test_a_disk_that_is_full_when_a_part_is_written(tmp_path, monkeypatch, small_parts):
    with RunDirectory(tmp_path, WHAT, 1200) as directory:
        with monkeypatch.context() as patch:
            patch.setattr(token_parts.os, "fsync", full_disk)
            message = r"cannot be written \(No space left on device\): finished blocks are kept, and --resume goes on"
            with pytest.raises(OSError, match=message):
                fill(directory, (0, 600))
        assert list((tmp_path / "tokens").iterdir()) == []
        assert directory.finished == [range(600)]
        fill(directory, (600, 1200))
    check_whole(tmp_path, 1200)


@pytest.mark.parametrize(("limited", "cause"), [("ledger", "disk I/O error"), ("tokens", "File too large")])
def test_a_file_that_may_not_grow(tmp_path, processes, limited, cause):
    folder = tmp_path / "run"
    child = processes.Process(target=run_child.work_limited, args=(folder, 20_000, limited))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert Path(f"{folder}.error").read_text() == (
        f"{folder} cannot be written ({cause}): finished blocks are kept, and --resume goes on from there"
    )
    check_nothing_was_lost(folder)
    run_child.work(folder, 20_000, 1, 6000)
    check_whole(folder, 20_000)


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path, processes):
    memory = processes.Array("q", 2)
    child = processes.Process(target=run_child.add_many, args=(tmp_path, 30_000, memory))
    child.start()
    child.join()
    assert child.exitcode == 0
    early, late = memory
    assert 0 < early <= late < early + 5_000  # kB; an object of 200 bytes for each block is more
