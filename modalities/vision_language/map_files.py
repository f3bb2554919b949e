"""Similarity maps of image files: the cosine of each patch with each class, as georeferenced rasters."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from modalities.images.data import Preparation
from modalities.images.labels import image_files
from shared.errors import RequestError, WorkError
from shared.store import write_atomically

SUFFIX = ".tif"


class Place(NamedTuple):
    """Where a map lies in its image: columns and rows of the image to the left of and above it, and pixels a patch."""

    left: float
    top: float
    across: float
    down: float


def map_images(
    maps: Callable[[Tensor], Tensor], classes: Sequence[str], preparation: Preparation, inputs: Sequence[Path],
    output: Path, *, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write the maps of every image of ``inputs`` (files, and folders with their subfolders).

    maps: images (B, bands, size, size) to cosines (B, classes, h, w).
    output: a .tif file, for one image; else a folder, which repeats the folders of the inputs. A file has a float32
    band for each class, named so, and a pixel for each patch of the middle square that the model sees; its transform
    leads to the image's pixels, or on to the coordinates that those of a GeoTIFF have.

    Raises RequestError before anything is read where an output is there already, unless ``overwrite``, or two images
    would become one file. A single image that cannot be read raises; of several, the others are written, and a
    WorkError names those.
    """
    pairs = targets(inputs, output, preparation.suffixes, overwrite)
    failed: list[Path] = []
    for source, target in pairs:
        try:
            image = preparation.read(source)
        except RequestError as error:
            if len(pairs) == 1:
                raise
            print(f"omniadapt: {error}", file=sys.stderr)
            failed.append(source)
            continue
        found = maps(preparation.normalised(preparation.square(image))[None])[0].float().cpu().numpy()
        write_atomically(target, raster(found, classes, place(image.shape[1:], found.shape[1:]), source))
        print(f"{target}: {found.shape[2]} x {found.shape[1]} patches, {len(classes)} classes")
    if failed:
        raise WorkError(f"{len(failed)} of {len(pairs)} images failed: {', '.join(map(str, failed))}")


def targets(
    inputs: Sequence[Path], output: Path, suffixes: Sequence[str], overwrite: bool
) -> list[tuple[Path, Path]]:  # fmt: skip
    """Each image with the file to write."""
    alone = len(inputs) == 1 and not inputs[0].is_dir()
    if output.suffix.lower() in (SUFFIX, ".tiff") and not output.is_dir():
        if not alone:
            raise RequestError(f"{output}: maps of several images go to a folder; name one")
        pairs = [(inputs[0], output)]
    elif output.is_file() or output.suffix.lower() in (".csv", ".png", ".geojson"):
        raise RequestError(f"{output}: a map is a {SUFFIX} file, or goes into a folder")
    else:
        pairs = []
        for path in inputs:
            base = path if path.is_dir() else path.parent
            pairs += [(file, output / file.relative_to(base).with_suffix(SUFFIX))
                      for file in image_files([path], suffixes)]  # fmt: skip
    before: dict[Path, Path] = {}
    for source, target in pairs:
        if before.setdefault(target, source) != source:
            raise RequestError(f"{before[target]} and {source} would both become {target}; map them one by one")
        if target.exists() and target.samefile(source):
            raise RequestError(f"{target}: a map would overwrite its image; choose another folder")
        if target.exists() and not overwrite:
            raise RequestError(f"{target} exists already; --overwrite replaces it")
    return [(source, target) for target, source in before.items()]


def place(image: tuple[int, ...], patches: tuple[int, ...]) -> Place:
    """Where the patches (h, w) of the middle square of an image (H, W) lie."""
    side = min(image)
    return Place((image[1] - side) / 2, (image[0] - side) / 2, side / patches[1], side / patches[0])


def raster(values: np.ndarray, classes: Sequence[str], at: Place, source: Path) -> bytes:
    """A GeoTIFF of (classes, h, w), placed as the image of ``source`` is."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
        from rasterio.io import MemoryFile
    except ImportError as error:
        raise RequestError("maps need rasterio: pip install 'omniadapt[remote-sensing]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # most images are not
        crs, transform = None, rasterio.Affine.identity()
        if source.suffix.lower() in (SUFFIX, ".tiff"):
            with rasterio.open(source) as image:
                crs, transform = image.crs, image.transform
        inside = rasterio.Affine(at.across, 0, at.left, 0, at.down, at.top)
        profile: dict[str, Any] = {
            "driver": "GTiff", "dtype": "float32", "count": len(values), "height": values.shape[1],
            "width": values.shape[2], "crs": crs, "transform": transform @ inside, "compress": "deflate",
            "predictor": 3, "interleave": "band", "photometric": "minisblack",
        }  # fmt: skip
        with MemoryFile() as memory:
            with memory.open(**profile) as written:
                written.write(values.astype(np.float32))
                written.descriptions = tuple(classes)
            return bytes(memory.getbuffer())
