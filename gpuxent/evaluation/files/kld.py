"""`.kld` files of llama.cpp, written as `llama-perplexity --save-all-logits` does; the layout is in `sources.kld`.

The numbers are llama.cpp's, in its order of float32 operations: of a row the logits are cut off 16 below the largest,
what is left of their range is divided into 65535 steps, and the normalizer goes into the lowest log-probability. Only
the exponentials are taken in float64 and not in float32, so the last bit of that number may be another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from gpuxent.evaluation.files.writers import Layout
from gpuxent.evaluation.sources import Source
from gpuxent.evaluation.sources.kld import MAGIC, KldLayout

RANGE, STEPS = np.float32(16), np.float32(65535)  # nats that are kept, in so many steps
SMALLEST = np.finfo(np.float32).tiny  # step; of a smaller one there is no inverse, and every logit is the same
AT_ONCE = 2**20  # logits, and tokens: their temporary arrays stay in the cache


def sizes_of(layout: Layout, tokens: Source) -> KldLayout:
    windows, context = tokens.shape
    return KldLayout(context, layout.shape[-1], windows)


def check_windows(layout: Layout, tokens: Source | None, name: str) -> None:
    """ValueError: logits and windows of tokens that do not belong together, or that the format does not hold."""
    if not layout.has_columns:
        found = f"{layout.dtype} of shape {layout.shape}"
        raise ValueError(f"a .kld file holds logits (rows, vocab) of floats, and {name} has {found}")
    if tokens is None:
        raise ValueError("--tokens must be given: a .kld file holds the windows of tokens that the logits are of")
    if tokens.dtype.kind not in "iu" or len(tokens.shape) != 2 or tokens.shape[1] < 3:
        found = f"{tokens.dtype} of shape {tokens.shape}"
        raise ValueError(f"--tokens ({tokens.name}) must be integers of shape (windows, n_ctx), got {found}")
    sizes, rows = sizes_of(layout, tokens), math.prod(layout.lead)
    if rows != sizes.rows:
        each, rest = divmod(rows, max(sizes.contexts, 1))
        hint = f"; so many are of windows of {2 * each + 1:,} or {2 * each + 2:,} tokens" if each and not rest else ""
        raise ValueError(
            f"{name} must have {sizes.rows:,} rows for {sizes.contexts:,} windows of {sizes.context:,} tokens, of each "
            f"those that predict its tokens {sizes.skipped + 1:,} to {sizes.context - 1:,}, got {rows:,}{hint}"
        )


class KldWriter:
    """The header and all tokens, then a record for each row."""

    has_chunks: ClassVar[bool] = False
    has_names: ClassVar[bool] = False

    def __init__(self, path: Path, layout: Layout, tokens: Source) -> None:
        self.layout, self.sizes = layout, sizes_of(layout, tokens)
        self.cut_off, self.largest_step = 0, 0.0
        header = np.array([self.sizes.context, self.sizes.vocab, self.sizes.contexts], "<i4")
        self.file = path.open("xb")
        try:
            self.file.write(MAGIC + header.tobytes())
            for block in self._tokens(tokens):
                self.file.write(block.astype("<i4").tobytes())
        except BaseException:
            self.file.close()
            raise

    def _tokens(self, tokens: Source) -> Iterator[np.ndarray]:
        count = self.sizes.contexts * self.sizes.context
        for first in range(0, count, AT_ONCE):
            block = tokens.read(slice(first, min(first + AT_ONCE, count)))
            bad = np.flatnonzero((block < 0) | (block >= self.sizes.vocab))
            if bad.size:
                at = divmod(first + int(bad[0]), self.sizes.context)
                raise ValueError(
                    f"--tokens[{at[0]}, {at[1]}] is {block[bad[0]]}, expected a class in [0, {self.sizes.vocab}) "
                    f"(in {tokens.name})"
                )
            yield block

    def blocks(self) -> Iterator[tuple[int, int]]:
        return self.layout.boxes(self.layout.chunk)

    def write(self, first: int, block: np.ndarray) -> None:
        rows = max(1, AT_ONCE // self.sizes.vocab)
        for start in range(0, len(block), rows):
            with np.errstate(over="ignore"):  # of float64: infinite, and refused
                logits = block[start : start + rows].astype(np.float32)
            self._check(first + start, logits)
            self.file.write(self._records(logits).tobytes())

    def _check(self, first: int, logits: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(logits.max(axis=1)))
        if bad.size:
            raise ValueError(
                f"row {first + int(bad[0]):,} of the logits has one that is NaN or infinite, or none that is not: "
                "a .kld file cannot hold it"
            )

    def _records(self, logits: np.ndarray) -> np.ndarray:
        top = logits.max(axis=1, keepdims=True)
        floor = np.maximum(logits.min(axis=1, keepdims=True), top - RANGE)
        total = np.exp((logits - top).astype(np.float64)).sum(axis=1, keepdims=True)
        step = (top - floor) / STEPS
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > SMALLEST)
        records = np.zeros((len(logits), self.sizes.record), "<u2")
        head = np.concatenate([step, floor - top - np.log(total).astype(np.float32)], axis=1)
        records[:, :4] = head.astype("<f4").view("<u2")
        records[:, 4 : 4 + self.sizes.vocab] = np.rint(inverse * (np.maximum(logits, floor) - floor))
        self.cut_off += int(np.count_nonzero(logits < floor))
        self.largest_step = max(self.largest_step, float(step.max(initial=0)))
        return records

    @property
    def note(self) -> str:
        """What the format has lost."""
        share = self.cut_off / max(1, self.sizes.rows * self.sizes.vocab)
        rounded = f"rounded by up to {self.largest_step / 2:.1g} nats"
        raised = f"{100 * share:.3g} % of them raised to 16 below their row's largest"
        windows = f"{self.sizes.contexts:,} windows of {self.sizes.context:,} tokens"
        return f"{windows}, log-probabilities in 16 bits: {rounded}, {raised}"

    def close(self) -> None:
        self.file.close()
