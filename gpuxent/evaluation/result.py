"""The statistics of a data set."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class CalibrationBin:
    """Rows whose top probability lies in (lower, upper]: how many, how often the top class was right, their mean
    p_max."""

    lower: float
    upper: float
    count: int
    accuracy: float
    confidence: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns. Means are over the scored tokens; NaN if there are none.

    cross_entropy and entropy (of the model's distribution) are in nats per token; perplexity is exp(cross_entropy),
    inf if that overflows; stderr is that of the cross-entropy, tokens taken as independent. accuracy,
    topk_accuracy[k] and ece (the expected calibration error of the top class, from `bins`) are shares from 0 to 1. Of
    equally probable classes the first counts. Rows whose loss is NaN or infinite are among the scored ones;
    first_*_row are their numbers, leading axes flattened.
    """

    cross_entropy: float
    perplexity: float
    bits_per_token: float
    stderr: float
    scored: int
    ignored: int
    accuracy: float
    topk_accuracy: dict[int, float]
    entropy: float
    ece: float
    nan_rows: int
    first_nan_row: int | None
    infinite_rows: int
    first_infinite_row: int | None
    bins: tuple[CalibrationBin, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite (the counts of NaN and infinite rows tell why), top-k as
        top5_accuracy."""
        data: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "topk_accuracy":
                data |= {f"top{k}_accuracy": share for k, share in value.items() if k != 1}
            else:
                data[name] = value
        return _finite(data) | {"bins": [_finite(b) for b in data["bins"]]}


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in data.items()
    }
