"""What softmax regression is trained on: the door for features, targets and weights of every kind of array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_array, validate_data

from gpuxent import _arguments as arguments
from gpuxent._records import Array
from gpuxent.backends import backend_of, beside_rows, computed, is_cupy, is_dask, on_host, to_gpu

PARTS, LARGE = 16, 2**20  # features in all, from which on threads are worth their while


@dataclass(frozen=True)
class Examples:
    """Features (n, p), which may be sparse, with targets: classes (n,) int64, or distributions (n, K). `weight` (n,) is
    float64. All in one memory, or Dask arrays with the same chunks of rows."""

    features: Any
    targets: Array
    weight: Array | None = None

    @property
    def count(self) -> int:
        return self.features.shape[0]

    @property
    def chunk_count(self) -> int:
        return self.features.numblocks[0] if is_dask(self.features) else 1

    def take(self, rows: np.ndarray) -> Examples:
        rows = to_gpu(rows, self.features) if is_cupy(self.features) else rows
        return Examples(self.features[rows], self.targets[rows], None if self.weight is None else self.weight[rows])

    def take_chunks(self, chunks: np.ndarray) -> Examples:
        """Some chunks of Dask arrays."""
        parts = vars(self).values()
        return Examples(*(None if part is None else part.blocks[chunks.tolist()] for part in parts))

    def chunks(self, order: np.ndarray) -> Iterator[Examples]:
        """The chunks, one at a time in memory; what is in memory is one chunk."""
        if not is_dask(self.features):
            yield self
            return
        for chunk in order:
            lazy = self.take_chunks(np.array([chunk]))
            yield Examples(*computed(*vars(lazy).values(), scheduler=None))

    def parts(self) -> list[Examples]:
        """As many as can be worked on side by side, the same on every machine: views, so of large NumPy arrays only."""
        if not isinstance(self.features, np.ndarray) or self.features.size < LARGE:
            return [self]
        edges = [self.count * i // PARTS for i in range(PARTS + 1)]
        slices = (slice(a, b) for a, b in pairwise(edges) if a < b)
        return [Examples(*(None if part is None else part[s] for part in vars(self).values())) for s in slices]

    def split(self, share: float, rng: np.random.RandomState) -> tuple[Examples, Examples]:
        """(most, a random share): of rows, or of chunks where there are several."""
        whole = self.chunk_count if is_dask(self.features) else self.count
        order, fewer = rng.permutation(whole), max(1, round(share * whole))
        if whole < 2 or fewer >= whole:
            what = "chunks" if is_dask(self.features) else "examples"
            raise ValueError(f"validation_fraction={share:g} of {whole} {what} leaves none to train on or to hold out")
        take = self.take_chunks if is_dask(self.features) else self.take
        return take(np.sort(order[fewer:])), take(np.sort(order[:fewer]))

    def class_totals(self, classes: int) -> np.ndarray:
        """(K,): the weight of each class."""
        if self.targets.ndim == 1:
            totals = np.bincount(self.targets, weights=self.weight, minlength=classes)
        else:
            totals = (self.targets if self.weight is None else self.targets * self.weight[:, None]).sum(axis=0)
        return on_host(computed(totals, scheduler=None)[0]).astype(np.float64)


def features(estimator: Any, X: Any, *, reset: bool) -> Any:
    """(n, features), float32 or float64: NumPy, sparse by rows, CuPy, or Dask with one chunk of columns."""
    if not (is_dask(X) or is_cupy(X)):
        return validate_data(estimator, X, reset=reset, accept_sparse="csr", dtype=[np.float64, np.float32])
    X = arguments.array(X, "X")
    if X.ndim != 2 or X.dtype.kind not in "biuf":
        raise ValueError(f"X must hold numbers in two dimensions, (n, features), got shape {X.shape} and {X.dtype}")
    validate_data(estimator, X, reset=reset, skip_check_array=True)
    X = X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)
    return X.rechunk({1: -1}) if is_dask(X) else X


def targets(estimator: Any, y: Any, features: Any, known: np.ndarray | None) -> tuple[np.ndarray, Array]:
    """(classes, targets beside the features); the classes are those in y unless they are known."""
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None")
    if not is_dask(y):
        y = check_array(on_host(y), ensure_2d=False, dtype=None, input_name="y")
    elif not is_dask(features):
        raise TypeError("y is a Dask array but X is not; make both Dask arrays, or call y.compute()")
    if y.shape[:1] != features.shape[:1]:
        raise ValueError(f"y must have {features.shape[0]} rows as X has, got shape {y.shape}")
    if y.ndim == 2 and y.shape[1] > 1:
        return _soft_targets(y, features, known)
    y = y.reshape(-1) if is_dask(y) else column_or_1d(y, warn=True)
    if known is None:
        if not is_dask(y):
            check_classification_targets(y)
        known = known_classes(computed(np.unique(y), scheduler=None)[0])
    encode = partial(_encoded, classes=known)
    return known, beside_rows(features, y.map_blocks(encode, dtype=np.int64) if is_dask(y) else encode(y))


def known_classes(values: Any) -> np.ndarray:
    """Sorted, each once, two or more."""
    found = np.unique(on_host(values))
    if len(found) < 2:
        raise ValueError(f"needs two or more classes, got one class: {found.tolist()}")
    return found


def _encoded(y: np.ndarray, *, classes: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(classes, on_host(y)), len(classes) - 1)
    bad = classes[places] != on_host(y)
    if bad.any():
        raise ValueError(f"y holds {y[bad].tolist()[0]!r}, which is not among the classes {classes.tolist()}")
    return places


def _soft_targets(y: Any, features: Any, known: np.ndarray | None) -> tuple[np.ndarray, Array]:
    if y.dtype.kind != "f":
        raise ValueError(
            f"y must be classes (n,), or floats (n, K) whose rows sum to 1, got {y.dtype} of shape {y.shape}"
        )
    classes = np.arange(y.shape[1])
    if known is not None and not np.array_equal(known, classes):
        raise ValueError(f"soft targets are for classes 0 to {y.shape[1] - 1}, but the classes are {known.tolist()}")
    y = beside_rows(features, y)
    computed(arguments.check_distributions(backend_of(y), y, "y"), scheduler=None)
    return classes, y


def weights(sample_weight: Any, features: Any) -> Array | None:
    """(n,) float64, finite and at least 0, beside the features; None stays None."""
    if sample_weight is None:
        return None
    if not (is_dask(features) or is_cupy(features)):
        return _check_sample_weight(sample_weight, features, dtype=np.float64, ensure_non_negative=True)
    values = arguments.array(sample_weight, "sample_weight").astype(np.float64)
    if values.shape != features.shape[:1]:
        raise ValueError(f"sample_weight must have shape {features.shape[:1]}, got {values.shape}")
    low, high = computed(values.min(), values.max(), scheduler=None)
    if not (low >= 0 and high < np.inf):
        raise ValueError(f"sample_weight must hold finite numbers of at least 0, got {low} to {high}")
    return beside_rows(features, values)
