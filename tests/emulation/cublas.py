"""`cublasGemmEx` as its documentation has it: matrices stored by columns, at addresses, in their own dtypes."""

import ctypes

import ml_dtypes
import numpy as np

HANDLE = 20077
TYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}
FLOAT32 = (0, 68)  # as a data type, which CuPy passes, and as a type of computing


def gemmEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType, algo
):
    """C = alpha op(A) op(B) + beta C, with op(A) (m, k), op(B) (k, n) and C (m, n)."""
    if handle != HANDLE or {transa, transb} - {0, 1} or min(m, n, k) < 1 or computeType not in FLOAT32:
        raise ValueError("CUBLAS_STATUS_INVALID_VALUE")
    if Atype != Btype or Atype not in (2, 14) or Ctype != 0 or algo != -1:
        raise NotImplementedError("CUBLAS_STATUS_NOT_SUPPORTED")
    a = _stored_by_columns(A, (k, m) if transa else (m, k), lda, Atype)
    b = _stored_by_columns(B, (n, k) if transb else (k, n), ldb, Btype)
    c = _stored_by_columns(C, (m, n), ldc, Ctype)
    product = (a.T if transa else a).astype(np.float32) @ (b.T if transb else b).astype(np.float32)
    before = c * _scalar(beta) if _scalar(beta) else np.float32(0)  # with 0 what is there is not read
    c[...] = _scalar(alpha) * product + before


def _scalar(address):
    return np.float32(ctypes.c_float.from_address(address).value)


def _stored_by_columns(address, shape, step, kind):
    rows, columns = shape
    if step < max(1, rows):
        raise ValueError("CUBLAS_STATUS_INVALID_VALUE: a leading dimension is too small")
    dtype = TYPES[kind]
    count = step * (columns - 1) + rows
    raw = np.frombuffer((ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(raw, shape, (dtype.itemsize, step * dtype.itemsize))
