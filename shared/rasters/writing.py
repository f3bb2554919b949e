"""Writing rasters: GeoTIFF, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.errors import WorkError
from shared.rasters.gdal import quiet, reason
from shared.rasters.reading import Georeference


def write_raster(
    path: str | Path,
    image: np.ndarray,
    *,
    georeference: Georeference | None = None,
    band_names: Sequence[str] | None = None,
    nodata: float | None = None,
) -> None:
    """Write (bands, H, W) as a deflated GeoTIFF: to a temporary name beside ``path``, renamed when whole.

    Raises WorkError where it cannot be written; then ``path`` is as it was.
    """
    path, (bands, height, width) = Path(path), image.shape
    place = {} if georeference is None else {"crs": georeference.crs, "transform": georeference.transform}
    profile = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": image.dtype, **place}
    predictor = 3 if np.issubdtype(image.dtype, np.floating) else 2
    # MINISBLACK: four bytes per pixel would otherwise be written as red, green, blue and alpha.
    coding = {"compress": "deflate", "predictor": predictor, "photometric": "MINISBLACK", "nodata": nodata}
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tif")
    try:
        with quiet() as rasterio, rasterio.open(temporary, "w", **profile, **coding) as dataset:
            dataset.write(image)
            dataset.descriptions = tuple(band_names) if band_names else (None,) * bands
        os.replace(temporary, path)
    except OSError as error:  # which rasterio's own errors are
        raise WorkError(f"{path}: cannot be written ({reason(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)
