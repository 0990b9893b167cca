"""Arrays in memory, and arrays of Dask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from gpuxent.evaluation.sources._base import InMemory, Window, row_chunk


@dataclass(frozen=True)
class ArraySource(InMemory):
    """An array of NumPy or CuPy, or whatever can be sliced and reshaped. A read is a view where one is possible."""

    array: Any
    name: str = "array"
    row_chunk: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        window = Window.of(self.shape, rows, columns)
        if not _adjacent(self.array, len(window.rows)):
            return window.gather(self.array.__getitem__)
        flat = self.array.reshape(-1 if columns is None else (math.prod(window.rows), window.row_size))
        place = slice(window.first, window.stop)
        return flat[place] if window.columns is None else flat[place, window.columns]


def _adjacent(array: Any, axes: int) -> bool:
    """Whether the leading axes are one axis in memory, so that flattening them copies nothing."""
    steps = getattr(array, "strides", None)
    if steps is None or 0 in array.shape:
        return False
    return all(a == b * size for (a, b), size in zip(pairwise(steps[:axes]), array.shape[1:axes], strict=True))


@dataclass(frozen=True)
class DaskSource(InMemory):
    """An array of Dask, whose reads are lazy: nothing is computed."""

    array: Any
    name: str = "array"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def row_chunk(self) -> int:
        """Exact for even chunks, else that of the largest: `row_edges` has the truth."""
        return row_chunk(self.shape, [max(sizes, default=1) for sizes in self.array.chunks])

    @property
    def row_edges(self) -> list[int]:
        """Rows, from 0 to their number, at which blocks can begin and end without reading a chunk twice."""
        axes, chunks = self.shape[:-1] or self.shape, self.array.chunks
        for axis in range(len(axes)):
            if max(chunks[axis], default=1) > 1 or axis == len(axes) - 1:
                inner = math.prod(axes[axis + 1 :])
                ends = list(accumulate(chunks[axis]))
                outer = range(math.prod(axes[:axis]))
                return [0, *((repeat * axes[axis] + end) * inner for repeat in outer for end in ends)]
        return [0, 1]

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        window = Window.of(self.shape, rows, columns)
        if not len(window):  # which Dask does not reshape
            return np.empty_like(self.array, shape=window.shape)
        return window.gather(self.array.__getitem__)
