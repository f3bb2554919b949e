"""Predicting for files with Segment Anything and its shadow detector: what is written, where it lies, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.warp import transform_geom

from modalities.images.adapter_shadow import AdapterShadow
from modalities.images.backbones import SAM, Prompts
from modalities.images.data import GeneratedShadows, read_image
from modalities.images.prompted import PromptedSegmentation
from modalities.images.shadow_segmentation import ShadowSegmentation
from modalities.remote_sensing.data import GeneratedScenes
from shared import LoRA, RequestError, WorkError, adapt
from shared.rasters import Georeference, read_header, write_raster
from shared.rasters import read_image as read_raster
from shared.training.optimiser import Optimiser

SETTINGS = {"points_per_side": 3, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
HERE = Georeference(CRS.from_epsg(32632), Affine(10, 0, 500_000, 0, -10, 5_500_000))
ASKED = [{"points": [[10, 20]], "name": "roof"}, {"box": [30, 10, 60, 40]}]


def found_by(data: Any, **settings: Any) -> tuple[PromptedSegmentation, dict[str, Any]]:
    torch.manual_seed(0)
    model = adapt(SAM(3, size="tiny", weights="random"), LoRA(rank=2))
    for parameter in model.bank.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return PromptedSegmentation(model, data, Optimiser(), **settings), data.describe()


@pytest.fixture(scope="module")
def rasters() -> tuple[PromptedSegmentation, dict[str, Any]]:
    """A model of tiles of 48 pixels."""
    return found_by(GeneratedScenes(count=3, size=48, bands=("red", "green", "blue")))


@pytest.fixture(scope="module")
def photographs() -> tuple[PromptedSegmentation, dict[str, Any]]:
    """A model of whole images in squares of 48 pixels."""
    return found_by(GeneratedShadows(count=3, side=32, size=48))


def pixels(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (3, height, width), dtype=np.uint8)


def picture(path: Path, height: int = 50, width: int = 70) -> Path:
    Image.fromarray(pixels(height, width).transpose(1, 2, 0)).save(path)
    return path


def raster(path: Path, place: Georeference | None = HERE) -> Path:
    write_raster(path, pixels(), georeference=place)
    return path


def predict(task: Any, source: Path | list[Path], output: Path, **options: Any) -> None:
    model, described = task
    inputs = source if isinstance(source, list) else [source]
    model.predict_files(inputs, output, described=described, identity={}, **options)


def asked_in(path: Path) -> Path:
    path.write_text(json.dumps(ASKED))
    return path


# -- objects -----------------------------------------------------------------------------------------------------------


def test_a_raster_becomes_a_map_in_its_place(rasters, tmp_path: Path, capsys) -> None:
    source = raster(tmp_path / "a.tif")
    predict(rasters, source, tmp_path / "maps" / "m.tif", generator=SETTINGS)
    header = read_header(tmp_path / "maps" / "m.tif")
    assert (header.height, header.width, header.bands, header.dtype) == (50, 70, 1, "uint16")
    assert header.georeference == read_header(source).georeference
    numbers = read_raster(tmp_path / "maps" / "m.tif").image[0]
    count = int(capsys.readouterr().out.partition("70 x 50 pixels: ")[2].split()[0])
    assert numbers.max() <= count > 0
    assert {p.name for p in tmp_path.rglob("*")} == {"a.tif", "maps", "m.tif"}


def test_outlines_on_earth_are_those_of_the_map(rasters, tmp_path: Path) -> None:
    source, asked = raster(tmp_path / "a.tif"), asked_in(tmp_path / "p.json")
    predict(rasters, source, tmp_path / "m.geojson", prompts=asked)
    predict(rasters, source, tmp_path / "m.tif", prompts=asked)
    numbers = read_raster(tmp_path / "m.tif").image[0]
    collection = json.loads((tmp_path / "m.geojson").read_text())
    assert [f["properties"]["object"] for f in collection["features"]] == [1, 2]
    assert [f["properties"]["name"] for f in collection["features"]] == ["roof", "2"]
    assert "units" not in collection
    drawn = []
    for feature in collection["features"]:
        geometry = transform_geom("OGC:CRS84", HERE.crs, feature["geometry"])
        mask = rasterize([geometry], (50, 70), transform=HERE.transform).astype(bool)
        assert feature["properties"]["pixels"] == mask.sum() > 0
        drawn.append(mask)
    smaller = min((0, 1), key=lambda i: drawn[i].sum())
    assert np.array_equal(numbers == smaller + 1, drawn[smaller])  # it lies above
    assert np.array_equal(numbers > 0, drawn[0] | drawn[1])


def test_an_image_becomes_a_png_or_outlines_in_pixels(photographs, tmp_path: Path) -> None:
    source, asked = picture(tmp_path / "a.png"), asked_in(tmp_path / "p.json")
    predict(photographs, source, tmp_path / "m.png", prompts=asked)
    predict(photographs, source, tmp_path / "m.json", prompts=asked)
    numbers = np.array(Image.open(tmp_path / "m.png"))
    assert numbers.shape == (50, 70)
    collection = json.loads((tmp_path / "m.json").read_text())
    assert (collection["units"], collection["width"], collection["height"]) == ("pixels", 70, 50)
    drawn = [rasterize([f["geometry"]], (50, 70)).astype(bool) for f in collection["features"]]
    assert np.array_equal(numbers > 0, drawn[0] | drawn[1])
    model, described = photographs
    image = torch.from_numpy(read_image(source)).float()[None]
    square = torch.nn.functional.interpolate(image, (48, 48), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(described["normalisation"][key]).view(3, 1, 1) for key in ("mean", "std"))
    prompts = Prompts(torch.tensor([[[[10 * 48 / 70, 20 * 48 / 50]]]]), torch.ones(1, 1, 1))
    with torch.no_grad():
        model.eval()
        masks = model.model((square - mean) / std, prompts, True)
    fine = torch.nn.functional.interpolate(masks.logits[:, 0], (48, 48), mode="bilinear")
    fine = torch.nn.functional.interpolate(fine, (50, 70), mode="bilinear")[0, int(masks.iou.argmax())]
    assert (drawn[0] != (fine > 0).numpy()).mean() < 0.002  # resized before or after it is normalised


def test_prompts_may_lie_beside_an_image_or_in_a_folder(rasters, tmp_path: Path, capsys) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "asked").mkdir()
    first, second = raster(tmp_path / "in" / "a.tif"), raster(tmp_path / "in" / "deep" / "b.tif", None)
    asked_in(first.with_name("a.prompts.json"))
    predict(rasters, tmp_path / "in", tmp_path / "out", generator=SETTINGS)
    said = capsys.readouterr().out.splitlines()
    assert "a.tif: 70 x 50 pixels: 2 objects asked for by " in said[0]
    assert "found from a grid of points" in said[1]
    (tmp_path / "asked" / "a.csv").write_text("object,x,y,left,top,right,bottom\nroof,10,20,,,,\n,,,30,10,60,40\n")
    predict(rasters, first, tmp_path / "again.tif", prompts=tmp_path / "asked")
    assert np.array_equal(read_raster(tmp_path / "again.tif").image, read_raster(tmp_path / "out" / "a.tif").image)
    assert read_header(tmp_path / "out" / "deep" / "b.tif").georeference is None
    predict(rasters, [first, second], tmp_path / "lines", kind="polygons", generator=SETTINGS)
    assert sorted(p.name for p in (tmp_path / "lines").iterdir()) == ["a.geojson", "b.json"]


def test_several_images_are_done_though_one_is_bad(photographs, tmp_path: Path, capsys) -> None:
    good, bad, cut = picture(tmp_path / "a.png"), tmp_path / "b.png", picture(tmp_path / "c.png")
    bad.touch()
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(WorkError, match=r"2 of 3 images failed: .*b.png, .*c.png"):
        predict(photographs, [good, bad, cut], tmp_path / "out", generator=SETTINGS)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "b.png: not a readable image: the file is empty" in err[0]


def test_what_does_not_fit_is_one_line_and_nothing_is_written(rasters, photographs, tmp_path: Path) -> None:
    placed, plain, asked = raster(tmp_path / "a.tif"), picture(tmp_path / "b.png"), asked_in(tmp_path / "p.json")
    outside = tmp_path / "o.json"
    outside.write_text('[{"points": [[71, 3]]}]')
    (tmp_path / "there.tif").write_bytes(b"x")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    cases: list[tuple[Any, Any, str, dict[str, Any], str]] = [
        (rasters, placed, "m.tif", {"prompts": outside}, r"o.json: object 1: point \(71, 3\) lies outside"),
        (rasters, placed, "m.png", {}, "m.png: the image lies on Earth, which PNG cannot say; name a .tif file"),
        (photographs, plain, "m.geojson", {}, "no coordinate reference system, and GeoJSON is in longitude"),
        (rasters, placed, "m.txt", {}, "m.txt: classes are written to a file named .png or .tif or .tiff"),
        (rasters, placed, "m.tif", {"kind": "polygons"}, "polygons are written to a file named .geojson or .json"),
        (rasters, placed, "m.tif", {"kind": "probabilities"}, "--as probabilities: objects are written as classes"),
        (rasters, placed, "there.tif", {}, "there.tif exists already; --overwrite replaces it"),
        (rasters, placed, "a.tif", {"overwrite": True}, "a.tif: a result would overwrite an input"),
        (rasters, [placed, plain], "m.tif", {}, "several images are written to a folder"),
        (rasters, [placed, plain], "out", {"prompts": asked}, "several images have a file of prompts each"),
        (rasters, placed, "m.tif", {"prompts": tmp_path / "away.json"}, "away.json: no such file or folder of prompts"),
        (rasters, placed, "m.tif", {"prompts": asked, "generator": SETTINGS}, "give one of them"),
        (rasters, placed, "m.tif", {"generator": {"output_mode": 3}}, "--generator output_mode: no such setting"),
        (rasters, placed, "m.tif", {"generator": {"points_per_side": 0}}, "points_per_side=0: use a whole number"),
        (rasters, placed, "m.tif", {"generator": {"pred_iou_thresh": "a"}}, "pred_iou_thresh=a: use a number"),
        (rasters, placed, "m.tif", {"overlap": 3}, "--overlap: the views of Segment Anything overlap by half"),
        (rasters, placed, "m.tif", {"window": 0}, "--window 0: use a number of pixels above 0"),
        (rasters, placed, "m.tif", {"window": 50}, "image height 50 is no multiple of its patch of 8"),
        (rasters, placed, "m.tif", {"bands": [1, 2]}, "the model reads 3, state one number for each"),
        (photographs, plain, "m.png", {"window": 48}, "--window is for rasters; this run was trained on whole images"),
        (photographs, tmp_path / "none.png", "m.png", {}, "none.png: no such file"),
    ]  # fmt: skip
    for task, source, output, options, message in cases:
        with pytest.raises(RequestError, match=message) as found:
            predict(task, source, tmp_path / output, **options)
        assert "\n" not in str(found.value)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_existing_result_is_replaced_when_asked(photographs, tmp_path: Path) -> None:
    source, asked = picture(tmp_path / "a.png"), asked_in(tmp_path / "p.json")
    predict(photographs, source, tmp_path / "m.png", prompts=asked)
    first = (tmp_path / "m.png").read_bytes()
    (tmp_path / "m.png").write_bytes(b"x")
    predict(photographs, source, tmp_path / "m.png", prompts=asked, overwrite=True)
    assert (tmp_path / "m.png").read_bytes() == first


# -- shadows -----------------------------------------------------------------------------------------------------------


def shadows(data: Any) -> tuple[ShadowSegmentation, dict[str, Any]]:
    torch.manual_seed(0)
    method = AdapterShadow(grid=4, subsample=2, detector="test_efficientnet", detector_weights="random")
    task = ShadowSegmentation(adapt(SAM(3, size="tiny", weights="random"), method), data, Optimiser())
    return task, data.describe()


def test_shadows_of_an_image_are_a_mask_of_its_size(tmp_path: Path, capsys) -> None:
    task, described = shadows(GeneratedShadows(count=3, side=32, size=48))
    source = picture(tmp_path / "a.png")
    for name in ("m.png", "m.json"):
        task.predict_files([source], tmp_path / name, described=described, identity={})
    mask = read_image(tmp_path / "m.png", bands=1)[0]  # as a data set reads it
    assert mask.shape == (50, 70)
    assert set(np.unique(mask)) <= {0, 255}
    mean, std = (torch.tensor(described["normalisation"][key]).view(3, 1, 1) for key in ("mean", "std"))
    image = (torch.from_numpy(read_image(source)).float() - mean) / std
    square = torch.nn.functional.interpolate(image[None], (48, 48), mode="bilinear", antialias=True)
    expected = task.predict(square, (50, 70)).mask[0].numpy()
    assert np.array_equal(mask == 255, expected)
    assert f"m.png: 70 x 50 pixels: shadow {expected.mean():.1%}" in capsys.readouterr().out
    (feature,) = json.loads((tmp_path / "m.json").read_text())["features"]
    assert feature["properties"] == {"object": 1, "class": "shadow", "pixels": int(expected.sum())}
    (tmp_path / "bad.png").write_bytes(source.read_bytes()[:3000])
    for given, output, options, message in (
        (source, "m.png", {}, "m.png exists already"),
        (tmp_path / "bad.png", "n.png", {}, "bad.png: not a readable PNG"),
        (source, "n.png", {"window": 3}, "trained on whole images and has no --window"),
        (source, "n.png", {"kind": "probabilities"}, "--as probabilities: objects are written"),
    ):
        with pytest.raises(RequestError, match=message):
            task.predict_files([given], tmp_path / output, described=described, identity={}, **options)
    assert not (tmp_path / "n.png").exists()
    for parameter in task.model.bank.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(WorkError, match="the shadow scores are not finite"):
        task.predict_files([source], tmp_path / "n.png", described=described, identity={})
    assert not (tmp_path / "n.png").exists()


def test_a_shadow_model_of_rasters_maps_rasters(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    for name in "abc":
        write_raster_pair(folder, name)
    from modalities.remote_sensing.data import FolderScenes

    data = FolderScenes(images=folder / "images", masks=folder / "masks", classes=["light", "shadow"], tile=48,
                        validation=0.3, test=0.3)  # fmt: skip
    task, described = shadows(data)
    predict((task, described), raster(tmp_path / "a.tif"), tmp_path / "m.tif")
    header = read_header(tmp_path / "m.tif")
    assert (header.height, header.width, header.dtype) == (50, 70, "uint8")
    assert header.georeference == HERE


def write_raster_pair(folder: Path, name: str) -> None:
    random = np.random.default_rng([*name.encode()])
    for part, bands, top in (("images", 3, 255), ("masks", 1, 2)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        values = random.integers(0, top, (bands, 48, 48), dtype=np.uint8)
        write_raster(folder / part / f"{name}.tif", values, georeference=HERE)
