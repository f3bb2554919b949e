"""Polygons: a class map as GeoJSON (RFC 7946), in longitude and latitude."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.errors import WorkError
from shared.mapping.geotiff import TAG
from shared.mapping.meridian import Polygon, Ring, area, within
from shared.rasters import IGNORE, Georeference, quiet

# Pixels of a side's pieces, and pieces of a side as long as the raster: what is straight on a map is curved on Earth.
LONGEST, FEWEST = 16, 8
EARTH = "OGC:CRS84"  # longitude and latitude, in this order
DECIMALS = 7  # of degrees: a centimetre, as RFC 7946 (section 11.2) has it


def write_polygons(
    class_map: Path, path: Path, classes: Sequence[str], digest: str, tick: Callable[[int], None]
) -> None:  # fmt: skip
    """Write the connected areas (by sides, not corners) of each class of a GeoTIFF as features of a GeoJSON file.

    A feature has the properties ``class`` (its name), ``value`` (its index) and ``pixels`` (its area). Pixels without
    data are in no polygon. An area across the 180th meridian is cut there. The raster is read by rows; what is held is
    the outlines of the whole map (about 100 bytes for a corner). tick: called with the pixels done.

    Raises WorkError where a place has no longitude and latitude.
    """
    with quiet() as rasterio, open(path, "w", encoding="utf-8") as file:
        from rasterio._err import CPLE_BaseError  # GDAL's own errors, some of which rasterio lets through
        from rasterio.errors import RasterioError
        from rasterio.features import shapes

        try:
            with rasterio.open(class_map) as dataset:
                found = ((s["coordinates"], int(v)) for s, v in shapes(rasterio.band(dataset, 1)) if v != IGNORE)
                file.write(f'{{"type":"FeatureCollection","{TAG}":"{digest}","features":[')
                pixel = abs(dataset.transform.determinant) ** 0.5
                longest = pixel * min(LONGEST, max(dataset.shape) / FEWEST)
                cut = ((rings, [_cut(ring, longest) for ring in rings], value) for rings, value in found)
                _write(file, cut, dataset.crs, pixel**2, classes, tick)
                file.write("\n]}\n")
        except (RasterioError, CPLE_BaseError) as error:
            raise WorkError(f"its areas cannot be brought to longitude and latitude: {error}") from error
        file.flush()
        os.fsync(file.fileno())


def outlines(mask: np.ndarray, place: Georeference | None = None, at: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """The connected areas (by sides, not corners) of a bool mask (H, W) as one GeoJSON geometry, a MultiPolygon where
    there are several: in longitude and latitude, or without a place on Earth in pixels, x to the right and y downwards.

    place: of the raster that the mask is a part of; its first row and column are ``at`` there.

    Raises WorkError where a place has no longitude and latitude.
    """
    with quiet() as rasterio:
        from rasterio._err import CPLE_BaseError
        from rasterio.errors import RasterioError
        from rasterio.features import shapes

        a, b, _, d, e, _ = (1, 0, 0, 0, 1, 0) if place is None else place.transform[:6]
        x, y = (at[1], at[0]) if place is None else place.at(at[1], at[0])
        transform = rasterio.Affine(a, b, x, d, e, y)
        found = [shape["coordinates"] for shape, _ in shapes(mask.astype(np.uint8), mask=mask, transform=transform)]
        if place is not None:
            longest = abs(transform.determinant) ** 0.5 * LONGEST
            try:
                parts = list(_on_earth([[_cut(ring, longest) for ring in rings] for rings in found], place.crs))
            except (RasterioError, CPLE_BaseError) as error:
                raise WorkError(f"its areas cannot be brought to longitude and latitude: {error}") from error
            found = [p for each in parts for p in _polygons(each)]
    one = len(found) == 1
    return {"type": "Polygon" if one else "MultiPolygon", "coordinates": found[0] if one else found}


def _polygons(geometry: dict[str, Any]) -> list[Any]:
    coordinates = geometry["coordinates"]
    return [coordinates] if geometry["type"] == "Polygon" else coordinates


def read_digest(path: Path) -> str | None:
    """What polygons were made from, as their file says; None where it is no file of ours."""
    with open(path, "rb") as file:
        found = re.search(rb'"%s":"(\w+)"' % TAG.encode(), file.read(200))
    return found[1].decode() if found else None


def _write(
    file: IO[str], found: Iterator[tuple[Polygon, Polygon, int]], crs: Any, pixel: float, classes: Sequence[str],
    tick: Callable[[int], None],
) -> None:  # fmt: skip
    """found: rings in map units, the same with long sides cut, and the class.  pixel: its area in map units."""
    done, comma = 0, ""
    tick(done)
    while some := list(islice(found, 1000)):
        geometries = _on_earth([cut for _, cut, _ in some], crs)
        for (rings, _, value), geometry in zip(some, geometries, strict=True):
            pixels = round((abs(area(rings[0])) - sum(abs(area(ring)) for ring in rings[1:])) / pixel)
            facts = {"class": classes[value], "value": value, "pixels": pixels}
            feature = {"type": "Feature", "properties": facts, "geometry": geometry}
            file.write(f"{comma}\n" + json.dumps(feature, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
            done, comma = done + pixels, ","
        tick(done)


def _on_earth(polygons: Sequence[Polygon], crs: Any) -> Iterator[dict[str, Any]]:
    """Polygons of a reference system as GeoJSON geometries."""
    from rasterio.warp import transform

    x, y = zip(*(point for rings in polygons for ring in rings for point in ring), strict=True)
    x, y = transform(crs, EARTH, x, y)[:2]
    if not all(map(math.isfinite, (*x, *y))):
        raise WorkError("a part of it has no longitude and latitude; ask for a class map, or reproject it")
    points = zip(x, y, strict=True)
    for rings in polygons:
        parts = [
            [[(round(x, DECIMALS), round(y, DECIMALS)) for x, y in ring] for ring in part]
            for part in within([list(islice(points, len(ring))) for ring in rings])
        ]
        one = len(parts) == 1
        yield {"type": "Polygon" if one else "MultiPolygon", "coordinates": parts[0] if one else parts}


def _cut(ring: Ring, longest: float) -> Ring:
    """The ring with long sides cut into pieces."""
    cut: Ring = []
    for (x, y), (to_x, to_y) in pairwise(ring):
        pieces = math.ceil(math.hypot(to_x - x, to_y - y) / longest)
        cut += [(x + (to_x - x) * i / pieces, y + (to_y - y) * i / pieces) for i in range(pieces)]
    return [*cut, ring[-1]]
