"""SPSA with gradient correction (Oh et al., CVPR 2023, arXiv 2303.14773): training by values of the loss alone.

Simultaneous perturbation (Spall, 1992): one random direction moves all weights at once, and two evaluations of the loss
estimate the gradient along it. The correction is Nesterov's momentum on such estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn, optim
from torch.nn.utils import parameters_to_vector

from shared.errors import RequestError

if TYPE_CHECKING:
    from shared.adapted import Adapted


@dataclass(frozen=True, kw_only=True)
class SPSA:
    """An optimiser that never asks for a gradient, for models that give none (or whose backward pass costs too much).

    Step t = 1, 2, ... moves by a / (t + o)^alpha and perturbs by c / t^gamma; each of its ``repeats`` estimates is of
    one batch and runs the model twice. The defaults are those published for CLIP ViT-B/16.

    momentum: weight of the past in the correction; 0 is plain SPSA.
    """

    a: float = 0.01
    c: float = 0.01
    o: float = 1.0
    alpha: float = 0.4
    gamma: float = 0.1
    momentum: float = 0.9
    repeats: int = 5

    def __post_init__(self) -> None:
        for key in ("a", "c"):
            if not 0 < getattr(self, key) < math.inf:
                raise RequestError(f"optimiser.{key} {getattr(self, key)}: use a number above 0")
        for key in ("o", "alpha", "gamma"):
            if not 0 <= getattr(self, key) < math.inf:
                raise RequestError(f"optimiser.{key} {getattr(self, key)}: use a number of at least 0")
        if not 0 <= self.momentum < 1 or self.repeats < 1:
            raise RequestError(
                f"optimiser: momentum {self.momentum} and repeats {self.repeats}: 0 to below 1, 1 or more"
            )

    def build(self, model: Adapted, total_steps: int) -> tuple[optim.Optimizer, optim.lr_scheduler.LambdaLR]:
        """What moves ``model.trainable()``, and its schedule; no weight decays, and the steps' number does not matter.

        Raises RequestError where nothing trains.
        """
        if not (parameters := list(model.trainable().values())):
            raise RequestError("the model has no trainable parameter: give it an adapter or a head")
        return self.over(parameters)

    def over(self, parameters: Iterable[nn.Parameter]) -> tuple[optim.Optimizer, optim.lr_scheduler.LambdaLR]:
        """The same over any parameters: call ``estimate``, then ``step()`` of both."""
        moves = optim.SGD(parameters, lr=self.a, momentum=self.momentum, nesterov=self.momentum > 0)
        return moves, optim.lr_scheduler.LambdaLR(moves, self.factor)

    def factor(self, step: int) -> float:
        """What ``a`` is multiplied by at step ``step`` (0-based)."""
        return (step + 1 + self.o) ** -self.alpha

    def width(self, step: int) -> float:
        """How far step ``step`` (0-based) perturbs."""
        return self.c / (step + 1) ** self.gamma

    def draws(self, count: int, generator: Generator) -> Tensor:
        """(repeats, count) directions: each component uniform in [0.5, 1], of either sign."""
        size = 0.5 + 0.5 * torch.rand(self.repeats, count, generator=generator, device="cpu")
        sign = torch.randint(2, (self.repeats, count), generator=generator, device="cpu") * 2 - 1
        return size * sign

    @torch.no_grad()
    def estimate(
        self, loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], step: int, draws: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient of ``loss`` by 2 evaluations for each of ``draws`` (R, P), as a flat vector (P,), and a loss.

        step: 0-based.  The loss is the mean of the last pair, or of the first pair that is not finite, where it stops.
        The parameters are bit for bit what they were afterwards.
        """
        start, width = parameters_to_vector(parameters), self.width(step)
        total = torch.zeros_like(start)
        mean = start.new_zeros(())
        try:
            for draw in draws.to(start):
                pair = []
                for sign in (1, -1):
                    _put(start + sign * width * draw, parameters)
                    pair.append(loss().detach())
                mean = (pair[0] + pair[1]) / 2
                total += (pair[0] - pair[1]) / (2 * width * draw)
                if not torch.isfinite(mean):
                    break
        finally:
            _put(start, parameters)
        return total / len(draws), mean


def _put(vector: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """In place, which tells whoever keeps what was computed from them."""
    for parameter, part in zip(parameters, _parts(vector, parameters), strict=True):
        parameter.copy_(part)


def _parts(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = vector.split([parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]


@torch.no_grad()
def assign(gradient: Tensor, parameters: Sequence[nn.Parameter], share: float = 1.0) -> None:
    """Add ``share`` of a flat gradient (P,) to ``grad`` of the parameters, for an optimiser to step by."""
    for parameter, part in zip(parameters, _parts(share * gradient, parameters), strict=True):
        parameter.grad = part if parameter.grad is None else parameter.grad + part
