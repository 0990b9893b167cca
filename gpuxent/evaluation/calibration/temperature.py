"""The temperature that makes the loss smallest, by a few passes over the rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpuxent import _row_loss
from gpuxent._records import IGNORED, NOTHING, ExactSum
from gpuxent._rows import Rows
from gpuxent.evaluation.calibration.held_out import PartJob, check_losses
from gpuxent.evaluation.job import Labelled
from gpuxent.evaluation.statistics.clustered import ratio
from gpuxent.evaluation.statistics.documents import DocumentSums
from gpuxent.evaluation.statistics.result import finite
from gpuxent.evaluation.statistics.sums import LossSums, exact_sum
from gpuxent.evaluation.statistics.tokens import BlockResult
from gpuxent.evaluation.statistics.totals import NO_BAD_ROWS, BadRows

COLDEST, HOTTEST = 2.0**-64, 2.0**60  # temperatures to look at: beyond the last one all classes are as probable
ERROR = 1e-10  # of 1 / T, relative, that is good enough
TOLERANCE = 1e-7  # of the last step in 1 / T, which leaves an error of about 1e-11; float32 logits on a GPU need it
MOST_PASSES = 60  # 6 to 9 are usual, 16 were the most, of logits multiplied by 1e-8
APART = 1e-4  # passes that differ less in 1 / T have too few digits between them for a standard error


@dataclass(frozen=True)
class TemperatureFit:
    """What `fit_temperature` returns.

    cross_entropy is that of logits / temperature, cross_entropy_before that of the logits as they are, in nats per
    row. stderr_iid is the standard error of the temperature with rows taken as independent, stderr_cluster that of
    documents drawn independently (None without documents). passes are the reads of all rows.
    """

    temperature: float
    cross_entropy: float
    cross_entropy_before: float
    stderr_iid: float
    stderr_cluster: float | None
    scored: int
    ignored: int
    documents: int | None
    passes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite."""
        return finite(asdict(self))


@dataclass(frozen=True)
class RowSlopes:
    """What one pass measures of each row, with z = logits / T."""

    loss: np.ndarray  # nats
    slope: np.ndarray  # d loss / d ln(1 / T) = mean of z over the model's distribution - z at the label
    gap: np.ndarray  # largest z - z at the label


def slopes(stats: Any, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of RowSlopes."""
    loss, _ = _row_loss.row_losses(stats, labels, 1.0, smoothing=0.0, z_loss=0.0, has_spread=False)
    gap = stats.max - stats.label_logit
    return loss, stats.moment / (1.0 + stats.rest) + gap, gap


NO_SLOPES = LossSums()


@dataclass(frozen=True)
class SlopeSums:
    """Counts and exact sums of RowSlopes, the same bit for bit under any grouping and order of the rows."""

    ignored: int = 0
    loss: ExactSum = NOTHING
    slope: LossSums = NO_SLOPES
    gap: ExactSum = NOTHING
    nan: BadRows = NO_BAD_ROWS
    infinite: BadRows = NO_BAD_ROWS
    documents: DocumentSums | None = None  # of the slopes

    def merge(self, other: SlopeSums) -> SlopeSums:
        documents = None
        if self.documents is not None and other.documents is not None:
            documents = self.documents.merge(other.documents)
        return SlopeSums(
            self.ignored + other.ignored,
            self.loss.merge(other.loss),
            self.slope.merge(other.slope),
            self.gap.merge(other.gap),
            self.nan.merge(other.nan),
            self.infinite.merge(other.infinite),
            documents,
        )

    @property
    def scored(self) -> int:
        return self.slope.count


@dataclass(frozen=True)
class SlopeJob(PartJob):
    """A job whose passes leave SlopeSums behind."""

    def identity(self) -> SlopeSums:
        return SlopeSums(documents=None if self.documents is None else DocumentSums())

    def row_scores(self, logits: Any, classes: np.ndarray) -> RowSlopes:
        logits, labels, options = self.opened(logits, classes)
        rows = Rows.open(logits, labels, **options)
        return RowSlopes(*rows.backend.map_rows(slopes, rows.stats(also=("moment",)), rows.labels, outputs=3))

    def block_result(self, first: int, labelled: Labelled, scores: RowSlopes, kind: str) -> BlockResult:
        rows = labelled.classes.size
        on = np.flatnonzero(labelled.classes != IGNORED)
        loss, slope = scores.loss[on], scores.slope[on]
        sums = SlopeSums(
            rows - on.size,
            exact_sum(loss),
            LossSums(on.size, exact_sum(slope), exact_sum(slope, squared=True)),
            exact_sum(scores.gap[on]),
            BadRows.of(np.isnan(loss), on + first),
            BadRows.of(np.isinf(loss), on + first),
            None if labelled.documents is None else DocumentSums.of(labelled.documents[on], slope),
        )
        return BlockResult(first, rows, sums, None, kind)


@dataclass(frozen=True)
class Pass:
    """What one pass told of the mean loss as a function of b = 1 / T, which is convex."""

    b: float
    sums: SlopeSums

    @property
    def loss(self) -> float:
        return self.sums.loss.divided_by(self.sums.scored)

    @property
    def slope(self) -> float:
        """d mean loss / db."""
        return self.sums.slope.mean / self.b


def best_temperature(at: Callable[[float], SlopeSums]) -> TemperatureFit:
    """Of `at(T)`, a pass over all rows. ValueError where no temperature is best."""
    passes: list[Pass] = []

    def look(b: float) -> Pass:
        passes.append(Pass(b, at(1.0 / b)))
        return passes[-1]

    start = look(1.0)
    check_rows(start.sums)
    best = solve(look, *bracket(look, start), passes)
    return _result(best, start, passes)


def check_rows(sums: SlopeSums) -> None:
    """ValueError if these rows have no best temperature, or one of 0."""
    check_losses(sums, "fit a temperature to")
    if sums.gap.units == 0 and sums.slope.squares.units == 0:
        raise ValueError("no temperature is best: in every row all classes are as probable, at any temperature")
    if sums.gap.units == 0:
        raise ValueError(
            f"no temperature is best: in all {sums.scored:,} rows the label has the largest logit, so the loss keeps "
            "falling as the temperature goes to 0; more rows, or rows that the model was not trained on, would have "
            "errors"
        )


def bracket(look: Callable[[float], Pass], start: Pass) -> tuple[Pass, Pass]:
    """Two passes between which the slope is 0, or one twice."""
    low = high = start
    if start.slope == 0:
        return low, high
    guess, factor = _guess(start), 4.0
    if start.slope > 0:
        low = look(guess)
        if low.slope > 0:
            low, high = look(guess / factor), low
        if low.slope > 0:
            low, high = look(1.0 / HOTTEST), low
            if low.slope >= 0:
                raise ValueError(_UNRELATED.format(size=low.slope))
    else:
        high = look(guess)
        while high.slope < 0:
            if high.b > 1.0 / COLDEST:
                raise ValueError(f"no temperature above {COLDEST:.2g} is best: the loss keeps falling")
            low, high = high, look(high.b * factor)
            factor *= factor
    return low, high


_UNRELATED = (
    "no temperature is best: the labels' logits are on average {size:.3g} below the mean of their rows, so the loss "
    "keeps falling as the temperature goes to infinity; are these the labels of these rows (shift)?"
)


def _guess(start: Pass) -> float:
    """b of the second pass: as if the slope were `gap - a / b**2`, which it is where gaps are spread evenly near 0."""
    gap = start.sums.gap.divided_by(start.sums.scored)
    guess = math.sqrt(max(gap - start.slope, 0.0) / gap)
    return min(max(guess, 1 / 32), 0.9) if start.slope > 0 else max(min(guess, 32.0), 1.1)


def solve(look: Callable[[float], Pass], low: Pass, high: Pass, passes: list[Pass]) -> Pass:
    """Where the slope is 0, between a pass where it is not above and one where it is not below.

    Newton's method, with the curvature of a parabola through three passes: it has order 1.8 (Muller 1956, MTAC 10:208).
    A step out of the bracket, or after one that has not halved the slope, goes to the middle.
    """
    last = before = min(low, high, key=lambda p: abs(p.slope))
    while last.slope != 0 and len(passes) < MOST_PASSES:
        bend = curvature(last, passes)
        b = last.b - last.slope / bend if bend > 0 else math.nan
        if abs(b - last.b) <= ERROR * last.b:
            break
        if not low.b < b < high.b or (last is not before and abs(last.slope) > abs(before.slope) / 2):
            b = math.sqrt(low.b * high.b) if high.b > 4 * low.b else (low.b + high.b) / 2
        if not low.b < b < high.b:
            break  # nothing lies between
        before, last = last, look(b)
        low, high = (last, high) if last.slope < 0 else (low, last)
        if abs(last.b - before.b) <= TOLERANCE * last.b:
            break
    return min(passes, key=lambda p: abs(p.slope))


def curvature(best: Pass, passes: list[Pass], apart: float = 0.0) -> float:
    """d slope / db at the best pass: of the parabola through it and the two next to it that are not too close; NaN
    without one."""
    distances = sorted((abs(math.log(p.b / best.b)), i) for i, p in enumerate(passes))
    others = [passes[i] for distance, i in distances if distance > apart][:2]
    if not others:
        return math.nan

    def divided(p: Pass, q: Pass) -> float:
        return (p.slope - q.slope) / (p.b - q.b)

    if len(others) == 1:
        return divided(best, others[0])
    return divided(best, others[0]) + divided(best, others[1]) - divided(*others)


def _result(best: Pass, start: Pass, passes: list[Pass]) -> TemperatureFit:
    """With standard errors by the sandwich formula: that of T is T**2 times that of b, and that of b the standard error
    of the mean slope over the curvature (Huber 1967), whether or not the model is right."""
    sums, documents = best.sums, best.sums.documents
    bend = curvature(best, passes, APART)
    scale = 1.0 / (best.b**3 * bend) if bend > 0 else math.nan
    cluster = None if documents is None else ratio(documents.run, documents.run.counts)[1] * scale
    return TemperatureFit(
        temperature=1.0 / best.b,
        cross_entropy=best.loss,
        cross_entropy_before=start.loss,
        stderr_iid=sums.slope.stderr * scale,
        stderr_cluster=cluster,
        scored=sums.scored,
        ignored=sums.ignored,
        documents=None if documents is None else len(documents),
        passes=len(passes),
    )
