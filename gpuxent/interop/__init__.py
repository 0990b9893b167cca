"""Losses for autograd libraries; each module imports its library, and nothing else does."""
