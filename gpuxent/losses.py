"""Cross-entropy and binary cross-entropy from logits, their gradients, and the same losses from probabilities."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent import _row_loss
from gpuxent._dlpack import returns_own_kind
from gpuxent._records import Array
from gpuxent._rows import BinaryRows, Rows, reduced
from gpuxent.backends import backend_of


@returns_own_kind
def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    class_weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    check_labels: bool = True,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of rows of logits with their labels, in nats.

    Of one row with label y: loss = lse(x) - x[y], where lse(x) = ln sum exp(x). With class weights w, smoothing eps
    and soft labels s the formulas are those of `torch.nn.functional.cross_entropy`:

        index labels: (1 - eps) w[y] (lse - x[y]) + eps / V * sum_c w[c] (lse - x[c])
        soft labels:  sum_c w[c] ((1 - eps) s[c] + eps / V) (lse - x[c])

    The row's probability at the label keeps its digits however close to 1 it is: p = 1 - 1e-12 has loss 1e-12.

    Args:
        logits: (..., vocab), float16, bfloat16, float32 or float64; NumPy, CuPy or Dask, or a tensor on a GPU (PyTorch,
            JAX), which is taken without a copy. Never written to. A -inf logit is a class with probability exactly 0.
        labels: (...) of any integer dtype, or soft labels (..., vocab) of any float dtype whose rows sum to 1. CuPy
            beside CuPy logits.
        class_weight: (vocab,) finite weights of at least 0; NumPy beside all logits, CuPy beside CuPy logits.
        ignore_index: label of rows that do not count: loss 0 and gradient 0, even if their logits are NaN. None: no
            such label. Soft labels take the default only.
        label_smoothing: eps in [0, 1].
        z_loss: coefficient of lse**2, added per row, untouched by class weights (PaLM, arXiv 2204.02311, section 5).
        softcap: c > 0: the logits are first c * tanh(x / c), as the last layer of some models computes them (Gemma 2,
            arXiv 2408.00118); -inf becomes -c, as there.
        temperature: T > 0 divides the (capped) logits.
        reduction: "mean" divides by the summed class weight of the rows that count (soft labels: by the number of
            rows), and the z-loss by the number of rows that count; NaN if there are none. "sum", or "none" for one
            loss per row.
        check_labels: False saves the check of the labels (for soft labels, a read of them). A label outside the
            vocabulary then has loss +inf. On a GPU that check, and that of a CuPy class_weight, are all that is waited
            for.
        backend: "numba" or "numpy"; "cupy" brings NumPy logits to the GPU; None for the best one where the logits are.

    Returns:
        float64 for "mean" and "sum"; for "none" an array (...), float64 for float64 logits and float32 otherwise. Of
        the logits' kind, so a CuPy array of shape () for CuPy logits. A Dask array, lazily, for Dask logits: errors in
        values are then raised when it is computed, and a mean or sum comes to the CPU.

    Raises:
        IndexError: a label outside [0, vocab) that is not ignore_index, with its place.
        ValueError, TypeError: an argument of a wrong shape, dtype or range; soft labels that are no probabilities.

    >>> import numpy as np
    >>> logits = np.array([[2.3, -1.2, 0.7, 1.1], [0.0, 0.0, 0.0, 0.0]])
    >>> float(cross_entropy(logits, np.array([0, 3])).round(4))
    0.9069
    >>> cross_entropy(logits, np.array([0, -100]), reduction="none").round(4)
    array([0.4274, 0.    ])
    """
    rows = Rows.open(
        logits,
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
def cross_entropy_and_grad(
    logits: Array,
    labels: Array,
    *,
    class_weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    check_labels: bool = True,
    backend: str | None = None,
    grad_output: Any = 1.0,
    denominator: Any = None,
    return_stats: bool = False,
    out: Array | None = None,
) -> tuple[Any, ...]:
    """Cross-entropy and its gradient with respect to the logits.

    For plain labels the gradient of a row is (softmax(x) - onehot(y)) / n. At the label it is computed as
    -(1 - p) without forming 1 - p from p, so it keeps its digits in confident rows. The other arguments, errors and
    the loss are those of `cross_entropy`.

    Args:
        grad_output: factor of the gradient (the upstream gradient, a loss scale): a number, or with reduction="none"
            one per row, such as sample weights. It does not change the loss.
        denominator: a number > 0 that the mean divides by instead of its own count (gradient accumulation). A CuPy
            array of shape () is waited for.
        return_stats: also return a `RowSummary` with the rows' lse (nats), argmax (lowest on ties; -1 if there is a
            NaN) and p_max.
        out: where to write the gradient: an array of the logits' kind, shape and dtype, or the logits themselves.

    Returns:
        (loss, dlogits), or (loss, dlogits, summary). dlogits has the shape and dtype of the logits.

    >>> import numpy as np
    >>> loss, dlogits = cross_entropy_and_grad(np.array([[2.0, 0.0, 0.0]]), np.array([0]))
    >>> float(loss.round(4)), dlogits.round(4)
    (0.2395, array([[-0.213 ,  0.1065,  0.1065]]))
    """
    rows = Rows.open(
        logits,
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
    out = arguments.output(out, rows.logits, labels)
    grad_output = arguments.grad_output(grad_output, rows.logits, rows.logits.shape[:-1], reduction)
    denominators = rows.denominators(arguments.denominator(denominator, reduction))
    also = ("argmax",) if return_stats else ()
    stats, dlogits = rows.stats_and_gradient(grad_output, *denominators, also, out)
    loss = rows.reduced(*rows.losses(stats), *denominators)
    return (loss, dlogits, rows.summary(stats)) if return_stats else (loss, dlogits)


# ---- from probabilities ----


@returns_own_kind
def cross_entropy_from_probs(
    probs: Array,
    labels: Array,
    *,
    label_format: str,
    class_weight: Any = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    check_labels: bool = True,
) -> Any:
    """Cross-entropy of rows of probabilities with their labels, in nats: -ln p[y], or -sum_c s[c] ln p[c].

    Prefer `cross_entropy` where there are logits: a probability has lost what distinguishes 1 - 1e-12 from 1. Nothing
    is clipped or renormalized: the loss at p = 0 is +inf.

    Args:
        probs: (..., vocab) floats; each row non-negative and summing to 1 within max(1e-4, 4 eps of the dtype).
        labels: by `label_format`: "index": integers (...); "onehot": (..., vocab) of any real dtype, each row one 1
            and 0 elsewhere; "soft": floats (..., vocab), each row a distribution. The form is never guessed.
        class_weight, ignore_index, reduction: as `cross_entropy`; ignore_index belongs to "index" labels.
        check_labels: False saves the checks of the labels' and the probabilities' values.

    Returns: as `cross_entropy`.

    Raises:
        IndexError: a class out of range. ValueError, TypeError: rows that are no distributions, wrong shapes or dtypes.

    >>> import numpy as np
    >>> probs = np.array([[0.1, 0.8, 0.1], [0.98, 0.01, 0.01]])
    >>> cross_entropy_from_probs(probs, np.array([1, 1]), label_format="index", reduction="none").round(4)
    array([0.2231, 4.6052])
    """
    probs = arguments.rows(probs, "probs")
    vocab = probs.shape[-1]
    labels = arguments.formatted_labels(labels, probs, label_format)
    weight = arguments.class_weight(class_weight, probs, check_labels)
    ignore = arguments.ignore_index(ignore_index)
    arguments.one_of(reduction, "reduction", arguments.REDUCTIONS)
    if label_format != "index" and ignore != arguments.DEFAULT_IGNORE_INDEX:
        raise ValueError(f"ignore_index must be left at its default for {label_format} labels, got {ignore_index!r}")
    owner = backend_of(probs)
    labels = owner.laid_out_as(probs, labels)
    if check_labels:
        probs = owner.after(arguments.check_distributions(owner, probs, "probs"), probs)
    if label_format == "soft":
        if check_labels:
            labels = owner.after(arguments.check_distributions(owner, labels, "labels"), labels)
        losses = owner.cross_sums(labels, probs, scale=1.0 if weight is None else weight)
        return reduced(owner, losses, None, reduction, arguments.row_dtype(probs))
    if label_format == "onehot":
        classes = owner.map_rows(arguments.onehot_labels, *owner.onehot_sums(labels), dtype=np.int64, at=True)
    else:
        check = partial(arguments.class_labels, vocab=vocab, ignore=ignore, check=check_labels)
        classes = owner.map_rows(check, labels, dtype=np.int64, at=True)
    take = _one_each if weight is None else partial(_row_loss.take_class_weight, weight)
    label_weight = owner.map_rows(take, classes)
    losses = owner.map_rows(_row_loss.losses_from_probs, owner.take_label(probs, classes), classes, label_weight)
    return reduced(owner, losses, label_weight, reduction, arguments.row_dtype(probs))


def _one_each(labels: Array) -> Array:
    """The class weights of rows without any."""
    return np.where(labels >= 0, 1.0, 0.0)


# ---- independent sigmoids ----


@returns_own_kind
def binary_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    pos_weight: Any = None,
    class_weight: Any = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Any:
    """Cross-entropy of independent sigmoids, in nats, as `torch.nn.functional.binary_cross_entropy_with_logits`.

    Of one element: class_weight * (pos_weight * y * softplus(-x) + (1 - y) * softplus(x)), softplus(x) = ln(1 +
    e**x). A target of 1 at +inf and of 0 at -inf has loss 0.

    Args:
        logits: (N,), or (..., K) for K labels per row; float16, bfloat16, float32 or float64; NumPy, CuPy or Dask.
        targets: the logits' shape and kind; bool, integer or float, each in [0, 1] or ignore_index. The check of that
            is waited for on a GPU.
        pos_weight, class_weight: a number, or (K,) one per column; finite and at least 0.
        ignore_index: target of elements that do not count: loss 0 and gradient 0 whatever the logit. None: no such
            target.
        reduction: "mean" divides by the number of elements that count (NaN if there are none); "sum"; "none".
        backend: as `cross_entropy`.

    Returns: float64 for "mean" and "sum"; for "none" the logits' shape, float64 for float64 logits, else float32.

    Raises: ValueError, TypeError: an argument of a wrong shape, dtype or range; a target outside [0, 1].

    >>> import numpy as np
    >>> logits = np.array([5.0, -5.0, 0.0, 2.0, -2.0])
    >>> binary_cross_entropy(logits, np.array([1, 0, 1, 0, 1]), reduction="none").round(4)
    array([0.0067, 0.0067, 0.6931, 2.1269, 2.1269])
    """
    problem = BinaryRows.open(
        logits,
        targets,
        "logits",
        pos_weight=pos_weight,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
    )
    return problem.loss()[0]


@returns_own_kind
def binary_cross_entropy_and_grad(
    logits: Array,
    targets: Array,
    *,
    pos_weight: Any = None,
    class_weight: Any = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    grad_output: Any = 1.0,
    denominator: Any = None,
    out: Array | None = None,
) -> tuple[Any, Array]:
    """Binary cross-entropy and its gradient; with no weights the gradient of an element is (sigmoid(x) - y) / n.

    The arguments, errors and the loss are those of `binary_cross_entropy`, and `grad_output`, `denominator` and `out`
    those of `cross_entropy_and_grad` (with reduction="none" grad_output may have the logits' shape).

    Returns: (loss, dlogits); dlogits has the shape and dtype of the logits.

    >>> import numpy as np
    >>> loss, dlogits = binary_cross_entropy_and_grad(np.array([5.0, 0.0]), np.array([1, 0]), reduction="sum")
    >>> float(loss.round(4)), dlogits.round(4)
    (0.6999, array([-0.0067,  0.5   ]))
    """
    problem = BinaryRows.open(
        logits,
        targets,
        "logits",
        pos_weight=pos_weight,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
    )
    whole = arguments.array(logits, "logits")
    out = arguments.output(out, whole, targets)
    upstream = arguments.grad_output(grad_output, whole, whole.shape, reduction)
    loss, count = problem.loss(arguments.denominator(denominator, reduction))
    return loss, problem.gradient(upstream, count, out)


@returns_own_kind
def binary_cross_entropy_from_probs(
    probs: Array,
    targets: Array,
    *,
    pos_weight: Any = None,
    class_weight: Any = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
) -> Any:
    """Binary cross-entropy from probabilities in [0, 1], in nats: -(pos_weight y ln p + (1 - y) ln(1 - p)).

    Nothing is clipped: the loss of p = 0 with target 1 is +inf. Arguments, errors and result as `binary_cross_entropy`.

    >>> import numpy as np
    >>> binary_cross_entropy_from_probs(np.array([0.5, 0.1, 0.001]), np.ones(3), reduction="none").round(3)
    array([0.693, 2.303, 6.908])
    """
    problem = BinaryRows.open(
        probs,
        targets,
        "probs",
        pos_weight=pos_weight,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return problem.loss()[0]
