"""scikit-learn's log_loss of a label with p = 0 is the dtype's. `python -m bench.failures.clipped_log_loss`"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

import gpuxent
from bench.failures import frame
from bench.failures.frame import Failure, Line

LABELS = np.array([0, 1])


def theirs(probs: np.ndarray) -> float:
    from sklearn.metrics import log_loss

    return log_loss(LABELS, probs)


def lines(quick: bool) -> Iterator[Line]:
    for dtype in (np.float64, np.float32, np.float16):
        probs = np.array([[0.5, 0.5], [1, 0]], dtype)
        yield Line(
            f"mean loss, {dtype.__name__}, one p of 0",
            "scikit-learn log_loss",
            frame.rival(lambda probs=probs: theirs(probs)),
            frame.outcome(lambda probs=probs: gpuxent.cross_entropy_from_probs(probs, LABELS, label_format="index")),
            math.inf,
        )


FAILURE = Failure(
    "clipped_log_loss", "Clipped to the eps of its dtype, the same zero costs 36, 16 or 7 nats; ln 0 is -inf.", lines
)

if __name__ == "__main__":
    raise SystemExit(frame.main(FAILURE))
