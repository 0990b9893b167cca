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
from bench import devices, figures, machine, regression, torch_rivals
from bench.clock import rounds
from bench.figures import Figure, Report, Target
from bench.timing import Plan
from gpuxent.backends import on_host


class Size(NamedTuple):
    rows: int
    features: int
    vocab: int

    def __str__(self) -> str:
        return f"N = {self.rows:,}, D = {self.features:,}, V = {self.vocab:,}"


TIMING, ONCE = Plan(seconds=120, least=3, most=7), Plan(seconds=0.1, least=1, most=2)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True, highlight=False)


class WrongResult(AssertionError):
    """What was to be timed is not within rounding of float64."""


class Problem:
    """Hidden states and a classifier whose logits are of the size that a trained model's are."""

    full, small = Size(2048, 1024, 32000), Size(300, 16, 500)
    over_products, over_torch = Target(1.15, True), Target(1.2)  # of loss and gradients
    tolerance = 1e-4  # of a gradient's largest entry

    def __init__(self, size: Size) -> None:
        rng = np.random.default_rng(0)
        self.size = size
        hidden = rng.standard_normal((size.rows, size.features), np.float32)
        classifier = rng.standard_normal((size.vocab, size.features), np.float32) / np.float32(size.features**0.5)
        self.hidden, self.classifier = self.placed(hidden), self.placed(classifier)
        self.labels = self.placed(rng.integers(0, size.vocab, size.rows))

    def placed(self, array: np.ndarray) -> Any:
        return array

    def ours(self) -> Any:
        return gx.linear_cross_entropy_and_grad(self.hidden, self.classifier, self.labels)

    def loss_alone(self) -> Any:
        return gx.linear_cross_entropy(self.hidden, self.classifier, self.labels)

    def products(self) -> Any:
        """The three of one pass, as large as BLAS likes them: nothing is read between them."""
        whole = self.hidden @ self.classifier.T
        return whole @ self.classifier, whole.T @ self.hidden

    def first_product(self) -> Any:
        return self.hidden @ self.classifier.T

    def torch(self) -> Any:
        """Eager, with logits, as a training loop has it."""
        import torch

        hidden, classifier = self.leaves()
        logits = torch.nn.functional.linear(hidden, classifier)
        loss = torch.nn.functional.cross_entropy(logits.float(), torch_rivals.tensor(self.labels))
        return self.differentiated(loss, hidden, classifier)

    def leaves(self) -> list[Any]:
        return [torch_rivals.tensor(array).detach().requires_grad_() for array in (self.hidden, self.classifier)]

    def differentiated(self, loss: Any, hidden: Any, classifier: Any) -> Any:
        loss.backward()
        return loss.detach(), hidden.grad, classifier.grad

    def rivals(self) -> dict[str, Callable[[], Any]]:
        """Those that have no logits either."""
        return {}

    def contenders(self) -> dict[str, Callable[[], Any]]:
        own = {
            "ours": self.ours,
            "products": self.products,
            "torch": self.torch,
            "loss": self.loss_alone,
            "one product": self.first_product,
        }
        return own | self.rivals()

    def check(self) -> None:
        """A few rows of each gradient and the loss, against float64; the classifier's against torch."""
        loss, grad = self.ours()
        torch_loss, of_hidden, of_classifier = self.torch()
        some = np.arange(0, self.size.rows, max(1, self.size.rows // 16))
        expected = self._hidden_grad(some)
        for what, found, right in (
            ("hidden's gradient", _floats(grad.hidden)[some], expected),
            ("torch's gradient of hidden", _floats(of_hidden)[some], expected),
            ("the classifier's gradient", _floats(grad.classifier), _floats(of_classifier)),
        ):
            error = float(np.abs(found - right).max() / np.abs(right).max())
            if not error < self.tolerance:
                raise WrongResult(f"{what} is off by {error:.2g} of its largest entry")
        if abs(float(loss) - float(torch_loss)) > self.tolerance / 10 * abs(float(loss)):
            raise WrongResult(f"the loss is {float(loss)}, torch has {float(torch_loss)}")

    def _hidden_grad(self, some: np.ndarray) -> np.ndarray:
        """Of some rows, written out in float64."""
        hidden, classifier = (on_host(array).astype(np.float64) for array in (self.hidden, self.classifier))
        hidden = hidden[some]
        x = hidden @ classifier.T
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(some)), on_host(self.labels)[some]] -= 1
        return p @ classifier / self.size.rows


def _floats(array: Any) -> np.ndarray:
    """Of NumPy, CuPy or torch, in float32."""
    if hasattr(array, "detach"):
        return array.detach().float().cpu().numpy()
    return on_host(array).astype(np.float32)


def times(problem: Problem, timing: Plan) -> Iterator[Figure]:
    found = rounds(problem.contenders(), timing)
    ours, products = found["ours"], found["products"]
    what, flops = str(problem.size), 6 * np.prod(problem.size, dtype=float)
    beside = {
        "ours ms": 1e3 * ours.best,
        "products ms": 1e3 * products.best,
        "by median": ours.median / products.median,
        "GFLOP/s of products": flops / products.best / 1e9,
        "rounds": ours.rounds,
        "others": ours.others,
    }
    over, part = ours.best / products.best, "loss and gradients"
    yield Figure(part, f"{what}: ours / products", over, "x", problem.over_products, beside)
    for name in ("torch", *problem.rivals()):
        rival, target = found[name], problem.over_torch if name == "torch" else None
        beside = {f"{name} ms": 1e3 * rival.best, "by median": rival.median / ours.median}
        yield Figure(part, f"{what}: {name} / ours", rival.best / ours.best, "x", target, beside)
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


def cpu_figures(quick: bool) -> Iterator[Figure]:
    problem, timing = Problem(Problem.small if quick else Problem.full), ONCE if quick else TIMING
    problem.check()
    yield from times(problem, timing)
    yield memory(problem)
    yield from regression.times(regression.SMALL if quick else regression.FULL, timing)


def gpu_figures(quick: bool) -> Iterator[Figure]:
    from bench.gpu.linear import GpuProblem, memory

    problem = GpuProblem(GpuProblem.small if quick else GpuProblem.full)
    problem.check()
    yield from times(problem, ONCE if quick else TIMING)
    yield memory(problem)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small: a second, to see that all of it works.")] = False,
    device: Annotated[str, typer.Option(metavar="cpu|gpu", help="Where.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write linear.json, or linear-GPU.json, there.", file_okay=False),
    ] = None,
) -> None:
    """Loss and gradients from hidden states and a classifier: time and memory, on this machine's cores or its GPU; and
    on cores the estimator that is trained with them.

    What is timed is first compared with float64 and torch; the exit status is 1 if it differs. A full run writes its
    results to bench/results; a quick one only where --output says.
    """
    try:
        place = devices.device(device)
        found = tuple((gpu_figures if device == "gpu" else cpu_figures)(quick))
    except (RuntimeError, ValueError) as error:
        errors.print(f"bench: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (WrongResult, regression.DifferentModel) as error:
        errors.print(f"bench: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    report = Report(
        device=place.describe(),
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
        path = output / (f"linear-{place.results()}.json" if device == "gpu" else "linear.json")
        figures.write(report, path)
        errors.print(f"wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    app()
