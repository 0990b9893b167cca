"""Several files as one array, one after the other along the first axis."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from gpuxent.evaluation.sources._base import FileStamp, Source, Window

MOST_WARNINGS = 3  # of shards


@dataclass(frozen=True)
class ShardedSource:
    """Sources of the same dtype and, but for the first axis, shape. A read within one is that one's."""

    name: str
    parts: tuple[Source, ...]

    @classmethod
    def of(cls, name: str, parts: Sequence[Source]) -> ShardedSource:
        first = parts[0]
        for part in parts:
            if not part.shape or part.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{first.name} has shape {first.shape} and {part.name} {part.shape}; "
                    "shards may differ in the first axis only"
                )
            if part.dtype != first.dtype:
                raise ValueError(f"{first.name} holds {first.dtype} and {part.name} {part.dtype}")
        return cls(name, tuple(parts))

    @cached_property
    def edges(self) -> list[int]:
        """Where shards begin along the first axis, and the end of the last."""
        return list(accumulate((part.shape[0] for part in self.parts), initial=0))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.edges[-1], *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def normalized(self) -> bool:
        return all(getattr(part, "normalized", False) for part in self.parts)

    @property
    def row_chunk(self) -> int:
        """Exact if every shard but the last holds whole chunks."""
        return max(part.row_chunk for part in self.parts)

    @property
    def format(self) -> str:
        return f"{len(self.parts):,} files of {getattr(self.parts[0], 'format', '')}"

    @property
    def missing_chunks(self) -> int:
        return sum(getattr(part, "missing_chunks", 0) for part in self.parts)

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        blocks = [part.read(inside, columns) for part, inside in self._within(rows, columns)]
        if not blocks:
            return self.parts[0].read(slice(0, 0), columns)
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def check(self, rows: slice, columns: slice | None = None) -> None:
        for part, inside in self._within(rows, columns):
            part.check(inside, columns)

    def _within(self, rows: slice, columns: slice | None) -> Iterator[tuple[Source, slice]]:
        """The shards that hold rows, and their rows in them."""
        window = Window.of(self.shape, rows, columns)
        inner = math.prod(window.rows[1:])  # rows of an entry of the first axis
        at = bisect_right(self.edges, window.first // max(inner, 1)) - 1
        while at < len(self.parts) and self.edges[at] * inner < window.stop:
            first, stop = self.edges[at] * inner, min(window.stop, self.edges[at + 1] * inner)
            if max(window.first, first) < stop:
                yield self.parts[at], slice(max(window.first, first) - first, stop - first)
            at += 1

    def files(self) -> list[FileStamp]:
        return [stamp for part in self.parts for stamp in part.files()]

    def warnings(self) -> list[str]:
        found = [warning for part in self.parts for warning in part.warnings()]
        if len(found) > MOST_WARNINGS:
            found[MOST_WARNINGS:] = [f"{self.name}: {len(found) - MOST_WARNINGS:,} more warnings like these"]
        return [*self._missing(), *found]

    def _missing(self) -> list[str]:
        """What file names such as logits-00002-of-00010 say."""
        for part in self.parts:
            found = re.search(r"[0-9]+-of-([0-9]+)", os.path.basename(part.name))
            if found and int(found[1]) != len(self.parts):
                return [f"{self.name} is {len(self.parts):,} files, but {part.name} says {int(found[1]):,}"]
        return []


def natural(path: Path) -> tuple[list[int | str], str]:
    """Sorts shard-2 before shard-10."""
    pieces = re.split(r"([0-9]+)", str(path))
    return [int(piece) if at % 2 else piece for at, piece in enumerate(pieces)], str(path)
