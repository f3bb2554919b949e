"""Samples: images read when asked for, brought to one size and normalised; cropped and flipped in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modalities.images.backbones.inputs import library
from modalities.images.data.files import SUFFIXES, read_image
from modalities.images.data.raw import RAW_SUFFIXES, Sensor
from shared.errors import RequestError
from shared.normalisation import Normalisation

Flip = Literal["horizontal", "both"]


class Readable(Protocol):
    """Images. names: one for each."""

    names: list[str]

    def read(self, index: int) -> np.ndarray:
        """(bands, H, W) in values from 0 to 255: uint8, or float32 of camera RAW."""
        ...


class Source(Readable, Protocol):
    """Labelled images. labels: class indices."""

    labels: list[int]


@dataclass(frozen=True)
class Preparation:
    """What a model is fed of an image outside training: the shorter side brought to ``size`` pixels (bilinear,
    antialiased), the middle square of it, normalised."""

    size: int
    bands: int
    normalisation: Normalisation
    sensor: Sensor | None = None  # of camera RAW; None: images as they are commonly stored

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files it reads."""
        return SUFFIXES if self.sensor is None else RAW_SUFFIXES

    def read(self, file: Path) -> np.ndarray:
        """A file as (bands, H, W) in values from 0 to 255, uint8 but for RAW, whose linear values are float32."""
        return read_image(file, bands=self.bands) if self.sensor is None else 255 * self.sensor.read(file)

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Preparation:
        """As ``ClassifiedImages.describe`` states it."""
        try:
            scale = described["normalisation"]
            normalisation = Normalisation(tuple(scale["mean"]), tuple(scale["std"]))
            sensor = Sensor(**described["sensor"]) if "sensor" in described else None
            return cls(int(described["size"]), len(described["band_names"]), normalisation, sensor)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"the run does not say how its images were prepared ({error} is missing)") from error

    def square(self, image: np.ndarray) -> Tensor:
        """(bands, H, W) to (bands, size, size), of the same type."""
        functional = library("torchvision.transforms.v2.functional")
        pixels = functional.resize(torch.from_numpy(image), [self.size], antialias=True)
        return functional.center_crop(pixels, [self.size, self.size])

    def normalised(self, pixels: Tensor) -> Tensor:
        """(bands, H, W) to float32."""
        return torch.from_numpy(self.normalisation.apply(pixels.numpy()))


class Prepared(Dataset):
    """The given members of a source. Position ``epoch * len + i`` is image i as ``epoch`` augments it.

    augment: None for none.  seed: of the augmentation.
    """

    def __init__(
        self,
        source: Readable,
        members: Sequence[int],
        preparation: Preparation,
        augment: Augmentation | None,
        seed: int,
    ):
        self.source, self.members, self.preparation = source, list(members), preparation
        self.augment, self.seed = augment, seed

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, i = divmod(position, len(self))
        index = self.members[i]
        image = self.source.read(index)
        pixels = self.preparation.square(image) if self.augment is None else self._augmented(image, epoch, i)
        return {
            "image": self.preparation.normalised(pixels),
            **self.told(index, epoch, i),
            "name": self.source.names[index],
        }

    def told(self, index: int, epoch: int, i: int) -> dict[str, Any]:
        """What is said of image ``index``, the i-th member."""
        raise NotImplementedError(f"{type(self).__name__} tells nothing of its images")

    def _augmented(self, image: np.ndarray, epoch: int, i: int) -> Tensor:
        """Drawn by seed, epoch and image alone; the global random state is left as it was."""
        assert self.augment is not None
        seed = np.random.SeedSequence([self.seed, epoch, i]).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed) % 2**63)
            return self.augment(image, self.preparation)


class Images(Prepared):
    """Samples of labelled images."""

    source: Source

    def told(self, index: int, epoch: int, i: int) -> dict[str, Any]:
        return {"label": self.source.labels[index]}


@dataclass(frozen=True)
class Augmentation:
    """A random crop of at least the share ``crop`` of the area, at aspects from 3/4 to 4/3 (Szegedy et al., 2015), and
    flips. crop: 1 for the middle square.  flip: "horizontal", "both" (vertical too), None for none."""

    crop: float
    flip: Flip | None

    def __call__(self, image: np.ndarray, preparation: Preparation) -> Tensor:
        v2 = library("torchvision.transforms.v2")
        if self.crop < 1:
            cropping = v2.RandomResizedCrop(preparation.size, scale=(self.crop, 1.0), antialias=True)
            pixels = cropping(torch.from_numpy(image))
        else:
            pixels = preparation.square(image)
        if self.flip is not None:
            pixels = v2.RandomHorizontalFlip()(pixels)
        return v2.RandomVerticalFlip()(pixels) if self.flip == "both" else pixels
