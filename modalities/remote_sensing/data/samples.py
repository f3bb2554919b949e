"""Samples: tiles of labelled rasters, read when asked for, normalised, and flipped and turned in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from modalities.remote_sensing.data.statistics import Source
from modalities.remote_sensing.data.tiling import Tile
from shared.normalisation import Normalisation
from shared.rasters import IGNORE, Window


class Tiles(Dataset):
    """Samples of the given tiles. Position ``epoch * len + i`` is tile i as epoch ``epoch`` augments it.

    size: pixels a smaller raster is filled up to, at the right and below.  seed: of the flips and quarter turns, None
    for none.  once: ignore the pixels a tile repeats.
    """

    def __init__(
        self, source: Source, tiles: list[tuple[int, Tile]], size: int | None, normalisation: Normalisation,
        seed: int | None, once: bool,
    ):  # fmt: skip
        self.source, self.tiles, self.size = source, tiles, size
        self.normalisation, self.seed, self.once = normalisation, seed, once

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, i = divmod(position, len(self))
        index, tile = self.tiles[i]
        image, valid, mask = self.source.read(index, tile.window)
        image, mask = self.normalisation.apply(image, valid), np.where(valid, mask, IGNORE)
        if self.once:
            mask[: tile.seen_rows] = IGNORE
            mask[:, : tile.seen_columns] = IGNORE
        if self.size is not None:
            below, right = self.size - mask.shape[0], self.size - mask.shape[1]
            image = np.pad(image, ((0, 0), (0, below), (0, right)))
            mask = np.pad(mask, ((0, below), (0, right)), constant_values=IGNORE)
        if self.seed is not None:
            image, mask = turned(image, mask, np.random.default_rng([self.seed, epoch, i]))
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "mask": torch.from_numpy(np.ascontiguousarray(mask)),
            "name": _name(self.source.names[index], tile.window, self.source.sizes[index]),
        }


def turned(image: np.ndarray, mask: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One of the eight flips and quarter turns of a square (of the four of a rectangle)."""
    square = mask.shape[0] == mask.shape[1]
    turns, flip = int(random.integers(4) if square else 2 * random.integers(2)), bool(random.integers(2))
    image, mask = np.rot90(image, turns, (-2, -1)), np.rot90(mask, turns)
    return (image[..., ::-1], mask[..., ::-1]) if flip else (image, mask)


def _name(name: str, window: Window, size: tuple[int, int]) -> str:
    whole = window == (0, 0, *size)
    return name if whole else f"{name}:{window.row},{window.column}"
