"""Sources that are slow, or fail, in the process that reads them. Workers import this module."""

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuxent.evaluation.sources import Source


@dataclass(frozen=True)
class Odd:
    """Reads as another source does."""

    source: Source

    def __getattr__(self, name: str) -> Any:
        if name == "source" or name.startswith("__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        self.before(rows)
        return self.source.read(rows, columns)


@dataclass(frozen=True)
class Slow(Odd):
    seconds: float = 0.1

    def before(self, rows: slice) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Poison(Odd):
    """Kills the process that reads the row, after a moment in which it reads other blocks."""

    row: int = 0

    def before(self, rows: slice) -> None:
        time.sleep(0.05)
        if rows.start <= self.row < rows.stop:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Flaky(Odd):
    """The first process that reads the row finds the file server gone."""

    row: int = 0
    found: str = ""  # a file that says it happened

    def before(self, rows: slice) -> None:
        if rows.start <= self.row < rows.stop:
            try:
                Path(self.found).touch(exist_ok=False)
            except FileExistsError:
                return
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@dataclass(frozen=True)
class Told(Odd):
    """Leaves a file for every read, named after the process."""

    folder: str = ""

    def before(self, rows: slice) -> None:
        Path(self.folder, f"{os.getpid()}-{rows.start}").touch()
