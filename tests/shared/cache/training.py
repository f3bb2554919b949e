"""A small classification that trains through a cache, in one process or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modalities.images.classification import Classification
from modalities.images.data import GeneratedImages
from shared.method import Method
from shared.training import Engine, Optimiser, fit, processes
from tests.shared.cache.models import model, vit

CLASSES = ["disc", "stripes", "checks"]
EPOCHS, TRAIN, CHECK = 4, 9, 3


def data(crop: float = 1.0, workers: int = 0) -> GeneratedImages:
    """9 images train, 3 check and 3 test; without random crops they are the same in every epoch."""
    return GeneratedImages(
        count=5, classes=CLASSES, side=16, size=16, crop=crop, flip=None, batch_size=4, workers=workers, seed=0,
        normalisation={"mean": [120] * 3, "std": [60] * 3},
    )  # fmt: skip


def task(method: Method | None = None, given: Any = None) -> Classification:
    made = model(method, backbone=vit(depths=(3,)))
    return Classification(made, given or data(), Optimiser(learning_rate=1e-2, schedule="cosine"))


def engine(cache: Path | None, precision: str = "exact", **more: Any) -> Engine:
    settings = None if cache is None else {"precision": precision, "folder": str(cache)}
    if settings is not None and "views" in more:
        settings["views"] = more.pop("views")
    return Engine(**{"epochs": EPOCHS, "device": "cpu", "accumulate": 2, "clip": 1.0} | more, cache=settings)


def train(output: Path, cache: Path | None, precision: str = "exact", given: Any = None, **more: Any) -> dict[str, Any]:
    torch.manual_seed(11)
    given = given or data()
    return fit(task(given=given), given, engine(cache, precision, **more), output)


def in_two(folder: Path) -> None:
    """One of two processes that train together, after one alone has."""
    torch.manual_seed(11 + processes.rank())
    fit(task(), data(), engine(folder / "cache", devices=2), folder / "together")


def indices(folder: Path) -> list[int]:
    """Records by shard."""
    return [path.stat().st_size // 64 for path in (folder / "cache").glob("*/*.index")]
