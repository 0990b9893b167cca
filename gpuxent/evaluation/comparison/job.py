"""Two models' logits of the same rows, scored together: what is measured of each, and of their distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._records import IGNORED
from gpuxent._rows import Rows
from gpuxent.backends import made, on_gpu
from gpuxent.evaluation.comparison.pairs import DIVERGENCES, Pairs
from gpuxent.evaluation.job import Job, Labelled
from gpuxent.evaluation.sources import PairSource, Source
from gpuxent.evaluation.statistics.tokens import BlockResult, Tokens
from gpuxent.evaluation.statistics.totals import measures


@dataclass(frozen=True)
class PairScores:
    """Vectors of one entry per row; meaningless where the label does not count."""

    base_nll: np.ndarray
    base_entropy: np.ndarray
    base_rank: np.ndarray
    other_nll: np.ndarray
    other_entropy: np.ndarray
    other_rank: np.ndarray
    kl: np.ndarray  # nats, KL(base || other)
    reverse_kl: np.ndarray  # KL(other || base)
    js: np.ndarray
    same_top: np.ndarray  # 1 where both have the same most probable class


@dataclass(frozen=True)
class PairJob(Job):
    """A job whose logits are a `PairSource`."""

    @property
    def pair(self) -> PairSource:
        assert isinstance(self.logits, PairSource)
        return self.logits

    @property
    def row_bytes(self) -> int:
        return sum(side.shape[-1] * side.dtype.itemsize for side in self.pair.sides.values())

    @property
    def inputs(self) -> dict[str, Source | None]:
        found: dict[str, Source | None] = {}
        for name, side in self.pair.sides.items():
            parts = getattr(side, "parts", None)
            found |= {name: side} if parts is None else {f"{name} {part}": source for part, source in parts.items()}
        return found | {name: source for name, source in self.sources.items() if name != "logits"}

    @property
    def has_products(self) -> bool:
        return any(hasattr(side, "parts") for side in self.pair.sides.values())

    @property
    def kind(self) -> str | None:
        on_a_gpu = any(on_gpu(getattr(side, "array", None)) for side in self.pair.sides.values())
        return "cupy" if on_a_gpu else self.backend

    def identity(self) -> Pairs:
        return Pairs()

    def row_scores(self, logits: Any, classes: np.ndarray) -> PairScores:
        sides = [self.opened(made(side)[:, : self.pair.shape[-1]], classes) for side in logits]
        arguments.pair(sides[0][0], sides[1][0], ("base", "other"))
        base, other = (Rows.open(rows, labels, **options) for rows, labels, options in sides)
        owner, q = base.backend, base.backend.laid_out_as(base.logits, other.logits)
        stats = [rows.stats(also=("moment", "rank", "argmax")) for rows in (base, other)]
        measured: list[Any] = []
        for rows, found in zip((base, other), stats, strict=True):
            _, nll, entropy, rank, _ = rows.backend.map_rows(measures, found, rows.labels, outputs=5)
            measured.append((nll, entropy, rank))
        pair = owner.pair_stats(base.logits, q, *stats, divergences=DIVERGENCES)
        (nll, entropy, rank), (other_nll, other_entropy, other_rank) = measured
        same_top = stats[0].argmax == stats[1].argmax
        divergences = (pair.kl, pair.reverse_kl, pair.js)
        return PairScores(nll, entropy, rank, other_nll, other_entropy, other_rank, *divergences, same_top)

    def block_result(self, first: int, labelled: Labelled, scores: PairScores, kind: str) -> BlockResult:
        on = np.flatnonzero(labelled.classes != IGNORED)
        base, other = (_tokens(name, first, on, labelled, scores) for name in ("base", "other"))
        divergences = {name: getattr(scores, name)[on] for name in DIVERGENCES}
        same_top = scores.same_top[on].astype(np.float64)
        pairs = Pairs.of(base, other, divergences | {"same_top": same_top}) if on.size else Pairs()
        return BlockResult(first, labelled.classes.size, pairs, None, kind)


def _tokens(name: str, first: int, on: np.ndarray, labelled: Labelled, scores: PairScores) -> Tokens:
    return Tokens(
        row=on + first,
        label=labelled.classes[on],
        position=labelled.positions[on],
        nll=getattr(scores, f"{name}_nll")[on],
        entropy=getattr(scores, f"{name}_entropy")[on],
        p_max=np.full(on.size, np.nan),
        rank=getattr(scores, f"{name}_rank")[on].astype(np.int64),
        document=None if labelled.documents is None else labelled.documents[on],
    )
