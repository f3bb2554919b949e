"""Polygons: GeoJSON that gives the class map back, in longitude and latitude, with names and areas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rasterio import Affine
from rasterio.crs import CRS

from shared.errors import RequestError
from shared.mapping import Feed, map_raster, outlines
from shared.normalisation import Normalisation
from shared.rasters import Georeference, write_raster
from tests.shared.mapping.conftest import CLASSES, opened

PLAIN = Feed(CLASSES, (1, 2, 3), ("band 1", "band 2", "band 3"), None, None, Normalisation((0.0,) * 3, (1.0,) * 3), 64)


def drawn(folder: Path, mask: np.ndarray, place: Georeference | None) -> Path:
    """A raster whose brightest band is the class of a pixel, NaN where ``mask`` is 255."""
    image = np.stack([np.where(mask == 255, np.nan, mask == index) for index in range(3)]).astype(np.float32)
    write_raster(folder / "drawn.tif", image, georeference=place)
    return folder / "drawn.tif"


def polygons(folder: Path, mask: np.ndarray, place: Georeference) -> list[dict]:
    target = folder / "drawn.geojson"
    map_raster(torch.clone, drawn(folder, mask, place), target, PLAIN, output="polygons")
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    found = json.loads(target.read_text())
    assert found["type"] == "FeatureCollection"
    return found["features"]


def rings(feature: dict) -> list[tuple[np.ndarray, bool]]:
    """Each ring (n, 2) with whether it is an outer one."""
    geometry = feature["geometry"]
    parts = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    return [(np.array(ring), index == 0) for part in parts for index, ring in enumerate(part)]


def turn(ring: np.ndarray) -> float:
    """Signed area, positive counterclockwise."""
    x, y = (ring - ring[0]).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


PLACES = {
    "north up": Affine(30, 0, 400000, 0, -30, 5000000),
    "south up": Affine(30, 0, 400000, 0, 30, 5000000),
    "rotated": Affine(25, 10, 400000, 10, -25, 5000000),
}


@pytest.mark.parametrize("transform", PLACES.values(), ids=PLACES)
def test_polygons_give_the_class_map_back(tmp_path, transform):
    from rasterio.features import rasterize
    from rasterio.warp import transform_geom

    random = np.random.default_rng(3)
    mask = np.kron(random.choice([0, 0, 1, 2, 255], (12, 15)), np.ones((7, 7))).astype(np.uint8)
    crs = CRS.from_epsg(32633)
    features = polygons(tmp_path, mask, Georeference(crs, transform))
    shapes = [(transform_geom("OGC:CRS84", crs, f["geometry"]), f["properties"]["value"]) for f in features]
    back = rasterize(shapes, mask.shape, fill=255, transform=transform)
    np.testing.assert_array_equal(back, mask)
    for index, name in enumerate(CLASSES):
        own = [f["properties"]["pixels"] for f in features if f["properties"]["class"] == name]
        assert sum(own) == (mask == index).sum()
    for feature in features:
        for ring, outer in rings(feature):
            assert (ring[0] == ring[-1]).all()
            assert (turn(ring) > 0) == outer
            assert np.abs(ring - [13.7, 45.15]).max() < 0.2


def test_areas_go_on_across_strips_and_have_holes(tmp_path):
    mask = np.zeros((300, 200), np.uint8)
    mask[20:280, 50:60] = 1
    mask[100:200, 54:56] = 255
    features = polygons(tmp_path, mask, Georeference(CRS.from_epsg(32633), PLACES["north up"]))
    found = {(f["properties"]["class"], f["properties"]["pixels"]): len(rings(f)) for f in features}
    assert found == {("clear", 300 * 200 - 2600): 2, ("shadow", 2600 - 200): 2}


def test_long_sides_follow_the_curve_of_the_map(tmp_path):
    mask = np.zeros((4, 6000), np.uint8)  # 600 km along a parallel of easting: far from straight on the globe
    place = Georeference(CRS.from_epsg(32633), Affine(100, 0, 200000, 0, -100, 7500000))
    (feature,) = polygons(tmp_path, mask, place)
    from rasterio.warp import transform

    ((ring, _),) = rings(feature)
    middle = (ring[1:] + ring[:-1]) / 2
    _, north = transform("OGC:CRS84", place.crs, *middle.T)
    north = np.array(north)
    off = np.minimum(np.abs(north - 7500000), np.abs(north - 7499600))
    short = np.abs(np.diff(ring, axis=0)).max(1) > 1e-2  # the two sides of 400 m apart
    assert off[short].max() < 1  # metre, a hundredth of a pixel
    assert len(ring) > 2 * 6000 / 16


def test_an_area_across_the_antimeridian_is_cut_there(tmp_path):
    mask = np.zeros((20, 400), np.uint8)
    place = Georeference(CRS.from_epsg(32601), Affine(1000, 0, 200000, 0, -1000, 7800000))
    (feature,) = polygons(tmp_path, mask, place)
    assert feature["geometry"]["type"] == "MultiPolygon"
    assert feature["properties"]["pixels"] == 8000
    sides = [np.sign(ring[:, 0]).tolist() for ring, _ in rings(feature)]
    assert all(len(set(side)) == 1 for side in sides)
    assert {side[0] for side in sides} == {-1, 1}
    assert all((turn(ring) > 0) == outer for ring, outer in rings(feature))


def test_a_raster_without_a_reference_system_has_no_polygons(tmp_path):
    source = drawn(tmp_path, np.zeros((5, 5), np.uint8), None)
    with pytest.raises(RequestError, match="drawn.tif: no coordinate reference system, and GeoJSON is in longitude"):
        map_raster(torch.clone, source, tmp_path / "p.geojson", PLAIN, output="polygons")
    map_raster(torch.clone, source, tmp_path / "c.tif", PLAIN)
    assert not opened(tmp_path / "c.tif")[0].any()


def test_finished_polygons_are_left_alone(tmp_path):
    place = Georeference(CRS.from_epsg(4326), Affine(1, 0, 10, 0, -1, 50))
    source, target = drawn(tmp_path, np.zeros((5, 5), np.uint8), place), tmp_path / "p.geojson"
    assert map_raster(torch.clone, source, target, PLAIN, output="polygons").pixels == {
        "clear": 25,
        "shadow": 0,
        "cloud": 0,
    }
    assert map_raster(torch.clone, source, target, PLAIN, output="polygons").pixels is None
    (feature,) = json.loads(target.read_text())["features"]
    ((ring, _),) = rings(feature)
    assert turn(ring) == 25
    assert {tuple(corner) for corner in ring} >= {(10, 50), (10, 45), (15, 45), (15, 50)}


# -- outlines of one mask ----------------------------------------------------------------------------------------------


def test_outlines_without_a_place_are_in_pixels_of_the_whole() -> None:
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:6] = True
    assert outlines(mask)["coordinates"] == [[(2, 1), (2, 4), (6, 4), (6, 1), (2, 1)]]
    assert outlines(mask, at=(10, 20))["coordinates"] == [[(22, 11), (22, 14), (26, 14), (26, 11), (22, 11)]]
    mask[2, 3] = False
    assert len(outlines(mask)["coordinates"]) == 2  # with a hole
    mask[5, 7] = True
    found = outlines(mask)
    assert (found["type"], len(found["coordinates"])) == ("MultiPolygon", 2)


@pytest.mark.parametrize("transform", PLACES.values(), ids=PLACES)
def test_outlines_with_a_place_are_on_earth(transform) -> None:
    from rasterio.features import rasterize
    from rasterio.warp import transform_geom

    place, whole = Georeference(CRS.from_epsg(32631), transform), np.zeros((30, 40), bool)
    whole[4:12, 20:31] = True
    whole[6, 22:25] = False
    whole[12:14, 35] = True
    found = outlines(whole[4:, 20:], place, (4, 20))
    assert found["type"] == "MultiPolygon"
    back = rasterize([transform_geom("OGC:CRS84", place.crs, found)], (30, 40), transform=transform)
    assert np.array_equal(back.astype(bool), whole)


def test_an_outline_across_the_antimeridian_is_cut_there() -> None:
    place = Georeference(CRS.from_epsg(4326), Affine(0.5, 0, 178, 0, -0.5, 10))
    found = outlines(np.ones((4, 8), bool), place)
    assert found["type"] == "MultiPolygon"
    sides = sorted((min(x for x, _ in part[0]), max(x for x, _ in part[0])) for part in found["coordinates"])
    assert sides == [(-180, -178), (178, 180)]
