"""What a table says of documents: bytes, words, and the group each belongs to."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

DOCUMENT = "document"  # the column of the ids
GROUP_TYPES = (str, bool, int, float, np.generic)
Columns = dict[str, Sequence[Any]]


@dataclass(frozen=True)
class Metadata:
    """Bytes and words in all, or of each document; the columns are in the order of the ids."""

    name: str  # of the table, for messages
    documents: np.ndarray | None = None  # int64, ascending; None: the table is not needed
    bytes: int | np.ndarray | None = None
    words: int | np.ndarray | None = None
    group: np.ndarray | None = None  # of each document: its place in `groups`
    groups: tuple[str, ...] = ()

    @property
    def needs_documents(self) -> bool:
        return self.documents is not None

    def of(self, ids: np.ndarray) -> Metadata:
        """Of these documents, in their order. Raises: ValueError: the table lacks one of them."""
        if self.documents is None:
            return self
        places = np.searchsorted(self.documents, ids)
        known = places < self.documents.size
        known[known] = self.documents[places[known]] == ids[known]
        if not known.all():
            count = int(np.count_nonzero(~known))
            others = f" and {count - 1:,} more" if count > 1 else ""
            raise ValueError(
                f"{self.name} has no record of document {ids[~known][0]}{others}, which have scored tokens"
            )
        return self.take(places)

    def take(self, places: np.ndarray) -> Metadata:
        columns = {name: getattr(self, name) for name in ("documents", "bytes", "words", "group")}
        return replace(self, **{n: c[places] for n, c in columns.items() if isinstance(c, np.ndarray)})


def open_metadata(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    bytes: int | str | None = None,
    words: int | str | None = None,
    group_by: str | None = None,
) -> Metadata | None:
    """What is asked of a table of documents; None if nothing is.

    Args:
        source: a CSV (with a header), JSON lines or Parquet file with a column `document` of ids, each once, or the
            columns by name. What it says of documents without a scored token is not used.
        bytes, words: how many the text has, or the name of a column that says it of each document.
        group_by: the name of a column: statistics for each of its values. One that is missing is "".

    Raises: ValueError, TypeError: a column that is not there, is not of integers or has a negative one, an id twice;
        OSError: a file that cannot be read.
    """
    counts = {"bytes": _count(bytes, "bytes"), "words": _count(words, "words")}
    wanted = {n: c for n, c in {**counts, "group_by": group_by}.items() if isinstance(c, str)}
    totals: dict[str, Any] = {n: c for n, c in counts.items() if isinstance(c, int)}
    if not wanted:
        if source is not None:
            raise ValueError("metadata is given, but neither bytes, words nor group_by names a column of it")
        return Metadata("metadata", **totals) if totals else None
    if source is None:
        option, column = next(iter(wanted.items()))
        raise ValueError(f"{option} names a column, {column!r}, but no table of documents (metadata) is given")
    name = str(source) if isinstance(source, (str, Path)) else "metadata"
    columns = _read(source, name, [DOCUMENT, *dict.fromkeys(wanted.values())])
    ids = _integers(columns[DOCUMENT], name, DOCUMENT)
    order = np.argsort(ids, kind="stable")
    _check_unique(ids, order, name)
    for option in ("bytes", "words"):
        if option in wanted:
            totals[option] = _not_negative(
                _integers(columns[wanted[option]], name, wanted[option]), name, wanted[option]
            )[order]
    if group_by is not None:
        codes, groups = _groups(columns[group_by], name, group_by)
        totals |= {"group": codes[order], "groups": groups}
    return Metadata(name, ids[order], **totals)


def _count(value: Any, name: str) -> int | str | None:
    """A total, or the name of a column."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, (bool, str)) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer or the name of a column, got {value!r}")
    return int(value)


def _read(source: Any, name: str, wanted: list[str]) -> Columns:
    """The wanted columns, of one length."""
    if isinstance(source, Mapping):
        columns: Columns = {column: source[column] for column in _present(wanted, list(source), name)}
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of {name} must have one length, got {lengths}")
        return columns
    path = Path(source)
    reader = {".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}.get(
        path.suffix.lower()
    )
    if reader is None:
        raise ValueError(f"{name} must be a .csv, .jsonl, .ndjson or .parquet file")
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    try:
        return reader(path, name, wanted)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be text in UTF-8, got {error.reason} at byte {error.start:,}") from error


def _present(wanted: list[str], found: list[str], name: str) -> list[str]:
    for column in wanted:
        if column not in found:
            listed = ", ".join(map(repr, found[:20])) + (", ..." if len(found) > 20 else "")
            raise ValueError(f"{name} has no column {column!r}, but {listed or 'none'}")
        if found.count(column) > 1:
            raise ValueError(f"{name} has {found.count(column)} columns {column!r}, expected one")
    return wanted


def _read_csv(path: Path, name: str, wanted: list[str]) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            places = {column: header.index(column) for column in _present(wanted, header, name)}
            columns: dict[str, list[Any]] = {column: [] for column in wanted}
            for record in reader:
                if not record:  # an empty line
                    continue
                if len(record) != len(header):
                    raise ValueError(
                        f"{name} must have {len(header)} fields in line {reader.line_num}, as its header, "
                        f"got {len(record)}"
                    )
                for column, place in places.items():
                    columns[column].append(record[place])
        except csv.Error as error:
            raise ValueError(f"{name} is no CSV in line {reader.line_num}: {error}") from error
    return dict(columns)


def _read_jsonl(path: Path, name: str, wanted: list[str]) -> Columns:
    columns: dict[str, list[Any]] = {column: [] for column in wanted}
    seen: dict[str, None] = {}
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{name} must have an object of JSON in line {number}: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{name} must have an object of JSON in line {number}, got {line.strip()[:40]}")
            seen |= dict.fromkeys(record)
            for column in wanted:
                columns[column].append(record.get(column))
    _present(wanted, list(seen), name)
    return dict(columns)


def _read_parquet(path: Path, name: str, wanted: list[str]) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading {name} needs pyarrow: pip install 'gpuxent[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _present(wanted, file.schema_arrow.names, name)
            table = file.read(columns=wanted)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name} is no Parquet file that can be read: {error}") from error
    return {column: _arrow_values(table[column]) for column in wanted}


def _arrow_values(column: Any) -> Sequence[Any]:
    import pyarrow

    if pyarrow.types.is_integer(column.type) and column.null_count == 0:
        return column.to_numpy()
    return column.to_pylist()


def _integers(values: Sequence[Any], name: str, column: str) -> np.ndarray:
    """int64. Text is read as CSV has it; nothing else is made an integer."""
    if isinstance(values, np.ndarray) and values.dtype.kind != "O":
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise TypeError(
                f"column {column!r} of {name} must be a vector of integers, got {values.dtype}{list(values.shape)}"
            )
        if values.dtype.kind == "u" and values.size and int(values.max()) >= 2**63:
            raise ValueError(f"column {column!r} of {name} must be below 2**63, got {int(values.max())}")
        return values.astype(np.int64)
    made = np.empty(len(values), np.int64)
    for i, value in enumerate(values):
        number = _integer(value)
        if number is None or not -(2**63) <= number < 2**63:
            raise ValueError(f"column {column!r} of {name} must have integers, got {value!r} in record {i + 1:,}")
        made[i] = number
    return made


def _integer(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", value) else None
    return int(value) if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else None


def _not_negative(counts: np.ndarray, name: str, column: str) -> np.ndarray:
    bad = np.flatnonzero(counts < 0)
    if bad.size:
        raise ValueError(
            f"column {column!r} of {name} must not be negative, got {counts[bad[0]]} in record {bad[0] + 1:,}"
        )
    return counts


def _check_unique(ids: np.ndarray, order: np.ndarray, name: str) -> None:
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if twice.size:
        first, second = sorted(order[twice[0] : twice[0] + 2].tolist())
        raise ValueError(
            f"{name} must have each document once, got {ids[first]} in records {first + 1:,} and {second + 1:,}"
        )


def _groups(values: Iterable[Any], name: str, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(the place of each value among the names, the names in order)."""
    texts = []
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, GROUP_TYPES):
            raise TypeError(
                f"column {column!r} of {name} must have strings or numbers, got a {type(value).__name__} in record "
                f"{i + 1:,}"
            )
        texts.append("" if value is None else str(value))
    names = sorted(set(texts))
    places = {text: place for place, text in enumerate(names)}
    return np.fromiter((places[text] for text in texts), np.int64, len(texts)), tuple(names)
