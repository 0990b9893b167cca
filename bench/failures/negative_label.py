"""A label of -1 is scored as the last class. `python -m bench.failures.negative_label`"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import gpuxent
from bench.failures import frame, rivals
from bench.failures.frame import Call, Failure, Line, Raised

LOGITS = np.log(np.array([[0.2, 0.3, 0.5], [0.1, 0.2, 0.7]]))
LABELS = np.array([2, -1])
NO_SUCH_CLASS = Raised("IndexError", "labels[1] is -1")


def gathered() -> float:
    """What many a script does."""
    probs = np.exp(LOGITS)
    return np.exp(-np.log(np.take_along_axis(probs, LABELS[:, None], axis=1)).mean())


def diagonal() -> float:
    """The line of torcheval's Perplexity, `probs[:, target].diagonal()`."""
    return np.exp(-np.log(np.exp(LOGITS)[:, LABELS].diagonal()).mean())


THEIRS: dict[str, Call] = {
    "torchmetrics Perplexity": lambda: rivals.torchmetrics_perplexity(LOGITS, LABELS),
    "NumPy take_along_axis": gathered,
    "torcheval's probs[:, y].diagonal()": diagonal,
}


def lines(quick: bool) -> Iterator[Line]:
    own = frame.outcome(lambda: gpuxent.perplexity(LOGITS, LABELS))
    for name, call in THEIRS.items():
        yield Line("perplexity, labels (2, -1)", name, frame.rival(call), own, NO_SUCH_CLASS)


FAILURE = Failure("negative_label", "An index of -1 is the last; a label of -1 is a mistake, often padding.", lines)

if __name__ == "__main__":
    raise SystemExit(frame.main(FAILURE))
