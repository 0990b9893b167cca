"""What a model forecast of each row with which probability, and whether it came to pass."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent import _row_loss
from gpuxent._records import IGNORED, Spread, Transform
from gpuxent._rows import Rows
from gpuxent.evaluation.calibration.held_out import PartJob
from gpuxent.evaluation.job import Labelled
from gpuxent.evaluation.runs.directory import Run
from gpuxent.evaluation.statistics.tokens import BlockResult, Tokens
from gpuxent.evaluation.statistics.totals import rest_of_log_probs

NONE = np.zeros(0)


@dataclass(frozen=True)
class Forecasts:
    """One or several forecasts of each row that counts, in the order of the rows."""

    row: np.ndarray  # int64 (rows,): its number
    probability: np.ndarray  # float64 (rows,) or (rows, classes)
    event: np.ndarray  # bool, of the same shape: did it happen?
    nll: np.ndarray  # float64 (rows,): loss, nats
    brier: np.ndarray | None = None  # float64 (rows,): sum over all classes of (probability - 1 of the label)**2
    document: np.ndarray | None = None  # int64 (rows,)
    ignored: int = 0

    def __len__(self) -> int:
        return self.row.size

    @classmethod
    def concatenated(cls, parts: list[Forecasts]) -> Forecasts:
        columns: dict[str, Any] = {}
        for name in (field.name for field in fields(cls) if field.name != "ignored"):
            found = [getattr(part, name) for part in parts]
            columns[name] = None if found[0] is None else np.concatenate(found)
        return cls(**columns, ignored=sum(part.ignored for part in parts))

    def merge(self, other: Forecasts) -> Forecasts:
        """Of rows one after the other."""
        return Forecasts.concatenated([self, other])

    @classmethod
    def of_tokens(cls, tokens: Tokens) -> Forecasts:
        """Of the most probable class; a class of probability 0 is never a hit."""
        hit = (tokens.rank == 0) & (tokens.nll < np.inf)
        return cls(tokens.row, tokens.p_max, hit, tokens.nll, None, tokens.document)

    def of_class(self, place: int) -> Forecasts:
        """Of one of the classes."""
        return replace(self, probability=self.probability[:, place], event=self.event[:, place])

    def of_column(self, column: int, columns: int) -> Forecasts:
        """Of one of so many columns whose elements are rows here."""
        at = self.row % columns == column
        brier, document = (None if values is None else values[at] for values in (self.brier, self.document))
        return Forecasts(self.row[at], self.probability[at], self.event[at], self.nll[at], brier, document)


@dataclass(frozen=True)
class ForecastScores:
    """What is measured of each row; an array that is not needed is empty."""

    loss: np.ndarray  # nats; of probabilities the probability of the label
    p_max: np.ndarray
    rank: np.ndarray  # classes before the label: 0 is a hit
    squares: np.ndarray  # sum of the squared probabilities
    lse: np.ndarray
    columns: np.ndarray  # (rows, classes): logits or probabilities of the chosen classes
    outside: np.ndarray  # of probabilities: how many are negative or NaN
    sums: np.ndarray  # of probabilities


def from_logits(stats: Any, halved: Any, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """loss, p_max, rank, squares, lse; `halved` are the stats at half the temperature."""
    loss, _ = _row_loss.row_losses(stats, labels, 1.0, smoothing=0.0, z_loss=0.0, has_spread=False)
    squares = (1.0 + halved.rest) / (1.0 + stats.rest) ** 2
    return loss, 1.0 / (1.0 + stats.rest), stats.rank, squares, stats.max + _row_loss.log_of_sum(stats)


def from_probs(stats: Any, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same of the stats of probabilities, taken as logits: their maxima, and of their spread the squares."""
    squares = stats.max * stats.spread_weight - stats.spread_gap
    return stats.label_logit, stats.max, stats.rank, squares, stats.max


@dataclass(frozen=True)
class ForecastJob(PartJob):
    """A job whose blocks leave Forecasts behind: of the most probable class, or of the chosen classes."""

    tolerance: float | None = None  # how far sums of rows may be from 1, if what are called logits are probabilities
    classes: tuple[int, ...] | None = None

    def row_scores(self, logits: Any, classes: np.ndarray) -> ForecastScores:
        logits, labels, options = self.opened(logits, classes)
        rows = Rows.open(logits, labels, **options)
        columns = NONE if self.classes is None else rows.logits[:, list(self.classes)]
        if self.tolerance is not None:
            rows = replace(rows, spread=Spread(rows.logits, 1.0, 0.0))
            found = rows.backend.map_rows(from_probs, rows.stats(also=("rank",)), rows.labels, outputs=5)
            return ForecastScores(*found, columns, *rows.backend.row_sums(rows.logits))  # type: ignore[call-arg]
        change = rows.options.transform
        half = Transform(change.softcap, change.temperature / 2)
        halved = replace(rows, options=replace(rows.options, transform=half)).stats()
        stats = rows.stats(also=("rank",))
        if self.normalized:
            stats = replace(stats, rest=rows.backend.map_rows(rest_of_log_probs, stats.max))
        found = rows.backend.map_rows(from_logits, stats, halved, rows.labels, outputs=5)
        return ForecastScores(*found, columns, NONE, NONE)  # type: ignore[call-arg]

    def block_result(self, first: int, labelled: Labelled, scores: ForecastScores, kind: str) -> BlockResult:
        on = np.flatnonzero(labelled.classes != IGNORED)
        label = labelled.classes[on]
        picked = {f.name: values[on] if (values := getattr(scores, f.name)).size else values for f in fields(scores)}
        taken = ForecastScores(**picked)
        loss = taken.loss
        if self.tolerance is not None:
            self._check_probs(first, on, scores)
            with np.errstate(divide="ignore"):
                loss = -np.log(taken.loss)
        hit = (taken.rank == 0) & (loss < np.inf)
        probability, event = taken.p_max, hit
        if self.classes is not None:
            probability = taken.columns.astype(np.float64) if self.tolerance is not None else self._probabilities(taken)
            event = label[:, None] == np.array(self.classes)
        forecasts = Forecasts(
            on + first,
            probability,
            event,
            loss,
            np.maximum(taken.squares - 2.0 * np.exp(-loss) + 1.0, 0.0),
            None if labelled.documents is None else labelled.documents[on],
            labelled.classes.size - on.size,
        )
        return BlockResult(first, labelled.classes.size, forecasts, None, kind)

    def _probabilities(self, scores: ForecastScores) -> np.ndarray:
        z = scores.columns.astype(np.float64)
        if (cap := self.transform["softcap"]) is not None:
            z = cap * np.tanh(z / cap)
        return np.exp(z / self.transform["temperature"] - scores.lse[:, None])

    def _check_probs(self, first: int, on: np.ndarray, scores: ForecastScores) -> None:
        """That rows which count are distributions."""
        outside, sums = np.zeros_like(scores.outside), np.ones_like(scores.sums)
        outside[on], sums[on] = scores.outside[on], scores.sums[on]
        assert self.tolerance is not None
        arguments.distributions(outside, sums, name="logits", tolerance=self.tolerance, start=(first,))


def of_blocks(results: Iterable[BlockResult]) -> Forecasts:
    """All forecasts, of blocks in the order of their rows."""
    parts = [result.summary for result in results]
    if not parts:
        raise ValueError("no row to measure: of 0 rows none counts")
    return Forecasts.concatenated(parts)


def of_run(run: Run | str | os.PathLike[str]) -> Forecasts:
    """The forecasts of the most probable class that a run's record of tokens holds."""
    if not isinstance(run, Run):
        with Run.open(run) as opened:
            return of_run(opened)
    run.expect(Tokens)
    if not run.complete:
        done = f"{run.finished_rows:,} of {run.rows:,} rows"
        raise ValueError(f"run ({run.path}) must be finished, got one with {done} done; --resume goes on with it")
    parts = [Forecasts.of_tokens(tokens) for tokens in run.tokens()]
    if not parts:
        raise ValueError(f"run ({run.path}) holds no token")
    found = Forecasts.concatenated(parts)
    return replace(found, ignored=run.rows - len(found))
