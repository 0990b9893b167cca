"""The CUDA source files, and what they and Python have to agree on. CuPy is not needed for this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

FOLDER = Path(__file__).parent / "kernels"

# -ftz: exp2 of a denormal costs scaling instructions without it, and no sum here depends on one.
OPTIONS = ("-std=c++17", "-ftz=true")

ROWS = (
    "float32",
    "formats",
    "task",
    "groups",
    "gradient",
    "sums",
    "resident",
    "split",
)  # the files of the kernels over rows
PAIRS = (*ROWS, "pairs")

C_TYPES = {
    np.dtype(stored): name
    for stored, name in (
        (np.float16, "__half"),
        (ml_dtypes.bfloat16, "__nv_bfloat16"),
        (np.float32, "float"),
        (np.float64, "double"),
    )
}

# The bits of the template argument `how`, as in task.cu.
ARGMAX, MOMENT, RANK, SOFTCAP, GRADIENT = 1, 2, 4, 8, 16
UNIFORM, BY_CLASS, SOFT = 32, 64, 96
TEMPERATURE = 128

VECTOR = 16  # bytes of a vector
VECTORS_EACH = 4  # per thread, for rows in registers
CLUSTER = 8  # blocks
SYSTEM_SHARED = 1024  # bytes of shared memory that the system takes for each block
BLOCK_SHARED = 8 * (32 * 16 + 16) + 64  # bytes that a BlockGroup takes of the shared memory

# struct Task of task.cu, which is passed by value: addresses and integers, and a few float64 numbers.
NUMBERS = ("scale_number", "base_number", "softcap", "inverse_softcap", "temperature", "inverse_temperature")
TASK = np.dtype(
    [
        (name, np.float64 if name in NUMBERS else np.int64)
        for name in (
            *("logits", "out", "labels", "ranked_logit", "label_weight", "spread_weight", "lse_weight", "soft"),
            *("scale", "base", "scale_number", "base_number"),
            *("max", "rest", "label_logit", "gap", "weight", "moment", "argmax", "rank", "pieces"),
            *("rows", "inner", "vocab", "slices", "steps", "vocab_start"),
            *(f"{array}_{step}" for array in ("logits", "out", "soft") for step in ("outer", "step", "column")),
            *("softcap", "inverse_softcap", "temperature", "inverse_temperature"),
        )
    ]
)


@cache
def source(*names: str) -> str:
    """The files of that name, one after another: CuPy's disk cache goes by the text, not by what it includes."""
    return "".join(f'#line 1 "{name}.cu"\n{(FOLDER / f"{name}.cu").read_text()}' for name in names)


KEEPING = ("kept_rows", "cluster_rows", "pair_rows", "cluster_pairs")  # rows in shared memory


def files_of(kernel: str) -> tuple[str, ...]:
    """The files of a kernel over rows, or over pairs of them."""
    return PAIRS if kernel.startswith(("pair_rows", "cluster_pairs", "divergence_rows")) else ROWS


def is_double(logit: str, how: int) -> bool:
    """Whether a kernel computes in float64: `real_of` in task.cu."""
    return logit == "double" or bool(how & SOFTCAP)


def most_threads(logit: str, how: int) -> int:
    """Of a block with a row in registers or in shared memory: `most_threads` in resident.cu."""
    return 256 if is_double(logit, how) and how & ~(GRADIENT | ARGMAX) else 512


def piece_columns(vocab: int, slices: int) -> int:
    """The columns of a piece: `width` of struct Piece in task.cu."""
    share = -(-vocab // slices)
    return -(-share // 16) * 16


# ---- all that is compiled ----


@dataclass(frozen=True)
class Build:
    """Kernels that are compiled together: files and name expressions. `every_arch`: not only for one GPU."""

    files: tuple[str, ...]
    names: tuple[str, ...]
    every_arch: bool
    least_arch: int = 75


def builds() -> Iterator[Build]:
    """Every kernel, with every feature by itself and with all of them."""
    everything = ARGMAX | MOMENT | RANK | SOFT
    for logit in C_TYPES.values():
        for how in (0, GRADIENT):
            yield Build(ROWS, tuple(_resident(logit, how)), every_arch=True)
            yield Build(ROWS, (_cluster(logit, how),), every_arch=True, least_arch=90)
        yield Build(ROWS, tuple(_others(logit)), every_arch=True)
        for how in (UNIFORM, BY_CLASS, SOFT):
            with_gradient = (*_gradient(logit, how), *_resident(logit, how | GRADIENT))
            yield Build(ROWS, (*_resident(logit, how), *with_gradient), every_arch=False)
        for how in (ARGMAX, MOMENT, RANK, SOFTCAP):
            yield Build(ROWS, tuple(_resident(logit, how)), every_arch=False)
        for how in (everything, everything | GRADIENT, everything | SOFTCAP, everything | SOFTCAP | GRADIENT):
            yield Build(ROWS, tuple(_resident(logit, how)), every_arch=False)
            yield Build(ROWS, (_cluster(logit, how),), every_arch=False, least_arch=90)
        yield Build(ROWS, tuple(_gradient(logit, SOFT | SOFTCAP)), every_arch=False)
        if logit in ("__half", "__nv_bfloat16"):
            for how in (TEMPERATURE, TEMPERATURE | GRADIENT, TEMPERATURE | everything):
                yield Build(ROWS, tuple(_resident(logit, how)), every_arch=False)
                yield Build(ROWS, (_cluster(logit, how),), every_arch=False, least_arch=90)
        if logit != "double":
            for how in (0, ARGMAX | MOMENT | RANK):
                yield Build(ROWS, tuple(f"{kernel}<{logit}, {how}>" for kernel in SPLIT), every_arch=not how)
    yield from _pair_builds()
    kinds = [(value, denominator) for value in ("bool", "double") for denominator in ("double", "const double*")]
    names = tuple(f"totals::exact_total<{value}, {denominator}>" for value, denominator in kinds)
    yield Build(("formats", "totals"), names, every_arch=True)
    yield Build(("terms",), (), every_arch=True)  # functions, of which CuPy makes kernels


def _pair_builds() -> Iterator[Build]:
    """Pairs of one type with what a comparison asks for, the usual types without it and with softcap; and of two types.
    They take long to compile: not all are for every architecture."""
    compared = ARGMAX | MOMENT | RANK
    for logit in C_TYPES.values():
        usual = logit in ("float", "__nv_bfloat16")
        for how in (compared, 0, compared | SOFTCAP) if usual else (compared,):
            logits, every_arch = (logit, logit), usual and how == compared
            yield Build(PAIRS, tuple(pair_kernels(logits, (how, how))), every_arch)
            yield Build(PAIRS, (cluster_pairs(logits, (how, how)),), every_arch, least_arch=90)
    yield Build(PAIRS, tuple(pair_kernels(("float", "__nv_bfloat16"), (compared, compared))), every_arch=False)


def pair_kernels(logits: tuple[str, str], hows: tuple[int, int], tempered: bool = False) -> list[str]:
    """In shared memory, through L2, and given the statistics."""
    arguments = _pair_arguments(logits, hows, tempered)
    return [*(f"pair_rows<{arguments}, {copied}>" for copied in ("true", "false")), f"divergence_rows<{arguments}>"]


def cluster_pairs(logits: tuple[str, str], hows: tuple[int, int], tempered: bool = False) -> str:
    return f"cluster_pairs<{_pair_arguments(logits, hows, tempered)}>"


def _pair_arguments(logits: tuple[str, str], hows: tuple[int, int], tempered: bool) -> str:
    double = tempered or any(map(is_double, logits, hows))
    return f"{', '.join(logits)}, {hows[0]}, {hows[1]}, {'double' if double else 'float'}"


SPLIT = ("piece_tops", "piece_sums", "merge_pieces")  # in the order of their launches


def _resident(logit: str, how: int) -> Iterable[str]:
    rows = f"<{logit}, float, {how}"
    yield from (f"small_rows{rows}, {lanes}>" for lanes in (8, 16, 32))
    yield f"block_rows{rows}>"
    yield from (f"kept_rows{rows}, {copied}>" for copied in ("true", "false"))


SHARES = (8, 32, 0)  # lanes that share a row, or a block


def _gradient(logit: str, how: int) -> Iterable[str]:
    return (f"gradient_rows<{logit}, float, {how}, {lanes}>" for lanes in SHARES)


def _cluster(logit: str, how: int) -> str:
    return f"cluster_rows<{logit}, float, {how}>"


def _others(logit: str) -> Iterable[str]:
    yield from _gradient(logit, 0)
    yield from (f"log_prob_rows<{logit}, {lanes}>" for lanes in SHARES)
    yield from (f"label_logit_rows<{logit}, {how}>" for how in (0, SOFTCAP))
