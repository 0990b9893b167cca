"""`reliability` and `fit_temperature`: how far to trust a model's probabilities, and how to mend them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._dlpack import returns_own_kind
from gpuxent.backends import is_dask
from gpuxent.evaluation.cluster import ClientWorkers, check_reachable, default_client
from gpuxent.evaluation.evaluate import Data, open_job
from gpuxent.evaluation.forecasts import ForecastJob, Forecasts, of_blocks, of_run
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.reliability import Reliability, Resampling, measure, result_of
from gpuxent.evaluation.run import Run
from gpuxent.evaluation.score import block_results, score, unchanged
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
    return temperature_of(job, memory, _client(client, logits))


@returns_own_kind
def reliability(
    logits: Data,
    labels: Data,
    *,
    given: str = "logits",
    bins: int = 15,
    binning: str = "width",
    documents: Data | None = None,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_labels: bool = True,
    backend: str | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    memory: int | None = None,
    client: Any = None,
) -> Reliability:
    """How often the most probable class of a row is right, beside its probability: bins, ECE, MCE, ACE, Brier score and
    its parts, NLL, each with an interval.

    Args:
        logits: as `evaluate`, or with given="probs" probabilities, which must sum to 1. Which of the two is said, never
            guessed.
        bins: their number.
        binning: "width": of equal width in [0, 1]; "mass": with as many rows in each.
        level, resamples, seed: of the intervals: so many times documents are drawn with replacement (rows, where there
            are none), as many as there are; above 1000 they are first dealt at random into 1000 groups.
        The others: as `evaluate`.

    Returns: `Reliability`. Counts are exact integers, and sums exact. About 40 bytes per row that counts are in memory.

    Raises:
        ValueError: no row counts; a row has no distribution (NaN).
        IndexError, TypeError, OSError, RuntimeError: as `evaluate`.

    >>> import numpy as np
    >>> found = reliability(np.log([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]]), np.array([0, 1, 1]), bins=2)
    >>> round(found.ece.value, 4), round(found.brier.value, 4), [b.count for b in found.bins]
    (0.0333, 0.1633, [0, 3])
    """
    how = _resampling(level, resamples, seed)
    job = open_job(
        logits,
        labels,
        documents=documents,
        mask=mask,
        shift=shift,
        min_context=min_context,
        limit=limit,
        bins=bins,
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
        check_labels=check_labels,
        backend=backend,
    )
    forecasts = forecasts_of(job, given, memory=memory, client=_client(client, logits))
    return reliability_of(forecasts, bins, binning, how)


def reliability_of_run(
    run: str | Path | Run,
    *,
    bins: int = 15,
    binning: str = "width",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Reliability:
    """`reliability` of a finished run of `evaluate`, from its record of tokens: no logits are read.

    Arguments and errors as `reliability`; brier_all_classes is not known.

    >>> import numpy as np, tempfile
    >>> import gpuxent as gx
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = gx.evaluate(np.zeros((4, 2)), np.array([0, 1, 1, 0]), run=folder)
    ...     reliability_of_run(folder).ece.value == result.ece
    True
    """
    return reliability_of(of_run(run), arguments.positive(bins, "bins"), binning, _resampling(level, resamples, seed))


def reliability_of(forecasts: Forecasts, bins: int, binning: str, how: Resampling) -> Reliability:
    """Of one forecast per row."""
    arguments.one_of(binning, "binning", ("width", "mass"))
    check_forecasts(forecasts)
    return result_of(forecasts, measure(forecasts, bins, binning, how), binning, how)


def check_forecasts(forecasts: Forecasts) -> None:
    """ValueError if there is none, or a row without a distribution."""
    if not len(forecasts):
        raise ValueError(f"no row to measure: of {forecasts.ignored:,} rows none counts")
    bad = np.flatnonzero(np.isnan(forecasts.nll))
    if bad.size:
        first = forecasts.row[bad[0]]
        raise ValueError(
            f"logits must give every row a distribution: {bad.size:,} of {len(forecasts):,} rows have a loss of NaN, "
            f"first row {first:,}"
        )


def forecasts_of(
    job: Job, given: str, classes: tuple[int, ...] | None = None, *, memory: int | None = None, client: Any = None
) -> Forecasts:
    """The forecasts of all rows that count."""
    tolerance = None
    if arguments.one_of(given, "given", ("logits", "probs")) == "probs":
        if not arguments.transform(**job.transform).is_identity:
            raise ValueError("temperature and softcap must be left at their defaults with given='probs'")
        tolerance = arguments.sum_tolerance(job.logits.dtype)
    measured = ForecastJob(**vars(job), tolerance=tolerance, classes=classes)
    workers = None
    if client is not None:
        check_reachable(job)
        workers = ClientWorkers(client)
    with unchanged(job), closing(block_results(measured, [range(job.rows)], memory=memory, workers=workers)) as results:
        return of_blocks(results)


def _resampling(level: Any, resamples: Any, seed: Any) -> Resampling:
    level = arguments.number(level, "level", 0, 1, open_low=True)
    if level == 1:
        raise ValueError("level must be below 1, got 1")
    return Resampling(level, arguments.integer(resamples, "resamples", 0), arguments.integer(seed, "seed", 0))


def _client(client: Any, logits: Any) -> Any:
    return client or (default_client() if is_dask(logits) else None)


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
