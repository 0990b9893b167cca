"""XLA calls Python when arrays are there, and has results written into its own buffers.

`jax.experimental.buffer_callback` copies nothing, on a CPU or a GPU. `jax.pure_callback` copies what goes in and out,
on a GPU to the CPU and back; and it makes arrays of JAX in the middle of a computation, for which np.asarray was seen
to wait for ever on one core (JAX 0.10.2). Here no function of JAX is called while XLA waits.

XLA's threads take numbers below the smallest normal one for 0; those of gpuxent's pool do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from gpuxent._dlpack import CUDA
from gpuxent._records import Array
from gpuxent.backends import _cupy_found

Options = tuple[tuple[str, Any], ...]  # names and values, which JAX can hash
Shape = tuple[tuple[int, ...], Any]  # and dtype
Function = Callable[..., None]  # of options, arrays to write to, and arrays by name

SHARED = ("class_weight", "pos_weight", "classifier")  # by all rows: where there are such, vmap's entries are no rows


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def called(
    function: Function,
    options: Options,
    results: tuple[Shape, ...],
    arrays: dict[str, Any],
    given_up: dict[str, Any] | None = None,
) -> tuple[jax.Array, ...]:
    """What function(options, results, **arrays) writes into arrays of these shapes.

    The first result takes the memory of the array that is given up; XLA copies that where it is wanted later.
    """
    call = _Call(function, options, axes=len(results[0][0]))
    shapes = tuple(jax.ShapeDtypeStruct(*result) for result in results)
    how: dict[str, Any] = {"vmap_method": "expand_dims"}
    if given_up:
        how = {"vmap_method": "broadcast_all", "input_output_aliases": {0: 0}}
    found = buffer_callback(call, shapes, **how)(given_up or {}, arrays)
    return tuple(_alike(found, jax.tree.leaves((given_up, arrays))))


@called.defjvp
def _no_derivative(*_: Any) -> Any:
    raise TypeError("the gradients of gpuxent.jax's losses cannot be differentiated again")


@dataclass(frozen=True)
class _Call:
    """What XLA calls. Two with the same fields are equal, so that JAX finds what it has compiled for the other."""

    function: Function
    options: Options
    axes: int  # of the first result, without those that vmap has put in front

    def __call__(self, context: Any, out: tuple[Any, ...], given_up: dict[str, Any], buffers: dict[str, Any]) -> None:
        options, buffers = dict(self.options), given_up | buffers
        with _memory(context, out[0]) as array_of:
            results = [array_of(buffer) for buffer in out]
            arrays = {name: None if buffer is None else array_of(buffer) for name, buffer in buffers.items()}
            batch = results[0].shape[: results[0].ndim - self.axes]
            if options["reduction"] == "none" and all(arrays.get(name) is None for name in SHARED):
                self.function(options, results, **_as_rows(arrays, batch))
                return
            for index in np.ndindex(batch):
                entry = {name: None if array is None else array[_place(index, array)] for name, array in arrays.items()}
                self.function(options, [result[(*index, ...)] for result in results], **entry)


def _as_rows(arrays: dict[str, Any], batch: tuple[int, ...]) -> dict[str, Any]:
    """All entries of a batch as rows of one call. An array that is not mapped has axes of length 1 for it."""
    return {
        name: None if array is None else np.broadcast_to(array, batch + array.shape[len(batch) :])
        for name, array in arrays.items()
    }


def _place(index: tuple[int, ...], array: Array) -> tuple[Any, ...]:
    return *(0 if size == 1 else i for i, size in zip(index, array.shape, strict=False)), ...


def alike(arrays: Sequence[Any]) -> list[Any]:
    """Inside a shard_map: what its devices share becomes the own of each, so that gradients of it are added up."""
    return _alike(arrays, [array for array in arrays if array is not None])


def _alike(arrays: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    axes = frozenset[str]().union(*map(_varying, given))

    def own(array: Any) -> Any:
        return None if array is None else jax.lax.pcast(array, tuple(axes - _varying(array)), to="varying")

    return [own(array) for array in arrays]


def _varying(array: Any) -> frozenset[str]:
    """Axes of the mesh along which devices have arrays of their own. (JAX 0.10 has renamed them.)"""
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


@contextmanager
def _memory(context: Any, buffer: Any) -> Iterator[Callable[[Any], Array]]:
    """What makes arrays of XLA's buffers. CuPy works on XLA's stream meanwhile."""
    kind, number = buffer.__dlpack_device__()
    if kind != CUDA:
        yield np.asarray
        return
    cupy = _cupy_found.cupy()
    with cupy.cuda.Device(number), cupy.cuda.ExternalStream(context.stream):
        yield cupy.from_dlpack
