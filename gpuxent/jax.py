"""Losses for JAX's transformations; see `gpuxent.interop.jax`."""

from gpuxent.interop.jax import binary_cross_entropy, cross_entropy, linear_cross_entropy

__all__ = ["binary_cross_entropy", "cross_entropy", "linear_cross_entropy"]
