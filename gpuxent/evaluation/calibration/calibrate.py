"""`reliability`: how far to trust a model's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuxent._dlpack import returns_own_kind
from gpuxent.evaluation.calibration.forecasts import of_run
from gpuxent.evaluation.calibration.measuring import Measuring
from gpuxent.evaluation.calibration.passes import Passes
from gpuxent.evaluation.calibration.reliability import ClasswiseReliability, Reliability
from gpuxent.evaluation.calibration.rows import client_for, open_rows
from gpuxent.evaluation.evaluate import Data
from gpuxent.evaluation.runs.directory import Run
from gpuxent.evaluation.score import unchanged


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
    measuring = Measuring.checked(
        kind=kind, given=given, bins=bins, binning=binning, level=level, resamples=resamples, seed=seed
    )
    job = open_rows(
        kind,
        measuring.probs,
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
    with unchanged(job):
        return measuring.reliability(job, Passes.by(client_for(client, logits), memory))


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

    Raises: as `reliability`; IndexError: a class that there is not.

    >>> import numpy as np
    >>> found = classwise_reliability(np.log([[0.7, 0.3], [0.2, 0.8]]), np.array([0, 1]), bins=1)
    >>> found.classes, round(found.ece.value, 4), [round(r.ece.value, 4) for r in found.by_class]
    ((0, 1), 0.05, [0.05, 0.05])
    """
    measuring = Measuring.checked(
        kind=kind, given=given, bins=bins, binning=binning, level=level, resamples=resamples, seed=seed
    )
    job = open_rows(
        kind,
        measuring.probs,
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
    with unchanged(job):
        return measuring.by_class(job, Passes.by(client_for(client, logits), memory), classes)


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
    measuring = Measuring.checked(bins=bins, binning=binning, level=level, resamples=resamples, seed=seed)
    return measuring.of_forecasts(of_run(run))
