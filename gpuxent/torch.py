"""Losses for PyTorch's autograd; see `gpuxent.interop.torch`."""

from gpuxent.interop.torch import binary_cross_entropy, cross_entropy, linear_cross_entropy

__all__ = ["binary_cross_entropy", "cross_entropy", "linear_cross_entropy"]
