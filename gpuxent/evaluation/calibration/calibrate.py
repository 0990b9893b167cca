"""`reliability` and `fit_temperature`: how far to trust a model's probabilities, and how to mend them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._dlpack import returns_own_kind
from gpuxent.evaluation.calibration.forecasts import Forecasts, of_run
from gpuxent.evaluation.calibration.held_out import PartJob
from gpuxent.evaluation.calibration.reliability import (
    BINNINGS,
    ClasswiseReliability,
    Reliability,
    Resampling,
    classwise,
    measure,
    result_of,
)
from gpuxent.evaluation.calibration.rows import (
    chosen_classes,
    client_for,
    forecasts_of,
    given_probs,
    of_ones,
    open_rows,
    temperature_of,
)
from gpuxent.evaluation.calibration.sigmoids import columns_of
from gpuxent.evaluation.calibration.temperature import TemperatureCheck, TemperatureFit
from gpuxent.evaluation.evaluate import Data
from gpuxent.evaluation.runs.directory import Run


@returns_own_kind
def fit_temperature(
    logits: Data,
    labels: Data,
    *,
    kind: str = "softmax",
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

    Args:
        kind: "softmax"; or "sigmoid": logits (rows,) or (..., columns) of independent sigmoids, and labels of their
            shape, 0 or 1 (or `ignore_index`), whose binary cross-entropy is meant. Documents are those of rows, and
            where there are none rows of several columns take their place.
        documents: for the standard error only.
        The others: as `evaluate`, of all kinds that it takes.

    Returns: `TemperatureFit`, the same bit for bit under any chunking of rows, order of blocks and number of workers.

    Warns: UserWarning: a sample of the rows looks like probabilities, or like softmax applied twice.

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
    job = open_rows(
        kind,
        False,
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
    return temperature_of(job, memory, client_for(client, logits))


@returns_own_kind
def reliability(
    logits: Data,
    labels: Data,
    *,
    kind: str = "softmax",
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
        kind: "softmax"; or "sigmoid", as `fit_temperature`: then all forecasts of a 1 are binned.
        bins: their number.
        binning: "width": of equal width in [0, 1]; "mass": with as many rows in each.
        level, resamples, seed: of the intervals: so many times documents are drawn with replacement (rows, where there
            are none), as many as there are; above 1000 they are first dealt at random into 1000 groups.
        The others: as `evaluate`.

    Returns: `Reliability`. Counts are exact integers, and sums exact. About 40 bytes per row that counts are in memory.

    Warns: as `fit_temperature`.

    Raises:
        ValueError: no row counts; a row has no distribution (NaN).
        IndexError, TypeError, OSError, RuntimeError: as `evaluate`.

    >>> import numpy as np
    >>> found = reliability(np.log([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]]), np.array([0, 1, 1]), bins=2)
    >>> round(found.ece.value, 4), round(found.brier.value, 4), [b.count for b in found.bins]
    (0.0333, 0.1633, [0, 3])
    """
    how = _resampling(level, resamples, seed)
    job = open_rows(
        kind,
        given_probs(given),
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
    options = {"memory": memory, "client": client_for(client, logits)}
    if kind == "sigmoid":
        return reliability_of(of_ones(job, given_probs(given), **options), bins, binning, how)
    return reliability_of(forecasts_of(job, given_probs(given), **options), bins, binning, how)


@returns_own_kind
def classwise_reliability(
    logits: Data,
    labels: Data,
    *,
    kind: str = "softmax",
    classes: Sequence[int] | None = None,
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
) -> ClasswiseReliability:
    """The same of each class: how often it is the label, beside its probability (Kull et al. 2019, arXiv 1910.12656).

    Args:
        classes: some of them, or with kind="sigmoid" of the columns; None: all.
        The others: as `reliability`.

    Returns: `ClasswiseReliability`. 9 bytes per row and class are in memory, so of huge vocabularies choose some. nll
        and brier_all_classes are of all classes at once, except with kind="sigmoid".

    Raises: as `reliability`; IndexError: a class that there is not; TypeError: logits that are products.

    >>> import numpy as np
    >>> found = classwise_reliability(np.log([[0.7, 0.3], [0.2, 0.8]]), np.array([0, 1]), bins=1)
    >>> found.classes, round(found.ece.value, 4), [round(r.ece.value, 4) for r in found.by_class]
    ((0, 1), 0.05, [0.05, 0.05])
    """
    how, probs = _resampling(level, resamples, seed), given_probs(given)
    job = open_rows(
        kind,
        probs,
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
    options = {"memory": memory, "client": client_for(client, logits)}
    if kind == "sigmoid":
        columns = columns_of(job.lead)
        chosen = chosen_classes(classes, columns)
        ones = of_ones(job, probs, **options)
        by_class = [ones.of_column(column, columns) for column in chosen]
    else:
        if job.has_products:
            raise TypeError(f"logits ({job.logits.name}) must be stored, got products; store them")
        chosen = chosen_classes(classes, job.logits.shape[-1])
        found = forecasts_of(job, probs, chosen, **options)
        by_class = [found.of_class(place) for place in range(len(chosen))]
    arguments.one_of(binning, "binning", BINNINGS)
    for forecasts in by_class:
        check_forecasts(forecasts)
    return classwise(chosen, by_class, bins, binning, how)


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


@returns_own_kind
def check_temperature(
    logits: Data,
    labels: Data,
    *,
    kind: str = "softmax",
    held_out: float = 0.5,
    bins: int = 15,
    binning: str = "width",
    documents: Data | None = None,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    check_labels: bool = True,
    backend: str | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    memory: int | None = None,
    client: Any = None,
) -> TemperatureCheck:
    """`fit_temperature` on some of the rows, and `reliability` of the others before and after.

    Args:
        held_out: the share of documents (of rows, where there are none) that the temperature is checked on; which they
            are depends on their ids and `seed`, and on nothing else.
        The others: as `fit_temperature` and `reliability`.

    Returns: `TemperatureCheck`. Rows of the other part are among the ignored ones of each.

    Raises: as `fit_temperature` and `reliability`.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> logits = 2 * rng.standard_normal((2000, 5))
    >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    >>> check = check_temperature(3 * logits, labels)  # three times as sure as it should be
    >>> round(check.fit.temperature), check.helps
    (3, True)
    """
    how = _resampling(level, resamples, seed)
    share = arguments.number(held_out, "held_out", 0, 1, open_low=True)
    job = open_rows(
        kind,
        False,
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
        check_labels=check_labels,
        backend=backend,
    )
    options = {"memory": memory, "client": client_for(client, logits)}
    part = PartJob(**vars(job), held_out=False, share=share, seed=seed)
    fit = temperature_of(part, **options)
    of = of_ones if kind == "sigmoid" else forecasts_of
    found = [
        reliability_of(of(part_at(part, temperature), False, **options), bins, binning, how)
        for temperature in (1.0, fit.temperature)
    ]
    return TemperatureCheck(fit, *found)


def part_at(part: PartJob, temperature: float) -> PartJob:
    """The other part, at a temperature."""
    return replace(part, held_out=True, transform=part.transform | {"temperature": temperature})


def reliability_of(forecasts: Forecasts, bins: int, binning: str, how: Resampling) -> Reliability:
    """Of one forecast per row."""
    arguments.one_of(binning, "binning", BINNINGS)
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


def _resampling(level: Any, resamples: Any, seed: Any) -> Resampling:
    level = arguments.number(level, "level", 0, 1, open_low=True)
    if level == 1:
        raise ValueError("level must be below 1, got 1")
    return Resampling(level, arguments.integer(resamples, "resamples", 0), arguments.integer(seed, "seed", 0))
