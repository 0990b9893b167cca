"""The ledger of a run: which rows are finished and what they left behind, in one SQLite file.

What is in it is finished; SQLite keeps it through SIGKILL (a loss of power may cost the last blocks, no more). While it
is open its lock keeps other processes out. Memory does not grow with the number of blocks.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "ledger.sqlite"
OWNER = "running.json"  # who has the ledger open, for messages
JOURNAL = "wal"
PAGE_BYTES = 16384  # a block's tokens and summary are some kilobytes
ATTEMPTS = 5  # at the lock, in about half a second: a reader may be tidying, a killed process may be dying still

_SCHEMA = """
create table run (key text primary key, value text not null);
create table kinds (kind integer primary key, computed_by text not null unique);
create table blocks (first integer primary key, rows integer not null, kind integer not null, summary text not null);
create table pieces (first integer primary key, stop integer not null, tokens integer not null, columns blob not null);
create table parts (first integer primary key, stop integer not null, tokens integer not null, name text not null,
                    bytes integer not null);
"""


@dataclass(frozen=True)
class Piece:
    """Tokens of the rows [first, stop) that are in the ledger still."""

    first: int
    stop: int
    tokens: int


@dataclass(frozen=True)
class Part:
    """Tokens of the rows [first, stop) that are in a file."""

    first: int
    stop: int
    tokens: int
    name: str
    bytes: int


class Ledger:
    """The ledger in a folder, open; of a run that `begin` started, now or earlier.

    Raises OSError if another process has it open, or if it cannot be written; ValueError if it is damaged.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self._folder, self._read_only = folder, read_only
        self.kinds: list[str] = []  # who computed the blocks, the first block's first
        self.finished_rows = 0
        self.about: dict[str, Any] = {}  # what `begin` was told; empty if there is no run yet
        with self._explained():
            self._connection = _connect_to_read(folder) if read_only else _connect(folder)
        try:
            with self._explained():
                self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        tables = {name for (name,) in self._connection.execute("select name from sqlite_master")}
        if not tables:  # killed while it was made
            return
        if "run" not in tables:
            raise ValueError(f"{self._folder / NAME} is not the ledger of a run")
        values = self._connection.execute("select key, value from run")
        self.about = {key: json.loads(value) for key, value in values}
        found = self.about.pop("format", None)
        if found != FORMAT:
            raise ValueError(f"{self._folder / NAME} has format {found}, and this version reads format {FORMAT}")
        if not self._read_only:
            (verdict,) = self._connection.execute("pragma quick_check(1)").fetchone()
            if verdict != "ok":
                raise self._damaged(verdict.splitlines()[-1])
        self.kinds = [kind for (kind,) in self._connection.execute("select computed_by from kinds order by kind")]
        (self.finished_rows,) = self._connection.execute("select coalesce(sum(rows), 0) from blocks").fetchone()

    # ---- what is known of the run ----

    def begin(self, **about: Any) -> None:
        """A new run, and what is to be known of it."""
        with self._transaction() as connection:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            values = [(key, json.dumps(value)) for key, value in {"format": FORMAT, **about}.items()]
            connection.executemany("insert into run values (?, ?)", values)
        self.about = about

    def finished(self) -> Iterator[range]:
        """Of rows, in order, those that meet made one."""
        found = range(0)
        for first, rows in self._select("select first, rows from blocks order by first"):
            if found and first != found.stop:
                yield found
                found = range(0)
            found = range(found.start if found else first, first + rows)
        if found:
            yield found

    def summaries(self) -> Iterator[str]:
        return (text for (text,) in self._select("select summary from blocks order by first"))

    def pieces(self) -> list[Piece]:
        return [Piece(*row) for row in self._select("select first, stop, tokens from pieces order by first")]

    def columns(self, piece: Piece) -> bytes:
        ((found,),) = self._select("select columns from pieces where first = ?", piece.first)
        return found

    def parts(self) -> list[Part]:
        return [Part(*row) for row in self._select("select first, stop, tokens, name, bytes from parts order by first")]

    # ---- what is new ----

    def add(self, block: range, computed_by: str, summary: str, pieces: list[tuple[Piece, bytes]]) -> None:
        """A finished block; when this returns it is. ValueError if some of its rows were finished before."""
        kinds = self.kinds if computed_by in self.kinds else [*self.kinds, computed_by]
        kind = kinds.index(computed_by)
        with self._transaction() as connection:
            self._check_overlap(block)
            if kinds is not self.kinds:
                connection.execute("insert into kinds values (?, ?)", (kind, computed_by))
            connection.execute("insert into blocks values (?, ?, ?, ?)", (block.start, len(block), kind, summary))
            rows = [(piece.first, piece.stop, piece.tokens, columns) for piece, columns in pieces]
            connection.executemany("insert into pieces values (?, ?, ?, ?)", rows)
        self.kinds = kinds
        self.finished_rows += len(block)

    def _check_overlap(self, block: range) -> None:
        """No two blocks of the ledger overlap: of those that begin before this one's end, the last reaches furthest."""
        last = "select first, rows from blocks where first < ? order by first desc limit 1"
        found = self._connection.execute(last, (block.stop,)).fetchone()
        if found is not None and sum(found) > block.start:
            raise ValueError(
                f"rows {block.start:,} to {block.stop:,} cannot be added to {self._folder}: rows {found[0]:,} to "
                f"{sum(found):,} are finished"
            )

    def replace(self, pieces: list[Piece], part: Part | None) -> None:
        """Adjacent pieces are in a file now (or have no tokens)."""
        with self._transaction() as connection:
            if part is not None:
                row = (part.first, part.stop, part.tokens, part.name, part.bytes)
                connection.execute("insert into parts values (?, ?, ?, ?, ?)", row)
            ends = pieces[0].first, pieces[-1].first
            connection.execute("delete from pieces where first between ? and ?", ends)

    def close(self) -> None:
        """Leaves one file that can be read from a folder that cannot be written."""
        with suppress(sqlite3.Error, OSError):  # what is committed is on the disk, in one file or two
            if not self._read_only:
                self._connection.executescript("pragma incremental_vacuum")  # `execute` takes a single step: one page
                self._connection.execute("pragma journal_mode = delete")
                (self._folder / OWNER).unlink(missing_ok=True)
        self._connection.close()

    # ---- SQLite ----

    def _select(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        with self._explained():
            yield from self._connection.execute(query, values)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            self._connection.execute("begin immediate")
            try:
                yield self._connection
                self._connection.execute("commit")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors as errors of the folder."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise self._damaged(str(error)) from error
            if is_locked(error):
                raise OSError(f"{self._folder} is in use by another run{_owner(self._folder)}") from None
            if self._read_only:
                raise OSError(f"{self._folder / NAME} cannot be read ({error})") from error
            raise cannot_write(self._folder, str(error)) from error

    def _damaged(self, cause: str) -> ValueError:
        return ValueError(f"{self._folder / NAME} is damaged ({cause}): the run cannot go on, begin it in a new folder")


def cannot_write(folder: Path, cause: str) -> OSError:
    return OSError(f"{folder} cannot be written ({cause}): finished blocks are kept, and --resume goes on from there")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """The system's errors as errors of the run's folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # says it already
            raise
        raise cannot_write(folder, error.strerror or str(error)) from error


def is_locked(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL"))


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f" (process {owner['pid']} on {owner['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _connect(folder: Path) -> sqlite3.Connection:
    for attempt in range(ATTEMPTS):
        connection = sqlite3.connect(folder / NAME, timeout=0, isolation_level=None)
        try:
            _lock(connection, folder)
            return connection
        except BaseException as error:
            connection.close()
            if not isinstance(error, sqlite3.Error) or not is_locked(error) or attempt == ATTEMPTS - 1:
                raise
        time.sleep(random.uniform(0.02, 0.2))
    raise AssertionError


def _lock(connection: sqlite3.Connection, folder: Path) -> None:
    """The first transaction takes the lock, and it stays until the connection ends. The write-ahead log comes after
    it: so it needs no memory that processes share, which network file systems do not have."""
    if not (folder / NAME).exists() or (folder / NAME).stat().st_size == 0:  # later they would be written without lock
        connection.execute(f"pragma page_size = {PAGE_BYTES}")
        connection.execute("pragma auto_vacuum = incremental")
    connection.execute("pragma locking_mode = exclusive")
    connection.execute("begin exclusive")
    connection.execute("commit")
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
    (journal,) = connection.execute(f"pragma journal_mode = {JOURNAL}").fetchone()
    # without a write-ahead log, only FULL outlives a loss of power
    connection.execute(f"pragma synchronous = {'normal' if journal == 'wal' else 'full'}")


def _connect_to_read(folder: Path) -> sqlite3.Connection:
    """Beside other readers. What a killed run left in its log is put in its place first."""
    path = folder / NAME
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {NAME}")
    if (folder / OWNER).exists():
        Ledger(folder).close()
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1, isolation_level=None)
