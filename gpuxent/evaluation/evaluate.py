"""`perplexity` and `evaluate`: one number, or all of them, over arrays, files and Dask arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._dlpack import returns_own_kind
from gpuxent._records import Array
from gpuxent.backends import backend_of, is_cupy, is_dask
from gpuxent.evaluation.driver import score_blocks
from gpuxent.evaluation.result import Evaluation
from gpuxent.evaluation.sources import ArraySource, Source, open_source
from gpuxent.evaluation.totals import RowScores, Totals, merge_all, score_rows
from gpuxent.losses import cross_entropy


@returns_own_kind
def perplexity(
    logits: Array,
    labels: Array,
    *,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_labels: bool = True,
    backend: str | None = None,
) -> float:
    """exp of the mean cross-entropy of the rows that count, as a float. A Dask array is computed, a GPU waited for.

    Arguments and errors as `cross_entropy`; the mean is the correctly rounded one. inf if the exponential overflows
    (the cross-entropy itself does not), NaN if no row counts.

    >>> import numpy as np
    >>> round(perplexity(np.zeros((3, 8)), np.array([1, 5, -100])), 4)
    8.0
    """
    mean = cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
        check_labels=check_labels,
        backend=backend,
    )
    with np.errstate(over="ignore"):
        return float(np.exp(float(mean.compute() if is_dask(mean) else mean)))


@returns_own_kind
def evaluate(
    logits: Array | str | Path | Source,
    labels: Array | str | Path | Source,
    *,
    topk: tuple[int, ...] = (1, 5),
    bins: int = 15,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_labels: bool = True,
    backend: str | None = None,
) -> Evaluation:
    """Cross-entropy, perplexity, accuracy, entropy and calibration of a data set, in one read of the logits.

    Every sum is exact, so the result is the same bit for bit however the rows are cut into blocks.

    Args:
        logits: (..., vocab): a NumPy, CuPy or Dask array, a tensor on a GPU, or the path of a `.npy` file or a Zarr v3
            folder, read block by block. What is measured of each row of a CuPy array comes to the CPU, block by block:
            that waits for the GPU.
        labels: (...) integers, of any of these kinds; a Dask array only beside Dask logits, a NumPy array not beside
            CuPy logits.
        topk: the k of the top-k accuracies; 1 is always among them.
        bins: number of equal-width bins of p_max for the expected calibration error.
        ignore_index, softcap, temperature, check_labels, backend: as `cross_entropy`.

    Returns: `Evaluation`. Rows with a NaN or infinite loss are counted there, with the number of the first.

    Raises: IndexError, ValueError, TypeError: as `cross_entropy`; OSError: a file that cannot be read.

    >>> import numpy as np
    >>> result = evaluate(np.log([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]]), np.array([0, 2]), topk=(1, 2))
    >>> round(result.perplexity, 4), result.accuracy, result.topk_accuracy[2], result.scored
    (2.1822, 0.5, 1.0, 2)
    """
    identity = Totals.identity(arguments.topk(topk), arguments.positive(bins, "bins"))
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "temperature": temperature,
        "check_labels": check_labels,
        "backend": backend,
    }
    if is_dask(logits):
        return _dask_totals(logits, labels, identity, options).result()
    totals = identity
    beside = logits if is_cupy(logits) else None
    for block in score_blocks(as_source(logits, "logits"), as_source(labels, "labels", beside), **options):
        totals = totals.with_rows(block.scores, block.numbers)
    return totals.result()


def as_source(value: Any, name: str, beside: Array | None = None) -> Source:
    if isinstance(value, (str, Path)):
        return open_source(value)
    if hasattr(value, "read") and hasattr(value, "row_chunk"):
        return value
    array = arguments.array(value, name) if beside is None else arguments.beside(value, name, beside)
    if is_dask(array):
        raise TypeError(f"{name} is a Dask array but logits are not; make both Dask arrays")
    return ArraySource(array, name)


def _dask_totals(logits: Any, labels: Any, identity: Totals, options: dict[str, Any]) -> Totals:
    """The rows' scores lazily, then totals block by block; only those are held."""
    logits = arguments.rows(logits, "logits")
    if isinstance(labels, (str, Path)):
        raise TypeError(f"labels must be an array beside Dask logits, got the path {str(labels)!r}")
    labels = arguments.array(labels, "labels")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    scores = score_rows(logits, labels, **options)
    shape = logits.shape[:-1]

    def block_totals(*fields: np.ndarray, start: tuple[int, ...]) -> Totals:
        places = np.indices(fields[0].shape) + np.reshape(start, (-1,) + (1,) * len(shape))
        numbers = np.ravel_multi_index(tuple(places), shape)
        return identity.with_rows(RowScores(*fields), numbers)

    return merge_all([identity, *backend_of(logits).block_results(block_totals, *vars(scores).values())])
