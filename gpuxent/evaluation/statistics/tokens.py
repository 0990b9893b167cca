"""The records of scored tokens: what every statistic of a data set, or of two models on it, is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, ClassVar, Self

import numpy as np

from gpuxent._records import DIVERGENCES


@dataclass(frozen=True)
class TokenColumns:
    """Tokens that count, in the order of their rows, as arrays of one length.

    The fields of a record are its columns, in the order in which they are stored, `floats` of float64 and all others of
    int64; the last is `document`, which may be missing.
    """

    kind: ClassVar[str]  # of the runs that keep such tokens
    format: ClassVar[str]  # of their files
    floats: ClassVar[tuple[str, ...]]
    rising: ClassVar[tuple[str, ...]] = ("row", "position", "document")  # nearly; the other integers have few values

    row: np.ndarray  # the number of the row of logits, leading axes flattened

    def __len__(self) -> int:
        return self.row.size

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """By name; without `document` where there are none."""
        named = {name: getattr(self, name) for name in self.names()}
        return {name: column for name, column in named.items() if column is not None}

    def take(self, which: slice | np.ndarray) -> Self:
        return type(self)(**{name: column[which] for name, column in self.columns.items()})

    @classmethod
    def concatenated(cls, parts: Sequence[Self]) -> Self:
        names = parts[0].columns
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class Tokens(TokenColumns):
    """What is measured of one model's tokens."""

    kind: ClassVar[str] = "perplexity"
    format: ClassVar[str] = "gpuxent tokens, version 1"
    floats: ClassVar[tuple[str, ...]] = ("nll", "entropy", "p_max")

    label: np.ndarray  # int64
    position: np.ndarray  # int64: rows before it in its document and sequence
    nll: np.ndarray  # float64, nats
    entropy: np.ndarray  # float64, nats
    p_max: np.ndarray  # float64
    rank: np.ndarray  # int64: classes before the label; 0 is a hit
    document: np.ndarray | None = None  # int64: its id


@dataclass(frozen=True)
class PairTokens(TokenColumns):
    """What is measured of the same tokens of two models, base and other, and of their distributions."""

    kind: ClassVar[str] = "comparison"
    format: ClassVar[str] = "gpuxent pairs of tokens, version 2"
    floats: ClassVar[tuple[str, ...]] = (
        *("base_nll", "base_entropy", "base_p_max", "other_nll", "other_entropy", "other_p_max"),
        *DIVERGENCES,
    )

    label: np.ndarray  # int64
    position: np.ndarray  # int64: as in `Tokens`, and so are the next eight
    base_nll: np.ndarray
    base_entropy: np.ndarray
    base_p_max: np.ndarray
    base_rank: np.ndarray
    other_nll: np.ndarray
    other_entropy: np.ndarray
    other_p_max: np.ndarray
    other_rank: np.ndarray
    kl: np.ndarray  # float64, nats, KL(base || other)
    reverse_kl: np.ndarray  # float64, nats, KL(other || base)
    js: np.ndarray  # float64, nats
    tv: np.ndarray  # float64, 0 to 1
    same_top: np.ndarray  # int64: 1 where both have the same most probable class, else 0
    document: np.ndarray | None = None  # int64: its id

    def side(self, name: str) -> Tokens:
        """What is measured of "base", or of "other", alone."""
        common = {column: getattr(self, column) for column in ("row", "label", "position", "document")}
        own = {column: getattr(self, f"{name}_{column}") for column in ("nll", "entropy", "p_max", "rank")}
        return Tokens(**common, **own)


RECORDS: dict[str, type[TokenColumns]] = {record.kind: record for record in (Tokens, PairTokens)}


@dataclass(frozen=True)
class BlockResult:
    """What the rows [first, first + rows) of a data set leave behind."""

    first: int
    rows: int
    summary: Any  # a Summary, of a Job; it can be merged
    tokens: Any  # TokenColumns, of a Job's record, only if they are to be kept
    computed_by: str  # backend, CPU type and versions: what the last bits of a loss depend on

    @classmethod
    def joined(cls, parts: Sequence[BlockResult]) -> BlockResult:
        """Of rows one after the other, scored by one process."""
        if len(parts) == 1:
            return parts[0]
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return cls(
            parts[0].first,
            sum(part.rows for part in parts),
            reduce(lambda a, b: a.merge(b), (part.summary for part in parts)),
            type(tokens[0]).concatenated(tokens) if tokens else None,
            parts[0].computed_by,
        )
