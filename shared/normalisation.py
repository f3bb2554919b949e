"""Mean and deviation of each band of images, and normalisation by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.errors import RequestError


@dataclass(frozen=True)
class Normalisation:
    """(value - mean) / std for each band, in stored units; 0 where a pixel is invalid."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, image: np.ndarray, valid: np.ndarray | bool = True) -> np.ndarray:
        """image (bands, H, W), valid bool (H, W) to float32 (bands, H, W)."""
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

    def normalisation(self, band_names: Sequence[str]) -> Normalisation:
        """By these moments; refuses a band that never varies."""
        std = np.sqrt(self.squares / self.count)
        for name, mean, deviation in zip(band_names, self.mean, std, strict=True):
            if not deviation > 1e-7 * abs(mean):
                raise RequestError(f"band {name!r} is {mean:g} on every training pixel; leave it out of bands")
        return Normalisation(tuple(self.mean.tolist()), tuple(std.tolist()))


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
