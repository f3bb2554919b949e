"""New files for a trained run: read and normalised as its data were, with their place on Earth where they have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from modalities.images.data import Preparation
from modalities.images.data.listing import images_below
from shared.errors import RequestError
from shared.mapping import Feed
from shared.rasters import Georeference, Header, read_header, read_image

PLACED = (".tif", ".tiff")  # of images that may lie somewhere on Earth


class Opened(NamedTuple):
    """image: float32 (bands, H, W), normalised, of the file's own size.  valid: bool (H, W).  place: None
    where the file names no reference system."""

    image: np.ndarray
    valid: np.ndarray
    place: Georeference | None

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1], self.image.shape[2]


class Opener:
    """Reads files as ``described``: by data of images, or by those of rasters (``Scenes.describe``).

    window: for rasters, in place of the side of what the model was trained on.  bands: for rasters, numbers of the
    bands to read, where the file's own names would mislead.

    side: pixels of the square that the model sees.  stretched: whether whole images were brought to it, whatever their
    shape; else they are seen at their own resolution.
    """

    def __init__(self, described: Mapping[str, Any], window: int | None = None, bands: Sequence[int] | None = None):
        self.stretched, self._bands = "reading" not in described, bands
        if self.stretched:
            if given := [name for name, value in (("window", window), ("bands", bands)) if value is not None]:
                raise RequestError(f"--{given[0]} is for rasters; this run was trained on whole images of three bands")
            self._preparation = Preparation.of(described)
            self.side, self.suffixes = self._preparation.size, self._preparation.suffixes
            return
        self._feed = Feed.of(described)
        self.side, self.suffixes = (
            self._feed.window if window is None else window,
            (*PLACED, ".png", ".jpg", ".jpeg", ".npy"),
        )
        if self.side < 1:
            raise RequestError(f"--window {self.side}: use a number of pixels above 0")

    def open(self, file: Path) -> Opened:
        """Raises RequestError, in one line that names the file, where it cannot be read or does not fit the model."""
        if self.stretched:
            pixels = self._preparation.normalised(torch.from_numpy(self._preparation.read(file))).numpy()
            return Opened(pixels, np.ones(pixels.shape[1:], bool), self.place(file))
        feed = self._feed
        feed.check_files(str(file), 1)
        header = read_header(file, layout=feed.layout)
        numbers = feed.numbers(header, self._bands)
        raster = read_image(file, bands=numbers, layout=feed.layout, fill=feed.fill)
        return Opened(feed.normalisation.apply(raster.image, raster.valid), raster.valid, _known(header))

    def place(self, file: Path) -> Georeference | None:
        """Where a file lies, None where it does not say."""
        if file.suffix.lower() not in PLACED:
            return None
        return _known(read_header(file))

    def files(self, inputs: Sequence[Path]) -> list[tuple[Path, Path]]:
        """The files of ``inputs`` (files, and folders with their subfolders), each with its path below its input."""
        found: dict[Path, Path] = {}
        for path in inputs:
            below = images_below(path, self.suffixes) if path.is_dir() else [path]
            if not below:
                raise RequestError(f"{path}: holds no image ({', '.join(self.suffixes)})")
            found |= {file: file.relative_to(path) if path.is_dir() else Path(file.name) for file in below}
        return list(found.items())


def _known(header: Header) -> Georeference | None:
    place = header.georeference
    return place if place is not None and place.crs else None
