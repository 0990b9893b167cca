"""torchmetrics' Perplexity takes the softmax and then its logarithm. `python -m bench.failures.softmax_then_log`"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

import gpuxent
from bench.failures import frame, rivals, truth
from bench.failures.frame import FLOAT32, Failure, Line

LABELS = np.array([1, 1])


def lines(quick: bool) -> Iterator[Line]:
    for dtype, gap in ((np.float32, 120), (np.float16, 20)):
        logits = np.array(
            [[gap, 0, 0], [0, 0, 0]], dtype
        )  # a token whose label is far behind, and one that knows nothing
        yield Line(
            f"perplexity, {dtype.__name__}, one gap of {gap}",
            "torchmetrics Perplexity",
            frame.rival(lambda logits=logits: rivals.torchmetrics_perplexity(logits, LABELS)),
            frame.outcome(lambda logits=logits: gpuxent.perplexity(logits, LABELS)),
            math.exp(truth.mean(truth.losses(logits, LABELS.tolist()))),
            within=60 * FLOAT32,  # the mean loss is about 60, and exp multiplies its relative error by it
        )


FAILURE = Failure(
    "softmax_then_log",
    "A probability that underflows to 0 has an infinite logarithm; logits over their log-sum-exp do not underflow.",
    lines,
)

if __name__ == "__main__":
    raise SystemExit(frame.main(FAILURE))
