"""Two models' logits of the same rows, scored together: what is measured of each, and of their distributions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._records import IDENTITY, IGNORED, PairStats, Transform
from gpuxent._rows import Rows
from gpuxent.backends import made, on_gpu
from gpuxent.evaluation.comparison.pairs import Pairs
from gpuxent.evaluation.job import Job, Labelled
from gpuxent.evaluation.runs.directory import Run
from gpuxent.evaluation.sources import PairSource, Source
from gpuxent.evaluation.statistics.tokens import BlockResult, PairTokens, TokenColumns
from gpuxent.evaluation.statistics.totals import measures, rest_of_log_probs


@dataclass(frozen=True)
class PairScores:
    """Vectors of one entry per row; meaningless where the label does not count."""

    base_nll: np.ndarray
    base_entropy: np.ndarray
    base_rank: np.ndarray
    base_p_max: np.ndarray
    other_nll: np.ndarray
    other_entropy: np.ndarray
    other_rank: np.ndarray
    other_p_max: np.ndarray
    kl: np.ndarray  # nats, KL(base || other)
    reverse_kl: np.ndarray  # KL(other || base)
    js: np.ndarray
    tv: np.ndarray
    same_top: np.ndarray  # 1 where both have the same most probable class


def without_cut_off(p: Any, q: Any, cut_off: tuple[bool, ...]) -> tuple[Any, Any]:
    """With what was cut off of one side missing in the other too: nothing is known of these classes, and no term of a
    divergence is theirs."""
    base, other = cut_off
    kept_p = np.where(q == -np.inf, p.dtype.type(-np.inf), p) if other else p
    kept_q = np.where(p == -np.inf, q.dtype.type(-np.inf), q) if base else q
    return kept_p, kept_q


@dataclass(frozen=True)
class PairJob(Job):
    """A job whose logits are a `PairSource`."""

    record: ClassVar[type[TokenColumns]] = PairTokens

    changes: tuple[Transform, Transform] = (IDENTITY, IDENTITY)  # of base's logits, and of other's

    @property
    def pair(self) -> PairSource:
        assert isinstance(self.logits, PairSource)
        return self.logits

    @property
    def row_bytes(self) -> int:
        stored = sum(side.shape[-1] * side.dtype.itemsize for side in self.pair.sides.values())
        return stored + 8 * self.pair.shape[-1] * sum(self.normalized_sides)

    @property
    def options(self) -> dict[str, Any]:
        base, other = self.changes
        return super().options | vars(base) | {"other_temperature": other.temperature}

    @property
    def inputs(self) -> dict[str, Source | None]:
        found: dict[str, Source | None] = {}
        for name, side in self.pair.sides.items():
            factors = getattr(side, "factors", None)
            found |= {name: side} if factors is None else {f"{name} {part}": source for part, source in factors.items()}
        return found | {name: source for name, source in self.sources.items() if name != "logits"}

    @property
    def has_products(self) -> bool:
        return any(hasattr(side, "factors") for side in self.pair.sides.values())

    @property
    def kind(self) -> str | None:
        on_a_gpu = any(on_gpu(getattr(side, "array", None)) for side in self.pair.sides.values())
        return "cupy" if on_a_gpu else self.backend

    @property
    def normalized_sides(self) -> tuple[bool, ...]:
        """Which of the two are log-probabilities that were cut off: see `sources.kld`."""
        sides = zip(self.pair.sides.values(), self.changes, strict=True)
        return tuple(change.is_identity and getattr(side, "normalized", False) for side, change in sides)

    def identity(self) -> Pairs:
        return Pairs()

    def summary_of(self, run: Run) -> Pairs:
        """All sums are exact: made again from the tokens they are the same, and need no place in the ledger."""
        return reduce(Pairs.merge, map(Pairs.of_tokens, run.tokens()), Pairs())

    def row_scores(self, logits: Any, classes: np.ndarray) -> PairScores:
        arrays = [made(side)[:, : self.pair.shape[-1]] for side in logits]
        sides = [self.opened(array, classes) for array in arrays]
        arguments.pair(sides[0][0], sides[1][0], ("base", "other"))
        base, other = (Rows.open(rows, labels, **options) for rows, labels, options in sides)
        owner, q = base.backend, base.backend.laid_out_as(base.logits, other.logits)
        also = ("moment", "rank", "argmax")
        found = owner.pair_stats(base.logits, q, base.labels, transforms=self.changes, also=also)
        if any(self.normalized_sides):
            found = self._with_own_normalizers(owner, found, base.logits, q)
        measured: list[Any] = []
        for stats in (found.base, found.other):
            _, *of_side = owner.map_rows(measures, stats, base.labels, outputs=5)
            measured += of_side
        same_top = found.base.argmax == found.other.argmax
        return PairScores(*measured, *vars(found.divergences).values(), same_top)  # type: ignore[call-arg]

    def _with_own_normalizers(self, owner: Any, found: PairStats, p: Any, q: Any) -> PairStats:
        """With those that log-probabilities were made with, and without what was cut off of them: a second read."""
        base, other = (
            replace(stats, rest=owner.map_rows(rest_of_log_probs, stats.max)) if normalized else stats
            for stats, normalized in zip((found.base, found.other), self.normalized_sides, strict=True)
        )
        p, q = without_cut_off(p, q, self.normalized_sides)
        return PairStats(base, other, owner.divergence_sums(p, q, base, other, transforms=self.changes))

    def block_result(self, first: int, labelled: Labelled, scores: PairScores, kind: str) -> BlockResult:
        on = np.flatnonzero(labelled.classes != IGNORED)
        measured = {name: column[on] for name, column in vars(scores).items()}
        tokens = PairTokens(
            row=on + first,
            label=labelled.classes[on],
            position=labelled.positions[on],
            document=None if labelled.documents is None else labelled.documents[on],
            **{name: c if name in PairTokens.floats else c.astype(np.int64) for name, c in measured.items()},
        )
        kept = tokens if self.keep_tokens else None
        return BlockResult(first, labelled.classes.size, Pairs.of_tokens(tokens), kept, kind)
