"""GDAL, through rasterio: strict with damaged files, and silent where a raster has no place on Earth."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared.errors import RequestError

# By default GDAL pads a truncated JPEG with grey and a truncated PNG with zeros, without a word.
_STRICT = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_PNG_WHOLE_IMAGE_OPTIM": False}


@contextmanager
def quiet() -> Iterator[Any]:
    """rasterio, set to refuse truncated files and to say nothing of a raster without a place on Earth."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError as error:
        raise RequestError("reading rasters needs rasterio: pip install 'omniadapt[remote-sensing]'") from error
    with warnings.catch_warnings(), rasterio.Env(**_STRICT):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield rasterio


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What GDAL warns of meanwhile. Of a file that is cut short it may read the pixels, and lose the place on Earth or
    the names of the bands with no more than a warning."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("rasterio._env")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def reason(error: BaseException) -> str:
    """The first line of the deepest cause: GDAL's own words rather than 'Read failed. See previous exception'."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
