"""PyTorch as a contender: eager and compiled, on NumPy's and CuPy's arrays, without a copy."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from bench.contenders import Contenders, Prepared, both, mean_and_gradient, mean_and_rows, normalizer
from bench.machine import CORES
from bench.problems import Problem

TORCH = Contenders()
COMPILED = ("torch compiled", "torch lse-gather compiled")


def tensor(array: Any) -> Any:
    """bfloat16 goes through integers of 16 bits: PyTorch knows no ml_dtypes."""
    import torch

    given = array.view(np.int16) if array.dtype.name == "bfloat16" else array
    if isinstance(array, np.ndarray):
        torch.set_num_threads(CORES)
        made = torch.from_numpy(given)
    else:
        made = torch.from_dlpack(given)
    return made.view(torch.bfloat16) if given is not array else made


def data(problem: Problem) -> tuple[Any, Any]:
    return tensor(problem.logits), tensor(problem.labels)


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """Made once: PyTorch compiles a function object, and again for another of the same text."""
    import torch
    import torch.nn.functional as F

    def lse_gather(logits: Any, labels: Any) -> Any:
        """Row losses as some write them in PyTorch to have no N x V matrix of log-probabilities."""
        return logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]

    def with_mean(row_losses: Callable[..., Any]) -> Callable[..., Any]:
        def mean_and_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
            losses = row_losses(logits, labels)
            return losses.mean(), losses

        return mean_and_losses

    return {
        "loss": F.cross_entropy,
        "binary": F.binary_cross_entropy_with_logits,
        "lse-gather": lse_gather,
        "mean, losses": with_mean(partial(F.cross_entropy, reduction="none")),
        "mean, lse-gather": with_mean(lse_gather),
        "mean": lambda logits, labels: F.cross_entropy(logits, labels),
        "binary mean": lambda x, y: F.binary_cross_entropy_with_logits(x, y),
        "binary rows": lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none"),
        "logsumexp": lambda x: torch.logsumexp(x, dim=1),
        "softmax": lambda x: torch.softmax(x, dim=1),
    }


@cache
def compiled(name: str) -> Callable[..., Any]:
    import torch
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no helper processes that run on while others are timed
    return torch.compile(functions()[name], dynamic=False)


def forget_compiled() -> None:
    """Drop what was compiled for the last case: torch.compile gives up after some shapes, and all take memory."""
    compiled.cache_clear()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


# ---- losses ----


@TORCH.add("torch", "loss", "soft", "binary")
def eager(problem: Problem) -> Prepared:
    loss = functions()["binary" if problem.case.task == "binary" else "loss"]
    (logits, labels), sample = data(problem), problem.sample
    return mean_and_rows(lambda: loss(logits, labels), lambda: loss(logits[sample], labels[sample], reduction="none"))


@TORCH.add("torch", "pairs")
def js_divergence(problem: Problem) -> Prepared:
    """Composed, in float32, and of the divergences this one alone."""
    import torch

    def rows(p: Any, q: Any) -> Any:
        p, q = (torch.log_softmax(x.float(), dim=1) for x in (p, q))
        middle = torch.logaddexp(p, q) - math.log(2)
        return sum((x.exp() * (x - middle)).sum(dim=1) for x in (p, q)) / 2

    (logits, other), sample = data(problem), problem.sample
    return mean_and_rows(lambda: rows(logits, other).mean(), lambda: rows(logits[sample], other[sample]))


@TORCH.add("torch lse-gather", "loss")
def lse_gather(problem: Problem) -> Prepared:
    losses = functions()["lse-gather"]
    (logits, labels), sample = data(problem), problem.sample
    return mean_and_rows(lambda: losses(logits, labels).mean(), lambda: losses(logits[sample], labels[sample]))


@TORCH.add("torch compiled", "loss", "soft")
def compiled_loss(problem: Problem) -> Prepared:
    return both(partial(compiled("mean, losses"), *data(problem)), problem.sample)


@TORCH.add("torch compiled", "binary")
def compiled_binary_loss(problem: Problem) -> Prepared:
    """Compiled twice: losses of all elements, beside their mean, would be a third array to write."""
    (logits, labels), sample = data(problem), problem.sample
    some = logits[sample], labels[sample]
    return mean_and_rows(partial(compiled("binary mean"), logits, labels), partial(compiled("binary rows"), *some))


@TORCH.add("torch lse-gather compiled", "loss")
def compiled_lse_gather(problem: Problem) -> Prepared:
    return both(partial(compiled("mean, lse-gather"), *data(problem)), problem.sample)


# ---- gradients ----


@TORCH.add("torch", "grad", "inplace", "separate")
def forward_backward(problem: Problem) -> Prepared:
    return gradient(problem, functions()["mean"])


@TORCH.add("torch compiled", "grad", "inplace", "separate")
def compiled_forward_backward(problem: Problem) -> Prepared:
    return gradient(problem, compiled("mean"))


def gradient(problem: Problem, loss: Callable[..., Any]) -> Prepared:
    """PyTorch writes its gradient to a new array, also where ours goes over the logits."""
    import torch

    logits, labels = data(problem)
    logits.requires_grad_()

    def call() -> tuple[Any, Any]:
        mean = loss(logits, labels)
        return mean.detach(), torch.autograd.grad(mean, logits)[0]

    return mean_and_gradient(call, problem.sample)


# ---- normalizers ----


@TORCH.add("torch", "logsumexp", "softmax")
def eager_normalizer(problem: Problem) -> Prepared:
    return normalizer(partial(functions()[problem.case.task], tensor(problem.logits)), problem)


@TORCH.add("torch compiled", "logsumexp", "softmax")
def compiled_normalizer(problem: Problem) -> Prepared:
    return normalizer(partial(compiled(problem.case.task), tensor(problem.logits)), problem)
