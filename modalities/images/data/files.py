"""Image files: read whole and checked, as the array a model is fed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from modalities.images.backbones.inputs import library
from shared.errors import RequestError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
KINDS = {1: "grey", 3: "RGB"}  # by number of bands


def read_image(file: Any, where: str | None = None, bands: int = 3) -> np.ndarray:
    """An image as uint8 (bands, H, W), turned upright as its Exif data say.

    file: a path, or an open binary file.  where: what an error calls it, None: the path.  bands: 3 (RGB) or 1 (grey).
    Palettes are looked up, and an alpha channel that is opaque everywhere is left out; nothing else is converted.

    Raises RequestError where the file is missing, empty or damaged, holds several images, or has other channels.
    """
    where = str(file) if where is None else where
    picture = _plain(_opened(file, where))
    if picture.mode != {1: "L", 3: "RGB"}[bands]:
        have, want = f"{_channels(picture)} ({picture.mode})", f"{bands} of 8 bits ({KINDS[bands]})"
        raise RequestError(f"{where}: channels {have}, wanted {want}; convert the file, or set bands")
    array = np.array(picture)
    return array[None] if bands == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _opened(file: Any, where: str) -> Any:
    image = library("PIL.Image")
    if isinstance(file, (str, Path)):
        if not Path(file).is_file():
            raise RequestError(f"{where}: no such file")
        if not Path(file).stat().st_size:
            raise RequestError(f"{where}: not a readable image: the file is empty")
    try:
        with image.open(file, formats=FORMATS) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # a camera's further views of one photograph are left
                raise RequestError(f"{where}: holds {frames} images; one is wanted")
            picture.load()
            return library("PIL.ImageOps").exif_transpose(picture) if picture.getexif().get(0x0112, 1) != 1 else picture
    # Pillow raises these and more for the ways in which a file can be broken; an absent or forbidden one is an OSError.
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, image.DecompressionBombError) as error:
        line = " ".join(str(error).split())
        raise RequestError(f"{where}: not a readable PNG, JPEG, TIFF or WebP image ({line})") from error


def _plain(picture: Any) -> Any:
    """Palettes looked up, an opaque alpha channel dropped."""
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    elif picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("RGBA", "LA") and picture.getchannel("A").getextrema()[0] == 255:
        picture = picture.convert(picture.mode[:-1])
    return picture


def _channels(picture: Any) -> int:
    return len(picture.getbands())
