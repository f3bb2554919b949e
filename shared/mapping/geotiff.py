"""GeoTIFF: finished strips as a tiled, compressed map with colours, names and overviews."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import WorkError
from shared.mapping.partial import Strips
from shared.mapping.windows import BLOCK
from shared.rasters import IGNORE, Georeference, quiet

LOST = "does not hold what was written to it; is the disk full?"
TAG = "OMNIADAPT"  # of the file's metadata: a digest of what it was made from


def write_map(
    path: Path,
    strips: Strips,
    georeference: Georeference | None,
    classes: Sequence[str],
    digest: str,
    tick: Callable[[int], None],
) -> np.ndarray:
    """Write the class map (one band) or the probabilities (one band a class) that ``strips`` hold, read them back, and
    return the number of pixels of each class and, last, of none.

    Class map: uint8, 255 without data, a colour for each class, overviews by nearest neighbour. Probabilities: float32,
    NaN without data, overviews by averaging. tick: called with the pixels written.

    Raises WorkError where the file does not hold in the end what was written (GDAL may keep a full disk to itself).
    """
    pixels = np.zeros(len(classes) + 1, np.int64)
    with quiet() as rasterio:
        from rasterio._err import CPLE_BaseError  # GDAL's own errors, some of which rasterio lets through
        from rasterio.errors import RasterioError

        try:
            with rasterio.open(path, "w", **_profile(strips, georeference)) as dataset:
                _name(dataset, classes, digest)
                written = 0
                for window, block in _blocks(strips):
                    tick(written)
                    dataset.write(block, window=window)
                    pixels += _count(block, len(classes))
                    written += window.height * window.width
            _flush(path)
            _check_whole(rasterio, path)
            with rasterio.open(path, "r+") as dataset:
                _overview(dataset)
            _flush(path)
            _check_whole(rasterio, path)
            _verify(rasterio, path, strips)
        except (RasterioError, CPLE_BaseError) as error:
            raise WorkError(f"cannot be written: {error.__cause__ or error}") from error
    return pixels


def read_digest(path: Path) -> str | None:
    """What a map was made from, as its metadata say; None where it is no map of ours."""
    with quiet() as rasterio:
        try:
            with rasterio.open(path, driver="GTiff") as dataset:
                return dataset.tags().get(TAG)
        except rasterio.errors.RasterioError:
            return None


def _profile(strips: Strips, georeference: Georeference | None) -> dict[str, Any]:
    floating = strips.dtype.kind == "f"
    place = {} if georeference is None else {"crs": georeference.crs, "transform": georeference.transform}
    return {
        "driver": "GTiff",
        "height": strips.grid.rows.length,
        "width": strips.grid.columns.length,
        "count": strips.bands,
        "dtype": strips.dtype,
        "nodata": np.nan if floating else IGNORE,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "interleave": "band",
        "compress": "deflate",
        "predictor": 3 if floating else 1,
        "bigtiff": "if_safer",
        "photometric": "minisblack" if floating else "palette",
        **place,
    }


def _name(dataset: Any, classes: Sequence[str], digest: str) -> None:
    dataset.update_tags(**{TAG: digest}, **{f"CLASS_{index}": name for index, name in enumerate(classes)})
    if dataset.count == 1:
        dataset.descriptions = ("class",)
        dataset.write_colormap(1, _colours(classes))
    else:
        dataset.descriptions = tuple(classes)


def _colours(classes: Sequence[str]) -> dict[int, tuple[int, int, int, int]]:
    """The colours of a run's page, class by class."""
    from shared.report.plots import class_colours

    shades = [bytes.fromhex(colour.lstrip("#")) for colour in class_colours(classes).values()]
    return {index: (shade[0], shade[1], shade[2], 255) for index, shade in enumerate(shades)}


def _blocks(strips: Strips) -> Iterator[tuple[Any, np.ndarray]]:
    """The whole map, as rows of whole tiles: rasterio windows with their pixels (bands, rows, columns)."""
    from rasterio.windows import Window

    height = strips.grid.rows.length
    for number, panel in enumerate(strips.grid.panels):
        for top in range(0, height, BLOCK):
            bottom = min(top + BLOCK, height)
            window = Window.from_slices((top, bottom), (panel.left, panel.right))
            yield window, strips.read(number, top, bottom)


def _count(block: np.ndarray, classes: int) -> np.ndarray:
    labels = block[0] if block.dtype == np.uint8 else np.where(np.isnan(block[0]), IGNORE, block.argmax(0))
    found = np.bincount(labels.ravel(), minlength=IGNORE + 1)
    return np.append(found[:classes], found[IGNORE])


def _overview(dataset: Any) -> None:
    from rasterio.enums import Resampling

    factors = [2**n for n in range(1, 16) if max(dataset.shape) // 2 ** (n - 1) > BLOCK]
    if factors:
        dataset.build_overviews(factors, Resampling.average if dataset.count > 1 else Resampling.nearest)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _check_whole(rasterio: Any, path: Path) -> None:
    """On a disk that is full to the last byte GDAL may close a file that is none, without a word."""
    try:
        rasterio.open(path, driver="GTiff").close()
    except rasterio.errors.RasterioError as error:
        raise WorkError(LOST) from error


def _verify(rasterio: Any, path: Path, strips: Strips) -> None:
    with rasterio.open(path) as dataset:
        levels = len(dataset.overviews(1))
        for window, block in _blocks(strips):
            if not np.array_equal(dataset.read(window=window), block, equal_nan=block.dtype.kind == "f"):
                raise WorkError(LOST)
    for level in range(levels):
        with rasterio.open(path, OVERVIEW_LEVEL=level) as dataset:
            for top in range(0, dataset.height, BLOCK):
                height = min(BLOCK, dataset.height - top)
                dataset.read(window=rasterio.windows.Window(0, top, dataset.width, height))
