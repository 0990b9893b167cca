"""One or two passes over the rows, and what is measured of their forecasts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent.evaluation.calibration.forecasts import ForecastJob, Forecasts, of_blocks
from gpuxent.evaluation.calibration.passes import Passes
from gpuxent.evaluation.calibration.reliability import (
    BINNINGS,
    ClasswiseReliability,
    Reliability,
    Resampling,
    classwise,
    measure,
    result_of,
)
from gpuxent.evaluation.calibration.rows import chosen_classes, given_probs
from gpuxent.evaluation.calibration.sigmoids import columns_of
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.sources import stored


@dataclass(frozen=True)
class Measuring:
    """What a row holds, and how its forecasts are binned and drawn again."""

    kind: str
    probs: bool
    bins: int
    binning: str
    how: Resampling

    @classmethod
    def checked(
        cls,
        *,
        bins: Any,
        binning: Any,
        level: Any,
        resamples: Any,
        seed: Any,
        kind: Any = "softmax",
        given: Any = "logits",
    ) -> Measuring:
        """ValueError or TypeError of one that cannot be."""
        level = arguments.number(level, "level", 0, 1, open_low=True)
        if level == 1:
            raise ValueError("level must be below 1, got 1")
        how = Resampling(level, arguments.integer(resamples, "resamples", 0), arguments.integer(seed, "seed", 0))
        binning = arguments.one_of(binning, "binning", BINNINGS)
        return cls(kind, given_probs(given), arguments.positive(bins, "bins"), binning, how)

    def reliability(self, job: Job, passes: Passes, name: str = "reliability") -> Reliability:
        """Of the most probable class, or of all sigmoids."""
        of = self._ones if self.kind == "sigmoid" else self._forecasts
        return self.of_forecasts(of(job, passes, name))

    def by_class(self, job: Job, passes: Passes, classes: Any, name: str = "classes") -> ClasswiseReliability:
        """Of each class, or of each column of sigmoids."""
        chosen = self.chosen(job, classes)
        if self.kind == "sigmoid":
            ones = self._ones(job, passes, name)
            each = [ones.of_column(column, columns_of(job.lead)) for column in chosen]
        else:
            found = self._forecasts(replace(job, logits=stored(job.logits)), passes, name, chosen)
            each = [found.of_class(place) for place in range(len(chosen))]
        for forecasts in each:
            check_forecasts(forecasts)
        return classwise(chosen, each, self.bins, self.binning, self.how)

    def chosen(self, job: Job, classes: Any) -> tuple[int, ...]:
        """Those classes, or all; IndexError of one that there is not."""
        return chosen_classes(classes, columns_of(job.lead) if self.kind == "sigmoid" else job.logits.shape[-1])

    def of_forecasts(self, forecasts: Forecasts) -> Reliability:
        check_forecasts(forecasts)
        return result_of(forecasts, measure(forecasts, self.bins, self.binning, self.how), self.binning, self.how)

    def _ones(self, job: Job, passes: Passes, name: str) -> Forecasts:
        """Of the second class of two."""
        return replace(self._forecasts(job, passes, name, (1,)).of_class(0), brier=None)

    def _forecasts(self, job: Job, passes: Passes, name: str, classes: tuple[int, ...] | None = None) -> Forecasts:
        """Of all rows that count."""
        if self.probs and not arguments.transform(**job.transform).is_identity:
            raise ValueError("temperature and softcap must be left at their defaults with given='probs'")
        tolerance = arguments.sum_tolerance(job.logits.dtype) if self.probs else None
        measured = ForecastJob(**vars(job), tolerance=tolerance, classes=classes)
        return of_blocks(passes.results(measured, name))


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
