"""Two models on the same tokens: what changed, with errors of the difference itself.

The losses of two models on one text rise and fall together, so the error of their difference is far smaller than that
of either mean. Everything here is made from pairs of tokens, which the records of two runs give without any logits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from gpuxent.evaluation.clustered import ratio
from gpuxent.evaluation.documents import DocumentSums
from gpuxent.evaluation.result import finite
from gpuxent.evaluation.run import Run
from gpuxent.evaluation.sums import LossSums, exact_sum
from gpuxent.evaluation.tokens import Tokens
from gpuxent.evaluation.totals import exp

QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0)
LISTED = 20  # documents and tokens that changed most, each way


@dataclass(frozen=True)
class Estimate:
    """A number with its standard errors: of documents drawn independently, where there are ids, and of tokens."""

    value: float
    stderr_cluster: float | None
    stderr_iid: float

    def scaled(self, factor: float, value: float) -> Estimate:
        """Another value, whose errors are these times the factor (the delta method)."""
        cluster = None if self.stderr_cluster is None else factor * self.stderr_cluster
        return Estimate(value, cluster, factor * self.stderr_iid)


@dataclass(frozen=True)
class ChangedDocument:
    """A document's scored tokens, and its mean losses in nats per token."""

    document: int
    scored: int
    base: float
    other: float


@dataclass(frozen=True)
class ChangedToken:
    """A token's row, label and document, and its losses in nats."""

    row: int
    label: int
    document: int | None
    base: float
    other: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns. Differences are other - base: a positive one is a worse model `other`.

    base and other are cross-entropies in nats per token, base_perplexity and other_perplexity their exponentials.
    log_ratio is the mean difference of the losses, ln(PPL(other) / PPL(base)), ratio its exponential and difference
    that of the perplexities; their errors are those of pairs. correlation is that of the tokens' losses. delta_p is the
    change of the label's probability, with its root mean square and exact quantiles. Of the rows where the top class is
    right, both_right, only_base_right and only_other_right say of which model.

    Tokens with a NaN or infinite loss in either model are among the scored ones, and counted as `bad`.
    """

    scored: int
    bad: int
    first_bad_row: int | None
    documents: int | None
    base: Estimate
    other: Estimate
    base_perplexity: Estimate
    other_perplexity: Estimate
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    correlation: float
    delta_p: Estimate
    delta_p_rms: Estimate
    delta_p_quantiles: dict[float, float]
    both_right: int
    only_base_right: int
    only_other_right: int
    neither_right: int
    base_entropy: float
    other_entropy: float
    worse_documents: tuple[ChangedDocument, ...] = field(default=(), repr=False)
    better_documents: tuple[ChangedDocument, ...] = field(default=(), repr=False)
    worse_tokens: tuple[ChangedToken, ...] = field(default=(), repr=False)
    better_tokens: tuple[ChangedToken, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite."""
        data = asdict(self)
        data["delta_p_quantiles"] = {str(q): value for q, value in self.delta_p_quantiles.items()}
        return finite({name: list(value) if isinstance(value, tuple) else value for name, value in data.items()})


def compare(base: str | PathLike[str], other: str | PathLike[str]) -> Comparison:
    """Is `other` worse than `base`, by how much, and where? From two runs on the same tokens, without any logits.

    Args:
        base, other: folders that `evaluate(..., run=)` or `gpuxent perplexity --run` filled, to the end.

    Standard errors are of the paired difference: clustered by document where the runs have ids (as those of
    `evaluate`), and of independent tokens. Errors of exponentials are those of the exponents times the value.

    Raises: OSError: a folder that holds no run. ValueError: a run that is not finished or keeps no tokens; rows, labels
        or documents that differ.

    >>> import numpy as np, tempfile
    >>> from gpuxent import evaluate
    >>> folder, x, y = tempfile.mkdtemp(), np.log([[0.5, 0.5], [0.8, 0.2]]), np.array([0, 0])
    >>> _ = evaluate(x, y, run=f"{folder}/a"), evaluate(0.5 * x, y, run=f"{folder}/b")
    >>> round(compare(f"{folder}/a", f"{folder}/b").log_ratio.value, 4)
    0.0912
    """
    with Run.open(base) as first, Run.open(other) as second:
        for run in (first, second):
            _check(run)
        if first.rows != second.rows:
            raise ValueError(f"{second.path} must have the {first.rows:,} rows of {first.path}, got {second.rows:,}")
        pairs = Pairs()
        for mine, theirs in _paired(first, second):
            pairs.add(mine, theirs)
        return pairs.result()


def _check(run: Run) -> None:
    if not run.keeps_tokens:
        raise ValueError(f"{run.path} has no record of its tokens")
    if not run.complete:
        raise ValueError(
            f"{run.path} must be finished, got {run.finished_rows:,} of {run.rows:,} rows; --resume goes on"
        )


def _paired(base: Run, other: Run) -> Iterator[tuple[Tokens, Tokens]]:
    """The same tokens of both, some at a time."""
    sides = [_Side(base), _Side(other)]
    while True:
        count = min(side.filled() for side in sides)
        if count == 0:
            break
        mine, theirs = (side.take(count) for side in sides)
        _check_same(mine, theirs, base.path, other.path)
        yield mine, theirs
    for side, against in (sides, sides[::-1]):
        if side.filled():
            row = int(side.take(1).row[0])
            raise ValueError(f"row {row:,} counts in {side.path}, but not in {against.path}")


class _Side:
    """A run's tokens, as many at a time as are wanted."""

    def __init__(self, run: Run) -> None:
        self.path, self._parts, self._left = run.path, run.tokens(), None

    def filled(self) -> int:
        """How many are at hand; 0 at the end."""
        while self._left is None or len(self._left) == 0:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._left = part
        return len(self._left)

    def take(self, count: int) -> Tokens:
        left = self._left
        assert left is not None
        self._left = _sliced(left, slice(count, None))
        return _sliced(left, slice(count))

    _left: Tokens | None


def _sliced(tokens: Tokens, which: slice | np.ndarray) -> Tokens:
    return Tokens(**{name: column[which] for name, column in tokens.columns.items()})


def _check_same(mine: Tokens, theirs: Tokens, base: Path, other: Path) -> None:
    different = np.flatnonzero(mine.row != theirs.row)
    if different.size:
        a, b = int(mine.row[different[0]]), int(theirs.row[different[0]])
        counts, lacks = (base, other) if a < b else (other, base)
        raise ValueError(f"row {min(a, b):,} counts in {counts}, but not in {lacks}")
    if (mine.document is None) != (theirs.document is None):
        has, lacks = (base, other) if theirs.document is None else (other, base)
        raise ValueError(f"{has} has document ids, but {lacks} has none")
    for name in ("label", "document"):
        a, b = getattr(mine, name), getattr(theirs, name)
        different = np.flatnonzero(a != b) if a is not None else np.zeros(0, np.int64)
        if different.size:
            i = int(different[0])
            raise ValueError(f"row {int(mine.row[i]):,} has {name} {a[i]} in {base}, but {b[i]} in {other}")


class Pairs:
    """What pairs of tokens leave behind: exact sums, so that how they are cut up changes nothing."""

    def __init__(self) -> None:
        self._count, self._bad, self._first_bad = 0, 0, None
        self._losses = {name: LossSums() for name in ("base", "other", "log_ratio", "delta_p", "square")}
        self._documents: dict[str, DocumentSums] | None = None
        self._entropy = [exact_sum(np.zeros(0)), exact_sum(np.zeros(0))]
        self._right = np.zeros((2, 2), np.int64)  # of base, of other
        self._delta_p: list[np.ndarray] = []
        self._worse, self._better = (_Most(LISTED) for _ in range(2))

    _first_bad: int | None

    def add(self, base: Tokens, other: Tokens) -> None:
        with np.errstate(invalid="ignore"):  # inf - inf
            change = other.nll - base.nll
        delta_p = np.exp(-other.nll) - np.exp(-base.nll)
        values = {
            "base": base.nll,
            "other": other.nll,
            "log_ratio": change,
            "delta_p": delta_p,
            "square": delta_p * delta_p,
        }
        for name, column in values.items():
            sums = LossSums(column.size, exact_sum(column), exact_sum(column, squared=True))
            self._losses[name] = self._losses[name].merge(sums)
        bad = np.flatnonzero(~np.isfinite(change))
        if bad.size and self._first_bad is None:
            self._first_bad = int(base.row[bad[0]])
        self._count, self._bad = self._count + len(base), self._bad + bad.size
        if base.document is not None:
            found = {name: DocumentSums.of(base.document, column) for name, column in values.items()}
            before = self._documents
            self._documents = found if before is None else {name: before[name].merge(found[name]) for name in found}
        for i, tokens in enumerate((base, other)):
            self._entropy[i] = self._entropy[i].merge(exact_sum(tokens.entropy))
        hits = 2 * (base.rank == 0) + (other.rank == 0)
        self._right += np.bincount(hits, minlength=4).reshape(2, 2)
        self._delta_p.append(delta_p)
        self._worse.add(change, base, other)
        self._better.add(-change, base, other)

    def result(self) -> Comparison:
        base, other = self._mean("base"), self._mean("other")
        log_ratio, square = self._mean("log_ratio"), self._mean("square")
        rms = math.sqrt(square.value) if square.value >= 0 else math.nan
        worse, better = self._changed_documents()
        quantiles = (
            np.quantile(np.concatenate(self._delta_p), QUANTILES) if self._count else [math.nan] * len(QUANTILES)
        )
        return Comparison(
            scored=self._count,
            bad=self._bad,
            first_bad_row=self._first_bad,
            documents=None if self._documents is None else len(self._documents["base"]),
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
            delta_p_quantiles=dict(zip(QUANTILES, map(float, quantiles), strict=True)),
            both_right=int(self._right[1, 1]),
            only_base_right=int(self._right[1, 0]),
            only_other_right=int(self._right[0, 1]),
            neither_right=int(self._right[0, 0]),
            base_entropy=self._entropy[0].divided_by(self._count),
            other_entropy=self._entropy[1].divided_by(self._count),
            worse_documents=worse,
            better_documents=better,
            worse_tokens=self._worse.tokens(),
            better_tokens=self._better.tokens(),
        )

    def _mean(self, name: str) -> Estimate:
        sums, cluster = self._losses[name], None
        if self._documents is not None:
            run = self._documents[name].run
            cluster = ratio(run, run.counts)[1]
        return Estimate(sums.mean, cluster, sums.stderr)

    def _variances(self) -> tuple[float, float, float]:
        """Of the means of base, other and their difference."""
        base, other, change = (self._losses[name].stderr ** 2 for name in ("base", "other", "log_ratio"))
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
            return Estimate(b - a, None if self._documents is None else math.nan, math.nan)
        var_a, var_b, change = self._variances()
        variance = b * b * change + (b - a) ** 2 * var_a + b * (b - a) * (var_b - var_a - change)
        return Estimate(b - a, self._clustered_difference(a, b), math.sqrt(max(0.0, variance)))

    def _clustered_difference(self, a: float, b: float) -> float | None:
        """As `ratio`, of the documents' sums of the same."""
        if self._documents is None:
            return None
        run, count = self._documents["base"].run, len(self._documents["base"])
        if count < 2:
            return math.nan
        loss, change = (self._documents[name].means() - self._losses[name].mean for name in ("base", "log_ratio"))
        residuals = run.counts * (b * change + (b - a) * loss)
        return math.sqrt(count / (count - 1) * math.fsum(residuals**2)) / int(run.counts.sum())

    def _changed_documents(self) -> tuple[tuple[ChangedDocument, ...], tuple[ChangedDocument, ...]]:
        if self._documents is None:
            return (), ()
        base, other = self._documents["base"], self._documents["other"]
        means, changed = base.means(), other.means()
        with np.errstate(invalid="ignore"):
            change = changed - means
        order = np.argsort(np.where(np.isnan(change), 0.0, change), kind="stable")

        def listed(places: np.ndarray) -> tuple[ChangedDocument, ...]:
            columns = (base.run.ids[places], base.run.counts[places], means[places], changed[places])
            return tuple(map(ChangedDocument, *(column.tolist() for column in columns)))

        worst, best = order[::-1][:LISTED], order[:LISTED]
        return listed(worst[change[worst] > 0]), listed(best[change[best] < 0])


class _Most:
    """The tokens with the largest changes above 0, the first of equal ones."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[float, int, ChangedToken]] = []

    def add(self, change: np.ndarray, base: Tokens, other: Tokens) -> None:
        least = self._heap[0][0] if len(self._heap) == self._count else 0.0
        places = np.flatnonzero(change > least)
        if places.size > self._count:
            places = np.sort(places[np.argsort(-change[places], kind="stable")[: self._count]])
        for i in places.tolist():
            document = None if base.document is None else int(base.document[i])
            row = int(base.row[i])
            token = ChangedToken(row, int(base.label[i]), document, float(base.nll[i]), float(other.nll[i]))
            heapq.heappush(self._heap, (float(change[i]), -row, token))
            if len(self._heap) > self._count:
                heapq.heappop(self._heap)

    def tokens(self) -> tuple[ChangedToken, ...]:
        return tuple(token for _, _, token in sorted(self._heap, reverse=True))
