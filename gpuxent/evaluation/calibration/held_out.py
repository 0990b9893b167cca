"""A data set in two parts, one to fit to and one to check on: whole documents, wherever their rows are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuxent._records import IGNORED
from gpuxent.evaluation.job import Job, Labelled


@dataclass(frozen=True)
class PartJob(Job):
    """A job in which the documents of one part count, or the rows, where there are no documents."""

    held_out: bool | None = None  # which part; None: both
    share: float = 0.0  # of documents that are held out, about
    seed: int = 0

    def labelled(self, first: int, stop: int) -> Labelled:
        found = super().labelled(first, stop)
        if self.held_out is None:
            return found
        names = np.arange(first, stop) if found.documents is None else found.documents
        inside = drawn(names, self.share, self.seed) == self.held_out
        return replace(found, classes=np.where(inside, found.classes, IGNORED))


def drawn(names: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Whether each is in a random sample: by its name alone, so that no list of names is needed (SplitMix64, Steele et
    al. 2014, OOPSLA)."""
    with np.errstate(over="ignore"):
        z = names.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def check_losses(sums: Any, purpose: str, hint: str = "") -> None:
    """ValueError if no row counts, or if one has a loss that is not finite and that no fit could mend."""
    if sums.scored == 0:
        raise ValueError(f"no row to {purpose}: of {sums.ignored:,} rows none counts")
    for bad, what, why in ((sums.nan, "NaN", hint), (sums.infinite, "infinity", "")):
        if bad.count:
            which = f"{bad.count:,} of {sums.scored:,} rows have a loss of {what}, first row {bad.first:,}"
            raise ValueError(f"logits must give every label a probability above 0: {which}{why}")
