"""A change of rank r of a weight seen as a matrix (output rows, everything else)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shared.adapter import Factors, WeightAdapter
from shared.errors import RequestError


class LowRank(WeightAdapter):
    """``scale * up.T @ down`` on a weight of any shape: linear, embedding, convolution (grouped or not), fused rows.

    down: (rank, fan_in), Kaiming-uniform with a = sqrt 5.  up: (rank, rows), zero, so the start is the identity
    (Hu et al., 2021; their B is ``up.T``).

    Raises RequestError where the rank is not between 1 and the smaller side of the matrix.
    """

    def __init__(
        self, shape: torch.Size | tuple[int, ...], rank: int, scale: float, dropout: float = 0.0, where: str = "weight"
    ):
        super().__init__()
        rows, fan_in = shape[0], math.prod(shape[1:])
        if not 1 <= rank <= min(rows, fan_in):
            raise RequestError(
                f"rank {rank} at {where}: its matrix is {rows} x {fan_in}, so use 1 to {min(rows, fan_in)}"
            )
        self.scale, self.dropout = float(scale), float(dropout)
        self.down = nn.Parameter(torch.empty(rank, fan_in))
        self.up = nn.Parameter(torch.zeros(rank, rows))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def delta(self, weight: Tensor) -> Tensor:
        return ((self.up.t() @ self.down) * self.scale).reshape(weight.shape)

    def factors(self) -> Factors:
        return Factors(self.down, self.up, self.scale, self.dropout)


class Replacement(WeightAdapter):
    """A trained tensor used in place of the frozen one; it starts as a copy. Strength 0 to 1 moves from old to new."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.value = nn.Parameter(weight.detach().float().clone())

    def delta(self, weight: Tensor) -> Tensor:
        return self.value - weight

    def forward(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        # lerp, not a sum: exactly the new value at strength 1 and the old one at 0.
        return torch.lerp(weight.to(self.value.dtype), self.value, strength).to(weight.dtype)
