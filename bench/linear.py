"""Linear cross-entropy beside its matrix products alone and torch with logits, and softmax regression beside
scikit-learn's: `python -m bench.linear --help`."""

from __future__ import annotations

import shlex
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console

import gpuxent as gx
from bench import figures, machine, regression
from bench.clock import rounds
from bench.cpu.machine import describe
from bench.figures import Figure, Report, Target
from bench.timing import Plan


class Size(NamedTuple):
    rows: int
    features: int
    vocab: int

    def __str__(self) -> str:
        return f"N = {self.rows:,}, D = {self.features:,}, V = {self.vocab:,}"


FULL, SMALL = Size(2048, 1024, 32000), Size(300, 16, 500)
TIMING, ONCE = Plan(seconds=120, least=3, most=7), Plan(seconds=0.1, least=1, most=2)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True, highlight=False)


class WrongResult(AssertionError):
    """What was to be timed is not within rounding of float64."""


class Problem:
    """Hidden states and a classifier whose logits are of the size that a trained model's are."""

    def __init__(self, size: Size) -> None:
        rng = np.random.default_rng(0)
        self.size = size
        self.hidden = rng.standard_normal((size.rows, size.features), np.float32)
        self.classifier = rng.standard_normal((size.vocab, size.features), np.float32) / np.float32(size.features**0.5)
        self.labels = rng.integers(0, size.vocab, size.rows)
        self._out = np.empty((min(size.rows, 512), size.vocab), np.float32)

    def ours(self) -> Any:
        return gx.linear_cross_entropy_and_grad(self.hidden, self.classifier, self.labels)

    def loss_alone(self) -> Any:
        return gx.linear_cross_entropy(self.hidden, self.classifier, self.labels)

    def products(self) -> None:
        """The three of one pass, as large as BLAS likes them: nothing is read between them."""
        whole = self.hidden @ self.classifier.T
        whole @ self.classifier
        whole.T @ self.hidden

    def first_product(self) -> None:
        self.hidden @ self.classifier.T

    def torch(self) -> Any:
        """Eager, with logits, as a training loop has it."""
        import torch

        hidden, classifier = (torch.from_numpy(a).requires_grad_() for a in (self.hidden, self.classifier))
        logits = torch.nn.functional.linear(hidden, classifier)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(self.labels))
        loss.backward()
        return loss.item(), hidden.grad, classifier.grad

    def check(self) -> None:
        """A few rows of each gradient and the loss, against float64."""
        loss, grad = self.ours()
        some = np.arange(0, self.size.rows, max(1, self.size.rows // 16))
        x = self.hidden[some].astype(np.float64) @ self.classifier.astype(np.float64).T
        shifted = x - x.max(axis=1, keepdims=True)
        p = np.exp(shifted)
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(some)), self.labels[some]] -= 1
        expected = p @ self.classifier / self.size.rows
        _, theirs, of_classifier = self.torch()
        for what, found, right in (
            ("hidden's gradient", grad.hidden[some], expected),
            ("torch's gradient of hidden", theirs.numpy()[some], expected),
            ("the classifier's gradient", grad.classifier, of_classifier.numpy()),
        ):
            error = float(np.abs(found - right).max() / np.abs(right).max())
            if not error < 1e-4:
                raise WrongResult(f"{what} is off by {error:.2g} of its largest entry")
        if abs(loss - self.torch()[0]) > 1e-5 * abs(loss):
            raise WrongResult(f"the loss is {loss}, torch has {self.torch()[0]}")


def times(problem: Problem, timing: Plan) -> Iterator[Figure]:
    contenders: dict[str, Callable[[], Any]] = {
        "ours": problem.ours,
        "products": problem.products,
        "torch": problem.torch,
        "loss": problem.loss_alone,
        "one product": problem.first_product,
    }
    found = rounds(contenders, timing)
    ours, products, torch = (found[name] for name in ("ours", "products", "torch"))
    what, flops = str(problem.size), 6 * np.prod(problem.size, dtype=float)
    beside = {
        "ours ms": 1e3 * ours.best,
        "products ms": 1e3 * products.best,
        "by median": ours.median / products.median,
        "GFLOP/s of products": flops / products.best / 1e9,
        "rounds": ours.rounds,
        "others": ours.others,
    }
    yield Figure(
        "loss and gradients", f"{what}: ours / products", ours.best / products.best, "x", Target(1.15, True), beside
    )
    beside = {"torch ms": 1e3 * torch.best, "by median": torch.median / ours.median}
    yield Figure("loss and gradients", f"{what}: torch / ours", torch.best / ours.best, "x", Target(1.2), beside)
    loss, product = found["loss"], found["one product"]
    beside = {"ours ms": 1e3 * loss.best, "by median": loss.median / product.median}
    yield Figure("loss", f"{what}: ours / product", loss.best / product.best, "x", None, beside)


def memory(problem: Problem) -> Figure:
    """At the peak, beyond parameters and their gradients. torch's own arrays at the time of its softmax's backward:
    logits, log-probabilities and the gradient of the logits."""
    tracemalloc.start()
    try:
        _loss, grad = problem.ours()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    extra = peak - grad.hidden.nbytes - grad.classifier.nbytes
    theirs = 3 * 4 * problem.size.rows * problem.size.vocab
    beside = {"ours MB": extra / 1e6, "torch MB": theirs / 1e6}
    return Figure("memory", f"{problem.size}: torch / ours", theirs / extra, "x", Target(8.0), beside)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small: a second, to see that all of it works.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write linear.json there.", file_okay=False)
    ] = None,
) -> None:
    """Loss and gradients from hidden states and a classifier: time and memory, on this machine's cores; and the
    estimator that is trained with them.

    What is timed is first compared with float64 and torch; the exit status is 1 if it differs. A full run writes its
    results to bench/results; a quick one only where --output says.
    """
    problem, timing = Problem(SMALL if quick else FULL), ONCE if quick else TIMING
    try:
        problem.check()
        found = (*times(problem, timing), memory(problem))
        found += tuple(regression.times(regression.SMALL if quick else regression.FULL, timing))
    except (WrongResult, regression.DifferentModel) as error:
        errors.print(f"bench: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    report = Report(
        device=describe(),
        versions=machine.versions(),
        commit=machine.commit(),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        command=shlex.join(["python", "-m", "bench.linear", *sys.argv[1:]]),
        figures=found,
    )
    figures.show(report, Console(width=None if sys.stdout.isatty() else 160))
    if output is None and not quick:
        output = machine.ROOT / "bench" / "results"
    if output is not None:
        figures.write(report, output / "linear.json")
        errors.print(f"wrote {output / 'linear.json'}", soft_wrap=True)


if __name__ == "__main__":
    app()
