"""Camera RAW with a class each: mosaics of a folder or a table, or generated ones, as linear images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from modalities.images.data.classified import ClassifiedImages
from modalities.images.data.generated import CLASSES, draw_image
from modalities.images.data.listing import class_names, index_of, listed
from modalities.images.data.raw import RAW_SUFFIXES, Sensor, demosaic, linear, mosaiced
from modalities.images.data.samples import Flip, Preparation, Source
from modalities.images.data.splits import draw
from shared.errors import RequestError

GAMMA = 2.2
LIGHT = {"low": 0.1, "normal": 1.0, "over": 1.5}  # of the scene, as a factor
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0)}  # linear values from 0 to 1 reach the model as they are


class RawImages(ClassifiedImages):
    """What both have in common: a model is fed linear values from 0 to 1, as RAW-Adapter takes them."""

    bands = 3

    def __init__(
        self, source: Source, classes: Sequence[str], members: dict[str, list[int]], sensor: Sensor, *, size: int,
        crop: float, flip: Flip | None, batch_size: int, workers: int, seed: int,
    ):  # fmt: skip
        super().__init__(
            source, classes, members, bands=3, size=size, crop=crop, flip=flip, normalisation=UNIT,
            batch_size=batch_size, workers=workers, seed=seed,
        )  # fmt: skip
        self.sensor = sensor

    @cached_property
    def preparation(self) -> Preparation:
        return dataclasses.replace(super().preparation, sensor=self.sensor)

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON; ``sensor`` is how a new file of RAW is read."""
        facts = dataclasses.asdict(self.sensor)
        facts["shape"] = None if self.sensor.shape is None else list(self.sensor.shape)
        return super().describe() | {"sensor": facts}

    def display(self, image: Tensor | np.ndarray) -> np.ndarray:
        """Brightened by a gamma of 2.2, to be looked at."""
        return super().display(np.asarray(image, np.float32).clip(0, 1) ** (1 / GAMMA))


class RawFolders(RawImages):
    """RAW files, a folder for each class, or a table of path and label: flat mosaics (.npy, .raw), camera's containers.

    root, classes, validation, test, per_class, size, crop, flip, batch_size, workers, seed: as ``ImageFolders`` takes
    them, validation and test as fractions, "train" or "rest".  pattern, bits, black, white, shape, demosaic: as
    ``Sensor`` takes them.

    Raises RequestError, in one line that names the file, where something is wrong with the files or their classes.
    """

    def __init__(
        self,
        *,
        root: Path,
        classes: Sequence[str] | None = None,
        pattern: Literal["RGGB", "GRBG", "GBRG", "BGGR"] = "RGGB",
        bits: int = 14,
        black: float = 0.0,
        white: float | None = None,
        shape: tuple[int, int] | None = None,
        demosaic: Literal["half", "bilinear"] = "half",
        validation: float | Literal["train"] = 0.2,
        test: float | Literal["rest"] = 0.2,
        per_class: int | None = None,
        size: int = 224,
        crop: float = 0.5,
        flip: Literal["horizontal", "both"] | None = "horizontal",
        batch_size: int = 32,
        workers: int = 0,
        seed: int | None = None,
    ):
        sensor = Sensor(pattern=pattern, bits=bits, black=black, white=white, shape=shape, demosaic=demosaic)
        root, seed = Path(root), seed or 0
        items = listed(root, RAW_SUFFIXES)
        names = class_names(items, root, classes)
        labels = [index_of(item, names) for item in items]
        members = draw(labels, names, validation=validation, test=test, per_class=per_class, seed=seed)
        source = _Files([item.name for item in items], labels, [item.file for item in items], sensor)
        super().__init__(source, names, members, sensor, size=size, crop=crop, flip=flip, batch_size=batch_size,
                         workers=workers, seed=seed)  # fmt: skip


class _Files:
    """The files as a ``Source``."""

    def __init__(self, names: list[str], labels: list[int], files: list[Path], sensor: Sensor):
        self.names, self.labels, self._files, self._sensor = names, labels, files, sensor

    def read(self, index: int) -> np.ndarray:
        return 255 * self._sensor.read(self._files[index])


class GeneratedMosaics(RawImages):
    """What a sensor makes of ``GeneratedImages``' pictures: see ``exposed``.

    count, classes, side and the loaders' arguments: as ``GeneratedImages`` takes them.  light: "low" (a tenth),
    "normal" or "over" (half as much again, saturated).  noise: deviation, as a share of the white level.
    pattern, bits, black, demosaic: as ``Sensor`` takes them.
    """

    classes = CLASSES

    def __init__(
        self,
        *,
        count: int = 40,
        classes: Sequence[str] = CLASSES,
        side: int = 96,
        light: Literal["low", "normal", "over"] = "low",
        noise: float = 0.005,
        pattern: Literal["RGGB", "GRBG", "GBRG", "BGGR"] = "RGGB",
        bits: int = 12,
        black: float = 64.0,
        demosaic: Literal["half", "bilinear"] = "half",
        validation: float | Literal["train"] = 0.2,
        test: float | Literal["rest"] = 0.2,
        per_class: int | None = None,
        size: int = 48,
        crop: float = 0.5,
        flip: Literal["horizontal", "both"] | None = "horizontal",
        batch_size: int = 16,
        workers: int = 0,
        seed: int | None = None,
    ):
        if count < 1 or side < 16 or side % 2:
            raise RequestError(f"count {count} and side {side}: at least 1 and 16, the side even")
        if len(classes) < 2 or len(set(classes)) < len(classes) or set(classes) - set(CLASSES):
            raise RequestError(f"classes {', '.join(classes)}: two or more out of {', '.join(CLASSES)}, each once")
        if light not in LIGHT or not 0 <= noise < 1:
            raise RequestError(f"light {light!r} and noise {noise:g}: use {', '.join(LIGHT)}, and 0 to below 1")
        sensor = Sensor(pattern=pattern, bits=bits, black=black, shape=(side, side), demosaic=demosaic)
        seed = seed or 0
        source = _Drawn(count, tuple(classes), side, LIGHT[light], noise, sensor, seed)
        members = draw(source.labels, classes, validation=validation, test=test, per_class=per_class, seed=seed)
        super().__init__(source, classes, members, sensor, size=size, crop=crop, flip=flip, batch_size=batch_size,
                         workers=workers, seed=seed)  # fmt: skip


class _Drawn:
    """The mosaics as a ``Source``, each drawn anew when it is read."""

    def __init__(
        self, count: int, classes: tuple[str, ...], side: int, light: float, noise: float, sensor: Sensor, seed: int
    ):
        self.labels = [label for label in range(len(classes)) for _ in range(count)]
        self.names = [f"{classes[label]}/{index % count:04d}" for index, label in enumerate(self.labels)]
        self._classes, self._side, self._light, self._noise = classes, side, light, noise
        self._sensor, self._seed = sensor, seed

    def read(self, index: int) -> np.ndarray:
        random, sensor = np.random.default_rng([self._seed, index]), self._sensor
        picture = draw_image(random, self._classes[self.labels[index]], self._side)
        pixels = exposed(picture, sensor, random, light=self._light, noise=self._noise)
        values = linear(pixels, sensor.black, sensor.saturation, self.names[index])
        return 255 * demosaic(values, sensor.pattern, sensor.demosaic)


def exposed(
    picture: np.ndarray, sensor: Sensor, random: np.random.Generator, *, light: float, noise: float
) -> np.ndarray:
    """A mosaic, uint16 (H, W), as a sensor might have given it of an sRGB picture, uint8 (3, H, W) of even sides.

    The gamma of 2.2 is undone, the colours mixed by a matrix near the identity and weighed by an illuminant, both
    drawn; then come ``light`` as a factor, Gaussian noise, saturation and rounding to the sensor's bits.
    noise: its deviation as a share of the range from the black to the white level.
    """
    scene = (picture / 255.0) ** GAMMA
    mixing = random.uniform(0.7, 0.9) * np.eye(3) + random.uniform(0, 0.1, (3, 3))
    illuminant = np.array([random.uniform(0.4, 0.8), 1.0, random.uniform(0.4, 0.8)])
    sensed = light * illuminant[:, None, None] * np.einsum("ij,jhw->ihw", mixing, scene)
    signal = mosaiced(sensed, sensor.pattern)
    signal = signal + random.normal(0, noise, signal.shape)
    levels = sensor.black + signal * (sensor.saturation - sensor.black)
    return levels.round().clip(0, np.floor(sensor.saturation)).astype(np.uint16)
