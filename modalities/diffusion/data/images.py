"""Images with captions at many sizes, to train a text-to-image model: drawn shapes, and a folder of pictures."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from modalities.diffusion.buckets import BucketSampler, Draw, Size, buckets, cover, squares, weights
from shared.errors import RequestError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class ManySizes:
    """What both sources share: sizes, batches of one size, and fixed checks at every square size.

    low, high: shortest and longest side, pixels (released files: 128 to 1024 for SD1.5, 256 to 1536 for SDXL).
    step: sides are multiples of it, pixels.  ratio: least and greatest width over height (released files: 0.5 to 2;
    version 2: 0.28 to 3.5).  base: the side the model was trained at, pixels.  probability: of a size in training, see
    ``modalities.diffusion.buckets.weights``.  batch_size: images of a training step on one device.
    checks: images of validation and of test at each square size.  workers: processes that prepare images.
    """

    low: int = 128
    high: int = 1024
    step: int = 64
    ratio: tuple[float, float] = (0.5, 2.0)
    base: int = 512
    probability: Literal["uniform", "area", "distance"] = "uniform"
    batch_size: int = 4
    checks: int = 4
    seed: int = 0
    workers: int = 0

    bands: ClassVar[int] = 3

    def __post_init__(self) -> None:
        self.sizes()
        if min(self.batch_size, self.checks, self.base) < 1:
            raise RequestError("batch_size, checks and base must be at least 1")

    def sizes(self) -> list[Size]:
        """All sizes of training."""
        return buckets(self.low, self.high, self.step, self.ratio)

    def checked_sizes(self) -> list[Size]:
        """The sizes of validation and test."""
        return squares(self.low, self.high, self.step)

    def count(self, split: str) -> int:
        """Number of images of a split."""
        raise NotImplementedError

    def sample(self, split: str, draw: Draw | tuple[int, Size, None]) -> dict[str, Any]:
        """One image: ``image`` float32 (3, height, width) in -1 to 1, ``caption``, ``crop`` (top, left), ``name``."""
        raise NotImplementedError

    def train(self) -> DataLoader:
        """Batches of one size each, sizes and images in an order that the seed and the epoch decide."""
        sizes = self.sizes()
        sampler = BucketSampler(
            self.count("train"),
            sizes,
            batch_size=self.batch_size,
            weights=weights(sizes, self.probability, self.base),
            seed=self.seed,
        )
        return self._loader(_Split(self, "train"), sampler)

    def validation(self) -> DataLoader:
        """One batch at each square size, always the same."""
        return self._loader(_Split(self, "validation", self._checks("validation")))

    def test(self) -> DataLoader:
        return self._loader(_Split(self, "test", self._checks("test")))

    def _checks(self, split: str) -> list[list[tuple[int, Size, None]]]:
        images = range(min(self.checks, self.count(split)))
        return [[(index, size, None) for index in images] for size in self.checked_sizes()] if images else []

    def _loader(self, dataset: Dataset, sampler: BucketSampler | None = None) -> DataLoader:
        return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=self.workers)

    def describe(self) -> dict[str, Any]:
        """The splits and sizes, for the run directory and the adapter file."""
        return {
            "source": type(self).__name__,
            "images": {split: self.count(split) for split in SPLITS},
            "sides": {"low": self.low, "high": self.high, "step": self.step, "ratio": list(self.ratio)},
            "sizes": len(self.sizes()),
            "probability": self.probability,
            "normalisation": "-1 to 1",
        }


class _Split(Dataset):
    """Whole batches: for a list of draws (training), or by number (fixed checks)."""

    def __init__(self, data: ManySizes, split: str, batches: Sequence[Any] = ()):
        self.data, self.split, self.batches = data, split, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, key: int | list[Draw]) -> dict[str, Any]:
        draws = self.batches[key] if isinstance(key, int) else key
        return default_collate([self.data.sample(self.split, draw) for draw in draws])


@dataclass(frozen=True, kw_only=True)
class GeneratedShapes(ManySizes):
    """Coloured discs, squares, rings and stripes over a gradient, drawn at the size asked for; needs no files.

    images: of the training split; the checks come on top.
    """

    images: int = 512

    def count(self, split: str) -> int:
        return self.images if split == "train" else self.checks

    def sample(self, split: str, draw: Draw | tuple[int, Size, None]) -> dict[str, Any]:
        index, size, seed = draw
        random = np.random.default_rng((self.seed, SPLITS.index(split), index))
        side = max(size)
        _, (top, left) = cover(side, side, size, seed)
        pixels, caption = _picture(random, side, size, top, left)
        image = torch.from_numpy(pixels.astype(np.float32) * 2 - 1)
        return {"image": image, "caption": caption, "crop": torch.tensor([top, left]), "name": f"{split}/{index}"}


COLOURS = {
    "red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.2, 0.9),
    "yellow": (0.95, 0.85, 0.1), "white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0),
}  # fmt: skip
_SHAPES = ("disc", "square", "ring", "stripes")


def _picture(random: np.random.Generator, side: int, size: Size, top: int, left: int) -> tuple[np.ndarray, str]:
    """A crop (3, height, width) in 0 to 1 of a square picture of ``side`` pixels, and what it shows.

    The picture is the same at every size: its coordinates run from 0 to 1, and edges are soft over one pixel.
    """
    y = ((np.arange(size.height) + 0.5 + top) / side)[:, None]
    x = ((np.arange(size.width) + 0.5 + left) / side)[None, :]
    corners, angle = random.uniform(0.2, 0.8, (2, 3, 1, 1)), random.uniform(0, 2 * np.pi)
    slope = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)
    image = corners[0] * (1 - slope) + corners[1] * slope
    words = []
    for _ in range(random.integers(1, 4)):
        shape, colour = str(random.choice(_SHAPES)), str(random.choice(list(COLOURS)))
        centre, radius = random.uniform(0.2, 0.8, 2), random.uniform(0.12, 0.3)
        inside = np.clip(0.5 - outside(shape, y - centre[0], x - centre[1], radius) * side, 0, 1)
        image = image * (1 - inside) + np.array(COLOURS[colour])[:, None, None] * inside
        words.append(f"{colour} {shape}")
    return image, " and ".join(words)


def outside(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """How far each point is outside the shape's edge, negative inside, in units of the picture."""
    if shape == "disc":
        return np.hypot(y, x) - radius
    if shape == "ring":
        return np.abs(np.hypot(y, x) - radius * 0.75) - radius / 4
    square = np.maximum(np.abs(y), np.abs(x)) - radius
    return (
        square if shape == "square" else np.maximum(square, np.abs((x / radius * 3) % 2 - 1) * radius / 3 - radius / 6)
    )


@dataclass(frozen=True, kw_only=True)
class CaptionedImages(ManySizes):
    """Pictures of a folder with their captions, resized to cover the size and cropped at a random place.

    folder: holds ``captions.csv`` with the columns file and caption, or ``metadata.csv`` with file_name and text
    (Hugging Face's names); files are relative to it. Transparent pictures are put on white.
    validation_share, test_share: of the pictures, chosen by the seed.
    """

    folder: Path
    validation_share: float = 0.05
    test_share: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows  # noqa: B018  raises now where the folder or a share is wrong

    @functools.cached_property
    def rows(self) -> dict[str, list[tuple[str, str]]]:
        """(file, caption) of every picture, by split."""
        rows = _captions(self.folder)
        return parted(rows, self.validation_share, self.test_share, self.seed)

    def count(self, split: str) -> int:
        return len(self.rows[split])

    def sample(self, split: str, draw: Draw | tuple[int, Size, None]) -> dict[str, Any]:
        index, size, seed = draw
        name, caption = self.rows[split][index]
        picture = read_picture(self.folder / name)
        (height, width), (top, left) = cover(picture.height, picture.width, size, seed)
        picture = picture.resize((width, height)).crop((left, top, left + size.width, top + size.height))
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        return {"image": image, "caption": caption, "crop": torch.tensor([top, left]), "name": name}


def parted(rows: list[Any], validation: float, test: float, seed: int) -> dict[str, list[Any]]:
    """Rows by split: shares of them drawn by the seed, the rest trains. Raises RequestError for impossible shares."""
    if min(validation, test) < 0 or validation + test >= 1:
        raise RequestError("validation_share and test_share: from 0, together below 1")
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    held = [round(len(rows) * share) for share in (validation, test)]
    ends = {"validation": (0, held[0]), "test": (held[0], sum(held)), "train": (sum(held), len(rows))}
    return {split: [rows[i] for i in order[a:b]] for split, (a, b) in ends.items()}


def _captions(folder: Path) -> list[tuple[str, str]]:
    """(file, caption) of every row of the folder's table; all files must be there."""
    tables = {"captions.csv": ("file", "caption"), "metadata.csv": ("file_name", "text")}
    table = next((name for name in tables if (folder / name).is_file()), None)
    if table is None:
        raise RequestError(f"{folder}: neither captions.csv (file, caption) nor metadata.csv (file_name, text) there")
    return captioned(folder / table, tables[table], Path.is_file)


def captioned(table: Path, columns: tuple[str, str], there: Callable[[Path], bool]) -> list[tuple[str, str]]:
    """(file, caption) of every row, by the names of these columns; all files must be ``there``, in the table's folder.

    Raises RequestError for a row without one of them, and with the first file that is missing.
    """
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise RequestError(f"{table}: wants rows with {columns[0]} and {columns[1]}")
    pairs = [(row[columns[0]], row[columns[1]]) for row in rows]
    if absent := [name for name, _ in pairs if not there(table.parent / name)]:
        raise RequestError(f"{table}: {len(absent)} of its files are not there (first: {absent[0]})")
    return pairs


def read_picture(path: Path) -> Any:
    """A picture in RGB; what is transparent becomes white."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{path}: not a readable image ({error})") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
