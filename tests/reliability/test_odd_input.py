"""Odd but legal input: rasters without a place or turned, names of all kinds, single pixels; the result is right.

What a map must hold is computed here from the raster's numbers and the model alone, without the mapping.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rasterio import Affine
from rasterio.crs import CRS

from shared import run
from shared.rasters import Georeference, quiet, write_raster
from tests.reliability.world import HERE, World, as_picture, image, labels, loop, opened, truncated

SIZE, MARGIN = 64, 8  # one window, and a quarter of its overlap beyond the raster's edges
WINDOW = f"--window {SIZE} --overlap {4 * MARGIN}"
SOUTH_UP = Georeference(HERE.crs, Affine(0.001, 0, 10, 0, 0.001, 50))
ROTATED = Georeference(CRS.from_epsg(32633), Affine(20, 8, 5e5, 8, -20, 5e6))
UNNAMED = Georeference(None, Affine(2, 0, 100, 0, -2, 900))


def expected(world: World, pixels: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """The class map (H, W) of an image (3, H, W) that fits one window: the model on its mirrored image at once."""
    trained = run.load(world.run)
    scale = trained.described["normalisation"]
    mean, std = (np.array(scale[key], np.float32)[:, None, None] for key in ("mean", "std"))
    valid = np.ones(pixels.shape[1:], bool) if valid is None else valid
    values = np.where(valid, (pixels.astype(np.float32) - mean) / std, 0).astype(np.float32)
    height, width = valid.shape
    beyond = (MARGIN, SIZE - MARGIN - height), (MARGIN, SIZE - MARGIN - width)
    window = torch.from_numpy(np.pad(values, ((0, 0), *beyond), mode="reflect"))[None]
    classes = trained.task.scores(window)[0, :, MARGIN : MARGIN + height, MARGIN : MARGIN + width].argmax(0)
    return np.where(valid, classes.numpy(), 255)


def predicted(world: World, source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.scene, world.out = source, target
    assert world.main(f"predict {{run}} {{scene}} -o {{out}} {WINDOW}") == 0
    assert capsys.readouterr().err == ""


PLACES = {"none": None, "without a system": UNNAMED, "south up": SOUTH_UP, "rotated": ROTATED, "north up": HERE}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_map_has_the_classes_and_the_place_of_its_raster(world, place, capsys):
    pixels = image(40, 44, "scene")
    write_raster(world.scene, pixels, georeference=place)
    predicted(world, world.scene, world.root / "map.tif", capsys)
    found, crs, transform = opened(world.root / "map.tif")
    right = expected(world, pixels)
    assert len(np.unique(right)) > 1
    np.testing.assert_array_equal(found[0], right)
    assert crs == (place.crs if place else None)
    assert transform == (place.transform if place else Affine.identity())


@pytest.mark.parametrize(
    "place", [HERE, SOUTH_UP, Georeference(HERE.crs, Affine(0.001, 0.0004, 10, 0.0004, -0.001, 50))]
)
def test_polygons_cover_the_pixels_of_their_class(world, place, capsys):
    """Drawn back onto the raster's grid they give the class map, whichever way the grid is turned."""
    from rasterio.features import rasterize

    pixels = image(40, 44, "scene")
    write_raster(world.scene, pixels, georeference=place)
    predicted(world, world.scene, world.root / "map.geojson", capsys)
    features = json.loads((world.root / "map.geojson").read_text())["features"]
    shapes = [(feature["geometry"], feature["properties"]["value"]) for feature in features]
    drawn = rasterize(shapes, (40, 44), fill=99, transform=place.transform, dtype="uint8")
    np.testing.assert_array_equal(drawn, expected(world, pixels))


@pytest.mark.parametrize("size", [(1, 1), (1, 44), (40, 1)], ids=str)
def test_a_map_of_a_single_pixel_row_or_column(world, size, capsys):
    pixels = image(*size, "small")
    write_raster(world.scene, pixels, georeference=HERE)
    predicted(world, world.scene, world.root / "map.tif", capsys)
    found, crs, transform = opened(world.root / "map.tif")
    np.testing.assert_array_equal(found[0], expected(world, pixels))
    assert (crs, transform) == (HERE.crs, HERE.transform)


def test_pixels_of_nan_infinity_and_nodata_are_without_data_and_change_no_other(world, capsys):
    pixels = image(40, 44, "scene").astype(np.float32)
    pixels[0, 3, 4], pixels[1, 5, 6], pixels[2, 7, 8], pixels[0, 9, 10:14] = np.nan, np.inf, -np.inf, -9999
    write_raster(world.scene, pixels, georeference=HERE, nodata=-9999)
    valid = np.isfinite(pixels).all(0) & (pixels != -9999).all(0)
    assert (~valid).sum() == 7
    predicted(world, world.scene, world.root / "map.tif", capsys)
    np.testing.assert_array_equal(
        opened(world.root / "map.tif")[0][0], expected(world, np.where(valid, pixels, 0), valid)
    )


@pytest.mark.parametrize("name", ["with two  spaces", "Größe 街 été", "it's [a] {b} #1 %20", "-o", "naïve\tname"])
def test_names_of_all_kinds(world, name, capsys):
    folder = world.root / f"in {name}"
    folder.mkdir()
    pixels = image(40, 44, name)
    write_raster(folder / f"{name}.tif", pixels, georeference=HERE)
    predicted(world, folder, world.root / f"maps {name}", capsys)
    np.testing.assert_array_equal(opened(world.root / f"maps {name}" / f"{name}.tif")[0][0], expected(world, pixels))


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_pictures_and_arrays_give_what_the_same_numbers_in_a_tiff_give(world, suffix, capsys):
    pixels = image(40, 44, "scene")
    if suffix == ".png":
        source = as_picture(world.scene, suffix)
    else:
        source = world.root / "scene.npy"
        np.save(source, pixels)
    predicted(world, source, world.root / "map.tif", capsys)
    found, crs, _ = opened(world.root / "map.tif")
    np.testing.assert_array_equal(found[0], expected(world, pixels))
    assert crs is None


def test_of_a_folder_with_bad_rasters_the_good_ones_are_mapped(world, capsys):
    truncated(world.images / "b.tif")
    loop(world.images / "d.tif")
    (world.images / "e.tif").write_bytes(b"")
    (world.images / "back").symlink_to(world.images)
    assert world.main(f"predict {{run}} {{images}} -o {{out}} {WINDOW}") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"images/(\w)\.tif: (\w+)", line)[0][7:] for line in lines[:3]] == [  # type: ignore[index]
        "b.tif: damaged", "d.tif: cannot", "e.tif: empty",
    ]  # fmt: skip
    assert len(lines) == 4
    assert lines[3].startswith("omniadapt: 3 of 6 rasters failed: ")
    assert sorted(path.name for path in world.out.iterdir()) == ["a.tif", "c.tif", "f.tif"]
    np.testing.assert_array_equal(opened(world.out / "c.tif")[0][0], expected(world, image(32, 32, "c")))


def trained_on(world: World, more: str, capsys: pytest.CaptureFixture[str]) -> dict:
    """What a run says, whose stderr was empty; its statistics are those of the files' numbers."""
    world.describe()
    assert world.main(f"run {{recipe}} --output {{out}} {more}") == 0
    assert capsys.readouterr().err == ""
    found = json.loads((world.out / "metrics.json").read_text())
    scenes, scale = found["data"]["splits"], found["data"]["normalisation"]
    files = {p.relative_to(world.images).with_suffix("").as_posix(): p for p in world.images.rglob("*.tif")}
    values = np.concatenate([opened(files[name])[0].reshape(3, -1) for name in scenes["train"]["scenes"]], 1)
    np.testing.assert_allclose(scale["mean"], values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(scale["std"], values.astype(np.float64).std(1), rtol=1e-6)
    truth = [opened(world.masks / files[name].relative_to(world.images))[0] for name in scenes["test"]["scenes"]]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in truth]), minlength=3)
    assert np.array(found["test"]["confusion"]).sum(1).tolist() == counts.tolist()
    return found


def moved(world: World, place: Georeference | None) -> None:
    for name in "abcdef":
        write_raster(world.images / f"{name}.tif", image(32, 32, name), georeference=place)
        write_raster(world.masks / f"{name}.tif", labels(32, 32, name), georeference=place)


@pytest.mark.parametrize("place", [None, SOUTH_UP, ROTATED], ids=["none", "south up", "rotated"])
def test_training_on_rasters_without_a_place_or_turned_gives_the_same_numbers(world, trained, place, capsys):
    moved(world, place)
    found = trained_on(world, "", capsys)
    assert found["test"] == json.loads((trained / "metrics.json").read_text())["test"]


def test_training_on_single_pixels(world, capsys):
    for name in "abcdef":
        write_raster(world.images / f"{name}.tif", image(1, 1, name), georeference=HERE)
        write_raster(world.masks / f"{name}.tif", labels(1, 1, name), georeference=HERE)
    found = trained_on(world, "data.tile=32", capsys)
    assert sum(sum(part["pixels"].values()) for part in found["data"]["splits"].values()) == 6


def test_training_on_names_of_all_kinds_and_a_folder_that_links_back(world, capsys):
    for folder in (world.images, world.masks):
        (folder / "Größe 街" / "two  spaces").mkdir(parents=True)
        (folder / "b.tif").rename(folder / "Größe 街" / "two  spaces" / "été #1.tif")
        (folder / "back").symlink_to(folder)
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "draft.tif").write_text("no raster")
    moved_to = [world.root / f"données {folder.name}" for folder in (world.images, world.masks)]
    for old, new in zip((world.images, world.masks), moved_to, strict=True):
        old.rename(new)
    world.images, world.masks = moved_to
    found = trained_on(world, "", capsys)
    names = [name for part in found["data"]["splits"].values() for name in part["scenes"]]
    assert sorted(names) == ["Größe 街/two  spaces/été #1", "a", "c", "d", "e", "f"]


def test_the_page_of_a_task_that_shows_no_prediction(world, capsys):
    assert world.main("run remote_sensing/pretrain --tiny --output {out}") == 0
    assert capsys.readouterr().err == ""
    text = (world.out / "report.html").read_text()
    assert "Pictures" not in text
    assert 'class="legend"' not in text
    found = json.loads((world.out / "metrics.json").read_text())
    assert f"{found['test']['loss']:.4f}" in text
    with open(world.out / "metrics.csv", newline="") as file:
        assert any(row["train/loss"] for row in csv.DictReader(file))
    assert text.rstrip().endswith("</html>")


def test_the_page_of_a_run_whose_test_split_shows_nothing(world, capsys, monkeypatch):
    from modalities.remote_sensing.segmentation import Segmentation
    from shared.report.plots import Pictures

    monkeypatch.setattr(Segmentation, "pictures", lambda task, data: Pictures([], {}))
    assert world.main("run {recipe} --output {out}") == 0
    assert capsys.readouterr().err == ""
    assert "Pictures" not in (world.out / "report.html").read_text()


def test_the_example_of_this_file_is_not_trivial(world):
    """The right map depends on the pixels, on their place in the image and on the mirror beyond its edges."""
    pixels = image(40, 44, "scene")
    right = expected(world, pixels)
    assert (right != expected(world, 255 - pixels)).any()
    assert (right != expected(world, pixels[:, ::-1])).any()
    with quiet() as rasterio:
        assert rasterio.open(world.scene).read().tobytes() == pixels.tobytes()
