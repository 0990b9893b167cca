"""What `gpuxent.calibration` reads: rows, or sigmoids as rows of two classes, of a part of the data or of all."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from gpuxent import _arguments as arguments
from gpuxent.backends import is_cupy, is_dask
from gpuxent.evaluation.calibration.sigmoids import RepeatedSource, pairs
from gpuxent.evaluation.cluster import default_client
from gpuxent.evaluation.evaluate import Data, as_source, open_job
from gpuxent.evaluation.files.sampling import kind_of_floats, sample_floats
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.sources import Source

DOUBT_BYTES = 4 * 2**20  # of logits to look at
FEW_ROWS = 100  # may be near to uniform by chance


def open_rows(
    kind: str, probs: bool, logits: Data, labels: Data, *, documents: Data | None, limit: int | None, **options: Any
) -> Job:
    """The job of rows, or of elements as rows of two classes. UserWarning of rows that look like something else."""
    if arguments.one_of(kind, "kind", ("softmax", "sigmoid")) == "softmax":
        job = open_job(logits, labels, documents=documents, limit=limit, **options)
        for doubt in doubts(job.logits, probs):
            warnings.warn(doubt, UserWarning, stacklevel=4)  # of the caller of a public function
        return job
    for name in ("shift", "min_context"):
        if options[name]:
            raise ValueError(f"{name} must be 0 with kind='sigmoid', got {options[name]}")
    scores = as_source(logits, "logits")
    rows = pairs(scores, probs)
    if getattr(getattr(labels, "dtype", None), "kind", "") == "b":
        labels = labels.astype(np.uint8)  # type: ignore[union-attr]
    if len(scores.shape) > 1:
        named = None if documents is None else as_source(documents, "documents", rows.array)
        documents = RepeatedSource(tuple(scores.shape[:-1]), rows.columns, named)
        limit = None if limit is None else arguments.positive(limit, "limit") * rows.columns
    return open_job(rows, labels, documents=documents, limit=limit, **options)


def given_probs(given: Any) -> bool:
    return arguments.one_of(given, "given", ("logits", "probs")) == "probs"


def chosen_classes(classes: Any, count: int) -> tuple[int, ...]:
    """Those chosen, of so many."""
    if classes is None:
        return tuple(range(count))
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise TypeError(f"classes must be a sequence of integers, got {classes!r}")
    chosen = tuple(arguments.integer(one, "classes", 0) for one in classes)
    if not chosen:
        raise ValueError(f"classes must name one class or more, got {classes!r}")
    for one in chosen:
        if one >= count:
            raise IndexError(f"classes has {one}, expected classes in [0, {count})")
    return chosen


def client_for(client: Any, logits: Any) -> Any:
    return client or (default_client() if is_dask(logits) else None)


def doubts(rows: Source, probs: bool) -> list[str]:
    """What a sample of logits (..., vocab) says against them being what they are said to be; no result depends on it.

    Logarithms of probabilities are logits as good as any: softmax does not change them. Arrays of Dask are not computed
    for this, and nothing is brought from a GPU.
    """
    if hasattr(rows, "factors") or hasattr(rows, "row_edges") or is_cupy(getattr(rows, "array", None)):
        return []
    sample = sample_floats(rows, DOUBT_BYTES)
    eps = float(ml_dtypes.finfo(rows.dtype.newbyteorder("=")).eps)
    name, notes = kind_of_floats(sample, rows.shape[-1], eps)
    found = []
    if name == "probabilities" and not probs:
        found.append("rows are in [0, 1] and sum to 1: if they are probabilities, say given='probs' (--from probs)")
    if sample.rows >= FEW_ROWS:
        found += [note for note in notes if "twice" in note]
    return [f"logits ({rows.name}): {note}" for note in found]
