"""Two dates of one place: a second raster brought to the grid of the first, and what cannot be brought together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp

from shared.errors import RequestError
from shared.rasters import Georeference, open_pair, read_header, write_raster

UTM = CRS.from_epsg(32633)
HERE = Georeference(UTM, Affine(10, 0, 500000, 0, -10, 5000000))


def ramp(path: Path, place: Georeference, size: int, nodata: float | None = None) -> Path:
    """A plane over the map, of two bands: easting and northing in kilometres from the corner of ``HERE``."""
    at = [place.at(column + 0.5, row + 0.5) for row in range(size) for column in range(size)]
    values = (np.array(at).T.reshape(2, size, size) - np.array([500000, 5000000])[:, None, None]) / 1000
    write_raster(path, values.astype(np.float32), georeference=place, nodata=nodata)
    return path


@pytest.mark.parametrize("nodata", [None, -9999.0])
def test_a_second_date_is_brought_to_the_grid_of_the_first(tmp_path, nodata) -> None:
    """Shifted by half a pixel, twice as fine, and ending short of the first: a plane stays itself."""
    before = ramp(tmp_path / "before.tif", HERE, 20)
    there = Georeference(UTM, Affine(5, 0, 500052.5, 0, -5, 5000000))
    after = ramp(tmp_path / "after.tif", there, 40, nodata)
    with pytest.raises(RequestError, match="40 x 40 pixels"), open_pair(before, after, bands=[1, 2]):
        pass
    with open_pair(before, after, bands=[1, 2], reproject=True) as pair:
        image, valid, place = pair.read()
    assert (image.shape, place) == ((4, 20, 20), HERE)
    assert valid[:, 7:].all()
    assert not valid[:, :5].any()  # the second begins 52.5 m further east
    inside = np.s_[:, 1:19, 7:]
    np.testing.assert_allclose(image[:2][inside], image[2:][inside], atol=2e-3)
    assert (image[:, ~valid] == 0).all()


@pytest.mark.parametrize("mark", ["nodata", "NaN", "alpha", "mask"])
def test_what_is_invalid_in_a_second_date_never_blends_into_its_neighbours(tmp_path, mark) -> None:
    """The right half, in one band only where the file can say so."""
    before = ramp(tmp_path / "before.tif", HERE, 20)
    image = np.full((2, 40, 40), 100, np.float32)
    opaque = np.full((40, 40), 255, np.uint8)
    image[0, :, 20:] = {"nodata": 7, "NaN": np.nan}.get(mark, 100)
    opaque[:, 20:] = 0
    there = {"crs": UTM, "transform": Affine(5, 0, 500002.5, 0, -5, 5000000)}
    kind = {"driver": "GTiff", "height": 40, "width": 40, "dtype": "uint8" if mark == "alpha" else "float32", **there}
    more = {"nodata": {"nodata": 7}, "alpha": {"photometric": "MINISBLACK", "alpha": "yes"}}.get(mark, {})
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(tmp_path / "after.tif", "w", count=2 + (mark == "alpha"), **kind, **more) as file,
    ):
        file.write(image.astype(kind["dtype"]), [1, 2])
        if mark == "alpha":
            file.write(opaque, 3)
            file.colorinterp = (ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha)
        if mark == "mask":
            file.write_mask(opaque)
    with open_pair(before, tmp_path / "after.tif", bands=[1, 2], reproject=True) as pair:
        found, valid, _ = pair.read()
    assert valid[:, 1:9].all()
    assert not valid[:, 11:].any()
    np.testing.assert_allclose(found[2:][:, valid], 100, atol=1e-4)


def test_a_second_date_of_another_reference_system_comes_to_the_same_place(tmp_path) -> None:
    from rasterio.warp import transform

    before = ramp(tmp_path / "before.tif", HERE, 20)
    degrees = CRS.from_epsg(4326)
    corner = transform(UTM, degrees, [499900.0], [5000100.0])
    place = Georeference(degrees, Affine(1e-4, 0, corner[0][0], 0, -1e-4, corner[1][0]))
    centres = [place.at(c + 0.5, r + 0.5) for r in range(60) for c in range(60)]
    at = transform(degrees, UTM, [x for x, _ in centres], [y for _, y in centres])
    values = np.array(at[:2]).reshape(2, 60, 60) - np.array([500000, 5000000])[:, None, None]
    write_raster(tmp_path / "after.tif", (values / 1000).astype(np.float32), georeference=place)
    with pytest.raises(RequestError, match="60 x 60"), open_pair(before, tmp_path / "after.tif", bands=[1, 2]):
        pass
    with open_pair(before, tmp_path / "after.tif", bands=[1, 2], reproject=True) as pair:
        image, valid, _ = pair.read()
    assert valid.all()
    np.testing.assert_allclose(image[:2], image[2:], atol=2e-3)  # two metres


def test_what_cannot_be_brought_together_is_refused(tmp_path) -> None:
    before = ramp(tmp_path / "before.tif", HERE, 8)
    write_raster(tmp_path / "lost.tif", np.ones((2, 8, 8), np.float32))
    far = ramp(tmp_path / "far.tif", Georeference(UTM, Affine(10, 0, 900000, 0, -10, 5000000)), 8)
    cases: tuple[tuple[Path, dict[str, Any], str], ...] = (
        (tmp_path / "lost.tif", {}, "lost.tif: no coordinate reference system"),
        (far, {"fill": 0.0}, "far.tif: fill 0 would blend into the data"),
    )
    for path, options, message in cases:
        with (
            pytest.raises(RequestError, match=message),
            open_pair(before, path, bands=[1, 2], reproject=True, **options),
        ):
            pass
    with open_pair(before, far, bands=[1, 2], reproject=True) as pair:
        assert not pair.read().valid.any()
    assert read_header(before).georeference == HERE
