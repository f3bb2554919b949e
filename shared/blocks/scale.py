"""A frozen tensor times a trained vector, plus another where asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.adapter import WeightAdapter


class Scale(WeightAdapter):
    """The weight's rows (axis 0, outputs) or columns (axis 1, inputs) times ``scale``, which starts at one.

    Given another adapter's ``scale``, it follows that one: a bias is scaled as its weight is.
    """

    def __init__(self, size: int, axis: int = 0, scale: nn.Parameter | None = None):
        super().__init__()
        self.axis = axis
        self.scale = nn.Parameter(torch.ones(size)) if scale is None else scale

    def factor(self, weight: Tensor) -> Tensor:
        """The scale in the weight's shape, its axis apart."""
        return self.scale.reshape([-1 if axis == self.axis else 1 for axis in range(weight.ndim)])

    def delta(self, weight: Tensor) -> Tensor:
        return weight * (self.factor(weight) - 1)


class ScaleShift(Scale):
    """A bias times ``scale`` plus ``shift``, which starts at zero."""

    def __init__(self, size: int, scale: nn.Parameter | None = None):
        super().__init__(size, 0, scale)
        self.shift = nn.Parameter(torch.zeros(size))

    def delta(self, weight: Tensor) -> Tensor:
        return super().delta(weight) + self.shift
