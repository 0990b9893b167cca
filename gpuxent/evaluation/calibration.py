"""`fit_temperature`: how far to trust a model's probabilities, and how to mend them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpuxent._dlpack import returns_own_kind
from gpuxent.backends import is_dask
from gpuxent.evaluation.cluster import ClientWorkers, check_reachable, default_client
from gpuxent.evaluation.evaluate import Data, open_job
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.score import score, unchanged
from gpuxent.evaluation.temperature import SlopeJob, SlopeSums, TemperatureFit, best_temperature


@returns_own_kind
def fit_temperature(
    logits: Data,
    labels: Data,
    *,
    documents: Data | None = None,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    check_labels: bool = True,
    backend: str | None = None,
    memory: int | None = None,
    client: Any = None,
) -> TemperatureFit:
    """The temperature T at which the mean cross-entropy of logits / T is smallest (Guo et al. 2017, arXiv 1706.04599).

    The loss is convex in 1 / T, and its slope there is the mean of E[x] - x_label, with E over the model's distribution
    at T: a bracket around its zero is narrowed, by about ten passes over the rows, until T moves by less than 1e-7 of
    itself (which leaves an error far below). Fit on rows that the model was not trained on.

    Args: as `evaluate`, of all kinds that it takes. `documents` are for the standard error only.

    Returns: `TemperatureFit`, the same bit for bit under any chunking of rows, order of blocks and number of workers.

    Raises:
        ValueError: no temperature is best: every label has the largest logit of its row (T = 0), or labels have no
            larger logits than other classes (T = infinity); a loss that is NaN or infinite; no row counts.
        IndexError, TypeError, OSError, RuntimeError: as `evaluate`.

    >>> import numpy as np
    >>> logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])  # 90 % sure, and right three times of four
    >>> fit = fit_temperature(logits, np.array([0, 0, 1, 1]))
    >>> round(fit.temperature, 6), round(fit.cross_entropy_before, 4), round(fit.cross_entropy, 4)
    (2.0, 0.6547, 0.5623)
    """
    job = open_job(
        logits,
        labels,
        documents=documents,
        mask=mask,
        shift=shift,
        min_context=min_context,
        limit=limit,
        ignore_index=ignore_index,
        softcap=softcap,
        check_labels=check_labels,
        backend=backend,
    )
    return temperature_of(job, memory, client or (default_client() if is_dask(logits) else None))


def temperature_of(job: Job, memory: int | None = None, client: Any = None) -> TemperatureFit:
    """The best temperature of a job."""
    slopes = SlopeJob(**vars(job))
    if client is not None:
        check_reachable(job)

    def at(temperature: float) -> SlopeSums:
        workers = None if client is None else ClientWorkers(client)
        heated = replace(slopes, transform=job.transform | {"temperature": temperature})
        return score(heated, memory=memory, workers=workers)

    with unchanged(job):
        return best_temperature(at)
