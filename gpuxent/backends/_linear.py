"""Logits that are never there as a whole: products of hidden states and a classifier.

A tile of rows is made, read by the backend of its memory, in place turned into its gradient if that is wanted, and
forgotten. Rows that do not count are left out before the first product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import numpy as np

from gpuxent._records import IDENTITY, IGNORED, Array, GradWeights, LinearGrad, RowStats, Spread, Transform
from gpuxent.backends import _products, backend_of, is_cupy

TILE_BYTES, GPU_TILE_BYTES = 64 * 2**20, 2**30
LEAST_ROWS = 128  # of a tile, so that its products run at the speed of the machine


@dataclass(frozen=True)
class LinearLogits:
    """Rows (..., vocab) of hidden (..., features) @ classifier (vocab, features).T + bias (vocab,), all of one dtype
    and in one memory. `hidden` may be a sparse matrix of SciPy's, compressed by rows; it has no gradient then."""

    hidden: Array
    classifier: Array
    bias: Array | None = None
    tile_bytes: int | None = None  # of logits that are in memory at once, but of at least LEAST_ROWS

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.classifier.shape[0])

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> Any:
        return self.hidden.device

    @property
    def _meta(self) -> Array:
        """An array in the memory where these are, as Dask's arrays have one."""
        return self.hidden

    @property
    def tile_rows(self) -> int:
        default = GPU_TILE_BYTES if is_cupy(self.hidden) else TILE_BYTES
        return tile_rows(self.classifier.shape[0], self.dtype, self.tile_bytes or default)


def made(logits: LinearLogits) -> Array:
    """The logits, all of them, in the dtype in which they are computed."""
    dtype = computed_dtype(logits.dtype)
    out = _products.library(logits.hidden).empty(logits.shape, dtype)
    with np.errstate(all="ignore"):
        _products.logits_of(_products.factor(logits.hidden, dtype), logits.classifier, logits.bias, out)
    return out


def tile_rows(vocab: int, dtype: np.dtype, tile_bytes: int = TILE_BYTES) -> int:
    return max(LEAST_ROWS, tile_bytes // (vocab * computed_dtype(dtype).itemsize))


def computed_dtype(dtype: np.dtype) -> np.dtype:
    """Of logits and their gradients, and of sums of the latter."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


@dataclass(frozen=True)
class Tile:
    """Some rows, for which the logits are there."""

    rows: Any  # a slice or indices of the flattened rows
    hidden: Array  # (rows, features), as it is multiplied
    logits: Array  # (rows, vocab); may be overwritten
    labels: Array | None
    spread: Spread | None


class LinearBackend:
    """The contract for `LinearLogits`, by the backend of the memory they are in; what knows of no logits is its own."""

    def __init__(self, logits: LinearLogits, name: str | None = None) -> None:
        self._rows = backend_of(logits.hidden, name)
        self._numpy = _products.library(logits.hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)

    def row_stats(
        self,
        logits: LinearLogits,
        labels: Array | None = None,
        vocab_start: int = 0,
        *,
        spread: Spread | None = None,
        transform: Transform = IDENTITY,
        label_logit: Array | None = None,
        also: Sequence[str] = (),
    ) -> RowStats:
        record = self._empty(logits)
        flat = None if label_logit is None else label_logit.reshape(-1)
        for tile in self._tiles(logits, labels, spread):
            own = None if flat is None else flat[tile.rows]
            options = {"spread": tile.spread, "transform": transform, "label_logit": own, "also": also}
            _store(record, tile.rows, self._rows.row_stats(tile.logits, tile.labels, vocab_start, **options))
        return _shaped(record, logits.shape[:-1])

    def label_logits(self, logits: LinearLogits, labels: Array | None, vocab_start: int, transform: Transform) -> Array:
        return self.row_stats(logits, labels, vocab_start, transform=transform).label_logit

    def row_stats_and_parameter_grad(
        self,
        logits: LinearLogits,
        labels: Array | None,
        weights: GradWeights,
        *,
        spread: Spread | None = None,
        transform: Transform = IDENTITY,
        also: Sequence[str] = (),
        wrt: Sequence[str],
        features: int | None = None,
        dtype: np.dtype | None = None,
    ) -> tuple[RowStats, LinearGrad]:
        """For rows with the whole vocabulary: its product with each tile serves both. `features` is for lazy logits,
        which do not tell; `dtype` is that of the results, by default the parameters'."""
        record, sums = self._empty(logits), _GradSums(self, logits, wrt, dtype)
        for tile in self._tiles(logits, labels, spread):
            stats, dlogits = self._rows.row_stats_and_grad(
                tile.logits,
                tile.labels,
                _taken(weights, tile.rows, logits),
                spread=tile.spread,
                transform=transform,
                also=also,
                out=tile.logits,
            )
            _store(record, tile.rows, stats)
            sums.add(tile, dlogits)
        return _shaped(record, logits.shape[:-1]), sums.result()

    def parameter_grad(
        self,
        logits: LinearLogits,
        labels: Array | None,
        stats: RowStats,
        weights: GradWeights,
        vocab_start: int = 0,
        *,
        spread: Spread | None = None,
        transform: Transform = IDENTITY,
        wrt: Sequence[str],
        dtype: np.dtype | None = None,
    ) -> LinearGrad:
        """Of a slice of the vocabulary, given the statistics of whole rows; hidden's is what this slice adds to it."""
        sums = _GradSums(self, logits, wrt, dtype)
        for tile in self._tiles(logits, labels, spread):
            own_stats, own_weights = (_taken(record, tile.rows, logits) for record in (stats, weights))
            options = {"spread": tile.spread, "transform": transform, "out": tile.logits}
            sums.add(
                tile,
                self._rows.logit_grad(tile.logits, tile.labels, own_stats, own_weights, vocab_start, **options),
            )
        return sums.result()

    def _tiles(self, logits: LinearLogits, labels: Array | None, spread: Spread | None) -> Iterator[Tile]:
        """Rows that count; every tile is made where the last one was."""
        dtype, step = computed_dtype(logits.dtype), logits.tile_rows
        hidden = logits.hidden if logits.ndim == 2 else logits.hidden.reshape(-1, logits.hidden.shape[-1])
        labels = None if labels is None else labels.reshape(-1)
        counted = None if labels is None else self._numpy.flatnonzero(labels != IGNORED)
        total = hidden.shape[0]
        count = total if counted is None else len(counted)
        buffer = self._numpy.empty((min(step, count), logits.classifier.shape[0]), dtype)
        soft = None if spread is None or spread.soft is None else spread.soft.reshape(-1, spread.soft.shape[-1])
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows = slice(start, stop) if counted is None or count == total else counted[start:stop]
            own = hidden if stop - start == total else hidden[rows]  # a slice of a sparse matrix is a copy
            own, tile = _products.factor(own, dtype), buffer[: stop - start]
            with np.errstate(all="ignore"):
                _products.logits_of(own, logits.classifier, logits.bias, tile)
            yield Tile(
                rows,
                own,
                tile,
                None if labels is None else labels[rows],
                spread if soft is None or spread is None else replace(spread, soft=soft[rows]),
            )

    def _empty(self, logits: LinearLogits) -> RowStats:
        """What rows that do not count leave behind."""
        identity = RowStats.identity((prod(logits.shape[:-1]),))
        return RowStats(*map(self._numpy.asarray, vars(identity).values()))


class _GradSums:
    """Gradients of parameters, from those of one tile of logits after the other."""

    def __init__(
        self, backend: LinearBackend, logits: LinearLogits, wrt: Sequence[str], dtype: np.dtype | None = None
    ) -> None:
        self._logits, self._tiles = logits, 0
        self._dtype = logits.dtype if dtype is None else dtype
        array, dtype = backend._numpy, computed_dtype(logits.dtype)
        classes, features = logits.classifier.shape
        count = prod(logits.shape[:-1])
        self._hidden = array.zeros((count, features), self._dtype) if "hidden" in wrt else None
        self._classifier = array.zeros((classes, features), dtype) if "classifier" in wrt else None
        self._bias = array.zeros(classes) if "bias" in wrt else None

    def add(self, tile: Tile, dlogits: Array) -> None:
        with np.errstate(all="ignore"):
            factor = _products.gradient_factor(dlogits, self._logits.classifier)
            if self._hidden is not None:
                self._hidden[tile.rows] = _products.hidden_grad(factor, self._logits.classifier)
            if self._classifier is not None:
                _products.add_classifier_grad(factor, tile.hidden, self._classifier, first=self._tiles == 0)
            if self._bias is not None:
                _products.add_bias_grad(dlogits, self._bias)
        self._tiles += 1

    def result(self) -> LinearGrad:
        """Sums are rounded once."""
        dtype, hidden = self._dtype, self._hidden
        return LinearGrad(
            None if hidden is None else hidden.reshape(self._logits.hidden.shape),
            None if self._classifier is None else self._classifier.astype(dtype, copy=False),
            None if self._bias is None else self._bias.astype(dtype, copy=False),
        )


def _taken(record: Any, rows: Any, logits: LinearLogits) -> Any:
    """The entries of a record that belong to some of the flattened rows; numbers belong to all."""
    shape = logits.shape[:-1]

    def take(values: Any) -> Any:
        return values.reshape(-1)[rows] if getattr(values, "shape", ()) == shape and shape else values

    return type(record)(*(take(getattr(record, field.name)) for field in fields(record)))


def _store(record: RowStats, rows: Any, stats: RowStats) -> None:
    for name, values in vars(stats).items():
        getattr(record, name)[rows] = values


def _shaped(record: RowStats, shape: tuple[int, ...]) -> RowStats:
    return RowStats(*(values.reshape(shape) for values in vars(record).values()))
