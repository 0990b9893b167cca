"""Two models' logits of the same rows, read together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxent.evaluation.sources._base import FileStamp, Source


@dataclass(frozen=True)
class PairSource:
    """What is read is the pair (base's rows, other's rows), each with all its classes. Dtype is base's, and of two
    vocabularies the smaller one is the shape's, if what is beyond it shall be left out."""

    base: Source
    other: Source
    crop: bool = False

    def __post_init__(self) -> None:
        if self.other.shape[:-1] != self.base.shape[:-1]:
            raise ValueError(
                f"other ({self.other.name}) must have the rows of base, {self.base.shape[:-1]}, got "
                f"{self.other.shape[:-1]}"
            )
        if self.other.shape[-1:] != self.base.shape[-1:] and not self.crop:
            raise ValueError(
                f"other ({self.other.name}) must have the vocabulary of base, {self.base.shape[-1]:,} classes, got "
                f"{self.other.shape[-1]:,}; vocab_align='crop' leaves out the last ones of the larger"
            )

    @property
    def name(self) -> str:
        return f"{self.base.name} and {self.other.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.base.shape[:-1], min(self.base.shape[-1], self.other.shape[-1]))

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def sides(self) -> dict[str, Source]:
        return {"base": self.base, "other": self.other}

    @property
    def tile_rows(self) -> int:
        """Of sides that are products; AttributeError if there are none."""
        found = [side.tile_rows for side in (self.base, self.other) if hasattr(side, "tile_rows")]
        if not found:
            raise AttributeError("tile_rows")
        return min(found)

    @property
    def row_chunk(self) -> int:
        return max(self.base.row_chunk, self.other.row_chunk)

    def read(self, rows: slice, columns: slice | None = None) -> tuple[Any, Any]:
        return self.base.read(rows, columns), self.other.read(rows, columns)

    def files(self) -> list[FileStamp]:
        return [*self.base.files(), *self.other.files()]

    def warnings(self) -> list[str]:
        return [*self.base.warnings(), *self.other.warnings(), *self.left_out()]

    def left_out(self) -> list[str]:
        """A sentence, if classes are."""
        kept = self.shape[-1]
        return [
            f"the last {side.shape[-1] - kept:,} of {side.shape[-1]:,} classes of {name} ({side.name}) are left out: "
            "its probabilities are those of the others"
            for name, side in self.sides.items()
            if side.shape[-1] > kept
        ]

    def check(self, rows: slice, columns: slice | None = None) -> None:
        self.base.check(rows, columns)
        self.other.check(rows, columns)
