"""A weight's magnitude apart from its direction (Liu et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.adapter import WeightAdapter


class Decomposed(WeightAdapter):
    """``magnitude * V / |V|`` with ``V = W + change``, by output row or by column; exactly W at the start.

    change: of the direction, zero at the start.  columns: norms of columns (rows and kernel), not of rows.
    magnitude: (rows,) or (1, columns), the norms of W at the start.  detach_norm: |V| takes no gradient.
    dropout: ``W x`` stays whole and ``(W' - W) x`` sees the dropped-out x, as in the authors' code.
    Strength 0 to 1 moves from the frozen weight to this one.
    """

    def __init__(
        self, weight: Tensor, change: WeightAdapter, *, columns: bool = False, detach_norm: bool = True,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.change, self.columns, self.detach_norm, self.dropout = change, columns, detach_norm, float(dropout)
        with torch.no_grad():
            self.magnitude = nn.Parameter(self._norms(weight.to(next(change.parameters()).dtype)))

    def _norms(self, weight: Tensor) -> Tensor:
        if self.columns:
            return torch.linalg.vector_norm(weight.transpose(0, 1).flatten(1), dim=1).unsqueeze(0)
        return torch.linalg.vector_norm(weight.flatten(1), dim=1)

    def value(self, weight: Tensor) -> Tensor:
        """The whole new weight, in the adapter's precision."""
        moved = weight.to(self.magnitude.dtype) + self.change.delta(weight)
        norms = self._norms(moved.detach() if self.detach_norm else moved)
        # A row of zeros has the norm 0 and the magnitude 0, and stays a row of zeros.
        gain = self.magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return moved * gain.reshape(*gain.shape, *(1,) * (weight.ndim - gain.ndim))

    def delta(self, weight: Tensor) -> Tensor:
        return self.value(weight) - weight

    def forward(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        # lerp, not a sum: exactly the new weight at strength 1 and the frozen one at 0.
        value = self.value(weight)
        return torch.lerp(weight.to(value.dtype), value, strength).to(weight.dtype)
