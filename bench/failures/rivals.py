"""What several failures call of their rivals, each imported where it is called: it may not be installed."""

from __future__ import annotations

from typing import Any

import numpy as np


def torchmetrics_perplexity(logits: np.ndarray, labels: np.ndarray) -> float:
    """Of rows of logits, in one update."""
    import torch
    from torchmetrics.text import Perplexity

    metric = Perplexity()
    metric.update(torch.from_numpy(logits)[None], torch.from_numpy(labels)[None])
    return metric.compute().item()


def torch_cross_entropy(logits: np.ndarray, labels: np.ndarray, reduction: str) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction=reduction)
