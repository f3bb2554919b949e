"""Generated scenes: satellite images with clouds, thin clouds and their shadows, made from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modalities.remote_sensing.data.atmosphere import draw_clouds, draw_sun, look
from modalities.remote_sensing.data.biome import BANDS, CLASSES
from modalities.remote_sensing.data.landscape import BIOMES, PIXEL, landscape
from modalities.remote_sensing.data.scenes import Scenes
from shared.errors import RequestError
from shared.rasters import IGNORE, Georeference, Window, write_raster

# Deviation of the sensor's noise: reflectance, and kelvin for tir1.
NOISE = np.array([0.0015, 0.0015, 0.0015, 0.002, 0.002, 0.002, 0.0004, 0.15], np.float32)
NODATA = -9999.0


class Scene(NamedTuple):
    """name: index and biome.  image: float32 (bands, H, W), reflectance at the top of the atmosphere and, for tir1,
    kelvin; 0 where not ``valid`` (H, W).  mask: uint8 (H, W) class indices, IGNORE where not valid.
    epsg: code of the UTM zone.  corner: easting and northing of the upper left corner in metres."""

    name: str
    image: np.ndarray
    valid: np.ndarray
    mask: np.ndarray
    epsg: int
    corner: tuple[float, float]


def generate(
    seed: int, index: int, size: int, bands: Sequence[str] = BANDS, biomes: Sequence[str] = tuple(BIOMES)
) -> Scene:
    """Scene ``index`` of the world ``seed``, ``size`` x ``size`` pixels of 30 m, of the ``biomes`` in turn; the same
    whenever it is asked for."""
    random, name = np.random.default_rng([seed, index]), _name(index, biomes)
    sun = draw_sun(random)
    ground = landscape(random, size, BIOMES[name.split("_")[1]])
    sky = look(random, ground, sun, draw_clouds(random, size, sun))
    from scipy.ndimage import gaussian_filter

    image = np.concatenate([sky.optical, sky.cirrus[None], sky.thermal[None]]).astype(np.float32)
    image[:7] *= random.normal(1, 0.015, (7, 1, 1)).astype(np.float32)  # the sensor's gain and offset, scene by scene
    image[:6] += random.normal(0, 0.002, (6, 1, 1)).astype(np.float32)
    for band, sharpness in zip(image, (0.5,) * 7 + (1.4,), strict=True):  # thermal pixels are coarser
        gaussian_filter(band, sharpness, output=band, mode="nearest")
    image += NOISE[:, None, None] * random.standard_normal(image.shape, dtype=np.float32)
    np.maximum(image, 1e-4, out=image)
    valid = _swath(random, size)
    image[:, ~valid] = 0
    zone, north = int(random.integers(1, 61)), bool(sun.azimuth > np.pi / 2)
    corner = (PIXEL * int(random.integers(7000, 24000)), PIXEL * int(random.integers(60000, 220000)))
    chosen = image[[BANDS.index(band) for band in bands]]
    mask = np.where(valid, sky.mask, IGNORE).astype(np.uint8)
    return Scene(name, chosen, valid, mask, (32600 if north else 32700) + zone, corner)


def _swath(random: np.random.Generator, size: int) -> np.ndarray:
    """Valid pixels (H, W): all, but in one scene of ten, which the slanting edge of the swath cuts."""
    if random.random() >= 0.1:
        return np.ones((size, size), bool)
    rows, columns = np.mgrid[:size, :size] / size
    across = columns + 0.22 * rows if random.random() < 0.5 else 1 - columns + 0.22 * rows
    return across > random.uniform(0.1, 0.6)


class GeneratedScenes(Scenes):
    """Generated scenes of the eight biomes in turn, each with a terrain, land cover, sun, sky and sensor of its own, so
    that the scenes of validation and test are as new to a model as another place on another day.

    count: scenes.  size: pixels of 30 m along a side.  bands: names out of ``BANDS``, in the order wanted.
    seed: of the scenes, their split, the order and the augmentation.
    validation, test: a fraction of the scenes, or names out of ``scene_names``.
    The other arguments are those of ``FolderScenes``. Scenes are made when first needed (about 0.1 s for 256 pixels)
    and kept in memory, 4 bytes for each band of each pixel; for more than memory holds, ``write`` them once and read
    the folder.
    """

    classes = CLASSES

    def __init__(
        self,
        *,
        count: int = 40,
        size: int = 256,
        bands: Sequence[str] = BANDS,
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
        self._made = GeneratedSource(count, size, tuple(bands), seed)
        super().__init__(
            self._made, self._made.names, CLASSES, validation=validation, test=test, tile=tile, overlap=overlap,
            normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed, augment=augment,
        )  # fmt: skip

    def write(self, folder: str | Path) -> None:
        """Write georeferenced ``folder/images/<name>.tif`` (float32) and ``folder/masks/<name>.tif`` (class indices),
        which ``FolderScenes(images=..., masks=..., classes=CLASSES)`` reads."""
        for part in ("images", "masks"):
            (Path(folder) / part).mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(self._made.names):
            scene = self._made.scene(index)
            place = _place(scene)
            image = np.where(scene.valid, scene.image, np.float32(NODATA))
            write_raster(
                Path(folder) / "images" / f"{name}.tif",
                image,
                georeference=place,
                band_names=self.band_names,
                nodata=NODATA,
            )
            write_raster(Path(folder) / "masks" / f"{name}.tif", scene.mask[None], georeference=place, nodata=IGNORE)


class GeneratedSource:
    """The scenes as a ``Source``, each made when first read and then kept.

    biomes: names out of ``BIOMES`` that take turns.  first: index of the first scene.
    """

    def __init__(
        self, count: int, size: int, bands: tuple[str, ...], seed: int, *, biomes: Sequence[str] = tuple(BIOMES),
        first: int = 0,
    ):  # fmt: skip
        if count < 1 or size < 32:
            raise RequestError(f"count {count} and size {size}: at least 1 scene of at least 32 pixels")
        if not bands or len(set(bands)) < len(bands) or set(bands) - set(BANDS):
            raise RequestError(f"bands {list(bands)}: one or more out of {', '.join(BANDS)}, each once")
        if not biomes or set(biomes) - set(BIOMES):
            raise RequestError(f"biomes {list(biomes)}: one or more out of {', '.join(BIOMES)}")
        self.band_names, self.file_bands, self._size, self._seed = bands, bands, size, seed
        self._biomes, self._first = tuple(biomes), first
        self.names, self.sizes = [_name(first + i, biomes) for i in range(count)], [(size, size)] * count
        self.reading = {"bands": list(range(1, len(bands) + 1))}
        self._scenes: dict[int, Scene] = {}

    def scene(self, index: int) -> Scene:
        if index not in self._scenes:
            number = self._first + index
            self._scenes[index] = generate(self._seed, number, self._size, self.band_names, self._biomes)
        return self._scenes[index]

    def read(self, index: int, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scene, (row, column, height, width) = self.scene(index), window
        inside = (slice(row, row + height), slice(column, column + width))
        return scene.image[(slice(None), *inside)], scene.valid[inside], scene.mask[inside].astype(np.int64)


def _name(index: int, biomes: Sequence[str]) -> str:
    return f"{index:05d}_{biomes[index % len(biomes)]}"


def _place(scene: Scene) -> Georeference:
    from rasterio import Affine
    from rasterio.crs import CRS

    east, north = scene.corner
    return Georeference(CRS.from_epsg(scene.epsg), Affine(PIXEL, 0, east, 0, -PIXEL, north))
