"""Arrays on a GPU at the door of the public functions: tensors of other libraries (PyTorch, JAX) are taken as CuPy
arrays without a copy, results returned as the caller's own kind, and the work is done on the device of the first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from inspect import signature
from typing import Any, TypeVar

import numpy as np

from gpuxent._records import LinearGrad
from gpuxent._row_loss import RowSummary
from gpuxent.backends import _cupy_found, is_cupy

CUDA, CUDA_MANAGED = 2, 13  # DLPack's numbers of the kinds of device

Function = TypeVar("Function", bound=Callable[..., Any])


def returns_own_kind(function: Function) -> Function:
    """`function` for tensors of other libraries on a GPU too; results are of the kind of its first argument, on its
    device."""
    names = list(signature(function).parameters)

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        first = arguments[0] if arguments else options.get(names[0])
        if not is_cupy(first) and not _on_cuda(first):
            return function(*arguments, **options)
        named = [*zip(names, arguments, strict=False), *options.items()]
        taken = {id(value): _as_cupy(value, name) for name, value in named if _on_cuda(value)}

        def own(value: Any) -> Any:  # the same for logits that are out as well
            return taken.get(id(value), value)

        with own(first).device:
            result = function(*map(own, arguments), **{name: own(value) for name, value in options.items()})
        if is_cupy(first):
            return result
        originals = {id(own(value)): value for _, value in named if id(value) in taken}
        return _returned(result, originals, _importer(first))

    return call  # type: ignore[return-value]


def _on_cuda(value: Any) -> bool:
    kind: Any = type(value)
    return _has_dlpack(kind) and value.__dlpack_device__()[0] in (CUDA, CUDA_MANAGED)


@cache
def _has_dlpack(kind: type) -> bool:
    if issubclass(kind, np.ndarray) or (kind.__module__, kind.__name__) == ("cupy", "ndarray"):
        return False
    return hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__")


def _as_cupy(value: Any, name: str) -> Any:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if getattr(value, "requires_grad", False):
        detach = f"pass {name}.detach(), or use gpuxent.torch, whose losses autograd differentiates"
        raise TypeError(f"{name} is a {kind} that requires gradients, which would be lost: {detach}")
    if name == "out" and kind.startswith("jax"):
        raise TypeError(f"out must be writable, got an immutable {kind}")
    return _cupy_found.cupy().from_dlpack(value)


def _importer(tensor: Any) -> Callable[[Any], Any] | None:
    """from_dlpack of the tensor's library, which is loaded already; None if it has none in the usual places."""
    if hasattr(tensor, "__array_namespace__"):
        return getattr(tensor.__array_namespace__(), "from_dlpack", None)
    packages = (sys.modules.get(base.__module__.partition(".")[0]) for base in type(tensor).__mro__)
    return next(filter(None, (getattr(package, "from_dlpack", None) for package in packages)), None)


def _returned(result: Any, originals: dict[int, Any], importer: Callable[[Any], Any] | None) -> Any:
    if isinstance(result, tuple):
        return tuple(_returned(item, originals, importer) for item in result)
    if isinstance(result, (RowSummary, LinearGrad)):
        return type(result)(*(_returned(value, originals, importer) for value in vars(result).values()))
    if importer is None or not is_cupy(result):
        return result
    return originals[id(result)] if id(result) in originals else importer(result)
