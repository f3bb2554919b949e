"""TorchGeo's own datasets and samplers on small files: what a task is fed, and every mistake in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from rasterio import Affine
from rasterio.crs import CRS
from torch.utils.data import DataLoader, RandomSampler

from modalities.remote_sensing.data import TorchGeo
from shared import cli, recipe, run
from shared.errors import RequestError
from shared.mapping import Feed
from shared.training.feed import Shares

datasets = pytest.importorskip("torchgeo.datasets")
samplers = pytest.importorskip("torchgeo.samplers")

# rasterio calls affine in a way that affine 3 has in view to deprecate; TorchGeo calls rasterio.
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

CLASSES = ("low", "middle", "high")
WEST, NORTH, PIXEL = 500_000.0, 5_000_000.0, 10.0
# The scene is 100 x 200 pixels: train takes the 100 columns in the west, validation and test 50 each.
ROIS = {
    "train": [WEST, NORTH - 1000, WEST + 1000, NORTH],
    "validation": [WEST + 1000, NORTH - 1000, WEST + 1500, NORTH],
    "test": [WEST + 1500, NORTH - 1000, WEST + 2000, NORTH],
}


class Chips(datasets.NonGeoDataset):
    """Chips of two bands; a number in ``spoil`` tells what is wrong with chip 3."""

    classes: ClassVar[list[str]] = list(CLASSES)

    def __init__(self, count: int = 10, spoil: str = "", layout: str = "hw"):
        self.count, self.spoil, self.layout = count, spoil, layout

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(index)
        image = torch.rand(2, 16, 16, generator=random) * 100 + index
        mask = torch.arange(256).reshape(16, 16) % 3
        sample = {"image": image, "mask": mask[None] if self.layout == "1hw" else mask}
        if index == 3 and self.spoil:
            return SPOILS[self.spoil](image, mask)
        return sample


SPOILS: dict[str, Any] = {
    "no mask": lambda image, mask: {"image": image, "label": 1},
    "no image": lambda image, mask: {"mask": mask},
    "nan": lambda image, mask: {"image": image.index_fill(1, torch.tensor(2), float("nan")), "mask": mask},
    "bands": lambda image, mask: {"image": image[:1], "mask": mask},
    "label": lambda image, mask: {"image": image, "mask": mask + 5},
    "fraction": lambda image, mask: {"image": image, "mask": mask + 0.5},
    "size": lambda image, mask: {"image": image[:, :12], "mask": mask[:12]},
    "mask size": lambda image, mask: {"image": image, "mask": mask[:12]},
    "series": lambda image, mask: {"image": image[None], "mask": mask},
    "one-hot": lambda image, mask: {"image": image, "mask": torch.stack([mask, mask])},
    "error": lambda image, mask: {}["pixels"],
}


class Mask(datasets.RasterDataset):
    filename_glob = "mask.tif"
    is_image = False


class Scene(datasets.RasterDataset):
    filename_glob = "image.tif"
    all_bands = ("red", "green", "nir")


@pytest.fixture
def scene(tmp_path, save) -> Path:
    """image.tif, three bands whose first is the row and second the column; mask.tif, classes by row, none where 9."""
    place = {"crs": CRS.from_epsg(32633), "transform": Affine(PIXEL, 0, WEST, 0, -PIXEL, NORTH)}
    rows, columns = np.mgrid[:100, :200].astype(np.float32)
    third = np.random.default_rng(0).normal(300, 20, (100, 200)).astype(np.float32)
    save(tmp_path / "image.tif", np.stack([rows + 1, columns + 1, third]), **place)
    mask = (rows // 34).astype(np.uint8)
    mask[50, 40] = mask[50, 120] = 9
    save(tmp_path / "mask.tif", mask[None], **place)
    return tmp_path


def stated(folder: Path, **changes: Any) -> dict[str, Any]:
    """The scene as a recipe states it."""
    image = {"type": "RasterDataset", "paths": str(folder), "filename_glob": "image.tif"}
    mask = {"type": "RasterDataset", "paths": str(folder), "filename_glob": "mask.tif", "is_image": False}
    data = {
        "datasets": {"type": "IntersectionDataset", "dataset1": image, "dataset2": mask},
        "samplers": {
            "train": {"type": "RandomGeoSampler", "size": 32, "length": 6, "roi": ROIS["train"]},
            "validation": {"type": "GridGeoSampler", "size": 32, "roi": ROIS["validation"]},
            "test": {"type": "GridGeoSampler", "size": 32, "roi": ROIS["test"]},
        },
        "classes": list(CLASSES),
        "ignore_value": 9,
        "batch_size": 2,
    }
    return data | changes


def test_chips_are_what_a_task_expects():
    data = TorchGeo(datasets=Chips(), classes=CLASSES, batch_size=3, augment=False)
    batch = next(iter(data.train()))
    assert batch["image"].shape == (3, 2, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert (batch["mask"].shape, batch["mask"].dtype) == ((3, 16, 16), torch.int64)
    assert (data.bands, data.band_names, data.ignore_index) == (2, ("band 1", "band 2"), 255)
    names = {part: {n for b in getattr(data, part)() for n in b["name"]} for part in ("train", "validation", "test")}
    assert [len(n) for n in names.values()] == [6, 2, 2]
    splits = data.describe()["splits"]
    assert splits["train"]["pixels"] == {"low": 516, "middle": 510, "high": 510, "ignored": 0}
    assert json.loads(json.dumps(data.describe())) == data.describe()


@pytest.mark.parametrize("layout", ["hw", "1hw"])
def test_statistics_are_of_the_training_chips_alone(layout):
    train, other = Chips(4, layout=layout), Chips(9, layout=layout)
    data = TorchGeo(datasets={"train": train, "validation": other, "test": other}, classes=CLASSES, augment=False)
    pixels = torch.stack([train[i]["image"] for i in range(4)]).transpose(0, 1).reshape(2, -1).double()
    np.testing.assert_allclose(data.normalisation.mean, pixels.mean(1), rtol=1e-6)
    np.testing.assert_allclose(data.normalisation.std, pixels.std(1, correction=0), rtol=1e-6)
    seen = torch.cat([batch["image"] for batch in data.train()]).transpose(0, 1).reshape(2, -1)
    assert seen.mean(1).abs().max() < 1e-5
    fixed = {"mean": [1, 2], "std": [3, 4]}
    data = TorchGeo(datasets={"train": train, "validation": other, "test": other}, classes=CLASSES, normalisation=fixed)
    assert next(iter(data.test()))["image"][0, 1].equal((other[0]["image"][1] - 2) / 4)


def test_a_whole_dataset_of_torchgeo_is_read_from_its_own_layout(tmp_path, save):
    """LandCover.ai: chips of 512 pixels there, of 24 here, three lists of names."""
    random = np.random.default_rng(1)
    for part in ("train", "val", "test"):
        names = [f"{part}_{i}" for i in range(2)]
        (tmp_path / f"{part}.txt").write_text("\n".join(names))
        for name in names:
            save(tmp_path / "output" / f"{name}.jpg", random.integers(0, 255, (3, 24, 24)).astype(np.uint8))
            save(tmp_path / "output" / f"{name}_m.png", random.integers(0, 5, (1, 24, 24)).astype(np.uint8))
    root = {"type": "LandCoverAI", "root": str(tmp_path)}
    parts = {"train": root, "validation": {**root, "split": "val"}, "test": {**root, "split": "test"}}
    classes = ("Background", "Building", "Woodland", "Water", "Road")
    data = TorchGeo(datasets=parts, classes=classes, bands=[3, 1], band_names=["red", "green", "blue"])
    assert data.band_names == ("blue", "red")
    straight = datasets.LandCoverAI(str(tmp_path), "test")[1]
    batch = next(iter(data.test()))
    assert batch["mask"][1].equal(straight["mask"])
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.normalisation.mean, data.normalisation.std))
    torch.testing.assert_close(
        batch["image"][1].double() * std + mean, straight["image"][[2, 0]].double(), atol=1e-3, rtol=0
    )
    assert {part: d["samples"] for part, d in data.describe()["splits"].items()} == dict.fromkeys(parts, 2)


def test_a_raster_dataset_gives_the_pixels_of_its_files(scene):
    data = TorchGeo(**stated(scene, augment=False))
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.normalisation.mean, data.normalisation.std))
    for batch in data.train():
        assert batch["image"].shape == (2, 3, 32, 32)
        image = batch["image"].double() * std + mean
        row, column = image[:, 0].round().long() - 1, image[:, 1].round().long() - 1
        assert column.max() < 100
        expected = row // 34
        expected[(row == 50) & (column == 40)] = 255
        assert batch["mask"].equal(expected)


def test_a_grid_counts_every_pixel_of_its_roi_once(scene):
    """Windows of 32 go over the edge of 100 x 50 pixels; what TorchGeo fills in there is ignored, image and mask."""
    data = TorchGeo(**stated(scene))
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.normalisation.mean, data.normalisation.std))
    for part, first in (("validation", 100), ("test", 150)):
        batches = list(getattr(data, part)())
        image, mask = (torch.cat([batch[key] for batch in batches]) for key in ("image", "mask"))
        assert mask.shape == (8, 32, 32)
        place = (image.double() * std[None] + mean).round().long()
        inside = (image != 0).any(1)
        counted = sorted(zip(place[:, 0][inside].tolist(), place[:, 1][inside].tolist(), strict=True))
        assert counted == [(row + 1, column + 1) for row in range(100) for column in range(first, first + 50)]
        pixels = data.describe()["splits"][part]["pixels"]
        assert (mask != 255).sum() == 5000 - (part == "validation") == sum(pixels[name] for name in CLASSES)
        assert pixels["ignored"] == 8 * 32 * 32 - (mask != 255).sum()
        assert data.describe()["splits"][part]["shared_with_train"] == 0


def test_the_same_objects_and_the_same_words_give_the_same_samples(scene):
    whole = Scene(str(scene)) & Mask(str(scene))
    from shapely import box

    made = {
        "train": samplers.RandomGeoSampler(whole, 32, 6, roi=box(*ROIS["train"])),
        "validation": samplers.GridGeoSampler(whole, 32, roi=box(*ROIS["validation"])),
        "test": samplers.GridGeoSampler(whole, 32, roi=box(*ROIS["test"])),
    }
    one, other = TorchGeo(**stated(scene, datasets=whole, samplers=made)), TorchGeo(**stated(scene))
    assert one.band_names == ("red", "green", "nir")
    assert other.band_names == ("band 1", "band 2", "band 3")
    assert one.normalisation == other.normalisation
    for a, b in zip(one.test(), other.test(), strict=True):
        assert a["image"].equal(b["image"])
        assert a["name"] == b["name"]


def test_polygons_in_other_coordinates_are_a_mask(scene):
    """A VectorDataset in degrees over rasters in metres, within a time; the counts are the areas drawn."""
    import geopandas
    from shapely import box

    east = [box(WEST, NORTH - 1000, WEST + 900, NORTH - 500), box(WEST + 900, NORTH - 600, WEST + 2000, NORTH)]
    geopandas.GeoDataFrame({"kind": [1, 2]}, geometry=east, crs=32633).to_crs(4326).to_file(scene / "drawn.geojson")
    mask = {"type": "VectorDataset", "paths": str(scene / "drawn.geojson"), "label_name": "kind"}
    toi = ["2020-01-01", "2021-01-01"]
    chosen = {part: {"type": "GridGeoSampler", "size": 32, "roi": roi, "toi": toi} for part, roi in ROIS.items()}
    pair = {**stated(scene)["datasets"], "dataset2": mask}
    splits = TorchGeo(**stated(scene, datasets=pair, samplers=chosen)).describe()["splits"]
    counts = {part: [facts["pixels"][name] for name in CLASSES] for part, facts in splits.items()}
    assert counts == {"train": [4900, 4500, 600], "validation": [2000, 0, 3000], "test": [2000, 0, 3000]}


def test_samplers_of_batches_and_of_numbers_are_taken_as_they_are(scene):
    chosen = stated(scene)["samplers"]
    chosen["train"] = {"type": "RandomBatchGeoSampler", "size": 32, "batch_size": 3, "length": 6, "roi": ROIS["train"]}
    data = TorchGeo(**stated(scene, samplers=chosen))
    assert [len(batch["name"]) for batch in data.train()] == [3, 3]
    assert [len(batch["name"]) for batch in data.test()] == [2, 2, 2, 2]
    del chosen["train"]["batch_size"]
    assert [len(batch["name"]) for batch in TorchGeo(**stated(scene, samplers=chosen)).train()] == [2, 2, 2]

    whole = Chips()
    order = {"train": RandomSampler(whole, num_samples=5)}
    data = TorchGeo(datasets=dict.fromkeys(("train", "validation", "test"), whole), samplers=order, classes=CLASSES)
    assert [len(batch["name"]) for batch in data.train()] == [5]


def test_files_of_one_dataset_may_be_sampled_whole(scene):
    """PreChippedGeoSampler, and datasets apart: the ground of each split is its own."""
    parts = ("train", "validation", "test")
    data = TorchGeo(
        **stated(scene, samplers={p: {"type": "PreChippedGeoSampler", "roi": ROIS[p]} for p in parts if p != "train"}
        | {"train": {"type": "PreChippedGeoSampler", "shuffle": True, "roi": [WEST, NORTH - 1000, WEST + 500, NORTH]}})
    )  # fmt: skip
    assert [next(iter(getattr(data, p)()))["mask"].shape for p in parts] == [(1, 100, 50)] * 3


def test_draws_follow_from_the_seed_and_leave_other_random_numbers_alone(scene):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = TorchGeo(**stated(scene)).describe()
    assert torch.rand(3).equal(expected)
    assert TorchGeo(**stated(scene)).describe() == one
    assert TorchGeo(**stated(scene, seed=1)).describe()["normalisation"] != one["normalisation"]
    generator = torch.Generator().manual_seed(3)
    whole = Scene(str(scene)) & Mask(str(scene))
    sampler = samplers.RandomGeoSampler(whole, 32, 6, generator=generator)
    samplers_ = {"train": sampler, **{p: stated(scene)["samplers"][p] for p in ("validation", "test")}}
    with pytest.raises(RequestError, match="100% of the ground of validation is in train too"):
        TorchGeo(**stated(scene, datasets=whole, samplers=samplers_))
    assert sampler.generator is generator
    assert generator.get_state().equal(torch.Generator().manual_seed(3).get_state())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("no mask", r"train 3: Chips yields no mask: a sample has image, label$"),
        ("no image", r"train 3: Chips yields no image: a sample has mask$"),
        ("nan", r"train 3: the image holds NaN or infinity in 16 pixels"),
        ("bands", r"train 3: the image has 1 bands, the first sample 2$"),
        ("label", r"train 3: values \[5, 6, 7\] stand for no class; label_values and ignore_value have \[0, 1, 2\]$"),
        ("fraction", r"train 3: the mask holds fractions or NaN; classes are whole numbers$"),
        ("size", r"train 3: 12 x 16 pixels, the first sample has 16 x 16 pixels; batches need one size"),
        ("mask size", r"train 3: image 16 x 16 pixels, mask 12 x 16 pixels; a mask has its image's size$"),
        ("series", r"train 3: image torch.float32 \(1, 2, 16, 16\); it has shape \(bands, H, W\)$"),
        ("one-hot", r"train 3: mask of shape \(2, 16, 16\); it has shape \(H, W\) or \(1, H, W\)$"),
        ("error", r"train 3: Chips cannot read it: 'pixels'$"),
    ],
)
def test_a_bad_chip_is_one_line_before_training(spoil, message):
    parts = {"train": Chips(5, spoil), "validation": Chips(2), "test": Chips(2)}
    with pytest.raises(RequestError, match=message) as found:
        TorchGeo(datasets=parts, classes=CLASSES).train()
    assert "\n" not in str(found.value)


def test_a_bad_request_is_one_line(scene, tmp_path):
    geo, chosen = stated(scene), stated(scene)["samplers"]
    image, chips = geo["datasets"]["dataset1"], f"{__name__}.Chips"
    for changes, message in (
        ({"samplers": None}, "train: IntersectionDataset is read by place: give a sampler, such as RandomG"),
        ({"datasets": {"type": chips}}, "train: Chips is read by number, the samplers of TorchGeo give places"),
        ({"samplers": {**chosen, "train": RandomSampler(Chips())}}, "RandomSampler gives numbers, but Intersection"),
        ({"samplers": {**chosen, "train": {**chosen["train"], "roi": [1, 2]}}}, r"roi: wants \[xmin, ymin, xmax"),
        ({"samplers": {**chosen, "train": {**chosen["train"], "sise": 3}}}, "sise: .* such setting; nearest: 'size'"),
        ({"samplers": {**chosen, "train": {"type": "RandomGeoSampler"}}}, "missing a required argument: 'size'"),
        ({"samplers": {**chosen, "train": {**chosen["train"], "units": "metres"}}}, "units: wants pixels or crs"),
        ({"samplers": {**chosen, "train": {**chosen["train"], "toi": ["then", "now or"]}}}, "toi: wants .start, end"),
        ({"samplers": {**chosen, "test": {**chosen["test"], "size": 2000}}}, "the test split has no sample: its size"),
        ({"samplers": {**chosen, "train": {**chosen["train"], "size": 2000}}}, "RandomGeoSampler gives no place"),
        ({"samplers": {**chosen, "val": 1}}, "samplers: wants train, validation and test; got train, "),
        ({"samplers": chosen | {"validation": {**chosen["train"]}}}, "100% of the ground of validation is in"),
        ({"datasets": {"type": "LandCover"}, "samplers": None}, "no dataset of torchgeo.datasets is called"),
        ({"datasets": {"type": "os.system"}, "samplers": None}, "no dataset of os is called 'system'"),
        ({"datasets": {"type": "nowhere.Set"}, "samplers": None}, "datasets.type: 'nowhere.Set' cannot be imported"),
        ({"datasets": {"type": 3}, "samplers": None}, "datasets.type: wants the name of a dataset of"),
        ({"datasets": {**image, "cash": 1}}, "datasets.cash: RasterDataset has no such setting; nearest: 'cache'"),
        ({"datasets": {**image, "files": 1}}, "datasets.files: RasterDataset has no such setting"),
        ({"datasets": {**image, "paths": str(tmp_path / "no")}}, "datasets: RasterDataset: "),
        ({"datasets": image}, "train x=.* y=.*: RasterDataset yields no mask: a sample has crs, bounds, image"),
        ({"datasets": {"validation": image}}, "datasets: wants one with its type, or train, validation and test"),
        ({"datasets": 7, "samplers": None}, "datasets: wants a dataset that has a length, or a mapping .* got 7"),
        ({"bands": ["blue"]}, "IntersectionDataset: no band 'blue'; it has 1 band 1, 2 band 2, 3 band 3"),
        ({"band_names": ["a", "b"]}, "3 bands, but band_names gives 2 different names"),
        ({"classes": ["one"]}, "classes .* 2 to 255 different names"),
        ({"ignore_value": 0}, "a value stands for one class only"),
        ({"batch_size": 0}, "batch_size 0"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message) as found:
            TorchGeo(**stated(scene, **changes))
        assert "\n" not in str(found.value)


def test_labels_without_a_value_and_pixels_of_fill_do_not_count(scene):
    with pytest.raises(RequestError, match=r"x=\S+ y=\S+: values \[9\] stand for no class"):
        TorchGeo(**stated(scene, ignore_value=None)).describe()
    parts = {part: Chips(3) for part in ("train", "validation", "test")}
    found = TorchGeo(datasets=parts, classes=("a", "b"), label_values=[2, 0], ignore_value=1).describe()
    assert found["splits"]["train"]["pixels"] == {"a": 255, "b": 258, "ignored": 255}
    with pytest.raises(RequestError, match="no pixel of the train split has a label"):
        TorchGeo(datasets=parts, classes=("a", "b"), label_values=[5, 6], ignore_value=[0, 1, 2]).train()
    for chips in parts.values():
        chips.__class__ = type("Filled", (Chips,), {"__getitem__": _filled})
    found = TorchGeo(datasets=parts, classes=CLASSES, fill=-1).describe()
    assert found["splits"]["train"]["pixels"]["ignored"] == 3 * 16
    assert min(found["normalisation"]["mean"]) > 40


def _filled(self: Chips, index: int) -> dict[str, Any]:
    sample = Chips.__getitem__(self, index)
    return sample | {"image": sample["image"].index_fill(1, torch.tensor(4), -1.0)}


def test_without_torchgeo_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchgeo.datasets", None)
    with pytest.raises(RequestError, match=r"data of TorchGeo need torchgeo: pip install 'omniadapt\[torchgeo\]'"):
        TorchGeo(datasets=Chips(), classes=CLASSES)


def test_a_recipe_trains_on_it_repeats_exactly_and_predicts(scene, tmp_path, monkeypatch):
    small = yaml.safe_load(RECIPE) | {"data": {"type": "TorchGeo", **stated(scene, file_values=True)}}
    (tmp_path / "geo.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.chdir(tmp_path)
    first = run.run(recipe.load("geo.yaml"), tmp_path / "one")
    again = run.run(recipe.load("geo.yaml"), tmp_path / "two")
    assert first["test"] == again["test"]
    assert first["test"]["support/low"] + first["test"]["support/middle"] + first["test"]["support/high"] == 5000
    assert (tmp_path / "one/adapter.safetensors").read_bytes() == (tmp_path / "two/adapter.safetensors").read_bytes()
    assert cli.main(["predict", "one", str(scene / "image.tif"), "-o", "map.tif"]) == 0


def test_an_epoch_that_is_resumed_or_shared_has_the_same_windows(scene):
    """What training is fed follows from the seed, the epoch and the batch: after a kill, and among two processes."""
    loader, order = TorchGeo(**stated(scene)).train(), SimpleNamespace(seed=0)

    def fed(epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> list[Any]:
        done, at = SimpleNamespace(processed=epoch), SimpleNamespace(ready=start)
        batches = SimpleNamespace(batch_progress=SimpleNamespace(current=at))
        loop = SimpleNamespace(epoch_progress=SimpleNamespace(current=done), epoch_loop=batches)
        return list(Shares(loader, order, loop, rank, world))

    whole = fed(1)
    assert len(whole) == 3
    assert fed(1, start=1) == whole[1:]
    assert [one + other for one, other in zip(fed(1, rank=0, world=2), fed(1, rank=1, world=2), strict=True)] == whole
    assert fed(0) != whole


def test_files_are_read_only_where_samples_are_said_to_hold_their_values():
    described = TorchGeo(datasets=Chips(), classes=CLASSES, file_values=True, bands=[2], fill=0).describe()
    assert Feed.of(described).bands == (2,)
    with pytest.raises(RequestError, match="does not say how rasters are read: data lack 'reading'"):
        Feed.of(TorchGeo(datasets=Chips(), classes=CLASSES).describe())


def test_loaders_with_workers_give_the_same_samples(scene):
    one, other = TorchGeo(**stated(scene)), TorchGeo(**stated(scene, workers=1))
    for a, b in zip(one.test(), other.test(), strict=True):
        assert a["image"].equal(b["image"])
    assert isinstance(other.train(), DataLoader)
    assert len(list(other.train())) == 3


RECIPE = """
task: {type: Segmentation}
backbone:
  type: TimmViT
  name: vit_tiny_patch16_224
  weights: random
  image_size: 32
  depths: [0]
  model_args: {depth: 1, embed_dim: 12, num_heads: 2}
method: {type: LoRA, rank: 2}
head: {type: LightDecoder, width: 8}
optimiser: {learning_rate: 0.01}
trainer: {epochs: 1, device: cpu}
"""
