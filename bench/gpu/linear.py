"""Linear cross-entropy of bfloat16 on a GPU, beside its products and those who make no logits either."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from bench import torch_rivals
from bench.figures import Figure, Target
from bench.gpu.memory import peak_growth
from bench.gpu.timing import wait
from bench.linear import Problem, Size


class GpuProblem(Problem):
    """Every call is waited for: at this size that is nothing."""

    full, small = Size(8192, 4096, 128256), Size(300, 16, 500)
    over_torch = None
    tolerance = 2e-2  # bfloat16 has 8 bits, and torch rounds losses of rows to them

    def placed(self, array: np.ndarray) -> Any:
        return cupy.asarray(array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array)

    def products(self) -> Any:
        """By torch: CuPy's `matmul` of bfloat16 depends on its version."""
        hidden, classifier = (torch_rivals.tensor(array) for array in (self.hidden, self.classifier))
        whole = hidden @ classifier.T
        return whole @ classifier, whole.T @ hidden

    def first_product(self) -> Any:
        return torch_rivals.tensor(self.hidden) @ torch_rivals.tensor(self.classifier).T

    def liger(self) -> Any:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        hidden, classifier = self.leaves()
        found = LigerFusedLinearCrossEntropyFunction.apply(hidden, classifier, torch_rivals.tensor(self.labels))
        return self.differentiated(found[0] if isinstance(found, tuple) else found, hidden, classifier)

    def cce(self) -> Any:
        from cut_cross_entropy import linear_cross_entropy

        hidden, classifier = self.leaves()
        loss = linear_cross_entropy(hidden, classifier, torch_rivals.tensor(self.labels))
        return self.differentiated(loss, hidden, classifier)

    def rivals(self) -> dict[str, Callable[[], Any]]:
        """Those that are installed."""
        known = {"liger": ("liger_kernel", self.liger), "cce": ("cut_cross_entropy", self.cce)}
        return {name: call for name, (package, call) in known.items() if find_spec(package)}

    def contenders(self) -> dict[str, Callable[[], Any]]:
        return {name: _waited_for(call) for name, call in super().contenders().items()}


def _waited_for(call: Callable[[], Any]) -> Callable[[], None]:
    def whole() -> None:
        call()
        wait()

    return whole


def memory(problem: GpuProblem) -> Figure:
    """That libraries take from the GPU at the peak, beyond parameters and their gradients."""
    extra = peak_growth(problem.ours) - problem.hidden.nbytes - problem.classifier.nbytes
    beside = {"torch GB": (peak_growth(problem.torch) - problem.hidden.nbytes - problem.classifier.nbytes) / 1e9}
    return Figure("memory", f"{problem.size}: ours, beyond gradients", extra / 1e9, "GB", Target(1.0, True), beside)
