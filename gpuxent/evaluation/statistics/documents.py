"""Scored tokens and exact sums of their losses by document, for millions of documents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from gpuxent._records import NOTHING
from gpuxent.backends import limb_sums
from gpuxent.backends._numpy_sums import BITS, MASK
from gpuxent.evaluation.statistics.packed import pack, unpack

MOST_RUNS = 64  # of a DocumentSums before some are merged: so each sort is paid by dozens of merges
BATCH = 2**16  # documents whose sums are Python integers at a time


@dataclass(frozen=True)
class Document:
    """A document's id, its scored tokens, and their mean loss in nats."""

    document: int
    scored: int
    cross_entropy: float


@dataclass(frozen=True, eq=False)
class Run:
    """Documents in the order of their ids. A sum is an integer in two's complement, 32 bits in each row of `limbs`
    from the lowest on, in units of 2**(32 * low - 1126); there are as many rows as the largest one needs."""

    ids: np.ndarray  # int64 (documents,)
    counts: np.ndarray  # int64 (documents,)
    low: int
    limbs: np.ndarray  # uint32 (limbs, documents)
    nonfinite: np.ndarray  # float64 (documents,): as in ExactSum

    @classmethod
    def of(cls, ids: np.ndarray, losses: np.ndarray) -> Run:
        names, groups, counts = np.unique(ids, return_inverse=True, return_counts=True)
        low, limbs, nonfinite = limb_sums(losses, groups, names.size)
        return cls(names, counts, *_carried(low, iter(limbs)), nonfinite)

    def __len__(self) -> int:
        return self.ids.size

    @classmethod
    def merge_all(cls, runs: list[Run]) -> Run:
        """One plane of limbs at a time, so that the temporary arrays are small."""
        ids = np.concatenate([run.ids for run in runs])
        order = np.argsort(ids, kind="stable")  # of sorted runs: a merge
        ids = ids[order]
        starts = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))

        def gathered(columns: list[np.ndarray]) -> np.ndarray:
            return np.add.reduceat(np.concatenate(columns)[order], starts)

        low = min(run.low for run in runs)
        high = max(run.low + len(run.limbs) for run in runs)
        planes = (gathered([run._plane(i) for run in runs]) for i in range(low, high))
        with np.errstate(invalid="ignore"):  # inf - inf
            nonfinite = gathered([run.nonfinite for run in runs])
        return cls(ids[starts], gathered([run.counts for run in runs]), *_carried(low, planes), nonfinite)

    def _plane(self, place: int) -> np.ndarray:
        """The limbs of 2**(32 * place), int64, the highest of a sum signed."""
        i = place - self.low
        if not 0 <= i < len(self.limbs):
            return np.zeros(len(self), np.int64)
        plane = self.limbs[i]
        return (plane.view(np.int32) if i == len(self.limbs) - 1 else plane).astype(np.int64)

    def take(self, places: np.ndarray) -> Run:
        limbs = np.ascontiguousarray(self.limbs[:, places])
        return Run(self.ids[places], self.counts[places], self.low, limbs, self.nonfinite[places])

    def integers(self) -> Iterator[int]:
        """The finite sum of each document, in units of `scale`."""
        width = self.limbs.shape[0] * (BITS // 8)
        for start in range(0, len(self), BATCH):
            data = np.ascontiguousarray(self.limbs[:, start : start + BATCH].T, "<u4").tobytes()
            for place in range(0, len(data), width):
                yield int.from_bytes(data[place : place + width], "little", signed=True)

    @property
    def scale(self) -> int:
        """Integers count 2**-scale; it may be negative."""
        return NOTHING.scale - BITS * self.low


def _carried(low: int, planes: Iterator[np.ndarray]) -> tuple[int, np.ndarray]:
    """(low, limbs) of a Run from planes of signed limbs of any size, the lowest first: always the same for the same
    sums."""
    done: list[np.ndarray] = []
    carry: np.ndarray | int = 0
    for plane in planes:
        plane = plane + carry
        done.append((plane & MASK).astype(np.uint32))
        carry = plane >> BITS
    assert isinstance(carry, np.ndarray)  # there is a plane
    done.append(carry.astype(np.int32).view(np.uint32))
    while len(done) > 1 and not (done[-1].view(np.int32) != done[-2].view(np.int32) >> (BITS - 1)).any():
        done.pop()  # it says nothing but the sign
    empty = 0
    while empty < len(done) - 1 and not done[empty].any():
        empty += 1
    done = done[empty:]
    return (low + empty if done[0].any() or len(done) > 1 else 0), np.stack(done)


_NO_DOCUMENTS = Run.of(np.zeros(0, np.int64), np.zeros(0))


@dataclass(frozen=True, eq=False)
class DocumentSums:
    """For each document id its scored tokens and the exact sum of their losses, about 40 bytes each.

    `runs` are merged only when there are many, all but those that are larger than the smaller ones together: so a
    document is moved about log2(documents) times however many blocks are merged. What is read of it does not depend
    on that. A document without a scored token is not listed.
    """

    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, ids: np.ndarray, losses: np.ndarray) -> DocumentSums:
        """Of scored tokens, with the document id of each."""
        return cls((Run.of(ids, losses),) if ids.size else ())

    def merge(self, other: DocumentSums) -> DocumentSums:
        runs = self.runs + other.runs
        return DocumentSums(runs if len(runs) <= MOST_RUNS else _fewer(runs))

    @property
    def run(self) -> Run:
        """All documents, by id."""
        if len(self.runs) > 1:  # the same sums in one piece, which takes the place of the pieces
            object.__setattr__(self, "runs", (Run.merge_all(list(self.runs)),))
        return self.runs[0] if self.runs else _NO_DOCUMENTS

    def __len__(self) -> int:
        return len(self.run)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DocumentSums) and self.to_data() == other.to_data()

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Document]:
        """By id, the means rounded once."""
        columns = (self.run.ids.tolist(), self.run.counts.tolist(), self.means().tolist())
        yield from map(Document, *columns)

    def means(self) -> np.ndarray:
        """The documents' mean losses in the order of their ids, each what `math.fsum` of its losses gives over n."""
        run = self.run
        means = np.fromiter(map(divided, run.integers(), run.counts.tolist(), repeat(run.scale)), np.float64, len(run))
        return np.where(run.nonfinite == 0, means, run.nonfinite)

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        run = self.run
        return {
            "ids": pack(np.diff(run.ids, prepend=0)),
            "counts": pack(run.counts),
            "low": run.low,
            "limbs": [pack(plane) for plane in run.limbs],
            "nonfinite": pack(run.nonfinite) if run.nonfinite.any() else None,
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> DocumentSums:
        ids = np.cumsum(unpack(data["ids"], np.int64))
        nonfinite = np.zeros(ids.size) if data["nonfinite"] is None else unpack(data["nonfinite"], np.float64)
        limbs = np.stack([unpack(plane, np.uint32) for plane in data["limbs"]])
        run = Run(ids, unpack(data["counts"], np.int64), data["low"], limbs, nonfinite)
        return cls((run,) if ids.size else ())


def _fewer(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """With those merged that are not larger than all smaller ones together; the others are few, each twice the one
    before."""
    runs = tuple(sorted(runs, key=len))
    below, mixed = 0, 0
    for number, run in enumerate(runs):
        if len(run) <= below:
            mixed = number + 1
        below += len(run)
    return (Run.merge_all(list(runs[:mixed])), *runs[mixed:])


def divided(units: int, denominator: int, scale: int) -> float:
    """units * 2**-scale / denominator, rounded once."""
    try:
        return units / (denominator << scale) if scale >= 0 else (units << -scale) / denominator
    except OverflowError:
        return math.inf if units > 0 else -math.inf
