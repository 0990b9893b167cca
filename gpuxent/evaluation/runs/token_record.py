"""The record of a run's tokens: in the ledger until there are enough for a file, then in Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpuxent.evaluation.runs import token_parts
from gpuxent.evaluation.runs.ledger import Ledger, Part, Piece
from gpuxent.evaluation.statistics.tokens import TokenColumns

PART_TOKENS = 2**20  # as many wait in the ledger for a part
SMALL_CHANGE = 16 * 2**20  # bytes of disk for everything but tokens


def needed_bytes(record: type[TokenColumns], tokens: int) -> int:
    """Of disk: the files, and what waits in the ledger and once more in its log."""
    waiting = 2 * 8 * len(record.names()) * min(tokens, 2 * PART_TOKENS)
    in_files = 8 * len(record.floats) + 8  # a token, at most, about
    return in_files * tokens + waiting + SMALL_CHANGE


class TokenRecord:
    """Files of tokens in a folder, and the ledger that knows them and has the others.

    Each file is of adjacent rows that are all finished. So no two overlap, and all tokens can be read in order; few
    tokens beside a block that is not finished wait for it.
    """

    def __init__(self, record: type[TokenColumns], folder: Path, ledger: Ledger) -> None:
        self._record, self._folder, self._ledger = record, folder, ledger
        self._waiting, self._write_at = 0, PART_TOKENS

    def tidy(self) -> None:
        """Files that the ledger does not know were being written when the run was killed: it has their tokens."""
        self._folder.mkdir(exist_ok=True)
        known = {part.name: part.bytes for part in self._ledger.parts()}
        found = {file.name: file.stat().st_size for file in self._folder.iterdir() if token_parts.is_part(file.name)}
        for name in found.keys() - known.keys():
            (self._folder / name).unlink()
        for name, size in known.items():
            if found.get(name) != size:
                state = f"has {found[name]:,} bytes instead of {size:,}" if name in found else "is missing"
                raise ValueError(f"{self._folder / name} {state}: the run cannot go on, begin it in a new folder")
        self._waiting = sum(piece.tokens for piece in self._ledger.pieces())

    def pieces(self, block: range, tokens: TokenColumns | None) -> list[tuple[Piece, bytes]]:
        """A block's tokens for the ledger."""
        rows = f"rows {block.start:,} to {block.stop:,}"
        if tokens is None:
            raise ValueError(f"the tokens of {rows} are missing")
        row = tokens.row
        if row.size and not (row[0] >= block.start and row[-1] < block.stop and (row[1:] > row[:-1]).all()):
            raise ValueError(f"the tokens of {rows} must be of these rows and in their order")
        pieces = token_parts.split(tokens, block.start, block.stop)
        return [(Piece(first, stop, len(some)), token_parts.to_bytes(some)) for first, stop, some in pieces]

    def added(self, tokens: int) -> None:
        """So many more are in the ledger: files are written if that makes enough."""
        self._waiting += tokens
        if self._waiting >= self._write_at:
            self.write(at_least=PART_TOKENS // 2)

    def write(self, at_least: int = 0) -> None:
        """Files of tokens that wait, of at least so many each."""
        for pieces in _groups(self._ledger.pieces()):
            if sum(piece.tokens for piece in pieces) >= at_least:
                self._write(pieces)
        self._write_at = self._waiting + PART_TOKENS

    def _write(self, pieces: list[Piece]) -> None:
        first, stop, counts = pieces[0].first, pieces[-1].stop, [piece.tokens for piece in pieces]
        part = None
        if any(counts):
            tokens = token_parts.from_bytes(self._record, counts, map(self._ledger.columns, pieces))
            name = token_parts.part_name(first, stop)
            part = Part(first, stop, len(tokens), name, token_parts.write_part(self._folder / name, tokens))
        self._ledger.replace(pieces, part)
        self._waiting -= sum(counts)

    def read(self) -> Iterator[Any]:
        """All tokens in the order of their rows, some 100,000 at a time."""
        places: list[Part | Piece] = [*self._ledger.parts(), *self._ledger.pieces()]
        for place in sorted(places, key=lambda place: place.first):
            if isinstance(place, Part):
                yield from token_parts.read_part(self._record, self._folder / place.name)
            elif place.tokens:
                yield token_parts.from_bytes(self._record, [place.tokens], [self._ledger.columns(place)])


def _groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces of adjacent rows; a group ends where it has enough tokens for a file."""
    group: list[Piece] = []
    tokens = 0
    for piece in pieces:
        if group and (piece.first != group[-1].stop or tokens >= PART_TOKENS):
            yield group
            group, tokens = [], 0
        group.append(piece)
        tokens += piece.tokens
    if group:
        yield group
