"""Entropy, Kullback-Leibler and Jensen-Shannon divergence and cross-entropy of distributions, per row and in nats."""

from __future__ import annotations

from typing import Any

from gpuxent import _arguments as arguments
from gpuxent import _row_loss
from gpuxent._dlpack import returns_own_kind
from gpuxent._records import Array, PairStats
from gpuxent.backends import backend_of


@returns_own_kind
def entropy(p: Array, *, backend: str | None = None) -> Array:
    """H(p) = -sum p ln p of softmax(p) along the last axis, in nats; 0 ln 0 = 0.

    Args:
        p: logits (..., vocab), float16, bfloat16, float32 or float64; NumPy, CuPy or Dask, or a tensor on a GPU.
        backend: "numba" or "numpy"; "cupy" brings a NumPy array to the GPU; None for the best one where the array is.

    Returns: (...), float64 for float64 logits and float32 otherwise. NaN for a row that is all -inf, or has a NaN or
    +inf.

    Raises: ValueError, TypeError: an empty last axis, a dtype that is no float.

    >>> import numpy as np
    >>> float(entropy(np.zeros(8)).round(4))  # ln 8
    2.0794
    """
    p = arguments.rows(p, "p")
    owner = backend_of(p, backend)
    return _returned(p, p, owner.map_rows(_row_loss.entropy, owner.row_stats(p, also=("moment",))))


@returns_own_kind
def kl_divergence(p: Array, q: Array, *, backend: str | None = None) -> Array:
    """KL(p || q) = sum p ln(p / q) of softmax(p) and softmax(q) along the last axis, in nats.

    Summed as p ln(p/q) - p + q, in float64: never negative, and exact to rounding for models that nearly agree.

    Args:
        p, q: logits of one kind and shape (..., vocab), any float dtypes. The first is the reference (the base model,
            the data).
        backend: as `entropy`.

    Returns: (...), float64 if either is float64 and float32 otherwise. +inf where p > 0 meets q = 0.

    Raises: ValueError, TypeError: shapes that differ, an empty last axis, a dtype that is no float.

    >>> import numpy as np
    >>> float(kl_divergence(np.log([0.5, 0.5]), np.log([0.9, 0.1])).round(4))
    0.5108
    """
    return _divergence(p, q, "kl", backend)


@returns_own_kind
def js_divergence(p: Array, q: Array, *, backend: str | None = None) -> Array:
    """JS(p, q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, of softmax(p) and softmax(q), in nats: 0 to ln 2.

    Symmetric (J. Lin, 1991, doi:10.1109/18.61115). Arguments, result and errors as `kl_divergence`.

    >>> import numpy as np
    >>> float(js_divergence(np.array([0.0, -np.inf]), np.array([-np.inf, 0.0])).round(4))
    0.6931
    """
    return _divergence(p, q, "js", backend)


@returns_own_kind
def cross_entropy_between(p: Array, q: Array, *, backend: str | None = None) -> Array:
    """H(p, q) = -sum p ln q of softmax(p) and softmax(q) along the last axis, in nats, as H(p) + KL(p || q).

    Arguments, result and errors as `kl_divergence`.

    >>> import numpy as np
    >>> float(cross_entropy_between(np.log([0.5, 0.5]), np.log([0.9, 0.1])).round(4))
    1.204
    """
    p, q = arguments.pair(p, q)
    owner, stats = _pair(p, q, "kl", backend, also=("moment",))
    return _returned(p, q, owner.map_rows(_row_loss.entropy, stats.base) + stats.divergences.kl)


def _divergence(p: Any, q: Any, divergence: str, backend: str | None) -> Array:
    p, q = arguments.pair(p, q)
    _, stats = _pair(p, q, divergence, backend)
    return _returned(p, q, getattr(stats.divergences, divergence))


def _pair(
    p: Array, q: Array, divergence: str, backend: str | None, also: tuple[str, ...] = ()
) -> tuple[Any, PairStats]:
    owner = backend_of(p, backend)
    return owner, owner.pair_stats(p, owner.laid_out_as(p, q), divergences=(divergence,), also=also)


def _returned(p: Array, q: Array, values: Array) -> Array:
    """Values of the rows of p and q in the wider of their dtypes for results."""
    dtype = max(arguments.row_dtype(p), arguments.row_dtype(q), key=lambda kind: kind().itemsize)
    return arguments.as_row_dtype(backend_of(p), values, dtype)


# ---- from probabilities ----


@returns_own_kind
def entropy_from_probs(p: Array, *, check_probs: bool = True) -> Array:
    """H(p) = -sum p ln p of rows of probabilities, in nats; 0 ln 0 = 0.

    Args:
        p: (..., vocab) floats, each row non-negative and summing to 1 within max(1e-4, 4 eps of the dtype).
        check_probs: False saves the check of the values.

    Returns: (...), float64 for float64 probabilities and float32 otherwise.

    Raises: ValueError: a row that is no distribution; as `entropy` otherwise.

    >>> import numpy as np
    >>> float(entropy_from_probs(np.array([0.5, 0.5, 0.0])).round(4))
    0.6931
    """
    p = _checked(arguments.rows(p, "p"), "p", check_probs)
    return _returned(p, p, backend_of(p).cross_sums(p, p))


@returns_own_kind
def kl_divergence_from_probs(p: Array, q: Array, *, check_probs: bool = True) -> Array:
    """KL(p || q) = sum p ln(p / q) of rows of probabilities, in nats.

    Summed as p ln(p/q) - p + q: where rows sum to 1 only within rounding, this is what it is for the normalized rows
    (to second order), and never negative. +inf where p > 0 meets q = 0. Arguments and errors as `entropy_from_probs`.

    >>> import numpy as np
    >>> float(kl_divergence_from_probs(np.array([0.5, 0.5]), np.array([0.9, 0.1])).round(4))
    0.5108
    """
    p, q = _checked_pair(p, q, check_probs)
    return _returned(p, q, _probs_divergence(p, q, "kl"))


@returns_own_kind
def js_divergence_from_probs(p: Array, q: Array, *, check_probs: bool = True) -> Array:
    """JS(p, q) of rows of probabilities, in nats: 0 to ln 2. As `js_divergence`; arguments as `entropy_from_probs`.

    >>> import numpy as np
    >>> float(js_divergence_from_probs(np.array([1.0, 0.0]), np.array([0.0, 1.0])).round(4))
    0.6931
    """
    p, q = _checked_pair(p, q, check_probs)
    return _returned(p, q, _probs_divergence(p, q, "js"))


@returns_own_kind
def cross_entropy_between_from_probs(p: Array, q: Array, *, check_probs: bool = True) -> Array:
    """H(p, q) of rows of probabilities, in nats, as H(p) + KL(p || q). Arguments and errors as `entropy_from_probs`.

    >>> import numpy as np
    >>> float(cross_entropy_between_from_probs(np.array([0.5, 0.5]), np.array([0.9, 0.1])).round(4))
    1.204
    """
    p, q = _checked_pair(p, q, check_probs)
    return _returned(p, q, backend_of(p).cross_sums(p, p) + _probs_divergence(p, q, "kl"))


def _checked(p: Array, name: str, check: bool) -> Array:
    owner = backend_of(p)
    return owner.after(arguments.check_distributions(owner, p, name), p) if check else p


def _checked_pair(p: Any, q: Any, check: bool) -> tuple[Array, Array]:
    p, q = arguments.pair(p, q)
    q = backend_of(p).laid_out_as(p, q)
    return _checked(p, "p", check), _checked(q, "q", check)


def _probs_divergence(p: Array, q: Array, divergence: str) -> Array:
    return getattr(backend_of(p).divergence_sums(p, q, divergences=(divergence,)), divergence)
