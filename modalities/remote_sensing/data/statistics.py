"""Statistics of labelled rasters: moments of each band and pixels of each class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shared.errors import RequestError
from shared.normalisation import Moments, Normalisation
from shared.rasters import IGNORE, Window


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
        """image float32 (bands, H, W), valid bool (H, W), mask int64 (H, W) of class indices or IGNORE.

        A source of several dates gives their bands one date after the other, (dates * bands, H, W).
        """
        ...


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
        values = image[:, valid]
        moments += Moments.of(np.concatenate(np.split(values, len(values) // len(source.band_names)), 1))
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
    return total.normalisation(band_names)
