"""Tiles: how the NumPy backend walks over rows of logits with cache-sized buffers, on all cores, without a copy of
the rows.

A row's tiles lie on a grid of TILE columns that is fixed by the row, and what is kept of them is merged in column
order in float64: so the bits of a row's result do not depend on the rows around it, on threads or on how rows are
split over calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from gpuxent._records import Transform
from gpuxent.backends import _threads

TILE = 16384  # columns; of 4096..65536 the fastest on 2 cores with 1 MB of L2 each, together with BLOCK
BLOCK = 1 << 18  # elements of one buffer of a thread
SMALL_BLOCK = BLOCK // 4  # where the work on a tile makes float64 temporaries of its own

Index = tuple[Any, ...]


def over_tiles(
    work: Callable[..., None], arrays: Sequence[np.ndarray | None], scratch: list[Any], block: int = BLOCK
) -> None:
    """Call work(rows, columns, tile of each array, buffers) for every tile of arrays of one shape, on the thread
    pool."""
    arrays = _with_rows_collapsed(arrays)
    shape = next(a for a in arrays if a is not None).shape
    items = list(_tiles(shape, block))

    def group(items: Sequence[tuple[slice, Index, slice]]) -> None:
        flat = _scratch(scratch, max(block, TILE))
        with np.errstate(all="ignore"):  # special values are part of the contract, not an accident
            for at, index, columns in items:
                rows, width = at.stop - at.start, columns.stop - columns.start
                views = [None if a is None else a[index][:, columns] for a in arrays]
                work(at, columns, views, [f[: rows * width].reshape(rows, width) for f in flat])

    if np.prod(shape) < 1 << 17:  # a thread costs more than the work
        group(items)
    else:
        _threads.run(group, items)


_kept = threading.local()


def _scratch(dtypes: Sequence[Any], size: int) -> list[np.ndarray]:
    """One flat buffer for each dtype. A thread keeps its buffers: fresh memory costs a page fault every 4 KB."""
    buffers: dict[tuple[int, Any], np.ndarray] = _kept.__dict__.setdefault("buffers", {})
    for place in enumerate(dtypes):
        if place not in buffers or buffers[place].size < size:
            buffers[place] = np.empty(size, place[1])
    return [buffers[place] for place in enumerate(dtypes)]


def sum_tiles(
    sums: Callable[[list[Any], list[np.ndarray]], tuple[np.ndarray, ...]],
    arrays: list[np.ndarray],
    scratch: list[Any],
    outputs: int = 1,
) -> list[np.ndarray]:
    """The per-row sums that sums(tile of each array, buffers) gives, added over a row's tiles in column order; float64.

    Broadcast arrays are walked like any other, and take no memory.
    """
    shape = arrays[0].shape
    parts = np.empty((outputs, -(-shape[-1] // TILE), int(np.prod(shape[:-1]))))

    def work(at: slice, columns: slice, views: list[Any], buffers: list[np.ndarray]) -> None:
        for part, values in zip(parts, sums(views, buffers), strict=True):
            part[columns.start // TILE, at] = values

    over_tiles(work, arrays, scratch, SMALL_BLOCK)
    totals = np.zeros((outputs, parts.shape[2]))
    with np.errstate(all="ignore"):
        for tile in range(parts.shape[1]):
            totals += parts[:, tile]
    return [total.reshape(shape[:-1]) for total in totals]


def _with_rows_collapsed(arrays: Sequence[np.ndarray | None]) -> Sequence[np.ndarray | None]:
    """The arrays with their leading axes made one, if all allow it without a copy; `_tiles` copes with either."""
    try:
        return [None if a is None else np.reshape(a, (-1, a.shape[-1]), copy=False) for a in arrays]
    except ValueError:
        return arrays


def _tiles(shape: tuple[int, ...], block: int) -> Iterator[tuple[slice, Index, slice]]:
    """(flat rows, index of these rows, columns) of every tile."""
    *outer, rows, vocab = shape
    highest = max(1, block // min(vocab, TILE))
    height = -(-rows // -(-rows // highest)) if rows else 1  # equal blocks, for the threads' sake
    for number, lead in enumerate(np.ndindex(*outer)):
        for first in range(0, rows, height):
            last = min(first + height, rows)
            for column in range(0, vocab, TILE):
                columns = slice(column, min(column + TILE, vocab))
                yield slice(number * rows + first, number * rows + last), (*lead, slice(first, last)), columns


def work_dtype(dtype: np.dtype, transform: Transform) -> type:
    return np.float32 if dtype.itemsize <= 4 and transform.is_identity else np.float64


def load(tile: np.ndarray, buffer: np.ndarray, transform: Transform) -> None:
    """Widen a tile into the buffer and transform it there."""
    if tile.dtype == ml_dtypes.bfloat16 and buffer.dtype == np.float32:
        # bfloat16 is the upper half of a float32; many times faster than the cast
        np.left_shift(tile.view(np.uint16), np.uint32(16), out=buffer.view(np.uint32))
    else:
        np.copyto(buffer, tile)
    if transform.softcap is not None:
        buffer /= transform.softcap
        np.tanh(buffer, out=buffer)
        buffer *= transform.softcap
    if transform.temperature != 1.0:
        buffer /= transform.temperature


def slope_of(transformed: np.ndarray, transform: Transform, out: np.ndarray) -> np.ndarray:
    """d transformed / d logit = (1 - tanh**2) / temperature."""
    np.multiply(transformed, transform.temperature / transform.softcap, out=out)  # type: ignore[operator]
    np.multiply(out, out, out=out)
    np.subtract(1.0, out, out=out)
    out /= transform.temperature
    return out
