"""A problem that trains in milliseconds: LoRA and a head on frozen layers fit a line; every batch's order is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shared.adapted import Adapted, adapt
from shared.methods import LoRA
from shared.sites import describe
from shared.training import Optimiser, Task


class Points(Dataset):
    """y = 3 x_0 - x_2."""

    def __init__(self, count: int, seed: int):
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        self.y = 3 * self.x[:, :1] - self.x[:, 2:3]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index], "name": f"p{index}"}


class Data:
    def __init__(self, count: int = 20, generator: bool = False, workers: int = 0):
        self.training, self.checking = Points(count, 1), Points(8, 2)
        self.workers, self.generator = workers, torch.Generator().manual_seed(5) if generator else None

    def train(self) -> DataLoader:
        more = {"generator": self.generator, "num_workers": self.workers}
        return DataLoader(self.training, 4, shuffle=True, **more)  # type: ignore[arg-type]

    def validation(self) -> DataLoader:
        return DataLoader(self.checking, 4)

    def test(self) -> DataLoader:
        return DataLoader(self.checking, 4)


class Head(nn.Linear):
    def forward(self, x: Tensor, size: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Line(Task):
    """Squared error, and its mean over a split. seen: names of the training samples, batch by batch."""

    def __init__(self, model: Adapted, optimiser: Optimiser):
        super().__init__(model, optimiser)
        self.seen: list[list[str]] = []
        self.errors: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        self.seen.append(batch["name"])
        return nn.functional.mse_loss(self.model(batch["x"]), batch["y"])

    def evaluate(self, batch: Any) -> None:
        self.errors.append(nn.functional.mse_loss(self.model(batch["x"]), batch["y"]))

    def results(self) -> dict[str, Any]:
        loss = torch.stack(self.errors).mean().item()
        self.errors.clear()
        return {"loss": loss, "points": ["p"], "undefined": None}


def model(dropout: float = 0.1) -> Adapted:
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    method = LoRA(rank=2, dropout=dropout, roles=("linear",))
    return adapt(backbone, method, head=Head(64, 1), sites=describe(backbone))


def line(**settings: Any) -> Line:
    return Line(model(), Optimiser(**{"learning_rate": 1e-2, **settings}))
