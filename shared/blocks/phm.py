"""Linear layers with structured weights: sums of Kronecker products (PHM, Zhang et al., 2021) and low-rank products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import RequestError


class PHMRule(nn.Module):
    """The n matrices A_i of a PHM layer, (n, n, n), which layers may share (Compacter's slow weights).

    factorised: each A_i is a column times a row.  deviation: of the normal draw.
    """

    def __init__(self, n: int, *, factorised: bool = False, deviation: float = 0.01):
        super().__init__()
        shapes = {"left": (n, n, 1), "right": (n, 1, n)} if factorised else {"whole": (n, n, n)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * deviation))

    def forward(self) -> Tensor:
        return torch.bmm(self.left, self.right) if "left" in self._parameters else self.whole  # type: ignore[arg-type]


class PHMLinear(nn.Module):
    """``x H + bias`` with ``H = sum_i kron(A_i, W_i)``: x (..., inputs) to (..., outputs).

    rule: the A_i.  W: (n, inputs / n, outputs / n), or ``left @ right`` of rank ``rank``; each drawn Glorot-uniform
    with gain sqrt 2.  zero: the last of these starts at zero, so that the layer gives zero.

    Raises RequestError where n divides a side unevenly or the rank is not between 1 and a slice's smaller side.
    """

    def __init__(
        self, inputs: int, outputs: int, rule: PHMRule, *, rank: int | None = None, zero: bool = False,
        where: str = "adapter",
    ):  # fmt: skip
        super().__init__()
        n = len(rule())
        if inputs % n or outputs % n:
            raise RequestError(f"PHM of {n} products at {where}: {inputs} x {outputs} is not divisible by {n}")
        rows, columns = inputs // n, outputs // n
        if rank is not None and not 1 <= rank <= min(rows, columns):
            raise RequestError(f"PHM rank {rank} at {where}: its slices are {rows} x {columns}, so use 1 to "
                               f"{min(rows, columns)} or None")  # fmt: skip
        self.rule = rule
        shapes = (
            {"weight": (n, rows, columns)} if rank is None else {"left": (n, rows, rank), "right": (n, rank, columns)}
        )
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(glorot(torch.empty(shape))))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if zero:
            nn.init.zeros_(self._parameters["weight" if rank is None else "right"])  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self._parameters
        weight = parts["left"] @ parts["right"] if "left" in parts else parts["weight"]
        h = torch.einsum("iab,icd->acbd", self.rule(), weight)
        return x @ h.flatten(2).flatten(0, 1) + self.bias


class LowRankLinear(nn.Module):
    """``x left @ right + bias`` of rank ``rank``, both drawn Glorot-uniform with gain sqrt 2; ``zero``: right is zero.

    Raises RequestError where the rank is not between 1 and the smaller side.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, zero: bool = False, where: str = "adapter"):
        super().__init__()
        if not 1 <= rank <= min(inputs, outputs):
            raise RequestError(f"rank {rank} at {where}: its matrix is {inputs} x {outputs}, so use 1 to "
                               f"{min(inputs, outputs)}")  # fmt: skip
        self.left = nn.Parameter(glorot(torch.empty(inputs, rank)))
        self.right = nn.Parameter(torch.zeros(rank, outputs) if zero else glorot(torch.empty(rank, outputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.left @ self.right + self.bias


def glorot(weight: Tensor) -> Tensor:
    """Fill each matrix (the last two axes) uniformly within ``sqrt 2 * sqrt(6 / (rows + columns))``."""
    bound = math.sqrt(2) * math.sqrt(6 / sum(weight.shape[-2:]))
    return nn.init.uniform_(weight, -bound, bound)
