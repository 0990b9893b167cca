"""The contenders: how gpuxent and each rival do each task on the same data.

A contender is a function that takes a problem, does off the clock what is not part of the work (arrays of its own
kind, compiling), and returns a `Prepared`. What it cannot do it refuses with `Refused`; what is not installed raises
ImportError; both are said once and left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import gpuxent as gx
from bench.cases import OURS, OURS_NUMPY, TASKS
from bench.limits import CORES
from bench.problems import Answer, Problem
from bench.timing import nothing

SCIPY_ELEMENTS = 1 << 25  # scipy.special.logsumexp takes about a second for so many
SKLEARN_ELEMENTS = 1 << 24  # log_loss makes a one-hot int64 matrix, and copies of it


class Refused(Exception):
    """Why a contender does not take part in a case."""


@dataclass(frozen=True)
class Prepared:
    """`call` is what is timed, and blocks until the result is there; `before` comes first, off the clock.

    `answer` calls it, or the same code for single rows, and says what came out.
    """

    call: Callable[[], Any]
    answer: Callable[[], Answer]
    before: Callable[[], None] = nothing


Prepare = Callable[[Problem], Prepared]
CONTENDERS: dict[str, dict[str, Prepare]] = {task: {} for task in TASKS}


def contender(name: str, *tasks: str) -> Callable[[Prepare], Prepare]:
    """Register a function under a name for some tasks. Tables list contenders in the order of this file."""

    def register(prepare: Prepare) -> Prepare:
        for task in tasks:
            CONTENDERS[task][name] = prepare
        return prepare

    return register


# ---- from results to answers ----


def numbers(result: Any) -> np.ndarray:
    """float64 NumPy of an array of any library."""
    return np.asarray(result.detach().double() if hasattr(result, "detach") else result).astype(np.float64)


def mean_and_rows(call: Callable[[], Any], rows: Callable[[], Any]) -> Prepared:
    """The call returns a mean; `rows` computes the losses of the sampled rows."""
    return Prepared(call, lambda: Answer(float(call()), rows=numbers(rows())))


def both(call: Callable[[], tuple[Any, Any]], sample: np.ndarray) -> Prepared:
    """The call returns (mean, losses of all rows)."""

    def answer() -> Answer:
        mean, losses = call()
        return Answer(float(mean), rows=numbers(losses[sample]))

    return Prepared(call, answer)


def mean_and_gradient(
    call: Callable[[], tuple[Any, Any]], sample: np.ndarray, before: Callable[[], None] = nothing
) -> Prepared:
    def answer() -> Answer:
        before()
        mean, gradient = call()
        return Answer(float(mean), entries=numbers(gradient[sample]))

    return Prepared(call, answer, before)


def normalizer(call: Callable[[], Any], problem: Problem) -> Prepared:
    """The call returns an lse per row, or the softmax."""

    def answer() -> Answer:
        found = numbers(call()[problem.sample])
        return Answer(entries=found) if problem.case.task == "softmax" else Answer(rows=found)

    return Prepared(call, answer)


# ---- gpuxent ----


def our_loss(problem: Problem, backend: str | None) -> Prepared:
    loss = gx.binary_cross_entropy if problem.case.task == "binary" else gx.cross_entropy
    run = partial(loss, problem.logits, problem.labels, backend=backend)
    return mean_and_rows(run, lambda: run(reduction="none")[problem.sample])


def our_gradient(problem: Problem, backend: str | None) -> Prepared:
    run = partial(gx.cross_entropy_and_grad, problem.logits, problem.labels, backend=backend)
    return mean_and_gradient(run, problem.sample)


def our_gradient_in_place(problem: Problem, backend: str | None) -> Prepared:
    """Every call finds the logits, not the last gradient: they are put back first, off the clock."""
    logits = problem.scratch
    run = partial(gx.cross_entropy_and_grad, logits, problem.labels, out=logits, backend=backend)
    return mean_and_gradient(run, problem.sample, before=lambda: np.copyto(logits, problem.logits))


def our_normalizer(problem: Problem, backend: str | None) -> Prepared:
    function = {"logsumexp": gx.logsumexp, "softmax": gx.softmax}[problem.case.task]
    return normalizer(partial(function, problem.logits, backend=backend), problem)


for _name, _backend in ((OURS, None), (OURS_NUMPY, "numpy")):
    contender(_name, "loss", "soft", "binary")(partial(our_loss, backend=_backend))
    contender(_name, "grad")(partial(our_gradient, backend=_backend))
    contender(_name, "inplace")(partial(our_gradient_in_place, backend=_backend))
    contender(_name, "logsumexp", "softmax")(partial(our_normalizer, backend=_backend))


# ---- PyTorch ----


def torch_tensor(array: np.ndarray) -> Any:
    """Without a copy. bfloat16 goes through integers of 16 bits: PyTorch knows no ml_dtypes."""
    import torch

    torch.set_num_threads(CORES)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_data(problem: Problem) -> tuple[Any, Any]:
    return torch_tensor(problem.logits), torch_tensor(problem.labels)


def torch_loss(task: str) -> Callable[..., Any]:
    import torch.nn.functional as F

    return F.binary_cross_entropy_with_logits if task == "binary" else F.cross_entropy


def lse_minus_label_logit(logits: Any, labels: Any) -> Any:
    """Row losses as some write them in PyTorch to have no N x V matrix of log-probabilities."""
    return logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]


def torch_compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """The function compiled for the shapes of these arguments, as a call without any."""
    return partial(torch_compile(function), *arguments)


def torch_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no helper processes that run on while others are timed
    return torch.compile(function, dynamic=False)


@contender("torch", "loss", "soft", "binary")
def torch_eager(problem: Problem) -> Prepared:
    loss = torch_loss(problem.case.task)
    (logits, labels), sample = torch_data(problem), problem.sample
    return mean_and_rows(lambda: loss(logits, labels), lambda: loss(logits[sample], labels[sample], reduction="none"))


@contender("torch lse-gather", "loss")
def torch_lse_gather(problem: Problem) -> Prepared:
    (logits, labels), sample = torch_data(problem), problem.sample
    return mean_and_rows(
        lambda: lse_minus_label_logit(logits, labels).mean(),
        lambda: lse_minus_label_logit(logits[sample], labels[sample]),
    )


@contender("torch compiled", "loss", "soft")
def torch_compiled_loss(problem: Problem) -> Prepared:
    def mean_and_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
        losses = torch_loss(problem.case.task)(logits, labels, reduction="none")
        return losses.mean(), losses

    return both(torch_compiled(mean_and_losses, *torch_data(problem)), problem.sample)


@contender("torch compiled", "binary")
def torch_compiled_binary_loss(problem: Problem) -> Prepared:
    """Compiled twice: losses of all elements, beside their mean, would be a third array to write."""
    loss, sample = torch_loss("binary"), problem.sample
    logits, labels = torch_data(problem)
    return mean_and_rows(
        torch_compiled(lambda x, y: loss(x, y), logits, labels),
        torch_compiled(lambda x, y: loss(x, y, reduction="none"), logits[sample], labels[sample]),
    )


@contender("torch lse-gather compiled", "loss")
def torch_compiled_lse_gather(problem: Problem) -> Prepared:
    def mean_and_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
        losses = lse_minus_label_logit(logits, labels)
        return losses.mean(), losses

    return both(torch_compiled(mean_and_losses, *torch_data(problem)), problem.sample)


@contender("torch", "grad", "inplace")
def torch_forward_backward(problem: Problem) -> Prepared:
    return torch_gradient(problem, torch_loss("loss"))


@contender("torch compiled", "grad", "inplace")
def torch_compiled_forward_backward(problem: Problem) -> Prepared:
    loss = torch_loss("loss")
    return torch_gradient(problem, torch_compile(lambda logits, labels: loss(logits, labels)))


def torch_gradient(problem: Problem, loss: Callable[..., Any]) -> Prepared:
    """PyTorch writes its gradient to a new array, also where ours goes over the logits."""
    import torch

    logits, labels = torch_data(problem)
    logits.requires_grad_()

    def call() -> tuple[Any, Any]:
        mean = loss(logits, labels)
        return mean.detach(), torch.autograd.grad(mean, logits)[0]

    return mean_and_gradient(call, problem.sample)


@contender("torch", "logsumexp", "softmax")
def torch_normalizer(problem: Problem) -> Prepared:
    return normalizer(partial(torch_function(problem), torch_tensor(problem.logits)), problem)


@contender("torch compiled", "logsumexp", "softmax")
def torch_compiled_normalizer(problem: Problem) -> Prepared:
    function = torch_function(problem)
    return normalizer(torch_compiled(lambda x: function(x), torch_tensor(problem.logits)), problem)


def torch_function(problem: Problem) -> Callable[[Any], Any]:
    import torch

    return partial(torch.logsumexp if problem.case.task == "logsumexp" else torch.softmax, dim=1)


# ---- JAX ----


def jax_call(function: Callable[..., Any], *arrays: np.ndarray) -> Callable[[], Any]:
    """The function compiled by XLA, on copies of the arrays; waits for the result."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    compiled, data = jax.jit(function), [jax.numpy.asarray(array) for array in arrays]
    return lambda: jax.block_until_ready(compiled(*data))


@contender("jax/optax", "loss", "soft", "binary")
def optax_loss(problem: Problem) -> Prepared:
    row_losses = optax_row_losses(problem.case.task)

    def mean_and_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
        losses = row_losses(logits, labels)
        return losses.mean(), losses

    if problem.case.task != "binary":
        return both(jax_call(mean_and_losses, problem.logits, problem.labels), problem.sample)
    return mean_and_rows(
        jax_call(lambda x, y: row_losses(x, y).mean(), problem.logits, problem.labels),
        jax_call(row_losses, problem.logits[problem.sample], problem.labels[problem.sample]),
    )


@contender("jax/optax", "grad", "inplace")
def optax_gradient(problem: Problem) -> Prepared:
    import jax

    row_losses = optax_row_losses("loss")
    function = jax.value_and_grad(lambda logits, labels: row_losses(logits, labels).mean())
    return mean_and_gradient(jax_call(function, problem.logits, problem.labels), problem.sample)


def optax_row_losses(task: str) -> Callable[..., Any]:
    import optax

    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels,
        "soft": optax.softmax_cross_entropy,
        "binary": optax.sigmoid_binary_cross_entropy,
    }[task]


@contender("jax/optax", "logsumexp", "softmax")
def jax_normalizer(problem: Problem) -> Prepared:
    import jax

    function = jax.nn.logsumexp if problem.case.task == "logsumexp" else jax.nn.softmax
    return normalizer(jax_call(partial(function, axis=1), problem.logits), problem)


# ---- SciPy and scikit-learn: one thread ----


@contender("scipy", "loss")
def scipy_loss(problem: Problem) -> Prepared:
    logsumexp = scipy_function("logsumexp", problem)
    logits, labels = problem.logits, problem.labels

    def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return logsumexp(logits, axis=1) - np.take_along_axis(logits, labels[:, None], 1)[:, 0]

    sample = problem.sample
    return mean_and_rows(lambda: losses(logits, labels).mean(), lambda: losses(logits[sample], labels[sample]))


@contender("scipy", "logsumexp", "softmax")
def scipy_normalizer(problem: Problem) -> Prepared:
    return normalizer(partial(scipy_function(problem.case.task, problem), problem.logits, axis=1), problem)


def scipy_function(name: str, problem: Problem) -> Callable[..., Any]:
    import scipy.special

    if problem.case.dtype == "bf16":
        raise Refused("does not take bfloat16")
    if problem.logits.size > SCIPY_ELEMENTS:
        raise Refused(f"takes seconds above {SCIPY_ELEMENTS >> 20} Mi logits")
    return getattr(scipy.special, name)


@contender("scikit-learn", "loss")
def sklearn_loss(problem: Problem) -> Prepared:
    """log_loss takes probabilities, so their softmax is part of the work."""
    from sklearn.metrics import log_loss

    softmax = scipy_function("softmax", problem)
    if problem.case.dtype != "f32" or problem.logits.size > SKLEARN_ELEMENTS:
        raise Refused(f"makes one-hot matrices: only float32, up to {SKLEARN_ELEMENTS >> 20} Mi logits")
    logits, labels, sample = problem.logits, problem.labels, problem.sample
    classes = np.arange(problem.case.vocab)

    def rows() -> list[float]:
        probabilities = softmax(logits[sample], axis=1)
        return [log_loss([y], p[None], labels=classes) for p, y in zip(probabilities, labels[sample], strict=True)]

    return mean_and_rows(lambda: log_loss(labels, softmax(logits, axis=1), labels=classes), rows)


# ---- between cases ----


def forget_compiled() -> None:
    """Drop what was compiled for the last case: torch.compile gives up after some shapes, and all take memory."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
