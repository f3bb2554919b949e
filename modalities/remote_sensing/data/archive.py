"""Labelled photographs kept whole in memory, for pretraining: read from a tar archive, or generated."""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modalities.images.data import read_image
from modalities.remote_sensing.data.augment import crop_and_colour
from modalities.remote_sensing.data.splits import SPLITS, split_scenes
from shared.errors import RequestError
from shared.rasters import IGNORE


class _Photographs:
    """Photographs uint8 (N, 3, H, W) with a class each, split by the seed into train, validation and test loaders.

    A sample is ``{"image": float32 (3, size, size) normalised, "label": int64, "name": str}``. Training photographs
    are cropped, turned and recoloured anew in every epoch (see ``crop_and_colour``), batch by batch; the others are
    resized whole.
    """

    bands, band_names, ignore_index = 3, ("red", "green", "blue"), IGNORE

    def __init__(
        self, photographs: Tensor, labels: Tensor, names: Sequence[str], classes: Sequence[str], *, size: int,
        smallest: float, colour: float, validation: float, test: float, batch_size: int, seed: int,
    ):  # fmt: skip
        if size < 1 or batch_size < 1 or seed < 0:
            raise RequestError(f"size {size}, batch_size {batch_size} and seed {seed}: at least 1, 1 and 0")
        if not 0 < smallest <= 1 or colour < 0:
            raise RequestError(f"smallest {smallest} and colour {colour}: use above 0 to 1, and at least 0")
        self.photographs, self.labels, self.names, self.classes = photographs, labels, list(names), tuple(classes)
        self.size, self.smallest, self.colour, self.batch_size, self.seed = size, smallest, colour, batch_size, seed
        split = split_scenes(names, validation=validation, test=test, seed=seed)
        place = {name: index for index, name in enumerate(names)}
        self.members = {part: [place[name] for name in getattr(split, part)] for part in SPLITS}
        self.mean, self.std = _moments(photographs[self.members["train"]])
        self._scale = [torch.tensor(v)[:, None, None] for v in (self.mean, self.std)]

    def train(self) -> DataLoader:
        """Shuffled, and the last batch left out where it is not full."""
        return self._loader("train", shuffle=True, drop_last=len(self.members["train"]) >= self.batch_size)

    def validation(self) -> DataLoader:
        return self._loader("validation")

    def test(self) -> DataLoader:
        return self._loader("test")

    def normalise(self, photographs: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to float32 of about zero mean and unit deviation."""
        return (photographs.float() - self._scale[0]) / self._scale[1]

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON; ``normalisation`` is in stored units (0 to 255)."""
        counts = {part: torch.bincount(self.labels[m], minlength=len(self.classes)) for part, m in self.members.items()}
        return {
            "kind": type(self).__name__,
            "classes": list(self.classes),
            "band_names": list(self.band_names),
            "size": self.size,
            "seed": self.seed,
            "normalisation": {"kind": "measured", "mean": self.mean, "std": self.std},
            "splits": {
                part: {"images": int(n.sum()), **dict(zip(self.classes, n.tolist(), strict=True))}
                for part, n in counts.items()
            },
        }

    def _loader(self, part: str, **order: Any) -> DataLoader:
        if not self.members[part]:
            raise RequestError(f"there is no {part} split: ask for a fraction above 0")
        gather = self._train_batch if part == "train" else self._whole_batch
        return DataLoader(self.members[part], self.batch_size, collate_fn=gather, **order)  # type: ignore[arg-type]

    def _train_batch(self, members: list[int]) -> dict[str, Any]:
        image = self.normalise(self.photographs[members])
        return self._batch(crop_and_colour(image, self.size, smallest=self.smallest, colour=self.colour), members)

    def _whole_batch(self, members: list[int]) -> dict[str, Any]:
        return self._batch(resized(self.normalise(self.photographs[members]), self.size), members)

    def _batch(self, image: Tensor, members: list[int]) -> dict[str, Any]:
        return {"image": image, "label": self.labels[members], "name": [self.names[m] for m in members]}


class PhotographArchive(_Photographs):
    """A tar archive of square JPEG or PNG photographs of one size, ``<class>/<name>``.

    archive: the file.  classes: names of its folders, in the order of the index; those found, sorted, if not given.
    leave_out: a regular expression; members whose name it is found in are not read at all, so
    that what another data set tests on is never trained on. It is an error if it fits none.
    size: pixels a side of a crop.  smallest: least share of the area that a crop takes.  colour: strength of the
    colour changes, 0 for none.  validation, test: fractions of the photographs, drawn by ``seed``.
    batch_size: photographs.

    Raises RequestError where the archive is missing or damaged, a photograph cannot be decoded or has another size.
    """

    def __init__(
        self,
        *,
        archive: Path,
        classes: Sequence[str] | None = None,
        leave_out: str | None = None,
        size: int = 96,
        smallest: float = 0.25,
        colour: float = 1.0,
        validation: float = 0.1,
        test: float = 0.1,
        batch_size: int = 128,
        seed: int = 0,
    ):
        photographs, names, self.left_out = _read(Path(archive), leave_out)
        kinds = [name.rpartition("/")[0] for name in names]
        classes = sorted(set(kinds)) if classes is None else list(classes)
        if sorted(classes) != sorted(set(kinds)):
            raise RequestError(f"classes {classes}: {archive} has the folders {sorted(set(kinds))}")
        labels = torch.tensor([classes.index(kind) for kind in kinds])
        super().__init__(
            photographs, labels, names, classes, size=size, smallest=smallest, colour=colour, validation=validation,
            test=test, batch_size=batch_size, seed=seed,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"left_out": self.left_out}


class GeneratedTextures(_Photographs):
    """Generated photographs: each class is waves of one length and direction, under colours that tell nothing.

    count: photographs of each class.  classes: how many.  side: pixels of a photograph. The others are those of
    ``PhotographArchive``.
    """

    def __init__(
        self,
        *,
        count: int = 12,
        classes: int = 4,
        side: int = 48,
        size: int = 32,
        smallest: float = 0.5,
        colour: float = 1.0,
        validation: float = 0.2,
        test: float = 0.2,
        batch_size: int = 8,
        seed: int = 0,
    ):
        if count < 1 or classes < 2 or side < 16:
            raise RequestError(f"count {count}, classes {classes} and side {side}: at least 1, 2 and 16")
        labels = torch.arange(classes).repeat(count)
        random = np.random.default_rng(seed)
        photographs = np.stack([_texture(random, int(label), classes, side) for label in labels])
        names = [f"texture{label}/{index:04d}" for index, label in enumerate(labels.tolist())]
        super().__init__(
            torch.from_numpy(photographs), labels, names, [f"texture{i}" for i in range(classes)], size=size,
            smallest=smallest, colour=colour, validation=validation, test=test, batch_size=batch_size, seed=seed,
        )  # fmt: skip


def resized(image: Tensor, size: int) -> Tensor:
    """float (B, bands, H, W) to (B, bands, size, size), bilinear and antialiased."""
    if image.shape[2:] == (size, size):
        return image
    return torch.nn.functional.interpolate(image, size=(size, size), mode="bilinear", antialias=True)


def _read(path: Path, leave_out: str | None) -> tuple[Tensor, list[str], int]:
    """All photographs but those left out, in the order of their names, and the number of those."""
    found: dict[str, np.ndarray] = {}
    left_out = 0
    try:
        unwanted = re.compile(leave_out) if leave_out is not None else None
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile() or not member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                    continue
                if unwanted is not None and unwanted.search(member.name):
                    left_out += 1
                    continue
                found[member.name] = read_image(archive.extractfile(member), f"{path}: {member.name}")
    except re.error as error:
        raise RequestError(f"leave_out {leave_out!r} is not a regular expression: {error}") from error
    except (OSError, tarfile.TarError, EOFError) as error:
        raise RequestError(f"{path}: not a readable tar archive ({error})") from error
    _whole(path)
    if not found:
        raise RequestError(f"{path}: no photograph is left to read ({left_out} left out)")
    if leave_out is not None and not left_out:
        raise RequestError(f"leave_out {leave_out!r} fits none of the {len(found)} photographs of {path}")
    names = sorted(found)
    side = found[names[0]].shape[1:]
    if odd := next((n for n in names if found[n].shape[1:] != (side[0], side[0])), None):
        raise RequestError(
            f"{path}: {odd} has {found[odd].shape[1:]} pixels, the first {side}; squares of one size are needed"
        )
    return torch.from_numpy(np.stack([found[name] for name in names])), names, left_out


def _moments(photographs: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each band of uint8 (N, bands, H, W), from exact counts of the 256 values; two decimals."""
    values, mean, std = torch.arange(256, dtype=torch.float64), [], []
    for band in photographs.unbind(1):
        share = torch.bincount(band.flatten(), minlength=256).double() / band.numel()
        mean.append(float(share @ values))
        std.append(float(share @ (values - mean[-1]) ** 2) ** 0.5)
    return [round(m, 2) for m in mean], [round(s, 2) for s in std]


def _whole(path: Path) -> None:
    """tarfile takes an archive cut at a member for a shorter one; two blocks of zeros mark a true end."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        if file.read() != bytes(1024):
            raise RequestError(f"{path}: not a whole tar archive: it is cut short")


def _texture(random: np.random.Generator, label: int, classes: int, side: int) -> np.ndarray:
    """uint8 (3, side, side): waves of the class's direction and length, in a random colour, and noise."""
    rows, columns = np.mgrid[:side, :side]
    angle, length = math.pi * label / classes, 5 + 6 * label / classes
    wave = np.sin(2 * math.pi * (rows * math.cos(angle) + columns * math.sin(angle)) / length + random.uniform(0, 6.28))
    image = random.uniform(80, 170, (3, 1, 1)) + random.uniform(20, 50) * wave + random.normal(0, 6, (3, side, side))
    return image.clip(0, 255).astype(np.uint8)
