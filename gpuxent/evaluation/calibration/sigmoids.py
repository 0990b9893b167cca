"""Independent sigmoids as rows of two classes, so that everything for rows serves them too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxent.backends import is_dask
from gpuxent.evaluation.sources import FileStamp, Source, stored


@dataclass(frozen=True)
class SigmoidSource:
    """The elements of scores (...), each a row of two classes: 0 and the score, whose softmax is the sigmoid of it; of
    probabilities 1 - p and p."""

    scores: Source
    probs: bool = False

    @property
    def name(self) -> str:
        return self.scores.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scores.shape, 2)

    @property
    def dtype(self) -> np.dtype:
        return self.scores.dtype

    @property
    def columns(self) -> int:
        """Elements in a row of scores; 1 of a vector."""
        return columns_of(self.scores.shape)

    @property
    def row_chunk(self) -> int:
        return self.scores.row_chunk * self.columns

    @property
    def array(self) -> Any:
        """Where the scores are, if they are in memory."""
        return getattr(self.scores, "array", None)

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        first = rows.start // self.columns
        stop = -(-rows.stop // self.columns)
        block = self.scores.read(slice(first, stop), None if len(self.scores.shape) == 1 else slice(None))
        scores = block.reshape(-1)[rows.start - first * self.columns : rows.stop - first * self.columns]
        made: Any = np.stack([1 - scores if self.probs else np.zeros_like(scores), scores], axis=-1)
        return made.rechunk({1: 2}) if is_dask(made) else made

    def files(self) -> list[FileStamp]:
        return self.scores.files()

    def warnings(self) -> list[str]:
        return self.scores.warnings()

    def check(self, rows: slice, columns: slice | None = None) -> None:
        self.scores.check(slice(rows.start // self.columns, -(-rows.stop // self.columns)))


class DaskSigmoids(SigmoidSource):
    """Of an array of Dask."""

    @property
    def row_edges(self) -> list[int]:
        return [edge * self.columns for edge in self.scores.row_edges]  # type: ignore[attr-defined]


class ProductSigmoids(SigmoidSource):
    """Of hidden states and a classifier."""

    @property
    def hidden(self) -> Source:
        return self.scores.hidden  # type: ignore[attr-defined]

    @property
    def factors(self) -> dict[str, Source | None]:
        return self.scores.factors  # type: ignore[attr-defined]

    @property
    def tile_rows(self) -> int:
        return self.scores.tile_rows * self.columns  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RepeatedSource:
    """Integers of rows, once for each of the row's elements; by default the rows' numbers."""

    lead: tuple[int, ...]
    columns: int
    rows: Source | None = None

    @property
    def name(self) -> str:
        return "row numbers" if self.rows is None else self.rows.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (*(self.lead if self.rows is None else self.rows.shape), self.columns)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int64) if self.rows is None else self.rows.dtype

    @property
    def row_chunk(self) -> int:
        return 1

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        numbers = np.arange(rows.start, rows.stop) // self.columns
        if self.rows is None or not numbers.size:
            return numbers
        first = int(numbers[0])
        return self.rows.read(slice(first, int(numbers[-1]) + 1))[numbers - first]

    def files(self) -> list[FileStamp]:
        return [] if self.rows is None else self.rows.files()

    def warnings(self) -> list[str]:
        return [] if self.rows is None else self.rows.warnings()

    def check(self, rows: slice, columns: slice | None = None) -> None:
        pass  # the rows' source does, when it is read


def columns_of(shape: tuple[int, ...]) -> int:
    """Sigmoids per row of scores (rows,) or (..., columns)."""
    return shape[-1] if len(shape) > 1 else 1


def pairs(scores: Source, probs: bool) -> SigmoidSource:
    """The source of pairs for scores of any kind."""
    if not scores.shape or math.prod(scores.shape[1:]) == 0:
        raise ValueError(f"logits ({scores.name}) must have shape (rows,) or (..., labels), got {scores.shape}")
    if hasattr(scores, "factors"):
        return ProductSigmoids(stored(scores), probs)
    return (DaskSigmoids if hasattr(scores, "row_edges") else SigmoidSource)(scores, probs)
