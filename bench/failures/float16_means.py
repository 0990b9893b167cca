"""Means and sums of losses in 16 bits. `python -m bench.failures.float16_means`"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import ml_dtypes
import numpy as np

import gpuxent
from bench.failures import frame, rivals, truth
from bench.failures.frame import FLOAT32, Call, Failure, Line

TOKENS, VOCAB, CHUNK = 200_000, 8, 10_000


@cache
def problem() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(0, 1.5, (TOKENS, VOCAB)).astype(np.float16), random.integers(0, VOCAB, TOKENS)


def torch_losses() -> np.ndarray:
    """float16, as the logits."""
    return rivals.torch_cross_entropy(*problem(), reduction="none").numpy()


def dask_mean() -> float:
    import dask.array as da

    return da.from_array(torch_losses(), chunks=CHUNK).mean().compute()


MEANS: dict[str, Call] = {
    "PyTorch F.cross_entropy": lambda: rivals.torch_cross_entropy(*problem(), reduction="mean"),
    "PyTorch, then Dask's mean": dask_mean,
    "PyTorch, then NumPy's sum / n": lambda: float(torch_losses().sum()) / TOKENS,
    "PyTorch, then NumPy's bfloat16 mean": lambda: torch_losses().astype(ml_dtypes.bfloat16).mean(),
}


def lines(quick: bool) -> Iterator[Line]:
    logits, labels = problem()
    exact = truth.mean(truth.losses(logits, labels.tolist()))
    own = frame.outcome(lambda: gpuxent.cross_entropy(logits, labels))
    for name, call in MEANS.items():
        yield Line(f"mean loss, {TOKENS:,} tokens", name, frame.rival(call), own, exact, FLOAT32)
    yield Line(
        "perplexity",
        "torchmetrics Perplexity",
        frame.rival(lambda: rivals.torchmetrics_perplexity(logits, labels)),
        frame.outcome(lambda: gpuxent.perplexity(logits, labels)),
        math.exp(exact),
        exact * FLOAT32,  # exp multiplies the relative error of its argument by the argument
    )


FAILURE = Failure(
    "float16_means",
    "float16 ends at 65504 and bfloat16 has 8 bits; logits in 16 bits say nothing about how to sum losses.",
    lines,
)

if __name__ == "__main__":
    raise SystemExit(frame.main(FAILURE))
