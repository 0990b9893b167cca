"""The contenders on a GPU, in the order in which tables list them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cupy
import numpy as np

from bench import ours, torch_rivals
from bench.cases import OURS, OURS_KERNEL
from bench.contenders import Contenders, Prepared, Refused, both, mean_and_gradient, mean_and_rows, normalizer
from bench.ours import mean_loss, mean_weights, row_losses
from bench.problems import Answer, Problem
from gpuxent.backends import backend_of

CONTENDERS = Contenders()
CONTENDERS.include(ours.contenders(OURS, check_labels=False))  # the check is what would make the host wait


# ---- gpuxent's kernels ----


@CONTENDERS.add(OURS_KERNEL, "loss")
def row_stats(problem: Problem) -> Prepared:
    """The backend's function alone: what the device has to do for a loss, but for the mean of the rows."""
    call = partial(backend_of(problem.logits).row_stats, problem.logits, problem.labels)

    def answer() -> Answer:
        losses = row_losses(call())
        return Answer(float(np.mean(losses)), rows=losses[problem.sample])

    return Prepared(call, answer)


@CONTENDERS.add(OURS_KERNEL, "grad", "inplace")
def row_stats_and_grad(problem: Problem) -> Prepared:
    in_place = problem.case.task == "inplace"
    logits = problem.scratch if in_place else problem.logits
    run = backend_of(logits).row_stats_and_grad
    call = partial(run, logits, problem.labels, mean_weights(problem), out=logits if in_place else None)

    def mean_first() -> tuple[Any, Any]:
        stats, dlogits = call()
        return mean_loss(stats), dlogits

    if not in_place:
        return Prepared(call, mean_and_gradient(mean_first, problem.sample).answer)
    answer = mean_and_gradient(mean_first, problem.sample, problem.restore_scratch).answer
    return Prepared(call, answer, problem.restore_scratch)


CONTENDERS.include(torch_rivals.TORCH)


# ---- Liger ----


@CONTENDERS.add("liger", "loss", "grad", "inplace", "separate")
def liger(problem: Problem) -> Prepared:
    """It writes the gradient over the logits, whatever is asked for; so it gets logits that it may spoil."""
    import torch
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    logits, labels = torch_rivals.tensor(problem.scratch), torch_rivals.tensor(problem.labels)

    def loss() -> Any:
        found = LigerCrossEntropyFunction.apply(logits, labels, None)
        return found[0] if isinstance(found, tuple) else found

    if problem.case.task == "loss":
        before, sample = problem.restore_scratch, problem.sample

        def rows() -> Any:
            before()
            some = logits[sample], labels[sample], None, -100, 0.0, 0.0, "none"
            found = LigerCrossEntropyFunction.apply(*some)
            return found[0] if isinstance(found, tuple) else found

        found = mean_and_rows(loss, rows)
        return Prepared(found.call, found.answer, before)
    logits.requires_grad_()

    def call() -> tuple[Any, Any]:
        mean = loss()
        return mean.detach(), torch.autograd.grad(mean, logits)[0]

    return mean_and_gradient(call, problem.sample, problem.restore_scratch)


# ---- what CuPy offers ----


@CONTENDERS.add("cupy", "loss")
def cupy_loss(problem: Problem) -> Prepared:
    """Composed of array functions, in float32: max, exp, sum, log, gather."""

    def call() -> tuple[Any, Any]:
        x = _float32(problem)
        losses = _log_sum_exp(x)[:, 0] - _at_labels(x, problem.labels)
        return losses.mean(), losses

    return both(call, problem.sample)


@CONTENDERS.add("cupy", "grad", "inplace", "separate")
def cupy_gradient(problem: Problem) -> Prepared:
    rows = cupy.arange(problem.case.rows)

    def call() -> tuple[Any, Any]:
        x = _float32(problem)
        lse = _log_sum_exp(x)
        mean = (lse[:, 0] - _at_labels(x, problem.labels)).mean()
        gradient = cupy.exp(x - lse)
        gradient[rows, problem.labels] -= 1
        gradient /= problem.case.rows
        return mean, gradient.astype(problem.logits.dtype)

    return mean_and_gradient(call, problem.sample)


@CONTENDERS.add("cupyx", "loss")
def cupyx_loss(problem: Problem) -> Prepared:
    """cupyx.scipy.special.log_softmax and a gather, in the logits' own dtype."""
    log_softmax = _special("log_softmax", problem)

    def call() -> tuple[Any, Any]:
        losses = -_at_labels(log_softmax(problem.logits, axis=1), problem.labels)
        return losses.mean(), losses

    return both(call, problem.sample)


@CONTENDERS.add("cupyx", "logsumexp", "softmax")
def cupyx_normalizer(problem: Problem) -> Prepared:
    return normalizer(partial(_special(problem.case.task, problem), problem.logits, axis=1), problem)


def _special(name: str, problem: Problem) -> Callable[..., Any]:
    import cupyx.scipy.special

    if problem.case.dtype == "bf16":
        raise Refused("does not take bfloat16")
    return getattr(cupyx.scipy.special, name)


def _float32(problem: Problem) -> Any:
    return problem.logits.astype(np.float32, copy=False)


def _log_sum_exp(x: Any) -> Any:
    top = x.max(axis=1, keepdims=True)
    return cupy.log(cupy.exp(x - top).sum(axis=1, keepdims=True)) + top


def _at_labels(x: Any, labels: Any) -> Any:
    return cupy.take_along_axis(x, labels[:, None], axis=1)[:, 0]
