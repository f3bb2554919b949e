"""Folders of images and masks: what a task is fed, and every mistake in a folder named before training."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rasterio import Affine
from rasterio.crs import CRS

from modalities.remote_sensing.data import FolderScenes
from modalities.remote_sensing.data.scenes import Scenes
from shared.errors import RequestError
from shared.rasters import Georeference, write_raster

CLASSES = ("land", "water", "cloud")


@pytest.fixture
def folder(tmp_path, save) -> Path:
    """Ten images of five scenes, 3 bands of 40 x 56 pixels, values 10 times the scene and classes by column."""
    random = np.random.default_rng(0)
    for scene in range(5):
        for part in range(2):
            name = f"s{scene}_{part}"
            image = random.normal(1000 * (scene + 1), 50, (3, 40, 56)).astype(np.float32)
            mask = np.broadcast_to(np.arange(56) // 20, (1, 40, 56)).astype(np.uint8)
            save(tmp_path / "images" / f"{name}.tif", image)
            save(tmp_path / "masks" / f"{name}.png", mask)
    return tmp_path


def scenes(folder: Path, **changes) -> FolderScenes:
    settings = {
        "images": folder / "images",
        "masks": folder / "masks",
        "classes": CLASSES,
        "group": r"^(s\d)_",
        "batch_size": 4,
    }
    return FolderScenes(**{**settings, **changes})


def pixels(loader) -> Counter:
    count: Counter = Counter()
    for batch in loader:
        count.update(batch["mask"].flatten().tolist())
    return count


def test_a_batch_is_what_a_task_expects(folder):
    data = scenes(folder, tile=32, overlap=8)
    batch = next(iter(data.train()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (4, 32, 32)
    assert batch["mask"].dtype == torch.int64
    assert all(isinstance(name, str) for name in batch["name"])
    assert (data.bands, data.band_names) == (3, ("band 1", "band 2", "band 3"))
    assert (data.classes, data.ignore_index) == (CLASSES, 255)


def test_no_scene_is_in_two_splits_and_all_are_in_one(folder):
    data = scenes(folder)
    names = [
        {name.split("_")[0] for batch in loader for name in batch["name"]}
        for loader in (data.train(), data.validation(), data.test())
    ]
    assert [len(part) for part in names] == [3, 1, 1]
    assert len(set.union(*names)) == 5
    assert [sorted(part) for part in names] == [
        data.describe()["splits"][p]["scenes"] for p in ("train", "validation", "test")
    ]


@pytest.mark.parametrize("tile", [None, 16, 23, 40, 64])
def test_evaluation_counts_every_pixel_once(folder, tile):
    data = scenes(folder, tile=tile, overlap=0 if tile is None else 7)
    count = pixels(data.test())
    assert [count[c] for c in range(3)] == [2 * 40 * 20, 2 * 40 * 20, 2 * 40 * 16]
    assert data.describe()["splits"]["test"]["pixels"] == {"land": 1600, "water": 1600, "cloud": 1280, "ignored": 0}


def test_an_image_smaller_than_a_tile_is_filled_with_ignored_zeros(folder):
    data = scenes(folder, tile=64)
    batch = next(iter(data.test()))
    assert batch["image"].shape == (2, 3, 64, 64)
    assert (batch["mask"][:, 40:] == 255).all()
    assert (batch["mask"][:, :, 56:] == 255).all()
    assert (batch["image"][:, :, 40:] == 0).all()
    assert (batch["mask"][:, :40, :56] < 3).all()


def test_normalisation_is_measured_on_training_pixels_alone(folder):
    data = scenes(folder, validation=["s3"], test=["s4"], augment=False)
    mean = data.describe()["normalisation"]["mean"]
    np.testing.assert_allclose(mean, 2000, atol=5)  # scenes 0, 1 and 2: 1000, 2000 and 3000
    train = torch.cat([batch["image"] for batch in data.train()])
    np.testing.assert_allclose(train.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(train.std((0, 2, 3)), 1, atol=1e-3)
    assert next(iter(data.test()))["image"].mean() > 3


def test_normalisation_can_be_stated(folder):
    data = scenes(folder, normalisation={"mean": [0, 1000, 0], "std": [1, 1, 1000]}, validation=["s3"], test=["s4"])
    np.testing.assert_allclose(next(iter(data.test()))["image"].mean((0, 2, 3)), [5000, 4000, 5], atol=10)
    assert data.describe()["normalisation"] == {"kind": "given", "mean": [0, 1000, 0], "std": [1, 1, 1000]}
    with pytest.raises(RequestError, match="2 means and 3 deviations for 3 bands"):
        scenes(folder, normalisation={"mean": [0, 0], "std": [1, 1, 1]})


def test_the_same_seed_gives_the_same_epochs_and_another_seed_others(folder):
    def epochs(seed, count=2):
        loader = scenes(folder, seed=seed, tile=32, validation=["s3"], test=["s4"]).train()
        return [[(b["name"], b["image"].sum((2, 3)), b["image"][:, :, 0, 0]) for b in loader] for _ in range(count)]

    def same(one, other):
        return all(a[0] == b[0] and a[1].equal(b[1]) and a[2].equal(b[2]) for a, b in zip(one, other, strict=True))

    first, again, other = epochs(1), epochs(1), epochs(2)
    assert same(first[0], again[0])
    assert same(first[1], again[1])
    assert not same(first[0], first[1])
    assert not same(first[0], other[0])
    for epoch in first:
        assert len({name for names, *_ in epoch for name in names}) == 6 * 4


def test_an_epoch_can_be_resumed_and_workers_change_nothing(folder):
    loader: Any = scenes(folder, tile=32).train()
    next(iter(loader))  # epoch 0
    loader.sampler.set_epoch(3)
    third = [batch["image"] for batch in loader]
    loader = scenes(folder, tile=32, workers=2).train()
    loader.sampler.set_epoch(3)
    for one, other in zip(third, [batch["image"] for batch in loader], strict=True):
        assert one.equal(other)


def test_loading_leaves_the_global_random_state_alone(folder):
    loader = scenes(folder).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader)
    assert torch.rand(3).equal(expected)


def test_augmentation_turns_image_and_mask_together(tmp_path, save):
    rows, columns = np.mgrid[:16, :16]
    for i in range(3):
        save(tmp_path / "images" / f"{i}.tif", np.stack([rows, columns]).astype(np.float32))
        save(tmp_path / "masks" / f"{i}.tif", ((rows > 3) * 2 + (columns > 9))[None].astype(np.uint8))
    data = FolderScenes(
        images=tmp_path / "images", masks=tmp_path / "masks", classes="abcd", validation=["1"], test=["2"],
        normalisation={"mean": [0, 0], "std": [1, 1]},
    )  # fmt: skip
    loader, turns = data.train(), set()
    for _ in range(40):
        batch = next(iter(loader))
        (row, column), mask = batch["image"][0], batch["mask"][0]
        assert ((row > 3) * 2 + (column > 9)).equal(mask)
        turns.add((*row[0, :2].tolist(), *column[0, :2].tolist()))
    assert len(turns) == 8


def test_bands_are_chosen_by_name_or_number(folder, save):
    names = ["blue", "green", "red"]
    whole = scenes(folder, band_names=names, normalisation={"mean": [0] * 3, "std": [1] * 3})
    image = next(iter(whole.test()))["image"]
    for bands in (["Red", "blue"], [3, 1]):
        data = scenes(folder, band_names=names, bands=bands, normalisation={"mean": [0] * 2, "std": [1] * 2})
        assert (data.bands, data.band_names) == (2, ("red", "blue"))
        assert next(iter(data.test()))["image"].equal(image[:, [2, 0]])
        assert data.describe()["reading"] == {"bands": [3, 1], "layout": None, "fill": None}
    with pytest.raises(RequestError, match="no band 'nir'; it has 1 blue, 2 green, 3 red"):
        scenes(folder, band_names=names, bands=["nir"])
    with pytest.raises(RequestError, match="each band once"):
        scenes(folder, bands=[1, 1])
    with pytest.raises(RequestError, match=r"s0_0.tif: 3 bands, but band_names gives 2"):
        scenes(folder, band_names=["a", "b"])


def test_four_bands_of_bytes_are_four_bands_when_named(tmp_path, save):
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 255, (4, 16, 16), np.uint8)
        save(tmp_path / "images" / f"{i}.tif", image)  # which marks the fourth as alpha
        save(tmp_path / "masks" / f"{i}.tif", (image[:1] > 99).astype(np.uint8))
    settings = {"images": tmp_path / "images", "masks": tmp_path / "masks", "classes": "ab"}
    assert FolderScenes(**settings).bands == 3
    data = FolderScenes(**settings, band_names=["red", "green", "blue", "nir"])
    assert data.bands == 4
    assert data.describe()["splits"]["train"]["pixels"]["ignored"] == 0


def test_label_values_map_to_classes_and_the_rest_is_refused(folder, save):
    mask = np.full((1, 40, 56), 64, np.uint8)
    mask[0, :10], mask[0, 10:12], mask[0, 12:14] = 128, 0, 129
    for path in (folder / "masks").iterdir():
        save(path, mask)
    data = scenes(folder, classes=("clear", "shadow"), label_values=[[128, 129], 64], ignore_value=0)
    assert pixels(data.test()) == {0: 2 * 12 * 56, 255: 2 * 2 * 56, 1: 2 * 26 * 56}
    data = scenes(folder, classes=("clear", "shadow"), label_values=[128, 64], ignore_value=0)
    with pytest.raises(RequestError, match=r"s0_0.png: values \[129\] stand for no class.*\[0, 64, 128\]"):
        data.train()
    with pytest.raises(RequestError, match="a value stands for one class only"):
        scenes(folder, classes=("clear", "shadow"), label_values=[128, 64], ignore_value=64)
    with pytest.raises(RequestError, match="label_values: 3 for 2 classes"):
        scenes(folder, classes=("clear", "shadow"), label_values=[1, 2, 3])


def test_ranges_part_masks_with_soft_edges(folder, save):
    mask = np.full((1, 40, 56), 127, np.uint8)
    mask[0, :10], mask[0, 10:12], mask[0, 12:14] = 128, 0, 255
    for path in (folder / "masks").iterdir():
        save(path, mask)
    data = scenes(folder, classes=("ground", "road"), label_values=["0-127", "128-255"])
    assert pixels(data.test()) == {0: 2 * 28 * 56, 1: 2 * 12 * 56}
    data = scenes(folder, classes=("ground", "road"), label_values=["1-127", "128-255"], ignore_value=0)
    assert pixels(data.test()) == {0: 2 * 26 * 56, 255: 2 * 2 * 56, 1: 2 * 12 * 56}


def test_invalid_pixels_are_zero_and_ignored_and_not_measured(folder, save):
    for path in (folder / "images").iterdir():
        image = np.full((3, 40, 56), -1, np.float32)
        image[:, :, ::2], image[:, :20] = 1, np.nan
        save(path, image)
    data = scenes(folder)
    batch = next(iter(data.test()))
    assert (batch["image"][:, :, :20] == 0).all()
    assert (batch["mask"][:, :20] == 255).all()
    assert (batch["mask"][:, 20:] < 3).all()
    np.testing.assert_allclose(data.normalisation.mean, 0, atol=1e-9)
    np.testing.assert_allclose(data.normalisation.std, 1, atol=1e-9)


def test_the_description_is_json(folder):
    description = scenes(folder, tile=32, overlap=8).describe()
    assert json.loads(json.dumps(description)) == description
    assert description["kind"] == "FolderScenes"
    assert description["splits"]["train"]["images"] == 6
    assert description["splits"]["train"]["tiles"] == 6 * 2 * 2
    assert description["splits"]["test"]["tiles"] == 2 * 2 * 2


def test_a_picture_has_the_true_colours(folder):
    data = scenes(folder, band_names=["blue", "red", "green"], normalisation={"mean": [50] * 3, "std": [10] * 3})
    image = np.zeros((3, 20, 20), np.float32)
    image[1, :, 10:] = 4  # red on the right
    picture = data.display(torch.from_numpy(image))
    assert picture.dtype == np.uint8
    assert picture.shape == (20, 20, 3)
    assert picture[0, -1].tolist() == [255, 0, 0]
    assert picture[0, 0].tolist() == [0, 0, 0]


def test_subfolders_can_be_the_splits(tmp_path, save):
    for part in ("train", "val", "test"):
        for i in range(2):
            save(
                tmp_path / "images" / part / f"{i}.png", np.random.default_rng(i).integers(0, 255, (3, 8, 8), np.uint8)
            )
            save(tmp_path / "masks" / part / f"{i}.png", np.eye(8, dtype=np.uint8)[None])
    data = FolderScenes(
        images=tmp_path / "images",
        masks=tmp_path / "masks",
        classes="ab",
        group="^([^/]+)/",
        validation=["val"],
        test=["test"],
    )
    assert next(iter(data.test()))["name"] == ["test/0", "test/1"]
    assert data.band_names == ("red", "green", "blue")


def test_what_is_wrong_with_a_folder_is_said_with_the_file(folder, save, tmp_path):
    images, masks = folder / "images", folder / "masks"
    mask = (masks / "s1_0.png").read_bytes()
    small = np.zeros((1, 40, 55), np.uint8)

    def refused(reason: str, **changes):
        with pytest.raises(RequestError, match=reason) as error:
            scenes(folder, **changes).describe()
        assert "\n" not in str(error.value)

    (tmp_path / "none").mkdir()
    refused("none: holds no raster", images=tmp_path / "none")
    refused("absent: no such folder", masks=tmp_path / "absent")
    refused("are the same folder", masks=images)
    refused("tile 0 with overlap 0", tile=0)
    refused("2 to 255 different names", classes=["a"])
    refused("batch_size 0", batch_size=0)
    refused("does not match 's0_0'", group="^x")
    (masks / "s1_0.png").unlink()
    refused(r"image .*s1_0.tif has no mask: .*masks/s1_0.\* is missing")
    (masks / "s1_0.png").write_bytes(mask)
    (masks / "s9_0.png").write_bytes(mask)
    refused(r"mask .*s9_0.png has no image: .*images/s9_0.\* is missing")
    (masks / "s9_0.png").unlink()
    save(masks / "s1_0.npy", small[0])
    refused("s1_0.npy and s1_0.png share one name")
    (masks / "s1_0.npy").unlink()
    save(masks / "s1_0.png", small)
    refused("s1_0.png: 40 x 55 pixels, its image 40 x 56")
    (masks / "s1_0.png").write_bytes(mask[:60])
    refused("s1_0.png: damaged, or not PNG")
    (masks / "s1_0.png").write_bytes(b"")
    refused("s1_0.png: empty")
    (masks / "s1_0.png").write_bytes(mask)
    whole = (images / "s2_1.tif").read_bytes()
    save(images / "s2_1.tif", np.zeros((2, 40, 56), np.float32))
    refused("s2_1.tif: 2 bands, but s0_0.tif has 3")
    save(images / "s2_1.tif", np.full((3, 40, 56), np.nan, np.float32))
    refused("s2_1.tif: no valid pixel")
    refused("s2_1.*no valid pixel", tile=16)
    (images / "s2_1.tif").write_bytes(whole[: len(whole) // 2])
    refused("s2_1.tif: damaged, or not GTiff")
    save(images / "s2_1.tif", np.zeros((3, 20, 20), np.float32))
    save(masks / "s2_1.png", np.zeros((1, 20, 20), np.uint8))
    refused("images differ in size.*state the size of a tile")


def test_a_mask_that_lies_elsewhere_is_refused(tmp_path):
    image = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    for i in range(3):
        for part, array, east in (
            ("images", image, 0),
            ("masks", np.eye(8, dtype=np.uint8)[None], 600 if i == 2 else 0),
        ):
            (tmp_path / part).mkdir(exist_ok=True)
            place = Georeference(CRS.from_epsg(32633), Affine(30, 0, east, 0, -30, 0))
            write_raster(tmp_path / part / f"{i}.tif", array, georeference=place)
    with pytest.raises(RequestError, match=r"masks/2.tif: lies elsewhere than its image"):
        FolderScenes(images=tmp_path / "images", masks=tmp_path / "masks", classes="ab")


def test_a_split_without_labels_or_scenes_is_refused(folder, save):
    data = scenes(folder, test=0)
    assert data.describe()["splits"]["test"]["images"] == 0
    with pytest.raises(RequestError, match="there is no test split"):
        data.test()
    for part in range(2):
        save(folder / "masks" / f"s4_{part}.png", np.full((1, 40, 56), 9, np.uint8))
    with pytest.raises(RequestError, match="no pixel of the test split has a label"):
        scenes(folder, test=["s4"], ignore_value=9).test()


def test_every_kind_of_scenes_shares_the_loaders():
    assert FolderScenes.__mro__[1] is Scenes


def test_real_roads(real):
    data = FolderScenes(
        images=real("aerial_roads") / "images", masks=real("aerial_roads") / "masks", classes=("ground", "road"),
        label_values=["0-127", "128-255"], tile=200,
    )  # fmt: skip
    splits = data.describe()["splits"]
    assert [splits[part]["images"] for part in splits] == [10, 4, 4]
    assert [splits[part]["tiles"] for part in splits] == [40, 16, 16]
    assert data.band_names == ("red", "green", "blue")
    assert sum(sum(splits[part]["pixels"].values()) for part in splits) == 18 * 400 * 400
    assert sum(data.describe()["normalisation"]["mean"]) / 3 == pytest.approx(80, abs=15)
