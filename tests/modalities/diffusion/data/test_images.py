"""Drawn shapes and folders of pictures: right sizes and values, fixed checks, and wrong folders refused."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modalities.diffusion.buckets import Draw, Size
from modalities.diffusion.data import CaptionedImages, GeneratedShapes
from shared.errors import RequestError

SMALL = {"low": 16, "high": 64, "step": 16, "base": 32, "batch_size": 2, "checks": 3}


def test_batches_hold_one_size_with_captions_and_names():
    data = GeneratedShapes(images=20, **SMALL)
    batches = list(data.train())
    assert len(batches) == len(data.train()) == 10
    names = [name for batch in batches for name in batch["name"]]
    assert sorted(names) == sorted(f"train/{i}" for i in range(20))
    sizes = {tuple(batch["image"].shape[2:]) for batch in batches}
    assert len(sizes) > 3
    assert sizes <= set(data.sizes())
    for batch in batches:
        assert batch["image"].shape[:2] == (2, 3)
        assert batch["image"].dtype == torch.float32
        assert batch["image"].min() >= -1
        assert batch["image"].max() <= 1
        assert batch["crop"].shape == (2, 2)
        assert all(caption for caption in batch["caption"])


def test_checks_are_the_same_every_time_and_apart_from_training():
    data = GeneratedShapes(images=4, **SMALL)
    for split in ("validation", "test"):
        first, again = list(getattr(data, split)()), list(getattr(data, split)())
        assert [tuple(b["image"].shape) for b in first] == [(3, 3, side, side) for side in (16, 32, 48, 64)]
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    train, check = (data.sample(split, (0, Size(32, 32), None))["image"] for split in ("train", "validation"))
    assert not torch.equal(train, check)


def test_a_picture_is_the_same_at_every_size():
    data = GeneratedShapes(images=4, **SMALL)
    for index in range(4):
        large = data.sample("train", (index, Size(128, 128), None))
        small = data.sample("train", (index, Size(32, 32), None))
        assert small["caption"] == large["caption"]
        shrunk = F.avg_pool2d(large["image"][None], 4)[0]
        assert float((shrunk - small["image"]).abs().mean()) < 0.05
        assert float(small["image"].std()) > 0.05


def test_a_longer_side_shows_a_crop():
    data = GeneratedShapes(images=4, **SMALL)
    whole = data.sample("train", (0, Size(64, 64), None))
    part = data.sample("train", Draw(0, Size(64, 32), 5))
    top, left = part["crop"].tolist()
    assert top == 0
    assert 0 < left <= 32
    assert torch.equal(part["image"], whole["image"][:, :, left : left + 32])


def test_an_epoch_repeats_and_workers_change_nothing():
    one, two = (GeneratedShapes(images=6, workers=workers, **SMALL).train() for workers in (0, 1))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two, strict=True))
    one.sampler.set_epoch(1)
    assert [b["name"] for b in one] != [b["name"] for b in two]


def test_described():
    assert GeneratedShapes(images=5, **SMALL).describe() == {
        "source": "GeneratedShapes",
        "images": {"train": 5, "validation": 3, "test": 3},
        "sides": {"low": 16, "high": 64, "step": 16, "ratio": [0.5, 2.0]},
        "sizes": len(GeneratedShapes(**SMALL).sizes()),
        "probability": "uniform",
        "normalisation": "-1 to 1",
    }


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures whose red runs from left to right and green from top to bottom."""
    (tmp_path / "images").mkdir()
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption", "group"])
        for index in range(20):
            x, y = np.meshgrid(np.linspace(0, 255, 60), np.linspace(0, 255, 40))
            pixels = np.stack([x, y, np.full_like(x, index * 10)], -1).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"images/{index}.png")
            table.writerow([f"images/{index}.png", f"picture {index}", "all"])
    return tmp_path


def test_a_folder_is_split_once_and_for_all(folder):
    data = CaptionedImages(folder=folder, validation_share=0.2, test_share=0.1, **SMALL)
    assert data.describe()["images"] == {"train": 14, "validation": 4, "test": 2}
    assert {name for split in data.rows.values() for name, _ in split} == {f"images/{i}.png" for i in range(20)}
    assert data.rows == CaptionedImages(folder=folder, validation_share=0.2, test_share=0.1, **SMALL).rows
    other = CaptionedImages(folder=folder, validation_share=0.2, test_share=0.1, seed=1, **SMALL)
    assert data.rows != other.rows
    assert [batch["image"].shape[0] for batch in data.test()] == [2] * 4


def test_pictures_are_covered_and_cropped(folder):
    data = CaptionedImages(folder=folder, **SMALL)
    name, caption = data.rows["train"][0]
    middle = data.sample("train", (0, Size(32, 32), None))
    assert (middle["name"], middle["caption"]) == (name, caption)
    red, green, blue = middle["image"]
    assert red[:, 0].mean() == pytest.approx(-2 / 3, abs=0.1)  # a sixth of 60 columns is cut on either side
    assert red[:, -1].mean() == pytest.approx(2 / 3, abs=0.1)
    assert (green[0].mean(), green[-1].mean()) == pytest.approx((-1, 1), abs=0.1)
    assert blue.mean() == pytest.approx(int(name[7:-4]) * 10 / 127.5 - 1, abs=0.01)
    crops = {tuple(data.sample("train", Draw(0, Size(32, 32), seed))["crop"].tolist()) for seed in range(9)}
    assert len(crops) > 3
    assert all(top == 0 and 0 <= left <= 16 for top, left in crops)


def test_what_is_transparent_becomes_white(folder):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "images/0.png")
    data = CaptionedImages(folder=folder, **SMALL)
    split, index = next((s, i) for s, rows in data.rows.items() for i, r in enumerate(rows) if r[0] == "images/0.png")
    assert data.sample(split, (index, Size(16, 16), None))["image"].min() == 1


def test_the_names_of_an_image_folder_of_hugging_face(folder):
    (folder / "captions.csv").unlink()
    (folder / "metadata.csv").write_text("file_name,text\nimages/3.png,three\n")
    assert CaptionedImages(folder=folder, **SMALL).rows["train"] == [("images/3.png", "three")]


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(RequestError, match=r"neither captions.csv .* nor metadata.csv"):
        CaptionedImages(folder=tmp_path / "images", **SMALL)
    with pytest.raises(RequestError, match="validation_share and test_share: from 0, together below 1"):
        CaptionedImages(folder=folder, validation_share=0.5, test_share=0.5, **SMALL)
    (folder / "images/7.png").write_bytes(b"\x89PNG but not quite")
    data = CaptionedImages(folder=folder, **SMALL)
    split, index = next((s, i) for s, rows in data.rows.items() for i, r in enumerate(rows) if r[0] == "images/7.png")
    with pytest.raises(RequestError, match=r"images/7.png: not a readable image"):
        data.sample(split, (index, Size(16, 16), None))
    (folder / "images/7.png").unlink()
    with pytest.raises(RequestError, match=r"1 of its files are not there \(first: images/7.png\)"):
        CaptionedImages(folder=folder, **SMALL)
    (folder / "captions.csv").write_text("file,words\na.png,b\n")
    with pytest.raises(RequestError, match="wants rows with file and caption"):
        CaptionedImages(folder=folder, **SMALL)


def test_wrong_settings_are_named():
    with pytest.raises(RequestError, match="both ends must be multiples of the step"):
        GeneratedShapes(low=100)
    with pytest.raises(RequestError, match="batch_size, checks and base must be at least 1"):
        GeneratedShapes(batch_size=0)


def test_real_pictures(materials):
    folder = materials / "data/emoji_captions"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    data = CaptionedImages(folder=folder, **SMALL)
    assert data.describe()["images"] == {"train": 540, "validation": 30, "test": 30}
    batch = next(iter(data.train()))
    assert batch["image"].shape[:2] == (2, 3)
    assert float(batch["image"].std()) > 0.1
