"""What a case is: a task, a shape, and how good we have to be at it. The cases of each device lie in its folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

# The default backend for the array; backend="numpy"; and on a GPU the backend's function alone, without the checks of
# arguments before it and the sums after it.
OURS, OURS_NUMPY, OURS_KERNEL = "gpuxent", "gpuxent numpy", "gpuxent kernel"
OWN = (OURS, OURS_NUMPY, OURS_KERNEL)

LIMIT = "limit"
COPY = "device copy"  # of the case's bytes, also where the task only reads

ITEMSIZE = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass(frozen=True)
class Task:
    """`read` and `written` count arrays of the logits' size: the traffic that no implementation can avoid."""

    what: str
    read: int
    written: int

    @property
    def limit(self) -> str:
        return "copy" if self.written else "read"


TASKS = {
    "loss": Task("mean cross-entropy, labels are classes", read=1, written=0),
    "grad": Task("mean cross-entropy and its gradient, in a new array", read=1, written=1),
    "inplace": Task("the same, the gradient written over the logits", read=1, written=1),
    "separate": Task("row statistics, then the gradient from them, in two calls", read=2, written=1),
    "soft": Task("mean cross-entropy, labels are distributions", read=2, written=0),
    "pairs": Task("statistics and divergences of two models' logits", read=2, written=0),
    "binary": Task("mean binary cross-entropy of independent labels", read=2, written=0),
    "logsumexp": Task("log-sum-exp of every row", read=1, written=0),
    "softmax": Task("softmax of every row, in a new array", read=1, written=1),
}


@dataclass(frozen=True)
class Target:
    """`ours` is to be this many times as fast as the contender `against`, or to reach this share of the "limit"."""

    against: str
    at_least: float
    ours: str = OURS


@dataclass(frozen=True)
class Case:
    task: str
    dtype: str
    rows: int
    vocab: int
    targets: tuple[Target, ...] = ()
    headline: bool = False  # has a row in the README's table
    compiling: bool = True  # rivals that compile for every shape, which takes seconds, take part

    @property
    def name(self) -> str:
        return f"{self.task}-{self.dtype}-{self.rows}x{self.vocab}"

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * ITEMSIZE[self.dtype]

    @property
    def traffic(self) -> int:
        """Bytes that have to be read and written. Class labels and row results, a few bytes per row, are left out."""
        return (TASKS[self.task].read + TASKS[self.task].written) * self.logits_bytes


def share(at_least: float) -> Target:
    return Target(LIMIT, at_least)


def select(patterns: Iterable[str], among: Iterable[Case]) -> list[Case]:
    """The cases that a name or a glob ("loss-*", "*x128256") picks, in their own order; all, if there is no pattern.

    ValueError: a pattern that picks none.
    """
    patterns, among = list(patterns), list(among)
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in among):
            close = get_close_matches(pattern, [case.name for case in among], n=3)
            hint = f"; close to it: {', '.join(close)}" if close else "; --list shows them all"
            raise ValueError(f"no case is named {pattern!r}{hint}")
    return [case for case in among if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)]
