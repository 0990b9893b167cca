"""dask-ml's log_loss is the mean of the means of blocks. `python -m bench.failures.block_means`

dask-ml passes `eps` to scikit-learn's log_loss, which no longer takes it. To see its own arithmetic, the second line
calls it with a scikit-learn that drops this argument (it only clips, and nothing is near 0 or 1 here).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

import gpuxent
from bench.failures import frame, truth
from bench.failures.frame import Failure, Line

CHUNKS = (99, 1)


def problem() -> tuple[np.ndarray, np.ndarray]:
    """99 rows that give their label 0.891 and one that gives it 0.3765: the losses are 0.115 and 0.977."""
    likely = np.append(np.full(99, 0.891), 0.3765)
    return np.stack([1 - likely, likely], axis=1), np.ones(100, np.int64)


def in_chunks() -> tuple[Any, Any]:
    import dask.array as da

    probs, labels = problem()
    return da.from_array(probs, chunks=(CHUNKS, 2)), da.from_array(labels, chunks=(CHUNKS,))


def theirs() -> float:
    from dask_ml.metrics import log_loss

    probs, labels = in_chunks()
    return log_loss(labels, probs, labels=[0, 1]).compute()


def theirs_without_eps() -> float:
    import sklearn.metrics

    log_loss = sklearn.metrics.log_loss

    def without_eps(*arguments: Any, eps: float, **options: Any) -> float:
        return log_loss(*arguments, **options)

    with mock.patch.object(sklearn.metrics, "log_loss", without_eps):
        return theirs()


def ours() -> float:
    probs, labels = in_chunks()
    return gpuxent.cross_entropy_from_probs(probs, labels, label_format="index").compute()


def lines(quick: bool) -> Iterator[Line]:
    probs, labels = problem()
    exact = truth.mean(truth.losses(np.log(probs), labels.tolist()))
    for name, call in (("dask-ml log_loss", theirs), ("the same, eps taken away", theirs_without_eps)):
        yield Line(f"mean loss, chunks of {CHUNKS}", name, frame.rival(call), frame.outcome(ours), exact)


FAILURE = Failure(
    "block_means", "A mean of means counts each row of a small block for more; sums and counts do not.", lines
)

if __name__ == "__main__":
    raise SystemExit(frame.main(FAILURE))
