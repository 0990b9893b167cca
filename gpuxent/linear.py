"""Cross-entropy from hidden states and a classifier, and the gradients of both, without the logits between them."""

from __future__ import annotations

from typing import Any

from gpuxent import _arguments as arguments
from gpuxent._dlpack import returns_own_kind
from gpuxent._records import Array
from gpuxent._rows import Rows
from gpuxent.backends import linear_logits

PARAMETERS = ("hidden", "classifier", "bias")


@returns_own_kind
def linear_cross_entropy(
    hidden: Array,
    classifier: Array,
    labels: Array,
    *,
    bias: Array | None = None,
    class_weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    check_labels: bool = True,
    backend: str | None = None,
    memory: int | None = None,
) -> Any:
    """Cross-entropy of logits = hidden @ classifier.T + bias with their labels, in nats, without an array of logits.

    A tile of rows at a time is multiplied (by BLAS), read and forgotten. Rows whose label is ignore_index are left out
    before that and cost nothing. Products of 16-bit parameters are added up, and kept, in float32. The loss, the other
    arguments and the errors are those of `cross_entropy`. The last bits depend on how BLAS adds up a product, which
    may depend on the number of rows in a tile, and so on `memory`.

    Args:
        hidden: (..., features), float16, bfloat16, float32 or float64; NumPy, CuPy or Dask, or a tensor on a GPU.
        classifier: (vocab, features), of hidden's dtype and kind: the layout of `torch.nn.Linear.weight`. Beside Dask
            hidden states a NumPy array, or one of Dask, whose chunks of the vocabulary are worked on one by one.
        labels: as `cross_entropy` takes them for logits (..., vocab).
        bias: (vocab,), of the same dtype and kind.
        memory: bytes that a tile of logits takes; 64 MiB by default, 1 GiB on a GPU. A tile has at least 128 rows.

    >>> import numpy as np
    >>> hidden, classifier = np.array([[1.0, 2.0], [0.5, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> linear_cross_entropy(hidden, classifier, np.array([2, 0]), reduction="none").round(4)
    array([0.4076, 0.958 ])
    """
    hidden, classifier, bias = arguments.parameters(hidden, classifier, bias)
    memory = None if memory is None else arguments.positive(memory, "memory")
    rows = Rows.open(
        linear_logits(hidden, classifier, bias, memory),
        labels,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        reduction=reduction,
        check_labels=check_labels,
        backend=backend,
    )
    return rows.reduced(*rows.losses(rows.stats()), *rows.denominators(None))


@returns_own_kind
def linear_cross_entropy_and_grad(
    hidden: Array,
    classifier: Array,
    labels: Array,
    *,
    bias: Array | None = None,
    class_weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    check_labels: bool = True,
    backend: str | None = None,
    memory: int | None = None,
    grad_output: Any = 1.0,
    denominator: Any = None,
    return_stats: bool = False,
    wrt: tuple[str, ...] | str | None = None,
) -> tuple[Any, ...]:
    """Cross-entropy of hidden @ classifier.T + bias, and its gradients with respect to these parameters.

    With dlogits as `cross_entropy_and_grad` gives it: hidden's is dlogits @ classifier, the classifier's dlogits.T @
    hidden, the bias' the sum of dlogits over the rows. A tile of logits is overwritten by its gradient, and the sums
    over tiles are float32 for 16-bit parameters (float64 for the bias), rounded once. (On a GPU's tensor cores, dlogits
    is first rounded to bfloat16 where the parameters are of it.) The other arguments and the
    errors are those of `linear_cross_entropy` and of `cross_entropy_and_grad`.

    Args:
        wrt: the parameters whose gradients are wanted, some of "hidden", "classifier", "bias"; None: all that are
            given. Each costs its product.

    Returns:
        (loss, `LinearGrad`), or (loss, LinearGrad, summary) with return_stats. Each gradient has the shape and dtype of
        its parameter; those that were not asked for are None.

    >>> import numpy as np
    >>> loss, grad = linear_cross_entropy_and_grad(np.array([[2.0]]), np.array([[1.0], [0.0]]), np.array([0]))
    >>> float(loss.round(4)), grad.hidden.round(4), grad.classifier.round(4), grad.bias
    (0.1269, array([[-0.1192]]), array([[-0.2384],
           [ 0.2384]]), None)
    """
    hidden, classifier, bias = arguments.parameters(hidden, classifier, bias)
    memory = None if memory is None else arguments.positive(memory, "memory")
    given = PARAMETERS if bias is not None else PARAMETERS[:2]
    wrt = given if wrt is None else arguments.names_among(wrt, "wrt", given)
    rows = Rows.open(
        linear_logits(hidden, classifier, bias, memory),
        labels,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        reduction=reduction,
        check_labels=check_labels,
        backend=backend,
    )
    grad_output = arguments.grad_output(grad_output, rows.logits, rows.logits.shape[:-1], reduction)
    denominators = rows.denominators(arguments.denominator(denominator, reduction))
    also = ("argmax",) if return_stats else ()
    which = {"wrt": wrt, "features": hidden.shape[-1]}
    stats, grad = rows.stats_and_parameter_grad(grad_output, *denominators, also=also, **which)
    loss = rows.reduced(*rows.losses(stats), *denominators)
    return (loss, grad, rows.summary(stats)) if return_stats else (loss, grad)
