"""Generated pairs: ground with buildings at two dates under different light; some are built, some torn down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modalities.remote_sensing.data.noise import fractal
from modalities.remote_sensing.data.pairs import CHANGE, Pairs
from shared.errors import RequestError
from shared.rasters import Georeference, Window, write_raster

BANDS: tuple[str, ...] = ("red", "green", "blue")
PIXEL = 0.5  # metres


class TwoDates(NamedTuple):
    """before, after: float32 (3, H, W), about 0 to 255.  mask: uint8 (H, W), 1 where a building was built or lost."""

    before: np.ndarray
    after: np.ndarray
    mask: np.ndarray


def generate(seed: int, index: int, size: int) -> TwoDates:
    """Pair ``index`` of the world ``seed``; the same whenever it is asked for.

    Of 4 to 9 buildings, each stands at both dates or at one of them, so that neither date alone tells what changed.
    """
    random = np.random.default_rng([seed, index])
    ground = np.stack([fractal(random, size, 3) for _ in range(2)])
    mixed = np.tensordot(random.uniform(-14, 14, (3, 2)), ground, 1)
    before = (np.array([95, 105, 85])[:, None, None] + mixed).astype(np.float32)
    after, mask = before.copy(), np.zeros((size, size), np.uint8)
    taken = np.zeros((size, size), bool)
    for _ in range(int(random.integers(4, 10))):
        height, width = random.integers(size // 10, size // 4, 2)
        row, column = random.integers(0, size - height), random.integers(0, size - width)
        place = (slice(row, row + height), slice(column, column + width))
        if taken[place].any():
            continue
        taken[place] = True
        roof = (random.uniform(150, 230) + random.uniform(-25, 25, (3, 1, 1))).astype(np.float32)
        kind = random.integers(3)  # at both dates, lost, built
        for image, stands in ((before, kind < 2), (after, kind != 1)):
            if stands:
                image[:, *place] = roof
        mask[place] = kind > 0
    for image in (before, after):  # the light, and the sensor's noise
        image *= random.normal(1, 0.06, (3, 1, 1)).astype(np.float32)
        image += random.normal(0, 4, (3, 1, 1)).astype(np.float32)
        image += 3 * random.standard_normal(image.shape, dtype=np.float32)
    return TwoDates(before, after, mask)


class GeneratedPairs(Pairs):
    """Generated pairs, for trying things out and for tests.

    count: pairs.  size: pixels of half a metre along a side.  seed: of the pairs, their split, order and augmentation.
    validation, test: a fraction of the pairs, or their names. The other arguments are those of ``FolderScenes``.
    """

    classes, bands = CHANGE, 3

    def __init__(
        self,
        *,
        count: int = 40,
        size: int = 256,
        validation: float | Sequence[str] = 0.2,
        test: float | Sequence[str] = 0.2,
        tile: int | None = None,
        overlap: int = 0,
        normalisation: str | Mapping[str, Sequence[float]] = "measured",
        batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ):
        self._made = GeneratedPairSource(count, size, seed)
        super().__init__(
            self._made, self._made.names, CHANGE, validation=validation, test=test, tile=tile, overlap=overlap,
            normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed, augment=augment,
        )  # fmt: skip

    def write(self, folder: str | Path) -> None:
        """Write georeferenced ``folder/{A,B,label}/<name>.tif``, which ``FolderPairs(folder=folder)`` reads."""
        from rasterio import Affine
        from rasterio.crs import CRS

        for index, name in enumerate(self._made.names):
            pair, crs = self._made.pair(index), CRS.from_epsg(32633)
            place = Georeference(crs, Affine(PIXEL, 0, 400000 + 1000 * index, 0, -PIXEL, 5200000))
            for part, image in (("A", pair.before), ("B", pair.after), ("label", pair.mask[None])):
                (Path(folder) / part).mkdir(parents=True, exist_ok=True)
                names = BANDS if part != "label" else None
                write_raster(Path(folder) / part / f"{name}.tif", image, georeference=place, band_names=names)


class GeneratedPairSource:
    """The pairs as a ``Source`` of two dates, each made when first read and then kept."""

    def __init__(self, count: int, size: int, seed: int):
        if count < 1 or size < 32:
            raise RequestError(f"count {count} and size {size}: at least 1 pair of at least 32 pixels")
        self.band_names = self.file_bands = BANDS
        self.names, self.sizes = [f"{index:05d}" for index in range(count)], [(size, size)] * count
        self.reading = {"bands": [1, 2, 3]}
        self._size, self._seed = size, seed
        self._pairs: dict[int, TwoDates] = {}

    def pair(self, index: int) -> TwoDates:
        if index not in self._pairs:
            self._pairs[index] = generate(self._seed, index, self._size)
        return self._pairs[index]

    def read(self, index: int, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pair, (row, column, height, width) = self.pair(index), window
        inside = (slice(row, row + height), slice(column, column + width))
        image = np.concatenate([pair.before, pair.after])[(slice(None), *inside)]
        return image, np.ones((height, width), bool), pair.mask[inside].astype(np.int64)
