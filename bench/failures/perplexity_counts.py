"""torchmetrics' Perplexity sums and counts in float32. `python -m bench.failures.perplexity_counts`

The same 1000 tokens are fed again and again, so the perplexity has to stay what it is after the first time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

import gpuxent
from bench.failures import frame, truth
from bench.failures.frame import Failure, Line

if TYPE_CHECKING:
    from torchmetrics.text import Perplexity

BATCHES, BATCH, VOCAB = 300_000, 1000, 8
COMPARED = 500  # batches


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Logits in float64, so that nothing but the counting can go wrong."""
    random = np.random.default_rng(0)
    return random.normal(0, 2, (BATCH, VOCAB)), random.integers(0, VOCAB, BATCH)


# ---- theirs ----


def updated(batches: int) -> Perplexity:
    """The metric after as many calls of its own `update`."""
    import torch
    from torchmetrics.text import Perplexity

    logits, labels = (torch.from_numpy(array)[None] for array in batch())
    metric, threads = Perplexity(), torch.get_num_threads()
    torch.set_num_threads(1)  # which wait for each other longer than they compute
    for _ in range(batches):
        metric.update(logits, labels)
    torch.set_num_threads(threads)
    return metric


def added(batches: int) -> Perplexity:
    """The same, quickly: the lines of `update` that add to the state, with what goes before them, always the same
    here, done once."""
    import torch
    from torchmetrics.functional.text.perplexity import _perplexity_update
    from torchmetrics.text import Perplexity

    total_log_probs, count = _perplexity_update(*(torch.from_numpy(array)[None] for array in batch()))
    metric = Perplexity()
    for _ in range(batches):
        metric.total_log_probs += total_log_probs
        metric.count += count
    metric._update_count = batches  # `compute` warns where it is 0
    return metric


def check_added() -> None:
    """`added` is the metric's own arithmetic: the same bits, where both are run."""
    one, other = (way(COMPARED) for way in (updated, added))
    if (one.total_log_probs, one.count) != (other.total_log_probs, other.count):
        raise RuntimeError(f"after {COMPARED} updates torchmetrics has {one.metric_state}, added {other.metric_state}")


# ---- ours ----


def evaluated(batches: int) -> tuple[float, int]:
    """Perplexity and count of all tokens, each scored; the arrays are views with strides of 0, which take no memory."""
    logits, labels = batch()
    many = np.broadcast_to(logits, (batches, *logits.shape)), np.broadcast_to(labels, (batches, *labels.shape))
    result = gpuxent.evaluate(*many)
    return result.perplexity, result.scored


def merged(batches: int) -> tuple[float, int]:
    """The same, quickly: what one block of a data set leaves behind, merged with itself by doubling."""
    from gpuxent.evaluation.evaluate import open_job

    job = open_job(*batch())
    doubled, total = job.score(0, BATCH).summary, job.identity()
    while batches:
        if batches % 2:
            total = total.merge(doubled)
        doubled, batches = doubled.merge(doubled), batches // 2
    return math.exp(total.totals.mean_loss), total.totals.scored


# ---- both ----


def lines(quick: bool) -> Iterator[Line]:
    if quick and find_spec("torchmetrics"):
        check_added()
    theirs = cache(added if quick else updated)
    own = cache(merged if quick else evaluated)
    logits, labels = batch()
    yield Line(
        f"perplexity, {BATCHES * BATCH:,} tokens",
        "torchmetrics Perplexity",
        frame.rival(lambda: theirs(BATCHES).compute().item()),
        frame.outcome(lambda: own(BATCHES)[0]),
        math.exp(truth.mean(truth.losses(logits, labels.tolist()))),
    )
    yield Line(
        "its count of tokens",
        "torchmetrics Perplexity",
        frame.rival(lambda: theirs(BATCHES).count.item()),
        frame.outcome(lambda: own(BATCHES)[1]),
        float(BATCHES * BATCH),
    )


def note(quick: bool) -> str:
    if quick:
        return (
            "--quick: theirs by adding to the metric's state what its update adds, with its own line; checked against "
            f"{COMPARED:,} of its own updates, bit for bit. Ours by merging what one block leaves behind."
        )
    return f"Theirs by {BATCHES:,} calls of its own update with {BATCH:,} tokens; ours by evaluate, every token scored."


FAILURE = Failure(
    "perplexity_counts", "float32 sums and counts lose what is small beside them; integers lose nothing.", lines, note
)

if __name__ == "__main__":
    raise SystemExit(frame.main(FAILURE))
