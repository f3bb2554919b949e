"""Bad input: one clear line, nothing written, whatever is wrong with the raster, the target or the settings."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rasterio import Affine
from rasterio.crs import CRS

from shared.errors import RequestError, WorkError
from shared.mapping import Feed, map_raster
from shared.rasters import Georeference, write_raster
from tests.shared.mapping.conftest import HERE


def truncated(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])


def damaged(path: Path) -> None:
    """The header is fine; a tile in the middle is not."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(bytes(data))


def invalid(path: Path) -> None:
    write_raster(path, np.full((3, 60, 60), np.nan, np.float32), georeference=HERE)


def infinite(path: Path) -> None:
    write_raster(path, np.full((3, 60, 60), np.inf, np.float32), georeference=HERE)


def nodata(path: Path) -> None:
    write_raster(path, np.zeros((3, 60, 60), np.uint8), georeference=HERE, nodata=0)


def of(bands: int):
    return lambda path: write_raster(path, np.ones((bands, 60, 60), np.uint8))


def numbers(path: Path) -> None:
    np.save(path.with_suffix(".npy"), np.ones((60, 60, 60)))


# what happens to a good raster, the source and target asked for, the message
SOURCES = {
    "missing": (lambda path: path.unlink(), "in.tif", "in.tif: no such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "in.tif", "in.tif: a folder, not a file"),
    "empty": (lambda path: path.write_bytes(b""), "in.tif", r"in.tif: empty \(0 bytes\)"),
    "text": (lambda path: path.write_text("hello"), "in.tif", "in.tif: damaged, or not GTiff"),
    "truncated": (truncated, "in.tif", "in.tif: damaged, or not GTiff"),
    "damaged inside": (damaged, "in.tif", "in.tif: damaged, or not GTiff"),
    "unknown kind": (lambda path: path.rename(path.with_suffix(".jp2")), "in.jp2", "in.jp2: not a raster this reads"),
    "all NaN": (invalid, "in.tif", "in.tif: no valid pixel"),
    "all infinite": (infinite, "in.tif", "in.tif: no valid pixel"),
    "all nodata": (nodata, "in.tif", "in.tif: no valid pixel"),
    "too few bands": (of(2), "in.tif", "in.tif: 2 bands; the model was trained on files of 3 bands"),
    "too many bands": (of(5), "in.tif", "in.tif: 5 bands; the model was trained on files of 3 bands"),
    "one band": (of(1), "in.tif", "in.tif: 1 band; the model was trained on files of 3 bands"),
    "unclear axes": (numbers, "in.npy", r"in.npy: which axis of \(60, 60, 60\) holds the bands is not plain"),
}


@pytest.mark.parametrize(("spoil", "name", "message"), SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("output", ["classes", "polygons"])
def test_a_bad_raster_is_one_line_and_leaves_nothing(tmp_path, made, scores, feed, spoil, name, message, output):
    spoil(made(60, 60))
    before = sorted(tmp_path.rglob("*"))
    target = tmp_path / ("out.tif" if output == "classes" else "out.geojson")
    with pytest.raises(RequestError) as caught:
        map_raster(scores, tmp_path / name, target, feed, output=output)
    unplaced = output == "polygons" and "no coordinate reference system" in str(caught.value)
    assert unplaced or re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


# settings, target, message
REQUESTS = {
    "its own input": ({}, "in.tif", "in.tif: the result would overwrite its own input"),
    "even asked to": ({"overwrite": True}, "in.tif", "in.tif: the result would overwrite its own input"),
    "by a link": ({"overwrite": True}, "link.tif", "link.tif: the result would overwrite its own input"),
    "a folder": ({}, "folder.tif", "folder.tif: a folder; name a file in it"),
    "another file": ({}, "there.tif", "there.tif exists and is another prediction or none"),
    "a wrong name": ({}, "out.png", "out.png: classes are written to a file named .tif or .tiff"),
    "polygons as tif": ({"output": "polygons"}, "out.tif", "out.tif: polygons are written to a file named .geojson"),
    "unknown output": ({"output": "masks"}, "out.tif", "output 'masks': use classes, probabilities, polygons"),
    "overlap": ({"overlap": 17}, "out.tif", "window 32 with overlap 17: at least 1 pixel, sharing at most half"),
    "window": ({"window": -1}, "out.tif", "window -1 with overlap"),
    "zero window": ({"window": 0}, "out.tif", "window 0 with overlap"),
    "band count": ({"bands": [1, 2]}, "out.tif", r"bands \[1, 2\]: the model reads 3, state one number for each"),
    "band number": ({"bands": [1, 2, 4]}, "out.tif", "in.tif: no band 4; it has bands 1 to 3"),
    "no batch": ({"batch": 0}, "out.tif", "batch 0: at least 1 window"),
}


@pytest.mark.parametrize(("options", "name", "message"), REQUESTS.values(), ids=REQUESTS)
def test_a_wrong_request_is_one_line_and_leaves_all_as_it_was(tmp_path, made, scores, feed, options, name, message):
    source = made(60, 60)
    (tmp_path / "link.tif").symlink_to(source)
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "there.tif").write_text("precious")
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RequestError, match=message) as caught:
        map_raster(scores, source, tmp_path / name, feed, **options)
    assert "\n" not in str(caught.value)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_raster_that_breaks_off_late_leaves_nothing(tmp_path, made, scores, feed):
    source = made(600, 600)
    truncated(source)
    with pytest.raises(RequestError, match="in.tif: damaged, or not GTiff"):
        map_raster(scores, source, tmp_path / "out.tif", feed)
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]


def test_a_folder_that_cannot_be_written(tmp_path, made, scores, feed):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match=r"out.tif: cannot be written: (Not a directory|File exists)"):
        map_raster(scores, made(60, 60), tmp_path / "file" / "out.tif", feed)


def test_polygons_outside_of_the_globe(tmp_path, made, scores, feed):
    far = Georeference(CRS.from_epsg(32633), Affine(30, 0, 1e12, 0, -30, 1e12))
    source = made(40, 40, place=far)
    with pytest.raises(WorkError, match="has no longitude and latitude|cannot be brought to longitude and latitude"):
        map_raster(scores, source, tmp_path / "out.geojson", feed, output="polygons")
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]
    map_raster(scores, source, tmp_path / "out.tif", feed)


def test_names_with_spaces_and_other_letters(tmp_path, made, scores, feed):
    source = made(40, 40, name="Größe 街 été.tif")
    target = tmp_path / "neuer Ordner" / "Karte ñ.geojson"
    strange = replace(feed, classes=('wo"lke', "tré\\s", "雲"))
    map_raster(scores, source, target, strange, output="polygons")
    assert [path.name for path in target.parent.iterdir()] == ["Karte ñ.geojson"]
    text = target.read_text(encoding="utf-8")
    assert "雲" in text
    map_raster(scores, source, target.with_suffix(".tif"), strange)


@pytest.mark.parametrize("missing", ["classes", "file_bands", "reading", "normalisation", "window"])
def test_data_that_do_not_say_how_to_read(missing):
    described = {
        "classes": ["a", "b"], "file_bands": ["band 1"], "reading": {"bands": [1]},
        "normalisation": {"mean": [0.0], "std": [1.0]}, "window": 32,
    }  # fmt: skip
    assert Feed.of(described).fill is None
    del described[missing]
    with pytest.raises(RequestError, match=f"does not say how rasters are read: data lack '{missing}'"):
        Feed.of(described)
