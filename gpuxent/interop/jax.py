"""Losses for JAX's transformations (`jit`, `grad`, `vmap`, `checkpoint`), in the memory where XLA has the arrays.

On the CPU NumPy and Numba read it, on a GPU the CUDA kernels, on XLA's stream; losses and gradients are written where
XLA wants them. Nothing is copied, under `jit` either, but the gradients of a classifier, once; see `_xla`.

Arguments are named as in the rest of gpuxent, and classes are on the last axis, as in Optax. Losses are float64 for
float64 logits, else float32. Labels and the weights of classes have no gradient: to differentiate them is an error, and
so is to differentiate twice, or forwards. Options other than arrays cannot be traced.

Values that are known when a function is called or traced are checked there. What is wrong with the others is found
when they are computed, and XLA then raises an error of its own that ends with the message. `gpuxent.threads` does not
reach what XLA calls.
"""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._records import ROW_FIELDS, Array, RowStats
from gpuxent._rows import BinaryRows, Rows
from gpuxent.backends import linear_logits
from gpuxent.interop._xla import Options, Shape, alike, called
from gpuxent.linear import PARAMETERS, linear_cross_entropy_and_grad
from gpuxent.linear import linear_cross_entropy as _linear_cross_entropy


def cross_entropy(
    logits: Any,
    labels: Any,
    *,
    class_weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    check_labels: bool = True,
) -> jax.Array:
    """`gpuxent.cross_entropy`, in nats: one read of the logits forwards, a read and a write backwards.

    The gradient takes the place of the logits in memory, where nothing else needs them. Under `vmap` all rows are read
    at once with reduction="none" and without class weights, else the entries one after the other.

    Args:
        logits: (..., vocab), float16, bfloat16, float32 or float64; of JAX or NumPy.
        labels: (...) of any integer dtype, or soft labels (..., vocab) of any float dtype whose rows sum to 1.
        class_weight: (vocab,).
        ignore_index, label_smoothing, z_loss, softcap, temperature, reduction, check_labels: as
            `gpuxent.cross_entropy`.

    Returns: float64 for float64 logits, else float32.

    Raises: as `gpuxent.cross_entropy`; TypeError if labels or class_weight are differentiated.

    >>> import jax, jax.numpy as jnp
    >>> loss, dlogits = jax.jit(jax.value_and_grad(cross_entropy))(jnp.array([[2.0, 0.0, 0.0]]), jnp.array([0]))
    >>> round(float(loss), 4), dlogits.round(4).tolist()
    (0.2395, [[-0.2130, 0.1065, 0.1065]])
    """
    logits, labels, class_weight = _taken(logits=logits, labels=labels, class_weight=class_weight)
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "temperature": temperature,
        "reduction": reduction,
    }
    unchecked = check_labels and not _check_rows(_outline(logits), labels, class_weight, check_labels, options)
    return _cross_entropy(_hashable(options, check_labels=unchecked), *_as_jax(logits, labels, class_weight))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options: Options, logits: jax.Array, labels: jax.Array, class_weight: Any) -> jax.Array:
    named = {"logits": logits, "labels": labels, "class_weight": class_weight}
    return called(_loss, options, (_loss_shape(options, logits),), named)[0]


def _cross_entropy_forward(options: Options, logits: Any, labels: Any, class_weight: Any) -> tuple[jax.Array, Any]:
    _refuse_gradients(labels=labels, class_weight=class_weight)
    named = _values(logits=logits, labels=labels, class_weight=class_weight)
    shape = named["logits"].shape[:-1]
    results = (_loss_shape(options, named["logits"]), _bits_shape(*shape, len(ROW_FIELDS)))
    loss, stats = called(_loss, options, results, named)
    return loss, (named, {"stats": stats})


def _cross_entropy_backward(options: Options, kept: Any, grad_output: jax.Array) -> tuple[Any, ...]:
    return _in_place(_logit_grad, options, kept, grad_output), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


def _loss(options: dict[str, Any], out: list[Array], logits: Array, labels: Array, class_weight: Array | None) -> None:
    rows = Rows.open(logits, labels, class_weight=class_weight, **options)
    stats = rows.stats()
    _store(out[0], rows.reduced(*rows.losses(stats), *rows.denominators(None)))
    for bits in out[1:]:
        bits.view(np.float64)[...] = stats.stacked()


def _logit_grad(
    options: dict[str, Any],
    out: list[Array],
    logits: Array,
    labels: Array,
    class_weight: Array | None,
    stats: Array,
    grad_output: Array,
) -> None:
    rows = Rows.open(logits, labels, class_weight=class_weight, **options | {"check_labels": False})
    weights = rows.weights(grad_output.astype(np.float64), *rows.denominators(None))
    how = {"spread": rows.spread, "transform": rows.options.transform, "out": out[0]}
    rows.backend.logit_grad(rows.logits, rows.labels, RowStats.unstacked(stats.view(np.float64)), weights, **how)


def linear_cross_entropy(
    hidden: Any,
    classifier: Any,
    labels: Any,
    *,
    bias: Any = None,
    class_weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    check_labels: bool = True,
    memory: int | None = None,
) -> jax.Array:
    """`cross_entropy` of hidden @ classifier.T + bias, without an array of logits; see `gpuxent.linear_cross_entropy`.

    The gradients that are wanted are made with the loss, tile by tile, and kept (three products for both); with
    reduction="none" they are made backwards (four). Under `vmap` the entries are worked on one after the other, and
    each has gradients of its own: leading axes of `hidden` share them.

    Args:
        hidden: (..., features). classifier: (vocab, features): the transpose of a kernel of Flax. bias: (vocab,). All
            of one dtype.
        labels: integers (...), or soft labels (..., vocab).
        memory: as `gpuxent.linear_cross_entropy`; the others as `cross_entropy`.

    Returns: float64 for float64 hidden states, else float32.

    Raises: as `cross_entropy`.

    >>> import jax, jax.numpy as jnp
    >>> grad = jax.grad(linear_cross_entropy, argnums=(0, 1))
    >>> [g.round(4).tolist() for g in grad(jnp.array([[2.0]]), jnp.array([[1.0], [0.0]]), jnp.array([0]))]
    [[[-0.1192]], [[-0.2384], [0.2384]]]
    """
    named = {"hidden": hidden, "classifier": classifier, "labels": labels, "bias": bias, "class_weight": class_weight}
    hidden, classifier, labels, bias, class_weight = _taken(**named)
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "temperature": temperature,
        "reduction": reduction,
    }
    outlines = arguments.parameters(*map(_outline, (hidden, classifier, bias)))
    memory = None if memory is None else arguments.positive(memory, "memory")
    unchecked = check_labels and not _check_rows(linear_logits(*outlines), labels, class_weight, check_labels, options)
    static = _hashable(options, check_labels=unchecked, memory=memory)
    return _linear(static, *_as_jax(hidden, classifier, bias, labels, class_weight))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(options: Options, hidden: Any, classifier: Any, bias: Any, labels: Any, class_weight: Any) -> jax.Array:
    named = {"hidden": hidden, "classifier": classifier, "bias": bias, "labels": labels, "class_weight": class_weight}
    return called(_linear_loss, options, (_loss_shape(options, hidden),), named)[0]


def _linear_forward(
    options: Options, hidden: Any, classifier: Any, bias: Any, labels: Any, class_weight: Any
) -> tuple[jax.Array, Any]:
    _refuse_gradients(labels=labels, class_weight=class_weight)
    wrt = tuple(name for name, value in zip(PARAMETERS, (hidden, classifier, bias), strict=True) if _is_wanted(value))
    named = _values(hidden=hidden, classifier=classifier, bias=bias, labels=labels, class_weight=class_weight)
    loss = _loss_shape(options, named["hidden"])
    if dict(options)["reduction"] == "none":
        return called(_linear_loss, options, (loss,), named)[0], (named, dict.fromkeys(wrt))
    results = (loss, *(_shape_of(named[name]) for name in wrt))
    reduced, *grads = called(_linear_grad, (*options, ("wrt", wrt)), results, named)
    return reduced, (named, dict(zip(wrt, grads, strict=True)))


def _linear_backward(options: Options, kept: Any, grad_output: jax.Array) -> tuple[Any, ...]:
    named, grads = kept
    wrt = tuple(grads)
    if dict(options)["reduction"] == "none":
        results = (_loss_shape(options, named["hidden"]), *(_shape_of(named[name]) for name in wrt))
        _, *found = called(_linear_grad, (*options, ("wrt", wrt)), results, named | {"grad_output": grad_output})
        grads = dict(zip(wrt, found, strict=True))
    else:
        grads = {name: grad * grad_output.astype(grad.dtype) for name, grad in grads.items()}
    return *(grads.get(name) for name in PARAMETERS), None, None


_linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


def _linear_loss(
    options: dict[str, Any], out: list[Array], hidden: Array, classifier: Array, labels: Array, **arrays: Any
) -> None:
    _store(out[0], _linear_cross_entropy(hidden, classifier, labels, **arrays, **options))


def _linear_grad(
    options: dict[str, Any], out: list[Array], hidden: Array, classifier: Array, labels: Array, **arrays: Any
) -> None:
    loss, grad = linear_cross_entropy_and_grad(hidden, classifier, labels, **arrays, **options)
    _store(out[0], loss)
    for target, name in zip(out[1:], options["wrt"], strict=True):
        target[...] = getattr(grad, name)


def binary_cross_entropy(
    logits: Any,
    targets: Any,
    *,
    pos_weight: Any = None,
    class_weight: Any = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """`gpuxent.binary_cross_entropy`, in nats; under `vmap` as `cross_entropy`.

    Args:
        logits: (N,) or (..., K). targets: of the same shape, in [0, 1] or ignore_index.
        pos_weight, class_weight: a number, or (K,). ignore_index, reduction: as `gpuxent.binary_cross_entropy`.

    Returns: float64 for float64 logits, else float32.

    Raises: as `gpuxent.binary_cross_entropy`; TypeError if anything but the logits is differentiated.

    >>> import jax, jax.numpy as jnp
    >>> jax.grad(binary_cross_entropy)(jnp.zeros(2), jnp.array([1.0, 0.0]), reduction="sum").tolist()
    [-0.5, 0.5]
    """
    named = {"logits": logits, "targets": targets, "pos_weight": pos_weight, "class_weight": class_weight}
    logits, targets, pos_weight, class_weight = _taken(**named)
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    weights = {"pos_weight": _known(pos_weight), "class_weight": _known(class_weight)}
    BinaryRows.open(_outline(logits), _outline(targets), "logits", **weights, **options, check=False)
    return _binary(_hashable(options), *_as_jax(logits, targets, pos_weight, class_weight))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _binary(options: Options, logits: Any, targets: Any, pos_weight: Any, class_weight: Any) -> jax.Array:
    named = {"logits": logits, "targets": targets, "pos_weight": pos_weight, "class_weight": class_weight}
    return called(_binary_loss, options, (_loss_shape(options, logits, elements=True),), named)[0]


def _binary_forward(
    options: Options, logits: Any, targets: Any, pos_weight: Any, class_weight: Any
) -> tuple[jax.Array, Any]:
    _refuse_gradients(targets=targets, pos_weight=pos_weight, class_weight=class_weight)
    named = _values(logits=logits, targets=targets, pos_weight=pos_weight, class_weight=class_weight)
    results = (_loss_shape(options, named["logits"], elements=True), _bits_shape(1))
    loss, count = called(_binary_loss, options, results, named)
    return loss, (named, {"count": count})


def _binary_backward(options: Options, kept: Any, grad_output: jax.Array) -> tuple[Any, ...]:
    return _in_place(_binary_grad, options, kept, grad_output), None, None, None


_binary.defvjp(_binary_forward, _binary_backward, symbolic_zeros=True)


def _binary_loss(options: dict[str, Any], out: list[Array], logits: Array, targets: Array, **weights: Any) -> None:
    loss, count = BinaryRows.open(logits, targets, "logits", **weights, **options).loss()
    _store(out[0], loss)
    for bits in out[1:]:
        bits.view(np.float64)[...] = count


def _binary_grad(
    options: dict[str, Any],
    out: list[Array],
    logits: Array,
    targets: Array,
    count: Array,
    grad_output: Array,
    **weights: Any,
) -> None:
    problem = BinaryRows.open(logits, targets, "logits", **weights, **options, check=False)
    denominator = count.view(np.float64)[0] if options["reduction"] == "mean" else 1.0
    problem.gradient(grad_output.astype(np.float64), denominator, out[0])


# ---- arguments ----


def _taken(**named: Any) -> tuple[Any, ...]:
    return tuple(_one_taken(name, value) for name, value in named.items())


def _one_taken(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (jax.Array, np.ndarray)):
        return value
    if isinstance(value, (list, tuple, Real, np.generic)):
        return np.asarray(value)
    raise TypeError(f"{name} must be a JAX or NumPy array, got {type(value).__module__}.{type(value).__qualname__}")


def _as_jax(*values: Any) -> list[Any]:
    return alike([_one_as_jax(value) for value in values])


def _one_as_jax(value: Any) -> jax.Array | None:
    """JAX makes 64 bits 32 by default; an integer beyond these must not wrap to a class."""
    if value is None:
        return None
    taken = jax.dtypes.canonicalize_dtype(value.dtype)
    if taken != value.dtype and taken.kind in "iu":
        value = np.clip(value, np.iinfo(taken).min, np.iinfo(taken).max)
    return jnp.asarray(value)


def _outline(value: Any) -> Any:
    """Shape and dtype of a JAX array, for checks that look at nothing else."""
    return np.broadcast_to(np.zeros((), value.dtype), value.shape) if isinstance(value, jax.Array) else value


def _known(value: Any) -> Any:
    """The values, if they are there and on the CPU; else an outline."""
    return np.asarray(value) if isinstance(value, jax.Array) and _is_known(value) else _outline(value)


def _is_known(value: Any) -> bool:
    if not isinstance(value, jax.Array):
        return True
    return not isinstance(value, jax.core.Tracer) and all(device.platform == "cpu" for device in value.devices())


def _check_rows(logits: Any, labels: Any, class_weight: Any, check_labels: bool, options: dict[str, Any]) -> bool:
    """Everything that can be checked now; are the labels among it? (Soft labels are not worth a read of their own.)"""
    known = _is_known(labels) and labels is not None and labels.dtype.kind in "iu"
    seen = _known(labels) if known else _outline(labels)
    Rows.open(logits, seen, class_weight=_known(class_weight), check_labels=bool(check_labels and known), **options)
    return known


def _hashable(options: dict[str, Any], **more: Any) -> Options:
    return tuple((options | more).items())


def _is_wanted(value: Any) -> bool:
    """Is the gradient of this argument of a forward rule?"""
    return value is not None and value.perturbed


def _values(**named: Any) -> dict[str, Any]:
    return {name: None if argument is None else argument.value for name, argument in named.items()}


def _refuse_gradients(**named: Any) -> None:
    for name, argument in named.items():
        if _is_wanted(argument):
            raise TypeError(f"there is no gradient of {name} here; pass jax.lax.stop_gradient({name})")


# ---- results ----


def _in_place(function: Any, options: Options, kept: Any, grad_output: jax.Array) -> jax.Array:
    """The gradient where the logits were."""
    named, more = kept
    logits = named["logits"]
    others = {name: array for name, array in named.items() if name != "logits"} | more | {"grad_output": grad_output}
    return called(function, options, (_shape_of(logits),), others, {"logits": logits})[0]


def _loss_shape(options: Options, logits: jax.Array, elements: bool = False) -> Shape:
    """Of the losses of rows, or of elements."""
    dtype = jnp.float64 if logits.dtype == np.float64 else jnp.float32
    shape = logits.shape if elements else logits.shape[:-1]
    return (shape if dict(options)["reduction"] == "none" else ()), dtype


def _bits_shape(*shape: int) -> Shape:
    """Of float64 numbers as JAX can keep them, which has no float64 by default."""
    return (*shape[:-1], 2 * shape[-1]), jnp.uint32


def _shape_of(array: jax.Array) -> Shape:
    return array.shape, array.dtype


def _store(target: Array, loss: Any) -> None:
    with np.errstate(over="ignore"):  # what float32 cannot hold is inf
        target[...] = loss
