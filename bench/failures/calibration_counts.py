"""torchmetrics' CalibrationError sums its bins in float32. `python -m bench.failures.calibration_counts`

Every second sample is a hit and all are predicted with 0.75, so that the error of the one bin is 1/4 however many
there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

import gpuxent
from bench.failures import frame
from bench.failures.frame import Failure, Line

CONFIDENCE, BLOCK = Fraction(3, 4), 1_000_000
SAMPLES, QUICK = 40_000_000, 10_000_000


def labels(samples: int) -> np.ndarray:
    return np.tile(np.array([0, 1], np.int8), samples // 2)


def theirs(samples: int) -> float:
    import torch
    from torchmetrics.classification import MulticlassCalibrationError

    probs = torch.tensor([float(CONFIDENCE), float(1 - CONFIDENCE)]).repeat(BLOCK, 1)
    classes = torch.from_numpy(labels(BLOCK)).long()
    metric = MulticlassCalibrationError(num_classes=2, n_bins=1)
    for _ in range(samples // BLOCK):
        metric.update(probs, classes)
    return metric.compute().item()


def ours(samples: int) -> float:
    row = np.log([float(CONFIDENCE), float(1 - CONFIDENCE)])
    many = np.broadcast_to(row, (samples, 2))  # a view with a stride of 0, which takes no memory
    return gpuxent.evaluate(many, labels(samples), bins=1).ece


def lines(quick: bool) -> Iterator[Line]:
    samples = QUICK if quick else SAMPLES
    hits = int(np.count_nonzero(labels(samples) == 0))
    yield Line(
        f"calibration error, {samples:,} samples",
        "torchmetrics MulticlassCalibrationError",
        frame.rival(lambda: theirs(samples)),
        frame.outcome(lambda: ours(samples)),
        float(abs(Fraction(hits, samples) - CONFIDENCE)),
    )


def note(quick: bool) -> str:
    return f"--quick: {QUICK:,} samples instead of {SAMPLES:,}." if quick else ""


FAILURE = Failure(
    "calibration_counts", "A float32 that has come to 2^24 stays there when 1 is added; integers do not.", lines, note
)

if __name__ == "__main__":
    raise SystemExit(frame.main(FAILURE))
