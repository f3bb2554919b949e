"""A problem whose training keeps state in every place there is, so that whatever a resumed run loses shows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from shared.adapted import adapt
from shared.adapter import Adapter
from shared.method import Method
from shared.sites import Site, Sites, describe
from shared.training import Optimiser
from tests.shared.training.problem import Head, Line


class Centred(Adapter):
    """Takes a running mean of its input off and scales by a number drawn before the step; both are buffers."""

    mean: Tensor
    drawn: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("drawn", torch.ones(3))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.8 * self.mean + 0.2 * x.detach().mean(0)
        return base(x) + self.scale * (x - self.mean) * (1 + 0.1 * self.drawn.sum())


@dataclass(frozen=True, kw_only=True)
class Everything(Method):
    """An adapter on the second layer of a backbone that trains too, batch normalisation included."""

    trains_backbone: ClassVar[bool] = True

    def sites(self, sites: Sites) -> Sites:
        return Sites([site for site in sites if site.path == "3"], sites.owner)

    def build(self, site: Site) -> Adapter:
        return Centred(site.width)

    def step(self, adapters: Mapping[str, nn.Module], number: int, generator: Generator) -> None:
        given = torch.rand((), generator=generator).item()
        for adapter in adapters.values():
            adapter.drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item() + given])


class Noisy(Line):
    """Its loss is disturbed by numbers from Python, NumPy and torch. drawn: these, by step."""

    drawn: list[tuple[float, float, float]]

    def loss(self, batch: Any) -> Tensor:
        numbers = random.random(), np.random.rand(), torch.rand(()).item()
        self.__dict__.setdefault("drawn", []).append(numbers)
        return super().loss(batch) * (1 + sum(numbers))


def everything(**settings: Any) -> Noisy:
    torch.manual_seed(3)
    layers = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)
    backbone = nn.Sequential(*layers)
    model = adapt(backbone, Everything(), head=Head(16, 1), sites=describe(backbone))
    return Noisy(model, Optimiser(**{"learning_rate": 1e-2, "warmup": 2, **settings}))
