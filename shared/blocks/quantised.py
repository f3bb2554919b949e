"""Linear layers trained under fake quantisation to a few bits, for normally distributed weights (Jie et al., 2023)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.blocks.packing import WIDTHS
from shared.errors import RequestError

EPSILON = 1e-5  # on the deviation that a trained weight is divided by


@functools.cache
def codebook(bits: int) -> tuple[float, ...]:
    """The 2^bits levels for a standard normal variable, rising: each the median of its cell, cells ending half-way
    between levels, so that the mean absolute error is least; 500 rounds from zero, as published."""
    levels = torch.zeros(2**bits, dtype=torch.float64, device="cpu")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    for _ in range(500):
        below = torch.cat([ends[:1], torch.special.ndtr((levels[1:] + levels[:-1]) / 2), ends[1:]])
        levels = torch.special.ndtri((below[1:] + below[:-1]) / 2)
    return tuple(levels.tolist())


def codes_of(values: Tensor, levels: Tensor) -> Tensor:
    """The index (uint8) of the level nearest to each value; one half-way between two has the upper."""
    borders = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values.contiguous(), borders, right=True).to(torch.uint8)


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight takes at most 2^bits values, ``mean + deviation * level``, whatever it is trained to.

    ``weight`` (outputs, inputs) is the float master weight; gradients reach it straight through the rounding, and
    through mean and deviation. ``held``: (mean, deviation) that a packed file gave, used in place of the weight's own;
    a deviation of 0 means there are none. An unpacked weight quantises to itself exactly.

    Raises RequestError where the bits are not 1, 2, 4 or 8, or the matrix has a single element.
    """

    levels: Tensor
    held: Tensor

    def __init__(self, inputs: int, outputs: int, bits: int, *, bias: bool = False, where: str = "adapter"):
        super().__init__(inputs, outputs, bias=bias)
        if bits not in WIDTHS:
            raise RequestError(f"weights of {bits} bits at {where}: use {', '.join(map(str, WIDTHS))} or 32 (float)")
        if inputs * outputs < 2:
            raise RequestError(f"quantised matrix of {inputs} x {outputs} at {where}: one element has no deviation")
        self.bits = bits
        self.register_buffer("held", torch.zeros(2))
        self.register_buffer("levels", torch.tensor(codebook(bits)), persistent=False)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, deviation (unbiased), and what centred weights are divided by; 0-dimensional, differentiable."""
        held = self.held[1] > 0
        mean = torch.where(held, self.held[0], self.weight.mean())
        own = self.weight.std()
        deviation = torch.where(held, self.held[1], own)
        return mean, deviation, torch.where(held, self.held[1], own + EPSILON)

    def codes(self) -> Tensor:
        """The index (outputs, inputs) uint8 of every weight's level."""
        mean, _, divisor = self.statistics()
        return codes_of((self.weight - mean) / divisor, self.levels)

    def quantised(self) -> Tensor:
        """The weight in force (outputs, inputs)."""
        mean, deviation, divisor = self.statistics()
        centred = (self.weight - mean) / divisor
        value = self.levels[codes_of(centred.detach(), self.levels).int()] + (centred - centred.detach())
        return value * deviation + mean

    @torch.no_grad()
    def hold(self, codes: Tensor, mean: Tensor, deviation: Tensor) -> None:
        """Take over a packed weight: its codes (outputs, inputs), mean and deviation."""
        self.held.copy_(torch.stack([mean, deviation]))
        self.weight.copy_(self.levels[codes.int()] * deviation + mean)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def quantise(module: nn.Module, bits: int, where: str = "adapter") -> None:
    """Put a ``QuantisedLinear`` in the place of every linear layer below ``module``, with its tensors and names kept;
    biases stay float (an extension of the paper, whose adapters have none). 32 bits change nothing."""
    if bits == 32:
        return
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            layer = QuantisedLinear(
                child.in_features, child.out_features, bits, bias=child.bias is not None, where=where
            )
            layer.weight, layer.bias = child.weight, child.bias
            setattr(module, name, layer.train(child.training).to(child.weight.device))
        else:
            quantise(child, bits, where)
