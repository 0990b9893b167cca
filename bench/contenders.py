"""What a contender is: how gpuxent or a rival does a task on the data of a problem.

It is a function that takes a problem, does off the clock what is not part of the work (arrays of its own kind,
compiling), and returns a `Prepared`. What it cannot do it refuses with `Refused`; what is not installed raises
ImportError; both are said once and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from bench.cases import TASKS
from bench.problems import Answer, Problem
from bench.timing import nothing

MOST_CALLS = 32  # in a row, between two times that all data are put back


class Refused(Exception):
    """Why a contender does not take part in a case."""


@dataclass(frozen=True)
class Prepared:
    """`call` is what is timed; `before` comes first, off the clock, and serves so many `calls`.

    On a CPU `call` blocks until the result is there, on a GPU until it is asked for. `answer` calls it, or the same
    code for single rows, and says what came out.
    """

    call: Callable[[], Any]
    answer: Callable[[], Answer]
    before: Callable[[], None] = nothing
    calls: int = 1


Prepare = Callable[[Problem], Prepared]


class Contenders(dict[str, dict[str, Prepare]]):
    """By task and name, in the order in which tables list them."""

    def __init__(self) -> None:
        super().__init__({task: {} for task in TASKS})

    def add(self, name: str, *tasks: str) -> Callable[[Prepare], Prepare]:
        """Registers the function that it decorates."""

        def register(prepare: Prepare) -> Prepare:
            for task in tasks:
                self[task][name] = prepare
            return prepare

        return register

    def include(self, others: Contenders) -> None:
        for task, of_task in others.items():
            self[task].update(of_task)


def rotating(prepare: Prepare, problems: Sequence[Problem]) -> Prepared:
    """The contender on problems with the same data in different places: every call takes the next of them."""
    prepared = [prepare(problem) for problem in problems]
    turns = cycle(prepared)
    idle = all(each.before is nothing for each in prepared)

    def before() -> None:
        for each in prepared:
            each.before()

    return Prepared(
        lambda: next(turns).call(),
        prepared[0].answer,
        nothing if idle else before,
        calls=min(len(prepared), MOST_CALLS),
    )


# ---- from results to answers ----


def numbers(result: Any) -> np.ndarray:
    """float64 NumPy of an array of any library, from wherever it is."""
    if hasattr(result, "detach"):
        result = result.detach().double().cpu()
    elif hasattr(result, "get"):
        result = result.get()
    return np.asarray(result).astype(np.float64)


def at(values: Any, rows: np.ndarray) -> np.ndarray:
    """The numbers of some rows of an array of any library."""
    if not hasattr(values, "get"):
        return numbers(values[rows])
    if values.dtype.itemsize == 2:  # as integers: not every CuPy takes rows of bfloat16
        return values.view(np.uint16)[rows.tolist()].get().view(values.dtype).astype(np.float64)
    return numbers(values[rows.tolist()])


def mean_and_rows(call: Callable[[], Any], rows: Callable[[], Any]) -> Prepared:
    """The call returns a mean; `rows` computes the losses of the sampled rows."""
    return Prepared(call, lambda: Answer(float(call()), rows=numbers(rows())))


def both(call: Callable[[], tuple[Any, Any]], sample: np.ndarray) -> Prepared:
    """The call returns (mean, losses of all rows)."""

    def answer() -> Answer:
        mean, losses = call()
        return Answer(float(mean), rows=at(losses, sample))

    return Prepared(call, answer)


def mean_and_gradient(
    call: Callable[[], tuple[Any, Any]], sample: np.ndarray, before: Callable[[], None] = nothing
) -> Prepared:
    def answer() -> Answer:
        before()
        mean, gradient = call()
        return Answer(float(mean), entries=at(gradient, sample))

    return Prepared(call, answer, before)


def normalizer(call: Callable[[], Any], problem: Problem) -> Prepared:
    """The call returns an lse per row, or the softmax."""

    def answer() -> Answer:
        found = at(call(), problem.sample)
        return Answer(entries=found) if problem.case.task == "softmax" else Answer(rows=found)

    return Prepared(call, answer)
