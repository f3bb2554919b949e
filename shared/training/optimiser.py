"""The optimiser and its schedule, from a model's parameter groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import nn, optim

from shared.errors import RequestError

if TYPE_CHECKING:
    from shared.adapted import Adapted

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """How trained parameters move.

    name: "adamw" (Loshchilov & Hutter, 2019) or "sgd" with momentum ``betas[0]``.
    learning_rate: peak, of adapters and a trained backbone.  head_learning_rate: peak of the head, None: the same.
    weight_decay: decoupled for adamw; norms, biases, embeddings and other one-dimensional tensors have none.
    betas: decay rates of the first and second moments.
    schedule: "poly" ((1 - t)^power, Chen et al., 2017), "cosine" (Loshchilov & Hutter, 2017) or "constant"; t runs
    from 0 to 1 over the steps after the warm-up.  warmup: steps of linear rise before.  power: of "poly".
    floor: the least part of the peak rates, at the start and in the end.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    head_learning_rate: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup: int = 0
    power: float = 0.9
    floor: float = 0.0

    def __post_init__(self) -> None:
        for key in ("learning_rate", "head_learning_rate", "power"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise RequestError(f"optimiser.{key} {value}: use a number above 0")
        if self.weight_decay < 0 or self.warmup < 0:
            raise RequestError("optimiser: weight_decay and warmup may not be negative")
        if not 0 <= self.floor <= 1:
            raise RequestError(f"optimiser.floor {self.floor}: a part of the peak rate, from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RequestError(f"optimiser.betas {self.betas}: use two numbers from 0 to below 1")

    def build(self, model: Adapted, total_steps: int) -> tuple[optim.Optimizer, optim.lr_scheduler.LambdaLR]:
        """The torch optimiser over ``model.groups()`` and its schedule, to be stepped after every optimiser step.

        Raises RequestError where nothing trains or the warm-up does not fit into ``total_steps``.
        """
        groups = list(self._groups(model))
        if not groups:
            raise RequestError(
                "the model has no trainable parameter: give it an adapter, a head, or train the backbone"
            )
        if self.warmup and self.warmup >= total_steps:
            raise RequestError(f"optimiser.warmup {self.warmup}: the whole training has {total_steps} steps")
        if self.name == "adamw":
            optimiser: optim.Optimizer = optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        else:
            optimiser = optim.SGD(groups, lr=self.learning_rate, momentum=self.betas[0])
        return optimiser, optim.lr_scheduler.LambdaLR(optimiser, partial(self.factor, total_steps=total_steps))

    def factor(self, step: int, total_steps: int) -> float:
        """What the peak learning rates are multiplied by at optimiser step ``step`` (0-based)."""
        return max(self._factor(step, total_steps), self.floor)

    def _factor(self, step: int, total_steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        t = min((step - self.warmup) / max(total_steps - self.warmup, 1), 1.0)
        if self.schedule == "poly":
            return (1 - t) ** self.power
        return 0.5 * (1 + math.cos(math.pi * t)) if self.schedule == "cosine" else 1.0

    def _groups(self, model: Adapted) -> Iterator[dict[str, Any]]:
        """One torch group for each role, with and without weight decay."""
        plain = {
            id(p)
            for m in model.modules()
            if isinstance(m, (nn.Embedding, *_NORMS))
            for p in m.parameters(recurse=False)
        }
        for group in model.groups():
            rate = self.head_learning_rate if group["role"] == "head" else None
            named = list(zip(group["names"], group["params"], strict=True))
            decayed = [p for n, p in named if not (id(p) in plain or _undecayed(n, p))]
            kept = {id(p) for p in decayed}
            free = [p for p in group["params"] if id(p) not in kept]
            for params, decay in ((decayed, self.weight_decay), (free, 0.0)):
                if params:
                    lr = self.learning_rate if rate is None else rate
                    yield {"params": params, "lr": lr, "weight_decay": decay, "role": group["role"]}


def _undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Vectors and scalars, biases of any shape (one for each of several experts), and bare embedding tensors (position,
    level, class token), which no module type marks."""
    own = name.rpartition(".")[2]
    return parameter.ndim <= 1 or own == "bias" or "embed" in own or "token" in own
