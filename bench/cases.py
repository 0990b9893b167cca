"""What is measured, and how good it has to be: the only place that names shapes and targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

OURS, OURS_NUMPY = "gpuxent", "gpuxent numpy"  # the default backend, and backend="numpy"

# PyTorch is quick where its N x V temporaries are smaller than this, and slow above: it is glibc's largest mmap
# threshold, below which malloc hands out the same pages again, and above which every call gets fresh ones.
MALLOC_STEP = 32 << 20

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
    "soft": Task("mean cross-entropy, labels are distributions", read=2, written=0),
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


def against_torch(at_least: float, *more: Target) -> tuple[Target, ...]:
    return (Target("torch", at_least), *more)


def share(at_least: float) -> Target:
    return Target("limit", at_least)


CASES = (
    # The headline: a vocabulary of 128k. Targets: section 6 of the design.
    Case("loss", "f32", 1024, 128256, against_torch(9, share(0.70), Target("torch", 1.5, OURS_NUMPY)), headline=True),
    Case("loss", "bf16", 1024, 128256, against_torch(6, share(0.45)), headline=True),
    Case("loss", "f16", 1024, 128256, against_torch(6, share(0.45)), headline=True),
    Case("grad", "f32", 1024, 128256, against_torch(9), headline=True),
    Case("grad", "bf16", 1024, 128256, against_torch(7), headline=True),
    Case("grad", "f16", 1024, 128256, against_torch(7)),
    Case("inplace", "f32", 1024, 128256, against_torch(9, share(0.75)), headline=True),
    Case("inplace", "bf16", 1024, 128256, against_torch(7)),
    # Few rows: what a call costs, and whether a single row uses all cores.
    Case("loss", "f32", 1, 128256, against_torch(1.1), headline=True),
    Case("loss", "f32", 2, 128256, against_torch(1.1)),
    Case("loss", "f32", 4, 128256, against_torch(1.1)),
    Case("loss", "f32", 8, 128256, against_torch(1.1)),
    Case("loss", "bf16", 8, 128256),
    Case("grad", "f32", 8, 128256),
    # On both sides of MALLOC_STEP.
    Case("loss", "f32", 64, 128256),
    Case("loss", "f32", 72, 128256),
    # Small vocabularies: the work per row counts.
    Case("loss", "f32", 8192, 256),
    Case("loss", "f32", 8192, 1000, against_torch(1.3), headline=True),
    Case("loss", "f32", 32768, 1024, against_torch(4), headline=True),
    Case("loss", "bf16", 32768, 1024),
    Case("grad", "f32", 8192, 1000),
    Case("loss", "f32", 8192, 4096),
    # Other vocabularies: Llama 2, GPT-2 (odd: rows are not aligned), Gemma.
    Case("loss", "f32", 2048, 32000),
    Case("loss", "bf16", 8192, 32000),
    Case("loss", "f32", 1024, 50257),
    Case("grad", "bf16", 1024, 50257),
    Case("loss", "f32", 256, 262144),
    Case("loss", "bf16", 512, 262144),
    # Other work.
    Case("soft", "f32", 256, 128256, headline=True),
    Case("soft", "bf16", 1024, 32000),
    Case("binary", "f32", 8192, 1000),
    Case("binary", "f32", 4096, 8192, headline=True),
    Case("logsumexp", "f32", 256, 128256),
    Case("logsumexp", "bf16", 1024, 32000),
    Case("softmax", "f32", 256, 128256, headline=True),
    Case("softmax", "bf16", 1024, 32000),
)

# Every task and dtype once, at sizes that say whether all is well, not how fast it is.
QUICK = (
    Case("loss", "f32", 64, 32000),
    Case("loss", "f16", 64, 32000),
    Case("grad", "bf16", 64, 32000),
    Case("inplace", "f32", 64, 32000),
    Case("soft", "f32", 64, 32000),
    Case("binary", "f32", 2048, 1000),
    Case("logsumexp", "f32", 64, 32000),
    Case("softmax", "f32", 64, 32000),
)


def select(patterns: Iterable[str], among: tuple[Case, ...] = CASES) -> list[Case]:
    """The cases that a name or a glob ("loss-*", "*x128256") picks, in their own order; all, if there is no pattern.

    ValueError: a pattern that picks none.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in among):
            close = get_close_matches(pattern, [case.name for case in among], n=3)
            hint = f"; close to it: {', '.join(close)}" if close else "; --list shows them all"
            raise ValueError(f"no case is named {pattern!r}{hint}")
    return [case for case in among if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)]
