"""Logits as products: hidden states, read block by block, and a classifier that every process reads once."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent.backends import computed, linear_logits, made, tile_rows
from gpuxent.evaluation.sources._base import FileStamp, Source

_LOADED: dict[Any, Any] = {}
_LOCK = Lock()


@dataclass(frozen=True)
class LinearSource:
    """Rows of hidden @ classifier.T + bias."""

    hidden: Source  # (..., features)
    classifier: Source  # (vocab, features)
    bias: Source | None = None  # (vocab,)

    def __post_init__(self) -> None:
        arguments.parameters(*(None if source is None else _like(source) for source in self.factors.values()))

    @property
    def factors(self) -> dict[str, Source | None]:
        return {"hidden": self.hidden, "classifier": self.classifier, "bias": self.bias}

    @property
    def name(self) -> str:
        return f"{self.hidden.name} @ {self.classifier.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.classifier.shape[0])

    @property
    def dtype(self) -> np.dtype:
        return self.hidden.dtype

    @property
    def row_chunk(self) -> int:
        return self.hidden.row_chunk

    @property
    def tile_rows(self) -> int:
        """To be read at once, from multiples of it on: the last bits of a product may depend on its number of rows."""
        return tile_rows(self.shape[-1], self.dtype)

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        hidden = self.hidden.read(rows, slice(None))
        return linear_logits(hidden, _loaded(self.classifier), None if self.bias is None else _loaded(self.bias))

    def files(self) -> list[FileStamp]:
        return [file for source in self.factors.values() if source is not None for file in source.files()]

    def warnings(self) -> list[str]:
        return [sentence for source in self.factors.values() if source is not None for sentence in source.warnings()]

    def check(self, rows: slice, columns: slice | None = None) -> None:
        self.hidden.check(rows, columns)


class MadeSource(LinearSource):
    """The same as arrays, for what cannot be measured tile by tile: a block's logits are all there at once."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(arguments.row_dtype(self.hidden))

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        (hidden,) = computed(self.hidden.read(rows, slice(None)))
        return made(linear_logits(hidden, _loaded(self.classifier), None if self.bias is None else _loaded(self.bias)))


def stored(source: Source) -> Source:
    """A source whose reads are arrays: of products `MadeSource`, any other as it is."""
    return MadeSource(source.hidden, source.classifier, source.bias) if isinstance(source, LinearSource) else source


def _like(source: Source) -> np.ndarray:
    """An array of its shape and dtype that takes no memory."""
    return np.broadcast_to(np.zeros((), source.dtype), source.shape)


def _loaded(source: Source) -> Any:
    """All of it; of a file once for the process."""
    array = getattr(source, "array", None)
    if array is not None:
        return array
    key = (source.name, *source.files())
    with _LOCK:
        if key not in _LOADED:
            for other in list(_LOADED)[:-3]:  # of other runs
                del _LOADED[other]
            _LOADED[key] = source.read(slice(0, source.shape[0]), slice(None) if len(source.shape) > 1 else None)
        return _LOADED[key]
