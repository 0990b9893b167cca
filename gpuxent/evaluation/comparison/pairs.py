"""What pairs of tokens, one of each model, leave behind: counts, exact sums, histograms and the largest changes.

All of it can be merged, and how the tokens were cut into blocks changes not a bit of it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from gpuxent._records import DIVERGENCES
from gpuxent.evaluation.comparison.result import ChangedDocument, ChangedToken, Comparison, Estimate
from gpuxent.evaluation.statistics.clustered import ratio
from gpuxent.evaluation.statistics.documents import DocumentSums
from gpuxent.evaluation.statistics.histogram import RELATIVE_ERROR, ChangeHistogram, exact_quantiles
from gpuxent.evaluation.statistics.sums import LossSums, exact_sum
from gpuxent.evaluation.statistics.tokens import PairTokens, Tokens
from gpuxent.evaluation.statistics.totals import NO_BAD_ROWS, BadRows, exp

QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0)
LISTED = 20  # documents and tokens that changed most, each way
WITH_QUANTILES = ("delta_p", "kl")
T = TypeVar("T")


@dataclass(frozen=True)
class Changes:
    """The tokens of the largest changes above 0: (change, -row, token), of equal ones the first."""

    largest: tuple[tuple[float, int, ChangedToken], ...] = ()

    @classmethod
    def of(cls, change: np.ndarray, base: Tokens, other: Tokens) -> Changes:
        places = np.flatnonzero(change > 0)
        if places.size > LISTED:
            places = places[np.argsort(-change[places], kind="stable")[:LISTED]]
        return cls(tuple((float(change[i]), -int(base.row[i]), _changed(i, base, other)) for i in places.tolist()))

    def merge(self, other: Changes) -> Changes:
        return Changes(tuple(heapq.nlargest(LISTED, (*self.largest, *other.largest))))

    def tokens(self) -> tuple[ChangedToken, ...]:
        return tuple(token for _, _, token in heapq.nlargest(LISTED, self.largest))


def _changed(i: int, base: Tokens, other: Tokens) -> ChangedToken:
    document = None if base.document is None else int(base.document[i])
    return ChangedToken(int(base.row[i]), int(base.label[i]), document, float(base.nll[i]), float(other.nll[i]))


@dataclass(frozen=True)
class Pairs:
    """Sums by name: of "base" and "other", their losses; "log_ratio", other - base; "delta_p", the change of the
    label's probability, and its "square"; the two entropies; DIVERGENCES, and "same_top", 1 where the models' top
    classes agree. `values` are what exact quantiles are taken from, where they are kept."""

    sums: dict[str, LossSums] = field(default_factory=dict)
    documents: dict[str, DocumentSums] | None = None
    histograms: dict[str, ChangeHistogram] = field(default_factory=dict)
    right: tuple[int, int, int, int] = (0, 0, 0, 0)  # neither, only other, only base, both
    bad: BadRows = NO_BAD_ROWS
    worse: Changes = Changes()
    better: Changes = Changes()
    values: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, base: Tokens, other: Tokens, divergences: dict[str, np.ndarray] | None = None, *, exact: bool = False
    ) -> Pairs:
        """Of tokens that belong together, and what else was measured of them. exact: keep what quantiles need, 8 bytes
        a token."""
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf
            change = other.nll - base.nll
            delta_p = np.exp(-other.nll) - np.exp(-base.nll)
        columns = {
            "base": base.nll,
            "other": other.nll,
            "log_ratio": change,
            "delta_p": delta_p,
            "square": delta_p * delta_p,
            "base_entropy": base.entropy,
            "other_entropy": other.entropy,
            **(divergences or {}),
        }
        ranged = {name: columns[name] for name in WITH_QUANTILES if name in columns}
        ids = base.document
        hits = np.bincount(2 * (base.rank == 0) + (other.rank == 0), minlength=4)
        return cls(
            {name: LossSums(c.size, exact_sum(c), exact_sum(c, squared=True)) for name, c in columns.items()},
            None if ids is None else {name: DocumentSums.of(ids, column) for name, column in columns.items()},
            {} if exact else {name: ChangeHistogram.of(column) for name, column in ranged.items()},
            tuple(hits.tolist()),
            BadRows.of(~np.isfinite(change), base.row),
            Changes.of(change, base, other),
            Changes.of(-change, base, other),
            {name: (column,) for name, column in ranged.items()} if exact else {},
        )

    @classmethod
    def of_tokens(cls, tokens: PairTokens, *, exact: bool = False) -> Pairs:
        """The same of all that was measured where both models' logits were there."""
        if len(tokens) == 0:
            return cls()
        measured = {name: getattr(tokens, name) for name in DIVERGENCES} | {"same_top": tokens.same_top.astype(float)}
        return cls.of(tokens.side("base"), tokens.side("other"), measured, exact=exact)

    def to_json(self) -> str:
        """For a run's ledger: nothing, since `of_tokens` makes all of it again from the tokens that the run keeps."""
        return ""

    def merge(self, other: Pairs) -> Pairs:
        if not (self.sums and other.sums):
            return self if self.sums else other
        documents = None
        if self.documents is not None and other.documents is not None:
            documents = _merged(self.documents, other.documents, DocumentSums.merge)
        return Pairs(
            _merged(self.sums, other.sums, LossSums.merge),
            documents,
            _merged(self.histograms, other.histograms, ChangeHistogram.merge),
            tuple(a + b for a, b in zip(self.right, other.right, strict=True)),  # type: ignore[arg-type]
            self.bad.merge(other.bad),
            self.worse.merge(other.worse),
            self.better.merge(other.better),
            _merged(self.values, other.values, tuple.__add__),
        )

    @property
    def count(self) -> int:
        return self._sums("base").count

    def result(self) -> Comparison:
        base, other, log_ratio = (self._mean(name) for name in ("base", "other", "log_ratio"))
        square = self._mean("square")
        rms = math.sqrt(square.value) if square.value >= 0 else math.nan
        worse, better = self._changed_documents()
        found: dict[str, Any] = {name: self._mean(name) for name in (*DIVERGENCES, "same_top") if name in self.sums}
        return Comparison(
            scored=self.count,
            bad=self.bad.count,
            first_bad_row=self.bad.first,
            documents=None if self.documents is None else len(self.documents["base"]),
            base=base,
            other=other,
            base_perplexity=base.scaled(exp(base.value), exp(base.value)),
            other_perplexity=other.scaled(exp(other.value), exp(other.value)),
            log_ratio=log_ratio,
            ratio=log_ratio.scaled(exp(log_ratio.value), exp(log_ratio.value)),
            difference=self._perplexity_difference(base.value, other.value),
            correlation=self._correlation(),
            delta_p=self._mean("delta_p"),
            delta_p_rms=square.scaled(1 / (2 * rms) if rms else 0.0, rms),
            delta_p_quantiles=self._quantiles("delta_p"),
            kl_quantiles=self._quantiles("kl") if "kl" in self.sums else None,
            quantile_error=RELATIVE_ERROR if self.histograms else 0.0,
            both_right=self.right[3],
            only_base_right=self.right[2],
            only_other_right=self.right[1],
            neither_right=self.right[0],
            base_entropy=self._sums("base_entropy").mean,
            other_entropy=self._sums("other_entropy").mean,
            worse_documents=worse,
            better_documents=better,
            worse_tokens=self.worse.tokens(),
            better_tokens=self.better.tokens(),
            **found,
        )

    def _sums(self, name: str) -> LossSums:
        return self.sums.get(name, LossSums())

    def _mean(self, name: str) -> Estimate:
        sums, cluster = self._sums(name), None
        if self.documents is not None:
            run = self.documents[name].run
            cluster = ratio(run, run.counts)[1]
        return Estimate(sums.mean, cluster, sums.stderr)

    def _quantiles(self, name: str) -> dict[float, float]:
        if name in self.histograms:
            return self.histograms[name].quantiles(QUANTILES)
        return exact_quantiles(np.concatenate(self.values.get(name, (np.zeros(0),))), QUANTILES)

    def _variances(self) -> tuple[float, float, float]:
        """Of the means of base, other and their difference."""
        base, other, change = (self._sums(name).stderr ** 2 for name in ("base", "other", "log_ratio"))
        return base, other, change

    def _correlation(self) -> float:
        """var(other - base) = var(other) + var(base) - 2 cov, and each variance is exact."""
        base, other, change = self._variances()
        scale = math.sqrt(base * other)
        return (base + other - change) / 2 / scale if scale > 0 else math.nan

    def _perplexity_difference(self, base: float, other: float) -> Estimate:
        """PPL(other) - PPL(base), whose derivatives by the two means are these. What a token adds to its error is
        PPL(other) * its change + (PPL(other) - PPL(base)) * its loss of base, each without the mean."""
        a, b = exp(base), exp(other)
        if not (a < math.inf and b < math.inf):
            return Estimate(b - a, None if self.documents is None else math.nan, math.nan)
        var_a, var_b, change = self._variances()
        variance = b * b * change + (b - a) ** 2 * var_a + b * (b - a) * (var_b - var_a - change)
        return Estimate(b - a, self._clustered_difference(a, b), math.sqrt(max(0.0, variance)))

    def _clustered_difference(self, a: float, b: float) -> float | None:
        """As `ratio`, of the documents' sums of the same."""
        if self.documents is None:
            return None
        run, count = self.documents["base"].run, len(self.documents["base"])
        if count < 2:
            return math.nan
        loss, change = (self.documents[name].means() - self._sums(name).mean for name in ("base", "log_ratio"))
        residuals = run.counts * (b * change + (b - a) * loss)
        return math.sqrt(count / (count - 1) * math.fsum(residuals**2)) / int(run.counts.sum())

    def _changed_documents(self) -> tuple[tuple[ChangedDocument, ...], tuple[ChangedDocument, ...]]:
        if self.documents is None:
            return (), ()
        base, other = self.documents["base"], self.documents["other"]
        means, changed = base.means(), other.means()
        with np.errstate(invalid="ignore"):
            change = changed - means
        order = np.argsort(np.where(np.isnan(change), 0.0, change), kind="stable")

        def listed(places: np.ndarray) -> tuple[ChangedDocument, ...]:
            columns = (base.run.ids[places], base.run.counts[places], means[places], changed[places])
            return tuple(map(ChangedDocument, *(column.tolist() for column in columns)))

        worst, best = order[::-1][:LISTED], order[:LISTED]
        return listed(worst[change[worst] > 0]), listed(best[change[best] < 0])


def _merged(a: dict[str, T], b: dict[str, T], merge: Callable[[T, T], Any]) -> dict[str, T]:
    return {name: merge(a[name], b[name]) for name in a}
