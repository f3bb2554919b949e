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

from modalities.remote_sensing.data.rasters import quiet
from modalities.remote_sensing.data.statistics import IGNORE
from modalities.remote_sensing.mapping.geotiff import TAG
from shared.errors import WorkError

LONGEST = 64  # pixels of a side's pieces: a long straight side of a map is curved in longitude and latitude
EARTH = "OGC:CRS84"  # longitude and latitude, in this order
DECIMALS = 7  # of degrees: a centimetre, as RFC 7946 (section 11.2) has it

Ring = list[tuple[float, float]]


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
        from rasterio.errors import RasterioError
        from rasterio.features import shapes

        try:
            with rasterio.open(class_map) as dataset:
                found = ((s["coordinates"], int(v)) for s, v in shapes(rasterio.band(dataset, 1)) if v != IGNORE)
                file.write(f'{{"type":"FeatureCollection","{TAG}":"{digest}","features":[')
                pixel = abs(dataset.transform.determinant) ** 0.5
                _write(file, found, dataset.crs, pixel, classes, tick)
                file.write("\n]}\n")
        except RasterioError as error:
            raise WorkError(f"{class_map}: cannot be brought to longitude and latitude: {error}") from error
        file.flush()
        os.fsync(file.fileno())


def read_digest(path: Path) -> str | None:
    """What polygons were made from, as their file says; None where it is no file of ours."""
    with open(path, "rb") as file:
        found = re.search(rb'"%s":"(\w+)"' % TAG.encode(), file.read(200))
    return found[1].decode() if found else None


def _write(
    file: IO[str], found: Iterator[tuple[list[Ring], int]], crs: Any, pixel: float, classes: Sequence[str],
    tick: Callable[[int], None],
) -> None:  # fmt: skip
    done, comma = 0, ""
    tick(done)
    while some := list(islice(found, 1000)):
        shaped = [[_cut(ring, LONGEST * pixel) for ring in rings] for rings, _ in some]
        for (rings, value), geometry in zip(some, _on_earth(shaped, crs), strict=True):
            area = abs(_area(rings[0])) - sum(abs(_area(ring)) for ring in rings[1:])
            pixels = round(area / pixel**2)
            facts = {"class": classes[value], "value": value, "pixels": pixels}
            feature = {"type": "Feature", "properties": facts, "geometry": _oriented(geometry)}
            file.write(f"{comma}\n" + json.dumps(feature, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
            done, comma = done + pixels, ","
        tick(done)


def _on_earth(polygons: Sequence[list[Ring]], crs: Any) -> Iterator[dict[str, Any]]:
    """Polygons of a reference system as GeoJSON geometries in longitude and latitude."""
    from rasterio.warp import transform, transform_geom

    x, y = zip(*(point for rings in polygons for ring in rings for point in ring), strict=True)
    points = iter(zip(*transform(crs, EARTH, x, y)[:2], strict=True))
    for rings in polygons:
        placed = [list(islice(points, len(ring))) for ring in rings]
        longitudes = [longitude for longitude, _ in placed[0]]
        if max(longitudes) - min(longitudes) > 180:  # across the 180th meridian: cut there, which takes GDAL long
            yield transform_geom(crs, EARTH, {"type": "Polygon", "coordinates": rings})
        else:
            yield {"type": "Polygon", "coordinates": placed}


def _cut(ring: Ring, longest: float) -> Ring:
    """The ring with long sides cut into pieces."""
    cut: Ring = []
    for (x, y), (to_x, to_y) in pairwise(ring):
        pieces = math.ceil(math.hypot(to_x - x, to_y - y) / longest)
        cut += [(x + (to_x - x) * i / pieces, y + (to_y - y) * i / pieces) for i in range(pieces)]
    return [*cut, ring[-1]]


def _oriented(geometry: dict[str, Any]) -> dict[str, Any]:
    """The geometry with rounded coordinates, outer rings counterclockwise and holes clockwise (section 3.1.6)."""
    alone = geometry["type"] == "Polygon"
    polygons = [geometry["coordinates"]] if alone else geometry["coordinates"]
    polygons = [[_turned(ring, outer=i == 0) for i, ring in enumerate(rings)] for rings in polygons]
    return {"type": geometry["type"], "coordinates": polygons[0] if alone else polygons}


def _turned(ring: Ring, *, outer: bool) -> Ring:
    if not all(math.isfinite(value) for point in ring for value in point[:2]):
        raise WorkError("a part of the raster has no longitude and latitude; ask for a class map, or reproject it")
    if (_area(ring) > 0) != outer:
        ring = ring[::-1]
    return [(round(point[0], DECIMALS), round(point[1], DECIMALS)) for point in ring]


def _area(ring: Ring) -> float:
    """Signed area of a closed ring, positive where it runs counterclockwise in (x, y)."""
    x, y = ring[0][:2]  # near the ring, so that no digits are lost
    return sum((a[0] - x) * (b[1] - y) - (b[0] - x) * (a[1] - y) for a, b in pairwise(ring)) / 2
