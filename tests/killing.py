"""Commands that keep a run, as processes that are killed and interrupted."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from gpuxent.evaluation.runs.directory import Run

COMMAND = [sys.executable, "-c", "from gpuxent.cli import main; main()"]


def start_command(*arguments, err=subprocess.PIPE):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True
    )


def run_command(*arguments):
    process = start_command(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def rows_of(run):
    """The numbers of finished rows."""
    if not (run / "ledger.sqlite").exists():
        return set()
    try:
        with Run.open(run) as left:
            return {row for part in left.finished for row in part}
    except FileNotFoundError:  # it was stopped before it began
        return set()


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def has_written(run, times):
    """A condition: so many changes of the ledger were seen, about as many blocks are finished."""
    log, seen = run / "ledger.sqlite-wal", set()

    def condition():
        with suppress(FileNotFoundError):
            seen.add(log.stat().st_mtime_ns)
        return len(seen) > times

    return condition


def kill(process):
    """SIGKILL; what it has started ends by itself."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(map(runs, started)):
        assert time.monotonic() < deadline, "a worker outlives its run"
        time.sleep(0.01)


def runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def interrupt(process, err, times=1):
    """Ctrl-C; a second one as soon as the first is answered."""
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: "once more to stop now" in err.read_text(), process)
    if times == 2:
        os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out, err.read_text()
