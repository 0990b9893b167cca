"""The record of scored tokens: what every statistic of a data set is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Tokens that count, in the order of their rows, as arrays of one length."""

    row: np.ndarray  # int64: the number of the row of logits, leading axes flattened
    label: np.ndarray  # int64
    position: np.ndarray  # int64: rows before it in its document and sequence
    nll: np.ndarray  # float64, nats
    entropy: np.ndarray  # float64, nats
    p_max: np.ndarray  # float64
    rank: np.ndarray  # int64: classes before the label; 0 is a hit
    document: np.ndarray | None = None  # int64: its id

    def __len__(self) -> int:
        return self.row.size

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """By name; without `document` where there are none."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in named.items() if column is not None}

    def at(self, places: np.ndarray) -> Tokens:
        """Some of them."""
        return Tokens(**{name: column[places] for name, column in self.columns.items()})

    @classmethod
    def concatenated(cls, parts: Sequence[Tokens]) -> Tokens:
        names = parts[0].columns
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class BlockResult:
    """What the rows [first, first + rows) of a data set leave behind."""

    first: int
    rows: int
    summary: Any  # a Summary, of a Job; it can be merged
    tokens: Tokens | None  # only if they are to be kept
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
            Tokens.concatenated(tokens) if tokens else None,
            parts[0].computed_by,
        )
