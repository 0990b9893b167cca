"""Losses for PyTorch's autograd, on the tensors' own memory and device: nothing is copied to get there.

A CPU tensor is read through Numba or NumPy, one on a GPU by the CUDA kernels, on the current stream. Arguments are
named as in `torch.nn.functional`, and classes are on axis 1, as there; the options that gpuxent adds keep their names.
Losses are float32 for 16-bit logits, where PyTorch rounds them to 16 bits. Gradients cannot be differentiated again.
`torch.compile` leaves a call out of its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import ml_dtypes
import numpy as np
import torch

from gpuxent import _arguments as arguments
from gpuxent._records import LinearGrad
from gpuxent._rows import BinaryRows, Rows
from gpuxent.backends import _cupy_found
from gpuxent.linear import linear_cross_entropy as _linear_cross_entropy
from gpuxent.linear import linear_cross_entropy_and_grad


@torch.compiler.disable
def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_labels: bool = True,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy`, in nats: one read of the logits forwards, a read and a write backwards.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), float16, bfloat16, float32 or float64, of any strides.
        target: classes, integers without the axis C, or probabilities of the shape of `input`.
        weight: (C,) by class.
        ignore_index, reduction, label_smoothing: as in PyTorch.
        z_loss, softcap, temperature, check_labels: as `gpuxent.cross_entropy`.

    Returns: float64 for float64 logits, else float32.

    Raises: as `gpuxent.cross_entropy`.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0]))
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(g, 4) for g in logits.grad[0].tolist()]
    (0.2395, [-0.213, 0.1065, 0.1065])
    """
    _check_tensors(input=input, target=target, weight=weight)
    last = min(1, input.ndim - 1)
    options = {
        "class_weight": None if weight is None else _array(weight),
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "temperature": temperature,
        "reduction": reduction,
        "check_labels": check_labels,
    }
    soft = target.is_floating_point() and target.shape == input.shape
    labels = target.movedim(last, -1) if soft else target
    return _CrossEntropy.apply(input.movedim(last, -1), labels, options)


class _Final(torch.autograd.Function):
    """A gradient that is a constant for autograd: to differentiate it is an error, not 0."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *_of: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("the gradients of gpuxent.torch's losses cannot be differentiated again")


def _last_gradient(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` whose results are `_Final`, for those who ask for a graph of it (create_graph=True)."""

    @wraps(backward)
    def call(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, grad_output)
        if not torch.is_grad_enabled():
            return found
        inputs = [tensor for tensor in ctx.saved_tensors if tensor is not None]
        return tuple(None if g is None else _Final.apply(g, grad_output, *inputs) for g in found)

    return call


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        with _on_stream_of(logits):
            rows = Rows.open(_array(logits), _array(labels), **options)
            stats, denominators = rows.stats(), rows.denominators(None)
            loss = rows.reduced(*rows.losses(stats), *denominators)
        ctx.rows, ctx.stats, ctx.denominators = rows, stats, denominators
        ctx.save_for_backward(logits)  # autograd then notices if they are written to before the gradient is made
        return _loss_tensor(loss, logits)

    @staticmethod
    @_last_gradient
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        rows = ctx.rows
        with _on_stream_of(logits):
            weights = rows.weights(_upstream(grad_output), *ctx.denominators)
            how = {"spread": rows.spread, "transform": rows.options.transform}
            dlogits = rows.backend.logit_grad(rows.logits, rows.labels, ctx.stats, weights, **how)
            return _tensor(dlogits), None, None


@torch.compiler.disable
def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_labels: bool = True,
    memory: int | None = None,
) -> torch.Tensor:
    """`cross_entropy` of `torch.nn.functional.linear(input, linear_weight, linear_bias)`, without an array of logits.

    The gradients are made with the loss, tile by tile, and kept for `backward` (three products); with reduction="none"
    they are made in `backward` (four). Classes are on the last axis here: input is (..., features).

    Args:
        input: (..., features). linear_weight: (C, features). linear_bias: (C,). All of one dtype.
        target: integers (...), or probabilities (..., C).
        memory: as `gpuxent.linear_cross_entropy`; the others as `cross_entropy`.

    Returns: float64 for float64 input, else float32.

    >>> import torch
    >>> hidden, head = torch.ones(1, 1, requires_grad=True), torch.nn.Linear(1, 2, bias=False)
    >>> linear_cross_entropy(hidden, head.weight, torch.tensor([0])).backward()
    >>> head.weight.grad.sum().abs().item() < 1e-6
    True
    """
    _check_tensors(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    options = {
        "class_weight": None if weight is None else _array(weight),
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "temperature": temperature,
        "reduction": reduction,
        "check_labels": check_labels,
        "memory": memory,
    }
    return _LinearCrossEntropy.apply(input, linear_weight, linear_bias, target, options)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        classifier: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        needed = zip(("hidden", "classifier", "bias"), ctx.needs_input_grad, strict=False)
        ctx.wrt, ctx.options = tuple(name for name, need in needed if need), options
        ctx.save_for_backward(hidden, classifier, bias, labels)
        ctx.grad = None
        with _on_stream_of(hidden):
            if ctx.wrt and options["reduction"] != "none":
                loss, ctx.grad = _gradients(ctx, (hidden, classifier, bias, labels), 1.0)
            else:
                arrays = (_array(hidden), _array(classifier), _array(labels))
                loss = _linear_cross_entropy(*arrays, bias=None if bias is None else _array(bias), **options)
        return _loss_tensor(loss, hidden)

    @staticmethod
    @_last_gradient
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden = ctx.saved_tensors[0]
        with _on_stream_of(hidden):
            if ctx.grad is None:
                _, grad = _gradients(ctx, ctx.saved_tensors, _upstream(grad_output))
                return (*map(_tensor, vars(grad).values()), None, None)
            scale = grad_output.to(hidden.dtype)
            return (*(None if g is None else _tensor(g) * scale for g in vars(ctx.grad).values()), None, None)


def _gradients(ctx: Any, tensors: Sequence[Any], upstream: Any) -> tuple[Any, LinearGrad]:
    hidden, classifier, bias, labels = (None if tensor is None else _array(tensor) for tensor in tensors)
    options = {"bias": bias, "grad_output": upstream, "wrt": ctx.wrt, **ctx.options}
    return linear_cross_entropy_and_grad(hidden, classifier, labels, **options)


@torch.compiler.disable
def binary_cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    *,
    pos_weight: torch.Tensor | float | None = None,
    class_weight: torch.Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`torch.nn.functional.binary_cross_entropy_with_logits`; see `gpuxent.binary_cross_entropy` for the options.

    Args:
        input: logits (N,) or (..., K). target: of the same shape, in [0, 1] or ignore_index.

    Returns: float64 for float64 logits, else float32.

    >>> import torch
    >>> x = torch.zeros(2, requires_grad=True)
    >>> binary_cross_entropy(x, torch.tensor([1.0, 0.0]), reduction="sum").backward()
    >>> x.grad.tolist()
    [-0.5, 0.5]
    """
    _check_tensors(input=input, target=target)
    weights = {
        name: _array(value) if isinstance(value, torch.Tensor) else value
        for name, value in (("pos_weight", pos_weight), ("class_weight", class_weight))
    }
    options = {**weights, "ignore_index": ignore_index, "reduction": reduction}
    return _BinaryCrossEntropy.apply(input, target, options)


class _BinaryCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        with _on_stream_of(logits):
            ctx.problem = BinaryRows.open(_array(logits), _array(targets), "logits", **options)
            loss, ctx.count = ctx.problem.loss()
        ctx.save_for_backward(logits)
        return _loss_tensor(loss, logits)

    @staticmethod
    @_last_gradient
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        with _on_stream_of(logits):
            return _tensor(ctx.problem.gradient(_upstream(grad_output), ctx.count, None)), None, None


# ---- tensors and arrays ----


def _check_tensors(**named: Any) -> None:
    for name, value in named.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__module__}.{type(value).__qualname__}")
    devices = {name: value.device for name, value in named.items() if value is not None}
    first = next(iter(devices.values()))
    for name, device in devices.items():
        if device != first:
            raise ValueError(f"{name} must be on the device of input, {first}, got {device}")


def _array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as a NumPy or CuPy array."""
    tensor = tensor.detach()
    if tensor.is_cuda:
        return _cupy_found.cupy().from_dlpack(tensor)
    if tensor.dtype == torch.bfloat16:  # NumPy's DLPack has no such type
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: Any) -> Any:
    """An array's memory as a tensor; None stays None."""
    if array is None:
        return None
    if not isinstance(array, np.ndarray):
        return torch.from_dlpack(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array) if any(s < 0 for s in array.strides) else array)


def _loss_tensor(loss: Any, logits: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    found = _tensor(np.asarray(loss) if np.isscalar(loss) else loss)
    return found.to(dtype)


def _upstream(grad_output: torch.Tensor) -> Any:
    return arguments.array(_array(grad_output), "grad_output").astype(np.float64)


@contextmanager
def _on_stream_of(tensor: torch.Tensor) -> Iterator[None]:
    """What CuPy launches for a tensor on a GPU, on its device and PyTorch's current stream there."""
    if not tensor.is_cuda:
        yield
        return
    cupy = _cupy_found.cupy()
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    with cupy.cuda.Device(tensor.device.index), cupy.cuda.ExternalStream(stream):
        yield
