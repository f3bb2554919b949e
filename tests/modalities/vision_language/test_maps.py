"""Similarity maps that a run of ClipClassification predicts: cosines of patches, where they lie, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from modalities.images.data import Preparation
from modalities.vision_language.heads import ZeroShotHead
from modalities.vision_language.map_files import place
from modalities.vision_language.zero_shot import classifier, similarity_maps
from shared import cli
from shared.errors import RequestError, WorkError
from tests.modalities.vision_language.clips import NAMES, fed, task, tuned


@pytest.fixture
def told():
    """A task as if trained, and how it predicts for files."""
    found = tuned(task())
    described = fed(found).describe()

    def predict(*inputs: Path, output: Path, **options: Any) -> None:
        found.predict_files(inputs, output, described=described, identity={}, **{"kind": "maps", **options})

    return found, described, predict


def written(path: Path, size: tuple[int, int] = (60, 40), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_map_holds_the_cosines_of_each_patch_with_each_class_in_the_middle_square(told, tmp_path):
    found, described, predict = told
    file = written(tmp_path / "a.png")
    predict(file, output=tmp_path / "a.tif")
    preparation = Preparation.of(described)
    image = preparation.normalised(preparation.square(preparation.read(file)))[None]
    with rasterio.open(tmp_path / "a.tif") as opened:
        values, transform = opened.read(), opened.transform
        assert opened.descriptions == NAMES
        assert (opened.dtypes[0], opened.crs) == ("float32", None)
    expected = similarity_maps(found.model, image, classifier(found.model, NAMES))[0]
    assert values.shape == (3, 4, 4)
    torch.testing.assert_close(torch.from_numpy(values), expected)
    assert (transform.c, transform.f, transform.a, transform.e) == (10, 0, 10, 10)  # 40 of 60 pixels, 4 patches
    assert abs(values).max() <= 1


def test_a_map_lies_where_its_image_does(told, tmp_path):
    _, _, predict = told
    pixels = np.random.default_rng(0).integers(0, 255, (3, 64, 32), np.uint8)
    there = rasterio.Affine(10, 0, 600_000, 0, -10, 5_000_000)
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", count=3, height=64, width=32, dtype="uint8", crs="EPSG:32632",
        transform=there, photometric="rgb",
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    predict(tmp_path / "scene.tif", output=tmp_path / "maps")
    with rasterio.open(tmp_path / "maps/scene.tif") as opened:
        assert opened.crs == rasterio.CRS.from_epsg(32632)
        assert opened.transform == rasterio.Affine(80, 0, 600_000, 0, -80, 5_000_000 - 160)
        assert opened.bounds.top - opened.bounds.bottom == 320
    assert place((30, 50), (2, 2)) == (10, 0, 15, 15)


def test_the_share_of_the_tuned_model_and_the_head_of_weights_make_the_maps(told):
    found, _, _ = told
    image = torch.randn(1, 3, 32, 32)
    whole = found.similarity_maps(image)
    found.ensemble = 0.0
    zero = found.similarity_maps(image)
    with found.model.disabled():
        torch.testing.assert_close(zero, similarity_maps(found.model, image, classifier(found.model, NAMES)))
    assert (zero - whole).abs().max() > 1e-3
    linear = tuned(task(head=ZeroShotHead(24, 3)))
    expected = similarity_maps(linear.model, image, linear.head.weight.detach())
    torch.testing.assert_close(linear.similarity_maps(image), expected)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_folder_becomes_a_folder_and_what_cannot_be_read_is_named(told, tmp_path, capsys):
    _, _, predict = told
    written(tmp_path / "in/a.png")
    written(tmp_path / "in/deep/b.jpg", seed=1)
    (tmp_path / "in/bad.png").write_bytes(b"no image")
    with pytest.raises(WorkError, match=r"1 of 3 images failed: .*bad.png"):
        predict(tmp_path / "in", output=tmp_path / "out")
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert made == ["a.tif", "deep/b.tif"]
    assert "bad.png: not a readable" in capsys.readouterr().err
    before = (tmp_path / "out/a.tif").read_bytes()
    with pytest.raises(RequestError, match="a.tif exists already; --overwrite replaces it"):
        predict(tmp_path / "in", output=tmp_path / "out")
    (tmp_path / "in/bad.png").unlink()
    predict(tmp_path / "in", output=tmp_path / "out", overwrite=True, ensemble=0.0)
    assert (tmp_path / "out/a.tif").read_bytes() != before


def test_what_cannot_be_mapped_is_refused_before_anything_is_written(told, tmp_path, monkeypatch):
    _, _, predict = told
    one, same = written(tmp_path / "x/a.png"), written(tmp_path / "y/a.png")
    for inputs, output, options, message in (
        ((one, same), "maps", {}, "would both become .*a.tif; map them one by one"),
        ((one, same), "a.tif", {}, "maps of several images go to a folder"),
        ((one,), "a.csv", {}, "a map is a .tif file, or goes into a folder"),
        ((tmp_path / "none.png",), "maps", {}, "none.png: no such file"),
        ((tmp_path,), "maps", {"window": 64}, "--as maps: there is no --window"),
        ((one,), "maps", {"kind": "polygons"}, "classification has no --as"),
    ):
        with pytest.raises(RequestError, match=message):
            predict(*inputs, output=tmp_path / output, **options)
        assert not (tmp_path / output).exists()
    monkeypatch.setattr("modalities.vision_language.map_files.raster", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(one, output=tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_the_command_line_knows_what_can_be_written(capsys):
    assert cli.main(["predict", "run", "a.png", "-o", "x", "--as", "pictures"]) == 2
    assert "invalid choice: 'pictures' (choose from" in capsys.readouterr().err
