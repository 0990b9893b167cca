"""A run's folder: a ledger of finished blocks, the record of their tokens, and the result.

RUN/ledger.sqlite                       what the run depends on, finished blocks with their summaries, their tokens
                                        until there are a million
RUN/tokens/FIRST-STOP.parquet           all tokens of the rows [first, stop), in their order
RUN/result.json                         the result, when there is one
RUN/running.json                        which process has the run open
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from gpuxent.evaluation.runs import ledger
from gpuxent.evaluation.runs.fingerprint import differences
from gpuxent.evaluation.runs.ledger import Ledger, writing_to
from gpuxent.evaluation.runs.token_parts import require_pyarrow, sync_folder
from gpuxent.evaluation.runs.token_record import TokenRecord, needed_bytes
from gpuxent.evaluation.statistics.tokens import RECORDS, BlockResult, TokenColumns, Tokens

if TYPE_CHECKING:
    from gpuxent.evaluation.statistics.summary import Summary

R = TypeVar("R", bound=TokenColumns)


class Run:
    """What a run has left behind in its folder, to read; `open` opens it. Others may read it too, but not run it."""

    def __init__(self, path: Path, ledger: Ledger, record: type[TokenColumns]) -> None:
        self.path, self._ledger, self._record = path, ledger, TokenRecord(record, path / "tokens", ledger)

    @classmethod
    def open(cls, path: str | os.PathLike[str], record: type[TokenColumns] | None = None) -> Run:
        """OSError or ValueError if the folder holds no run, or one that is going on or is damaged, or one that keeps
        another record than the one named: `Tokens` of one model, `PairTokens` of two."""
        path = Path(path)
        ledger = Ledger(path, read_only=True)
        try:
            if not ledger.about:
                raise FileNotFoundError(f"{path} holds no run: it was stopped before it began")
            kept = RECORDS[ledger.about.get("kind", Tokens.kind)]  # the first runs, of one model, did not say it
            found = Run(path, ledger, kept)
            found.expect(record or kept)
        except BaseException:
            ledger.close()
            raise
        return found

    @property
    def kind(self) -> str:
        """What the run is of: "perplexity" of one model, "comparison" of two."""
        return self._ledger.about.get("kind", Tokens.kind)

    def expect(self, record: type[TokenColumns]) -> None:
        """ValueError if the run is of another kind than those that keep such tokens."""
        if self.kind != record.kind:
            raise ValueError(f"{self.path} must hold a run of {record.kind}, got one of {self.kind}")

    @property
    def rows(self) -> int:
        """Of the data set."""
        return self._ledger.about["rows"]

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self._ledger.about["fingerprint"]

    @property
    def keeps_tokens(self) -> bool:
        return self._ledger.about["tokens"]

    @property
    def finished_rows(self) -> int:
        return self._ledger.finished_rows

    @property
    def complete(self) -> bool:
        return self.finished_rows == self.rows

    @property
    def finished(self) -> list[range]:
        """Rows, in order; ranges that meet are one."""
        return list(self._ledger.finished())

    @property
    def computed_by(self) -> tuple[str, ...]:
        """Who computed the blocks, the first block's first."""
        return tuple(self._ledger.kinds)

    @property
    def mixed(self) -> tuple[str, ...]:
        """The same if there are several: then the last bits depend on who computed what."""
        return self.computed_by if len(self.computed_by) > 1 else ()

    def summary(self, identity: Summary) -> Summary:
        """Of all finished blocks; the identity is that of the run's options."""
        kind = type(identity)
        return _merged(identity, map(kind.from_json, self._ledger.summaries()))

    def tokens(self) -> Iterator[Any]:
        """All tokens of finished blocks in the order of their rows, some 100,000 at a time, in the run's record."""
        return self._record.read()

    @property
    def result(self) -> dict[str, Any] | None:
        """As it was last written."""
        try:
            return json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def close(self) -> None:
        self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_kind(path: str | os.PathLike[str]) -> str:
    """What a folder holds: a run of "perplexity" or of a "comparison". OSError or ValueError if it holds none."""
    with Run.open(path) as run:
        return run.kind


def read_tokens(run: Run | str | os.PathLike[str], record: type[R] = Tokens) -> Iterator[R]:  # type: ignore[assignment]
    """All tokens of a run in the order of their rows, some 100,000 at a time."""
    if isinstance(run, Run):
        run.expect(record)
        yield from run.tokens()
    else:
        with Run.open(run, record) as opened:
            yield from opened.tokens()


class RunDirectory(Run):
    """A run in a folder, begun or (with `resume`) continued; one thread uses it.

    `rows` are those of the data set, of which about `expected_tokens` are scored, and kept in the `record` that is
    named. Everything that would stop the run later is found out now: OSError or ValueError if the folder cannot be
    written, has not enough room, is in use by another run, holds one already, or (with `resume`) one of other inputs,
    options or another version.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fingerprint: dict[str, Any],
        rows: int,
        *,
        record: type[TokenColumns] = Tokens,
        tokens: bool = True,
        resume: bool = False,
        allow_mixed: bool = False,
        expected_tokens: int | None = None,
    ) -> None:
        path = Path(path)
        if tokens:
            require_pyarrow(f"the record of tokens in {path}")
        _make_folder(path, resume)
        super().__init__(path, Ledger(path), record)
        self._allow_mixed = allow_mixed
        try:
            about = {"kind": record.kind, "fingerprint": fingerprint, "rows": rows, "tokens": tokens}
            if self._ledger.about:
                self._check_same(about, resume)
            if tokens:
                left = 1 - self.finished_rows / max(1, rows)
                _check_room(path, record, int(left * (rows if expected_tokens is None else expected_tokens)))
            if not self._ledger.about:
                self._ledger.begin(**about)
            if tokens:
                with writing_to(path):
                    self._record.tidy()
        except BaseException:
            self._ledger.close()
            raise

    def _check_same(self, now: dict[str, Any], resume: bool) -> None:
        if self.kind != now["kind"]:
            raise ValueError(f"{self.path} holds a run of {self.kind}; one of {now['kind']} needs another folder")
        if not resume:
            share = 100 * self.finished_rows // self.rows if self.rows else 100
            raise ValueError(
                f"{self.path} holds a run ({share} % done); give --resume to go on with it, or another folder"
            )
        found = differences(self.fingerprint, now["fingerprint"])
        found += [f"rows: {self.rows:,} -> {now['rows']:,}"] * (self.rows != now["rows"])
        if self.keeps_tokens != now["tokens"]:
            found.append("the record of tokens: " + ("kept -> not kept" if self.keeps_tokens else "not kept -> kept"))
        if found:
            raise ValueError(f"{self.path} cannot go on with what is not the same run: {'; '.join(found)}")

    # ---- blocks ----

    def add(self, result: BlockResult) -> None:
        """A finished block; when this returns, nothing but the loss of the disk takes it away.

        Raises ValueError if some of its rows are finished, or if it was computed by another kind of machine or another
        version than the run's first block; OSError if it cannot be written.
        """
        block = range(result.first, result.first + result.rows)
        if not 0 <= block.start < block.stop <= self.rows:
            raise ValueError(f"a block must be of rows in 0 to {self.rows:,}, got {block.start:,} to {block.stop:,}")
        first_kind = self.computed_by[0] if self.computed_by else result.computed_by
        if result.computed_by != first_kind and not self._allow_mixed:
            raise ValueError(
                f"{self.path} was begun with [{first_kind}] and cannot go on with [{result.computed_by}], which may "
                "differ in the last bits; --allow-mixed does, and the result says so"
            )
        pieces = self._record.pieces(block, result.tokens) if self.keeps_tokens else []
        self._ledger.add(block, result.computed_by, result.summary.to_json(), pieces)
        if self.keeps_tokens:
            with writing_to(self.path):
                self._record.added(sum(piece.tokens for piece, _ in pieces))

    def flush(self) -> None:
        """All tokens to Parquet, however few they are."""
        with writing_to(self.path):
            self._record.write()

    def write_result(self, data: dict[str, Any]) -> None:
        """RUN/result.json, which is whole or the one before."""
        text = json.dumps(data, indent=2, allow_nan=False, default=str) + "\n"
        path, temporary = self.path / "result.json", self.path / "result.json.tmp"
        with writing_to(self.path):
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(self.path)

    def close(self) -> None:
        """The run can go on later. Of a complete one all tokens are in Parquet then."""
        try:
            if self.complete:
                self.flush()
        finally:
            self._ledger.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._ledger.close()


def _merged(identity: Summary, summaries: Iterable[Summary]) -> Summary:
    """Those of as many blocks with each other: of millions every one is merged a few times only."""
    stack: list[tuple[int, Summary]] = []  # of so many blocks, ever fewer
    for summary in summaries:
        blocks = 1
        while stack and stack[-1][0] == blocks:
            blocks, summary = 2 * blocks, stack.pop()[1].merge(summary)
        stack.append((blocks, summary))
    total = identity
    for _, summary in reversed(stack):
        total = summary.merge(total)
    return total


def _make_folder(path: Path, resume: bool) -> None:
    """A folder that can be written, with a run or nothing that a run would be confused with."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise OSError(f"{path} cannot be made a folder that can be written: {reason}") from error
    names = {entry.name for entry in path.iterdir()}
    if ledger.NAME in names:
        return
    with suppress(OSError):  # the first start was killed at once
        (path / "tokens").rmdir()
        names.discard("tokens")
    if resume and names:
        raise ValueError(f"{path} holds no run to go on with, but other files, such as {min(names)}")
    if names & {"tokens", "result.json"}:
        raise ValueError(
            f"{path} holds what a run left behind ({min(names & {'tokens', 'result.json'})}) but no ledger"
        )


def _check_room(path: Path, record: type[TokenColumns], tokens: int) -> None:
    needed, free = needed_bytes(record, tokens), shutil.disk_usage(path).free
    if free < needed:
        sizes = f"{needed / 1e9:,.1f} GB for the record of {tokens:,} tokens, and {free / 1e9:,.1f} GB are free"
        raise OSError(f"{path} needs about {sizes}")
