"""Cloud scenes of every sensor: the published layouts, made here, and the real files where they are present."""

from pathlib import Path

import numpy as np
import pytest
import torch

from modalities.images.backbones import SAMEncoder, TimmViT
from modalities.remote_sensing.cloud_adapter import CloudAdapter
from modalities.remote_sensing.data import BinaryClouds, Cloud38, CloudSEN12, LandsatBiome, LandsatClouds
from modalities.remote_sensing.heads import LightDecoder
from modalities.remote_sensing.segmentation import Segmentation
from shared import adapt
from shared.errors import RequestError
from shared.mapping import Feed, map_files
from shared.rasters import Labels, gather, open_stack, read_image, read_mask
from shared.training.optimiser import Optimiser

KINDS = [(BinaryClouds, 2, 256), (CloudSEN12, 4, 512), (LandsatClouds, 4, 512)]


def published(folder: Path, save, classes: int, parts=("train", "val", "test")) -> Path:
    random = np.random.default_rng(0)
    for part in parts:
        for name in ("1", "scene_b"):
            save(folder / "img_dir" / part / f"{name}.png", random.integers(0, 255, (3, 32, 32), dtype=np.uint8))
            mask = random.integers(0, classes, (1, 32, 32), dtype=np.uint8)
            save(folder / "ann_dir" / part / f"{name}.png", mask)
    return folder


@pytest.mark.parametrize(("kind", "classes", "side"), KINDS)
def test_a_published_folder_is_split_by_its_folders(kind, classes, side, tmp_path, save):
    data = kind(folder=published(tmp_path, save, classes))
    assert (len(data.classes), data.bands, data.band_names, data.tile) == (classes, 3, ("red", "green", "blue"), side)
    splits = data.describe()["splits"]
    assert {part: each["scenes"] for part, each in splits.items()} == {
        "train": ["train"], "validation": ["val"], "test": ["test"],
    }  # fmt: skip
    assert [each["images"] for each in splits.values()] == [2, 2, 2]
    sample = data.samples("test")[0]
    stored = read_mask(tmp_path / "ann_dir" / "test" / "1.png").labels
    assert (sample["mask"][:32, :32].numpy() == stored).all()
    red = read_image(tmp_path / "img_dir" / "test" / "1.png").image[0]
    np.testing.assert_allclose(sample["image"][0, :32, :32], (red - 123.675) / 58.395, atol=1e-5)


def test_other_splits_and_other_values_are_stated(tmp_path, save):
    folder = published(tmp_path, save, 2, ("train", "val"))
    with pytest.raises(RequestError, match=r"img_dir has no folder test; state validation and test as fractions"):
        BinaryClouds(folder=folder)
    with pytest.raises(RequestError, match="give both, or neither"):
        BinaryClouds(folder=folder, test=0.5)
    with pytest.raises(RequestError, match="group is for a split of one's own"):
        BinaryClouds(folder=published(tmp_path, save, 2), group="(.)")
    splits = BinaryClouds(folder=folder, validation=["val/1"], test=["val/scene_b", "train/1"]).describe()["splits"]
    assert [part["images"] for part in splits.values()] == [4 - 1, 1, 2]
    for part in ("train", "val", "test"):
        for path in (tmp_path / "ann_dir" / part).iterdir():
            save(path, 255 * read_mask(path).labels.astype(np.uint8)[None])
    with pytest.raises(RequestError, match=r"values \[255\] stand for no class"):
        next(iter(BinaryClouds(folder=folder).train()))
    assert next(iter(BinaryClouds(folder=folder, label_values=[0, 255]).train()))["mask"].unique().tolist() == [
        0,
        1,
        255,
    ]


def test_pictures_without_masks_say_what_they_are_good_for(real, tmp_path, save):
    with pytest.raises(RequestError, match=r"gone: no such folder"):
        BinaryClouds(folder=tmp_path / "gone")
    save(tmp_path / "a.png", np.ones((3, 4, 4), np.uint8))
    with pytest.raises(
        RequestError, match=r"holds no folder img_dir, so nothing to train on; its 1 rasters can be mapp"
    ):
        CloudSEN12(folder=tmp_path)
    with pytest.raises(RequestError, match=r"gf1: holds no folder img_dir.*its 2 rasters.*omniadapt predict"):
        BinaryClouds(folder=real("cloud_scenes") / "gf1")


def patches(folder: Path, save) -> Path:
    random = np.random.default_rng(1)
    for scene in range(3):
        for patch in (1, 2):
            name = f"patch_{patch}_1_by_{patch}_LC08_L1TP_00205{scene}_20160520_20170324_01_T1"
            for at, band in enumerate(("red", "green", "blue", "nir")):
                values = random.integers(1, 1000, (1, 32, 32), dtype=np.uint16) + 1000 * at
                values[0, 0] = 0
                save(folder / f"train_{band}" / f"{band}_{name}.tif", values)
            mask = 255 * (np.arange(32) > 15).astype(np.uint8) * np.ones((1, 32, 32), np.uint8)
            save(folder / "train_gt" / f"gt_{name}.tif", mask)
    return folder


def test_38_cloud_is_split_by_landsat_scene_and_its_margins_are_no_data(tmp_path, save):
    data = Cloud38(folder=patches(tmp_path, save), validation=0.3, test=0.3)
    splits = data.describe()["splits"]
    scenes = [scene for part in splits.values() for scene in part["scenes"]]
    assert sorted(scenes) == [f"LC08_L1TP_00205{i}_20160520_20170324_01_T1" for i in range(3)]
    assert all(
        part["pixels"] == {"clear": 2 * 31 * 16, "cloud": 2 * 31 * 16, "ignored": 64} for part in splits.values()
    )
    assert data.band_names == ("red", "green", "blue", "nir")
    np.testing.assert_allclose(data.normalisation.mean, [500, 1500, 2500, 3500], atol=30)
    assert Cloud38(folder=tmp_path, bands=["nir"], validation=0.3, test=0.3).describe()["reading"]["bands"] == [4]


def test_the_real_38_cloud_patch(real):
    folder = real("cloud_scenes") / "38cloud_sample"
    ((name, files),) = gather(folder, {band: f"{band}_*" for band in ("red", "green", "blue", "nir")}).items()
    assert name.endswith("LC08_L1TP_002053_20160520_20170324_01_T1")
    with open_stack(files, fill=0) as stack:
        image, valid, _ = stack.read()
    assert image.shape == (4, 384, 384)
    assert valid.all()
    np.testing.assert_allclose(image.mean((1, 2)), [52, 53, 55, 80], atol=1)
    mask = read_mask(folder / f"gt_{name}.jpg")
    truth = Labels(["clear", "cloud"], ["0-127", "128-255"]).index("gt", mask.labels, mask.valid)
    assert truth.mean() == pytest.approx(0.30743, abs=1e-4)
    assert image[0][truth == 1].mean() > 1.8 * image[0][truth == 0].mean()
    with pytest.raises(RequestError, match="no scene is left to train on: 1 in all"):
        Cloud38(folder=folder)


@pytest.mark.parametrize("domain", ["gf1", "gf2", "hrc_whu", "l1c", "l2a", "l8"])
def test_a_model_of_rgb_clouds_maps_the_real_scenes_of_every_sensor(domain, real, tmp_path, save):
    """What a user does with ``omniadapt predict``: an untrained model here, so only that every pixel gets a class."""
    data = BinaryClouds(folder=published(tmp_path / "train", save, 2))
    backbone = TimmViT(
        3, name="vit_tiny_patch16_224", weights="random", image_size=64, normed=False,
        model_args={"embed_dim": 24, "depth": 4, "num_heads": 2},
    )  # fmt: skip
    model = adapt(backbone, CloudAdapter(width=6, rank=3), head=LightDecoder(backbone.channels, 2, width=8))
    task = Segmentation(model, data, Optimiser())
    done = map_files(
        task.scores, Feed.of(data.describe()), [real("cloud_scenes") / domain], tmp_path / "maps", overlap=0
    )
    assert len(done) == 2
    for mapped in done:
        assert mapped.pixels is not None
        assert sum(mapped.pixels.values()) == mapped.height * mapped.width in (256**2, 512**2)


@pytest.mark.parametrize("kind", ["dinov2", "sam"])
def test_eight_real_bands_train_on_either_backbone(kind, real):
    """A repeated patch kernel: one step on two tiles of Landsat-8 moves the adapter and the head alone."""
    data = LandsatBiome(root=real("cloud_landsat8_biome"), tile=64, batch_size=2)
    if kind == "sam":
        backbone = SAMEncoder(8, size="tiny", weights="random", neck=False)
    else:
        backbone = TimmViT(
            8, name="vit_small_patch14_dinov2", weights="random", image_size=64, patch_size=16, normed=False,
            model_args={"embed_dim": 24, "depth": 4, "num_heads": 2},
        )  # fmt: skip
    model = adapt(backbone, CloudAdapter(width=8, stages=3, rank=3), head=LightDecoder(backbone.channels, 4, width=8))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=0.01)
    batch = next(iter(data.train()))
    assert batch["image"].shape == (2, 8, 64, 64)
    model.head.loss(model(batch["image"]), batch["mask"]).backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    own = {id(p) for p in model.trainable().values()}
    assert moved == {name for name, p in model.named_parameters() if id(p) in own}
