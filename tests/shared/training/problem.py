"""A problem that trains in milliseconds: LoRA and a head on frozen layers fit a line; it records its batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler
from torchmetrics import MeanMetric, SumMetric

from shared.adapted import Adapted, adapt
from shared.methods import LoRA
from shared.sites import describe
from shared.training import Optimiser, Task


class Points(Dataset):
    """y = 3 x_0 - x_2.  noisy: x is disturbed by numbers from Python, NumPy and torch."""

    def __init__(self, count: int, seed: int, noisy: bool = False):
        self.noisy = noisy
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        self.y = 3 * self.x[:, :1] - self.x[:, 2:3]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = random.random() + np.random.rand() + torch.rand(4) if self.noisy else 0
        return {"x": self.x[index] + noise, "y": self.y[index], "name": f"p{index}"}


class EpochSampler(Sampler[int]):
    """An order that follows from the epoch alone, which the trainer tells."""

    def __init__(self, count: int):
        self.count, self.epoch = count, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Data:
    """order: from the global random state ("shuffled"), a "generator" of its own, or a "sampler" by epoch.

    count, checks: samples of training and of validation, which are those of test.
    """

    def __init__(
        self, order: str = "shuffled", workers: int = 0, count: int = 20, checks: int = 8, noisy: bool = False
    ):
        self.training, self.checking = Points(count, 1, noisy), Points(checks, 2)
        self.order, self.workers = order, workers

    def train(self) -> DataLoader:
        generator = torch.Generator().manual_seed(5) if self.order == "generator" else None
        sampler = (
            EpochSampler(len(self.training))
            if self.order == "sampler"
            else RandomSampler(self.training, generator=generator)
        )
        return DataLoader(
            self.training,
            4,
            sampler=sampler,
            generator=generator,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def validation(self) -> DataLoader:
        return DataLoader(self.checking, 4)

    def test(self) -> DataLoader:
        return DataLoader(self.checking, 4)


class Head(nn.Linear):
    def forward(self, x: Tensor, size: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Line(Task):
    """Squared error, its mean over a split, and how many points that has. seen: names of training samples by batch."""

    def __init__(self, model: Adapted, optimiser: Optimiser):
        super().__init__(model, optimiser)
        self.seen: list[list[str]] = []
        self.errors, self.points = MeanMetric(), SumMetric()

    def loss(self, batch: Any) -> Tensor:
        self.seen.append(batch["name"])
        return nn.functional.mse_loss(self.model(batch["x"]), batch["y"])

    def evaluate(self, batch: Any) -> None:
        self.errors.update(nn.functional.mse_loss(self.model(batch["x"]), batch["y"]), len(batch["y"]))
        self.points.update(len(batch["y"]))

    def results(self) -> dict[str, Any]:
        found = {"loss": self.errors.compute().item(), "points": [int(self.points.compute())], "undefined": None}
        self.errors.reset()
        self.points.reset()
        return found


def model(dropout: float = 0.1) -> Adapted:
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    method = LoRA(rank=2, dropout=dropout, roles=("linear",))
    return adapt(backbone, method, head=Head(64, 1), sites=describe(backbone))


def line(**settings: Any) -> Line:
    return Line(model(), Optimiser(**{"learning_rate": 1e-2, **settings}))
