"""Products of 16-bit matrices on a GPU's tensor cores with float32 sums and results, which CuPy's `matmul` rounds to 16
bits."""

from __future__ import annotations

import numpy as np

from gpuxent._records import Array
from gpuxent.backends import _cupy_found

TYPES = {"float16": 2, "bfloat16": 14}  # of cudaDataType
FLOAT32, DEFAULT_ALGORITHM = 0, -1  # of cudaDataType and cublasGemmAlgo_t
PLAIN, TRANSPOSED = 0, 1  # of cublasOperation_t
_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


def has_tensor_cores(array: Array) -> bool:
    """Whether the GPU of a CuPy array has them for both 16-bit dtypes."""
    return int(array.device.compute_capability) >= 80


def product(a: Array, b: Array, out: Array, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b. a (m, k) and b (k, n) are of one 16-bit dtype; out (m, n) is float32, and numbers
    of a row lie side by side.

    cuBLAS stores by columns: it is asked for out.T = b.T @ a.T, whose parts are a, b and out as they lie in memory.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    if not rows * columns * inner:
        out[...] = out if add else 0
        return
    cuda = _cupy_found.cupy().cuda
    (a, of_a, a_step), (b, of_b, b_step) = _as_stored(a), _as_stored(b)
    kind, beta = TYPES[a.dtype.name], _ONE if add else _ZERO
    out_step = max(out.strides[0] // out.itemsize, columns)
    sizes = (columns, rows, inner, _ONE.ctypes.data)
    factors = (b.data.ptr, kind, b_step, a.data.ptr, kind, a_step)
    result = (beta.ctypes.data, out.data.ptr, FLOAT32, out_step)
    handle = cuda.device.get_cublas_handle()
    cuda.cublas.gemmEx(handle, of_b, of_a, *sizes, *factors, *result, FLOAT32, DEFAULT_ALGORITHM)


def _as_stored(matrix: Array) -> tuple[Array, int, int]:
    """(matrix or a copy, PLAIN if its rows follow one another or TRANSPOSED if its columns do, the step between)."""
    (by_row, by_column), (rows, columns) = (step // matrix.itemsize for step in matrix.strides), matrix.shape
    if (columns == 1 or by_column == 1) and (rows == 1 or by_row >= columns):
        return matrix, PLAIN, max(by_row, columns)
    if (rows == 1 or by_row == 1) and (columns == 1 or by_column >= rows):
        return matrix, TRANSPOSED, max(by_column, rows)
    return matrix.copy(), PLAIN, columns
