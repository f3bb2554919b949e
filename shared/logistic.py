"""Multinomial logistic regression on frozen features: the linear probe."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, decay: float = 0.3, standardise: bool = True
) -> Callable[[Tensor], Tensor]:
    """Fit on features (N, C) and give a function from features to class indices.

    decay: half the squared weights times this is added to the mean cross entropy.  standardise: features by their mean
    and deviation first (not where most are zero, which would make much of the rarest).
    """
    mean, deviation = torch.zeros(()), torch.ones(())
    if standardise:
        mean, deviation = features.mean(0), features.std(0) + 1e-6
    weight = torch.zeros(features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    known = (features - mean) / deviation
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(known @ weight + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)  # type: ignore[arg-type]
    return lambda unknown: ((unknown - mean) / deviation @ weight + bias).argmax(1)
