"""Statistics of labelled rasters: mean and deviation of each band, pixels of each class; normalisation from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from modalities.remote_sensing.data.rasters import Window
from shared.errors import RequestError

IGNORE = 255


class Source(Protocol):
    """Labelled rasters that can be read by window.

    names: one for each.  sizes: (height, width) of each.  band_names: of what ``read`` returns.
    file_bands: of all bands of a file, as the file calls them.
    reading: the keyword arguments with which ``read_image`` reads a new file in the same way.
    """

    names: list[str]
    sizes: list[tuple[int, int]]
    band_names: tuple[str, ...]
    file_bands: tuple[str, ...]
    reading: dict[str, Any]

    def read(self, index: int, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image float32 (bands, H, W), valid bool (H, W), mask int64 (H, W) of class indices or IGNORE."""
        ...


@dataclass(frozen=True)
class Normalisation:
    """(value - mean) / std for each band, in stored units; 0 where a pixel is invalid."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, image: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """image float32 (bands, H, W), valid bool (H, W) to float32 (bands, H, W)."""
        return np.where(valid, (image - _column(self.mean)) / _column(self.std), np.float32(0))

    def undo(self, image: np.ndarray) -> np.ndarray:
        """A normalised image (bands, H, W) back in stored units."""
        return image * _column(self.std) + _column(self.mean)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each band, which add up exactly (Chan, Golub & LeVeque, 1983)."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """values (bands, n)"""
        if not values.shape[1]:
            return cls(0, np.zeros(len(values)), np.zeros(len(values)))
        mean = values.mean(1, dtype=np.float64)
        return cls(values.shape[1], mean, ((values - mean[:, None]) ** 2).sum(1))

    def __add__(self, other: Moments) -> Moments:
        if not (count := self.count + other.count):
            return self
        step = other.mean - self.mean
        return Moments(
            count,
            self.mean + step * other.count / count,
            self.squares + other.squares + step**2 * self.count * other.count / count,
        )


@dataclass(frozen=True)
class Survey:
    """One raster, read whole: the moments of its valid pixels, and ``pixels`` of each class and, last, of no class."""

    moments: Moments
    pixels: tuple[int, ...]


def survey(source: Source, index: int, classes: int) -> Survey:
    """Read raster ``index`` in strips of about a million pixels. Raises RequestError where none is valid."""
    height, width = source.sizes[index]
    moments, pixels = Moments.of(np.zeros((len(source.band_names), 0))), np.zeros(IGNORE + 1, np.int64)
    strip = max(1, 2**20 // width)
    for row in range(0, height, strip):
        image, valid, mask = source.read(index, Window(row, 0, min(strip, height - row), width))
        moments += Moments.of(image[:, valid])
        pixels += np.bincount(mask.ravel(), minlength=IGNORE + 1)
    if not moments.count:
        raise RequestError(
            f"{source.names[index]}: no valid pixel (all NaN, nodata or transparent); leave it out or mend it"
        )
    return Survey(moments, (*pixels[:classes].tolist(), int(pixels[IGNORE])))


def measured(surveys: Iterable[Survey], band_names: Sequence[str]) -> Normalisation:
    """Mean and standard deviation of each band over the valid pixels surveyed; refuses a band that never varies."""
    total, *others = (survey.moments for survey in surveys)
    for moments in others:
        total += moments
    std = np.sqrt(total.squares / total.count)
    for name, mean, deviation in zip(band_names, total.mean, std, strict=True):
        if not deviation > 1e-7 * abs(mean):
            raise RequestError(f"band {name!r} is {mean:g} on every training pixel; leave it out of bands")
    return Normalisation(tuple(total.mean.tolist()), tuple(std.tolist()))


def given(stated: object, band_names: Sequence[str]) -> Normalisation:
    """The normalisation ``{mean: [...], std: [...]}`` states: one mean and one positive deviation for each band."""
    if not isinstance(stated, Mapping) or set(stated) != {"mean", "std"}:
        raise RequestError(f"normalisation {stated!r}: use 'measured' or {{mean: [...], std: [...]}}")
    mean, std = stated["mean"], stated["std"]
    if not len(mean) == len(std) == len(band_names):
        counts = f"{len(mean)} means and {len(std)} deviations"
        raise RequestError(f"normalisation: {counts} for {len(band_names)} bands ({', '.join(band_names)})")
    if not (np.isfinite([*mean, *std]).all() and min(std) > 0):
        raise RequestError("normalisation: means are finite numbers and deviations finite numbers above 0")
    return Normalisation(tuple(map(float, mean)), tuple(map(float, std)))


def _column(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None]
