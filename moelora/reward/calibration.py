"""Confidence that means what it says.

Shapes: N prompts, T categories.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LIMITS = (0.05, 20.0)


def fit_temperature(logits_NT: Tensor, labels_N: Tensor) -> float:
    """The number that logits are divided by for the least cross-entropy (Guo et al. 2017, arXiv 1706.04599).

    Each label counts for (N + 1) / (N + 2), as in Platt (1999): where a few prompts are all classified rightly, that
    is no proof of certainty, and without it the temperature would fall for ever.
    """
    count, classes = logits_NT.shape
    smoothing = classes / ((classes - 1) * (count + 2))
    logits_NT = logits_NT.detach().double()
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithm], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits_NT / logarithm.exp(), labels_N, label_smoothing=smoothing)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(logarithm.detach().exp().clamp(*LIMITS))
