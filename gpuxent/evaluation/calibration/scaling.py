"""Vector and matrix scaling: a scale, or a row of a matrix, and a bias for every class (Guo et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._dlpack import returns_own_kind
from gpuxent._records import Array
from gpuxent.backends import is_cupy, is_dask, to_gpu
from gpuxent.evaluation.evaluate import Data, as_source, is_source
from gpuxent.evaluation.sources import FileStamp, Source, stored
from gpuxent.evaluation.statistics.result import finite

MOST_CLASSES = 1000  # of a matrix: their million of parameters want millions of rows already


@dataclass(frozen=True, eq=False)
class Scaling:
    """softmax(scale * logits + bias), or softmax(scale @ logits + bias) if scale is a matrix."""

    scale: np.ndarray = field(repr=False)  # float64 (classes,) or (classes, classes)
    bias: np.ndarray = field(repr=False)  # float64 (classes,)
    softcap: float | None  # of the logits, before they are scaled

    @classmethod
    def identity(cls, method: str, classes: int, softcap: float | None) -> Scaling:
        scale = np.ones(classes) if method == "vector" else np.eye(classes)
        return cls(scale, np.zeros(classes), softcap)

    @property
    def method(self) -> str:
        """ "vector" or "matrix"."""
        return "vector" if self.scale.ndim == 1 else "matrix"

    @property
    def parameters(self) -> np.ndarray:
        """(classes, 2) or (classes, classes + 1): each class's scales, and its bias."""
        return np.column_stack([self.scale, self.bias])

    def moved(self, away: np.ndarray) -> Scaling:
        """With parameters that are so far away."""
        found = self.parameters + away
        return replace(self, scale=found[:, 0] if self.method == "vector" else found[:, :-1], bias=found[:, -1])

    def capped(self, logits: Array, dtype: Any) -> Array:
        """What is scaled."""
        x = logits.astype(dtype, copy=False)
        return x if self.softcap is None else self.softcap * np.tanh(x / self.softcap)

    def of(self, logits: Array, dtype: Any) -> Array:
        """Of rows in memory, or on a GPU. A class of probability 0 keeps it where each class has its own scale."""
        scale, bias = (values.astype(dtype, copy=False) for values in (self.scale, self.bias))
        if is_cupy(logits):
            scale, bias = to_gpu(scale, logits), to_gpu(bias, logits)
        x = self.capped(logits, dtype)
        with np.errstate(invalid="ignore"):
            if self.method == "matrix":
                return x @ scale.T + bias
            return np.where(x == -np.inf, -np.inf, x * scale + bias)


@dataclass(frozen=True, eq=False)
class ScalingFit(Scaling):
    """What `fit_vector_scaling` and `fit_matrix_scaling` return.

    scale is (classes,), or (classes, classes) of matrix scaling, and bias is (classes,); cross_entropy is that of the
    scaled logits, cross_entropy_before that of the logits as they are, in nats per row, both without the penalty whose
    strength is 1 / C. passes are the reads of all rows.
    """

    C: float
    cross_entropy: float
    cross_entropy_before: float
    scored: int
    ignored: int
    passes: int
    converged: bool

    @property
    def unfinished(self) -> str:
        """What there is to say if it has not converged."""
        return f"{self.method} scaling has not converged in {self.passes} passes"

    def apply(self, logits: Data) -> Any:
        """Scaled logits (..., classes), float64 of float64 and float32 of all others: of an array one of its kind, of a
        path or another source one that is scaled block by block when it is read, for `evaluate` and its like."""
        return scaled(logits, self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite."""
        named = {"method": self.method, **vars(self)}
        return finite(named | {"scale": self.scale.tolist(), "bias": self.bias.tolist()})


@returns_own_kind
def scaled(logits: Data, scaling: Scaling) -> Any:
    """See `ScalingFit.apply`."""
    if is_source(logits):
        source = as_source(logits, "logits")
        check_classes(source.shape, scaling, source.name)
        return ScaledSource(stored(source), scaling)
    rows = arguments.rows(logits, "logits")
    check_classes(rows.shape, scaling, "array")
    dtype = arguments.row_dtype(rows)
    if is_dask(rows):
        whole = rows.rechunk({rows.ndim - 1: -1})
        return whole.map_blocks(scaling.of, dtype, dtype=dtype, meta=whole._meta.astype(dtype))
    return scaling.of(rows, dtype)


def check_classes(shape: tuple[int, ...], scaling: Scaling, name: str) -> None:
    """ValueError if the logits are of another number of classes."""
    classes = scaling.bias.size
    if not shape or shape[-1] != classes:
        raise ValueError(f"logits ({name}) must have shape (..., {classes}), as those that were fitted, got {shape}")


@dataclass(frozen=True)
class ScaledSource:
    """Logits that are scaled when they are read; where they are, and in which blocks, is as before."""

    source: Source
    scaling: Scaling

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(arguments.row_dtype(self.source))

    @property
    def row_chunk(self) -> int:
        return self.source.row_chunk

    @property
    def factors(self) -> dict[str, Source | None]:
        """What is read: these are products, whose blocks have one thread of BLAS each."""
        return getattr(self.source, "factors", {"logits": self.source})

    def __getattr__(self, name: str) -> Any:
        if name in ("array", "row_edges", "tile_rows", "hidden"):  # which not every source has
            return getattr(self.source, name)
        raise AttributeError(name)

    def read(self, rows: slice, columns: slice | None = None) -> Any:
        """All classes of the rows, of which `columns` are given."""
        block = scaled(self.source.read(rows, slice(None)), self.scaling)
        return block if columns is None else block[:, columns]

    def files(self) -> list[FileStamp]:
        return self.source.files()

    def warnings(self) -> list[str]:
        return self.source.warnings()

    def check(self, rows: slice, columns: slice | None = None) -> None:
        self.source.check(rows, columns)
