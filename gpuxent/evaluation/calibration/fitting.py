"""`fit_temperature`, vector and matrix scaling: how to mend a model's probabilities, and whether that helped."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from gpuxent._dlpack import returns_own_kind
from gpuxent.evaluation.calibration.checking import CalibrationCheck, Fitting, check, fitted
from gpuxent.evaluation.calibration.measuring import Measuring
from gpuxent.evaluation.calibration.passes import Passes
from gpuxent.evaluation.calibration.rows import client_for, open_rows
from gpuxent.evaluation.calibration.scaling import ScalingFit
from gpuxent.evaluation.calibration.temperature import TemperatureFit
from gpuxent.evaluation.evaluate import Data


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
    return fitted(job, Fitting(), Passes.by(client_for(client, logits), memory))


@returns_own_kind
def check_temperature(
    logits: Data,
    labels: Data,
    *,
    kind: str = "softmax",
    held_out: float = 0.5,
    classes: Sequence[int] | None = None,
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
) -> CalibrationCheck[TemperatureFit]:
    """`fit_temperature` on some of the rows, and `reliability` of the others before and after.

    Args:
        held_out: the share of documents (of rows, where there are none) that the temperature is checked on; which they
            are depends on their ids and `seed`, and on nothing else.
        classes: some whose reliability is wanted too, as `classwise_reliability` has it.
        The others: as `fit_temperature` and `reliability`.

    Returns: `CalibrationCheck`. Rows of the other part are among the ignored ones of each.

    Raises: as `fit_temperature` and `reliability`.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> logits = 2 * rng.standard_normal((2000, 5))
    >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    >>> check = check_temperature(3 * logits, labels)  # three times as sure as it should be
    >>> round(check.fit.temperature), check.helps
    (3, True)
    """
    measuring = Measuring.checked(kind=kind, bins=bins, binning=binning, level=level, resamples=resamples, seed=seed)
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
    passes = Passes.by(client_for(client, logits), memory)
    return check(job, Fitting(), measuring, passes, held_out=held_out, classes=classes)


@returns_own_kind
def fit_vector_scaling(
    logits: Data,
    labels: Data,
    *,
    C: float = 1.0,
    max_iter: int = 200,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    documents: Data | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    check_labels: bool = True,
    backend: str | None = None,
    memory: int | None = None,
    client: Any = None,
) -> ScalingFit:
    """The scale w and the bias b of every class at which the mean cross-entropy of w * logits + b is smallest, with a
    penalty of (|w - 1|**2 + |b|**2) / (2 C rows) (vector scaling, Guo et al. 2017, arXiv 1706.04599).

    The problem is convex: L-BFGS, with the gradient summed over all rows in each of some dozens of passes, computed in
    float64 a tile of rows at a time. The penalty, as if each number were known beforehand to 1 to about sqrt(C), hardly
    moves classes that are often the label, and leaves those that never are with a bias that is finite.

    Args:
        C: inverse strength of the penalty, as scikit-learn has it; infinity for none.
        max_iter: most iterations.
        documents: their ends matter with shift and min_context only.
        The others: as `evaluate`, of all kinds that it takes.

    Returns: `ScalingFit`, whose `apply` scales logits. A class at -inf has probability 0 and stays there. Gradients are
    added up in the order of the blocks, whoever is first; other blocks, as another number of workers makes them, move
    the objective by about 1e-8.

    Warns: UserWarning: as `fit_temperature`; max_iter was not enough.

    Raises:
        ValueError: a row's loss is NaN or infinite; no row counts.
        ModuleNotFoundError: SciPy is not installed.
        IndexError, TypeError, OSError, RuntimeError: as `evaluate`.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> logits = 2 * rng.standard_normal((4000, 3))
    >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    >>> fit = fit_vector_scaling(logits * [1, 2, 4] + [0, 0, 3], labels)  # as it should not be
    >>> fit.scale.round(1), (fit.bias - fit.bias[0]).round(1)
    (array([1. , 0.5, 0.2]), array([ 0. ,  0. , -0.8]))
    """
    fitting = Fitting.scaling("vector", C, max_iter)
    job = open_rows(
        "softmax",
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
    return told(fitted(job, fitting, Passes.by(client_for(client, logits), memory)))


@returns_own_kind
def fit_matrix_scaling(
    logits: Data,
    labels: Data,
    *,
    C: float = 1.0,
    max_iter: int = 200,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    documents: Data | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    check_labels: bool = True,
    backend: str | None = None,
    memory: int | None = None,
    client: Any = None,
) -> ScalingFit:
    """The matrix M and the bias b at which the mean cross-entropy of M @ logits + b is smallest, with a penalty of
    (|M - 1|**2 + |b|**2) / (2 C rows), 1 being the identity (matrix scaling, Guo et al. 2017, arXiv 1706.04599).

    For few classes, at most 1,000, and many rows: there is a parameter for every two classes. The penalty is that of
    vector scaling; Kull et al. 2019 (arXiv 1910.12656, ODIR) leave the diagonal out of theirs.

    Args, returns, warns and raises: as `fit_vector_scaling`; ValueError: too many classes, or a logit of -inf, which
    has no place where classes are mixed.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> logits = 2 * rng.standard_normal((4000, 3))
    >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    >>> fit = fit_matrix_scaling(logits @ [[2, 1, 0], [0, 1, 0], [0, 0, 1]], labels)
    >>> round(fit.cross_entropy_before, 1), round(fit.cross_entropy, 1)
    (0.9, 0.6)
    """
    fitting = Fitting.scaling("matrix", C, max_iter)
    job = open_rows(
        "softmax",
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
    return told(fitted(job, fitting, Passes.by(client_for(client, logits), memory)))


@returns_own_kind
def check_scaling(
    logits: Data,
    labels: Data,
    *,
    method: str = "vector",
    C: float = 1.0,
    max_iter: int = 200,
    held_out: float = 0.5,
    classes: Sequence[int] | None = None,
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
) -> CalibrationCheck[ScalingFit]:
    """`fit_vector_scaling` or `fit_matrix_scaling` on some rows, and `reliability` of the others before and after.

    Args:
        method: "vector" or "matrix".
        The others: as `check_temperature` and `fit_vector_scaling`.

    Returns: `CalibrationCheck`. Rows of the other part are among the ignored ones of each.

    Raises: as `fit_matrix_scaling` and `reliability`.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> logits = 2 * rng.standard_normal((4000, 3))
    >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    >>> check_scaling(logits + [0, 0, 3], labels).helps
    True
    """
    measuring = Measuring.checked(bins=bins, binning=binning, level=level, resamples=resamples, seed=seed)
    fitting = Fitting.scaling(method, C, max_iter)
    job = open_rows(
        "softmax",
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
    passes = Passes.by(client_for(client, logits), memory)
    found = check(job, fitting, measuring, passes, held_out=held_out, classes=classes)
    told(found.fit)
    return found


def told(fit: ScalingFit) -> ScalingFit:
    """With a warning if it is not what was asked for."""
    if not fit.converged:
        warnings.warn(f"{fit.unfinished}; raise max_iter", UserWarning, stacklevel=4)
    return fit
