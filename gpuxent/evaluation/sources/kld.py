"""`.kld` files of llama.cpp: log-probabilities of a model (`llama-perplexity --save-all-logits`), and its tokens.

Layout: `_logits_`; int32 context size, vocabulary size, number of contexts; int32 tokens, all of them; then a record
for each scored token, that is for the second half of each context: float32 step, float32 lowest log-probability, uint16
codes (one more if the vocabulary is odd). log-probability = step * code + lowest.

llama.cpp raises what lies more than 16 nats below a row's largest to that, and of 128k classes nearly all do: taken as
they stand they have a percent of the probability instead of next to none, and a divergence that counts them can be a
hundred times the true one. llama.cpp leaves them out of its sums, and takes the normalizer to be what it was. So do we:
they are read as -inf, all but the token that the row is scored by, and the rows are `normalized` as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from gpuxent.evaluation.sources._base import FileStamp, InFile, Window, reading
from gpuxent.evaluation.sources._mapped import map_bytes

MAGIC = b"_logits_"
HEADER_BYTES = len(MAGIC) + 3 * 4
CUT_AT = (16, 24)  # nats below the largest of a row: by llama.cpp, and by ik_llama.cpp
MEMBERS = ("logits", "labels", "contexts", "tokens")


@dataclass(frozen=True)
class KldLayout:
    """Sizes, in Python's integers: 16k tokens of context times 131k classes no longer fit 32 bits."""

    context: int
    vocab: int
    contexts: int

    @property
    def skipped(self) -> int:
        """Tokens at the start of a context whose successors are not scored."""
        return self.context // 2

    @property
    def scored(self) -> int:
        """Rows of a context; the last token has no successor."""
        return self.context - 1 - self.skipped

    @property
    def rows(self) -> int:
        return self.contexts * self.scored

    @property
    def record(self) -> int:
        """uint16 of a row."""
        return 4 + 2 * ((self.vocab + 1) // 2)

    @property
    def records_at(self) -> int:
        return HEADER_BYTES + 4 * self.contexts * self.context

    @property
    def file_size(self) -> int:
        return self.records_at + 2 * self.rows * self.record


@dataclass(frozen=True)
class KldLogits(InFile):
    """Log-probabilities, float32 of shape (rows, vocab)."""

    name: str
    stamp: FileStamp
    layout: KldLayout
    row_chunk: int = 1
    format: ClassVar[str] = ".kld"
    normalized: ClassVar[bool] = True  # log-probabilities, of which some were cut off

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.layout.rows, self.layout.vocab)

    def read(self, rows: slice, columns: slice | None = None) -> np.ndarray:
        window = Window.of(self.shape, rows, columns)
        with reading(self.name, window, self.stamp.check):
            return window.gather(lambda place: self._decode(*place))

    def _decode(self, rows: slice, columns: slice) -> np.ndarray:
        layout, count = self.layout, rows.stop - rows.start
        start = layout.records_at + 2 * rows.start * layout.record
        records = map_bytes(self.stamp.path, start, 2 * count * layout.record).view("<u2").reshape(count, layout.record)
        steps, lowest = records[:, :4].copy().view("<f4").T
        codes = records[:, 4 : 4 + layout.vocab]
        scored = KldTokens(self.name, self.stamp, layout, "labels").read(rows)
        block = np.empty(codes[:, columns].shape, np.float32)
        for row in range(count):  # in float32, as llama.cpp does; a row at a time stays in the cache
            np.multiply(codes[row, columns], steps[row], out=block[row], dtype=np.float32)
            block[row] += lowest[row]
            if any(abs(65535 * float(steps[row]) - nats) < 1e-3 for nats in CUT_AT):
                cut = codes[row] == 0
                cut[scored[row]] = False
                block[row, cut[columns]] = -np.inf
        return block

    def warnings(self) -> list[str]:
        """The writer's rounding is no error of ours, but no reader should take the last digits for the model's."""
        return [
            f"{self.name}: log-probabilities were rounded to steps of up to 0.00024 nats and cut off 16 nats below the "
            "largest (24 by ik_llama.cpp) when they were written; what was cut off counts as probability 0"
        ]


@dataclass(frozen=True)
class KldTokens(InFile):
    """What belongs to the rows, the token that each predicts or the number of its context; or the contexts' tokens."""

    name: str
    stamp: FileStamp
    layout: KldLayout
    member: str
    row_chunk: int = 1
    format: ClassVar[str] = ".kld"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        layout = self.layout
        return (layout.contexts, layout.context) if self.member == "tokens" else (layout.rows,)

    def read(self, rows: slice, columns: slice | None = None) -> np.ndarray:
        if columns is not None:
            raise ValueError(f"{self.name} has no columns")
        window, layout = Window.of(self.shape, rows, None), self.layout
        if self.member == "tokens":
            with reading(self.name, window, self.stamp.check):
                place = HEADER_BYTES + 4 * window.first, 4 * len(window)
                return map_bytes(self.stamp.path, *place).view("<i4").astype(np.int32)
        first, stop = window.first // layout.scored, math.ceil(window.stop / layout.scored)  # contexts
        with reading(self.name, window, self.stamp.check):
            if self.member == "contexts":
                values = np.repeat(np.arange(first, stop, dtype=np.int32), layout.scored)
            else:
                size = 4 * layout.context
                tokens = map_bytes(self.stamp.path, HEADER_BYTES + first * size, (stop - first) * size).view("<i4")
                values = tokens.reshape(stop - first, layout.context)[:, layout.skipped + 1 :].reshape(-1)
        start = window.first - first * layout.scored
        return values[start : start + len(window)].astype(np.int32)  # a copy: little of what was mapped


def open_kld(path: Path, member: str | None = None) -> KldLogits | KldTokens:
    """The log-probabilities, or ::labels, or ::contexts, or ::tokens."""
    name = str(path) if member is None else f"{path}::{member}"
    if member not in (None, *MEMBERS):
        raise ValueError(f"{path} has no {member!r}; it has {', '.join(MEMBERS)}")
    stamp = FileStamp.of(path)
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise ValueError(f"{path} is not a .kld file: it should begin with {MAGIC.decode()} and three sizes")
    layout = KldLayout(*(int(number) for number in np.frombuffer(header, "<i4", 3, len(MAGIC))))
    sizes = f"{layout.contexts:,} contexts of {layout.context:,} tokens and {layout.vocab:,} classes"
    if layout.context < 3 or layout.vocab < 1 or layout.contexts < 0:
        raise ValueError(f"{path} is not a .kld file: its header says {sizes}")
    if stamp.size != layout.file_size:
        raise ValueError(f"{path} has {stamp.size:,} bytes, expected {layout.file_size:,} for {sizes}")
    if member in (None, "logits"):
        return KldLogits(name, stamp, layout)
    return KldTokens(name, stamp, layout, member or "")
