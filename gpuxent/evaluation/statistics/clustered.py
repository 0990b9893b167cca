"""Means and ratios over documents, with the standard error of documents that are drawn independently."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpuxent._records import ExactSum
from gpuxent.evaluation.statistics.documents import DocumentSums, Run, divided
from gpuxent.evaluation.statistics.metadata import Metadata
from gpuxent.evaluation.statistics.result import DocumentTable, GroupStatistics
from gpuxent.evaluation.statistics.sums import LossSums
from gpuxent.evaluation.statistics.totals import exp

LN2 = math.log(2)


def ratio(documents: Run, weights: np.ndarray) -> tuple[float, float]:
    """(R, its standard error) of R = sum of losses / sum of weights: per token, byte or word, as the weights are.

    With the sum S_d of document d's losses, its weight w_d, and G documents,

        se = sqrt(G / (G - 1) * sum over d of (S_d - R * w_d)**2) / sum of w_d

    the sandwich estimator of a ratio of means (Liang & Zeger 1986, Biometrika 73:13; for evaluations of language models
    Miller 2024, arXiv 2411.00640), with the correction of few clusters. The residuals are integers over one
    denominator, each rounded once. NaN with fewer than two documents, or a sum that is not finite.
    """
    total, weight = sum(documents.integers()), sum(weights.tolist())
    nonfinite = math.nan if np.isnan(documents.nonfinite).any() else float(documents.nonfinite.sum())
    if nonfinite != 0:
        return (nonfinite if weight else math.nan), math.nan
    if weight == 0:
        return math.nan, math.nan
    value, count = divided(total, weight, documents.scale), len(documents)
    if count < 2:
        return value, math.nan
    residuals = (
        divided(own * weight - own_weight * total, weight, documents.scale)
        for own, own_weight in zip(documents.integers(), weights.tolist(), strict=True)
    )
    try:
        squares = math.fsum(r * r for r in residuals)
    except OverflowError:
        squares = math.inf
    return value, math.sqrt(count / (count - 1) * squares) / weight


def mean_of_means(means: np.ndarray) -> tuple[float, float]:
    """(the mean, its standard error): every document counts once, however long."""
    sums = LossSums(means.size, ExactSum.of(means), ExactSum.of_squares(means))
    return sums.mean, sums.stderr


def document_statistics(documents: DocumentSums, about: Metadata | None, whole: bool) -> dict[str, Any]:
    """The fields of `Evaluation` that are about documents; `about` has them in the order of their ids, and its counts
    of bytes and words are of use if they are scored as a whole."""
    run, means = documents.run, documents.means()
    mean, stderr = mean_of_means(means)
    return {
        "stderr_cluster": ratio(run, run.counts)[1],
        "documents": len(run),
        "document_cross_entropy": mean,
        "document_stderr": stderr,
        "by_document": DocumentTable(run.ids, run.counts, means),
        "groups": () if about is None or about.group is None else tuple(_groups(run, about, whole)),
    }


def unit_statistics(loss: ExactSum, documents: DocumentSums | None, about: Metadata) -> dict[str, Any]:
    """Bits per byte and word: of a total without an error, of counts per document with it."""
    fields: dict[str, Any] = {}
    for unit in ("byte", "word"):
        count = getattr(about, f"{unit}s")
        if count is None:
            continue
        if isinstance(count, np.ndarray) and documents is not None:
            nats, stderr = ratio(documents.run, count)
            fields[f"bits_per_{unit}_stderr"] = stderr / LN2
        else:
            nats = loss.divided_by(count)
        fields[f"bits_per_{unit}"] = nats / LN2
        if unit == "word":
            fields["word_perplexity"] = exp(nats)
    return fields


def _groups(run: Run, about: Metadata, whole: bool) -> Iterator[GroupStatistics]:
    assert about.group is not None
    order = np.argsort(about.group, kind="stable")
    ends = np.searchsorted(about.group[order], np.arange(len(about.groups) + 1))
    for name, start, stop in zip(about.groups, ends[:-1], ends[1:], strict=True):
        if start < stop:
            yield _group(name, run.take(order[start:stop]), about.take(order[start:stop]), whole)


def _group(name: str, run: Run, about: Metadata, whole: bool) -> GroupStatistics:
    mean, stderr = ratio(run, run.counts)
    bits = {
        f"bits_per_{unit}": ratio(run, count)[0] / LN2
        for unit in ("byte", "word")
        if whole and isinstance(count := getattr(about, f"{unit}s"), np.ndarray)
    }
    return GroupStatistics(name, len(run), int(run.counts.sum()), mean, exp(mean), stderr, **bits)
