"""gpuxent as a contender, on any device."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import gpuxent as gx
from bench.contenders import Contenders, Prepared, at, mean_and_gradient, mean_and_rows, normalizer, numbers
from bench.problems import Answer, Problem
from gpuxent._records import GradWeights
from gpuxent.backends import backend_of


def contenders(name: str, **options: Any) -> Contenders:
    """All tasks through the public functions (but "separate", which is two of a backend's), with these options of
    cross_entropy."""
    found = Contenders()
    for prepare, *tasks in (
        (loss, "loss", "soft", "binary"),
        (gradient, "grad"),
        (gradient_in_place, "inplace"),
        (separate_gradient, "separate"),
        (normalizers, "logsumexp", "softmax"),
        (pairs, "pairs"),
    ):
        found.add(name, *tasks)(partial(prepare, **options))
    return found


def loss(problem: Problem, **options: Any) -> Prepared:
    if problem.case.task == "binary":
        options.pop("check_labels", None)
        run = partial(gx.binary_cross_entropy, problem.logits, problem.labels, **options)
    else:
        run = partial(gx.cross_entropy, problem.logits, problem.labels, **options)
    return mean_and_rows(run, lambda: at(run(reduction="none"), problem.sample))


def gradient(problem: Problem, **options: Any) -> Prepared:
    run = partial(gx.cross_entropy_and_grad, problem.logits, problem.labels, **options)
    return mean_and_gradient(run, problem.sample)


def gradient_in_place(problem: Problem, **options: Any) -> Prepared:
    """Every call finds the logits, not the last gradient: they are put back first, off the clock."""
    logits = problem.scratch
    run = partial(gx.cross_entropy_and_grad, logits, problem.labels, out=logits, **options)
    return mean_and_gradient(run, problem.sample, before=problem.restore_scratch)


def separate_gradient(problem: Problem, backend: str | None = None, **_: Any) -> Prepared:
    """The two primitives of the backend, as vocabulary-parallel code calls them."""
    owner = backend_of(problem.logits, backend)
    logits, labels = problem.logits, problem.labels
    weights = mean_weights(problem)

    def call() -> tuple[Any, Any]:
        stats = owner.row_stats(logits, labels)
        return stats, owner.logit_grad(logits, labels, stats, weights)

    def mean_first() -> tuple[Any, Any]:
        stats, dlogits = call()
        return mean_loss(stats), dlogits

    return Prepared(call, mean_and_gradient(mean_first, problem.sample).answer)


def mean_weights(problem: Problem) -> GradWeights:
    """Those of the plain mean: (softmax - onehot) / rows."""
    push = np.full(problem.case.rows, 1 / problem.case.rows)
    label, push, none = (like(problem.logits, values) for values in (push, push, np.zeros_like(push)))
    return GradWeights(label, push, none)


def like(array: Any, values: np.ndarray) -> Any:
    """The values where the array is."""
    if not hasattr(array, "get"):
        return values
    import cupy

    return cupy.asarray(values)


def row_losses(stats: Any) -> np.ndarray:
    top, rest, label = (numbers(values) for values in (stats.max, stats.rest, stats.label_logit))
    return np.log1p(rest) + (top - label)


def mean_loss(stats: Any) -> float:
    return float(np.mean(row_losses(stats)))


def pairs(problem: Problem, backend: str | None = None, **_: Any) -> Prepared:
    """The backend's function: no public one gives all of it at once."""
    call = partial(backend_of(problem.logits, backend).pair_stats, problem.logits, problem.labels)

    def answer() -> Answer:
        rows = numbers(call().divergences.js)
        return Answer(float(np.mean(rows)), rows=rows[problem.sample])

    return Prepared(call, answer)


def normalizers(problem: Problem, backend: str | None = None, **_: Any) -> Prepared:
    function = {"logsumexp": gx.logsumexp, "softmax": gx.softmax}[problem.case.task]
    return normalizer(partial(function, problem.logits, backend=backend), problem)
