"""Cross-entropy, perplexity and their gradients over huge vocabularies.

Losses from logits: cross_entropy, binary_cross_entropy, their *_and_grad and *_from_probs twins. Normalizers:
logsumexp, softmax, log_softmax. Information: entropy, kl_divergence, js_divergence, cross_entropy_between, with
*_from_probs twins. From hidden states and a classifier: linear_cross_entropy, linear_cross_entropy_and_grad. Data
sets: perplexity, evaluate, compare, linear_logits, and the module gpuxent.calibration. Estimator: SoftmaxRegression.
CPU threads: threads. Arrays are NumPy's, CuPy's or Dask's, or tensors on a GPU; what comes out is of the same kind.
"""

from typing import TYPE_CHECKING

from gpuxent._records import LinearGrad
from gpuxent._row_loss import RowSummary
from gpuxent.backends._threads import threads
from gpuxent.divergences import (
    cross_entropy_between,
    cross_entropy_between_from_probs,
    entropy,
    entropy_from_probs,
    js_divergence,
    js_divergence_from_probs,
    kl_divergence,
    kl_divergence_from_probs,
)
from gpuxent.evaluation.comparison.compare import compare
from gpuxent.evaluation.comparison.result import Comparison
from gpuxent.evaluation.evaluate import evaluate, linear_logits, perplexity
from gpuxent.evaluation.statistics.result import CalibrationBin, Evaluation
from gpuxent.linear import linear_cross_entropy, linear_cross_entropy_and_grad
from gpuxent.losses import (
    binary_cross_entropy,
    binary_cross_entropy_and_grad,
    binary_cross_entropy_from_probs,
    cross_entropy,
    cross_entropy_and_grad,
    cross_entropy_from_probs,
)
from gpuxent.normalizers import log_softmax, logsumexp, softmax

if TYPE_CHECKING:
    from gpuxent.regression import SoftmaxRegression as SoftmaxRegression

__all__ = [
    "CalibrationBin",
    "Comparison",
    "Evaluation",
    "LinearGrad",
    "RowSummary",
    "binary_cross_entropy",
    "binary_cross_entropy_and_grad",
    "binary_cross_entropy_from_probs",
    "compare",
    "cross_entropy",
    "cross_entropy_and_grad",
    "cross_entropy_between",
    "cross_entropy_between_from_probs",
    "cross_entropy_from_probs",
    "entropy",
    "entropy_from_probs",
    "evaluate",
    "js_divergence",
    "js_divergence_from_probs",
    "kl_divergence",
    "kl_divergence_from_probs",
    "linear_cross_entropy",
    "linear_cross_entropy_and_grad",
    "linear_logits",
    "log_softmax",
    "logsumexp",
    "perplexity",
    "softmax",
    "threads",
]


def __getattr__(name: str) -> type:
    """SoftmaxRegression needs scikit-learn, which only those who ask for it load. `import *` is not among them."""
    if name != "SoftmaxRegression":
        raise AttributeError(f"module 'gpuxent' has no attribute {name!r}")
    try:
        from gpuxent.regression import SoftmaxRegression
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("sklearn", "scipy"):
            raise
        raise ModuleNotFoundError(
            "SoftmaxRegression needs scikit-learn, which is not installed: pip install 'gpuxent[sklearn]'"
        ) from error
    return SoftmaxRegression


__version__ = "0.1.0"
