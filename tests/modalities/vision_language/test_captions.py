"""Captioned images: tables of the true layout, splits, one caption an epoch, and bad input in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modalities.vision_language.data import CaptionedFolder, GeneratedCaptions
from shared.errors import RequestError

UNIT = {"mean": [0.0] * 3, "std": [1.0] * 3}


def folder(root: Path, images: int = 10, captions: int = 2) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = ["file,caption,source"]
    for index in range(images):
        Image.new("RGB", (20, 16), (index * 20, 5, 9)).save(root / f"{index}.png")
        lines += [f'{index}.png,"picture {index}, told  {n}",x' for n in range(captions)]
    (root / "captions.csv").write_text("\n".join(lines))
    return root


def test_a_table_gives_every_caption_and_training_one_an_epoch(tmp_path):
    root = folder(tmp_path / "a", captions=3)
    data = CaptionedFolder(root=root, validation=0.2, test=0.3, size=8, crop=1.0, batch_size=4, normalisation=UNIT)
    assert [len(data.members[part]) for part in ("train", "validation", "test")] == [5, 2, 3]
    assert sorted(i for members in data.members.values() for i in members) == list(range(10))
    batch = next(iter(data.test()))
    index = data.members["test"][0]
    assert batch["captions"][0] == tuple(f"picture {index}, told {n}" for n in range(3))
    assert batch["name"][0] == f"{index}.png"
    assert batch["image"].shape == (3, 3, 8, 8)
    assert batch["image"][0, :, 4, 4].tolist() == [index * 20, 5, 9]
    told = [epoch(data, number) for number in range(4)]
    assert all(len(caption) == 1 for batches in told for captions in batches for caption in captions)
    everything = {caption for batches in told for captions in batches for (caption,) in captions}
    assert len(everything) > 5  # other captions of the same five images in later epochs
    again = CaptionedFolder(root=root, validation=0.2, test=0.3, size=8, crop=1.0, batch_size=4, normalisation=UNIT)
    assert epoch(again, 3) == told[3]
    assert data.describe()["splits"]["train"] == {"images": 5, "captions": 15}
    assert len(data.captions) == 30


def epoch(data: CaptionedFolder, number: int) -> list[list[tuple[str, ...]]]:
    loader: Any = data.train()
    loader.sampler.set_epoch(number)
    return [batch["captions"] for batch in loader]


def test_splits_of_their_own_tables(tmp_path):
    root, other = folder(tmp_path / "a", 6), folder(tmp_path / "b", 3)
    data = CaptionedFolder(root=root, validation=0.2, test=other, size=8, normalisation="measured")
    assert data.members == {"train": data.members["train"], "validation": data.members["validation"], "test": [6, 7, 8]}
    assert len(data.members["train"]) == 5
    with pytest.raises(RequestError, match="test .*captions.csv: 0.png is an image of another split too"):
        CaptionedFolder(root=root, test=root / "captions.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("path,label\n0.png,x", "wants a first line with file and caption, got path, label"),
        ("file,caption\n0.png,", "line 2 lacks a file or a caption"),
        ("file,caption\n0.png,a\n7.png,b", "line 3: no such file: .*7.png"),
        ("file,caption\n0.png,a b\n0.png,a  b", "line 3 gives 0.png the same caption a second time"),
        ("file,caption\n", "holds no row"),
        ("file,caption\n0.png,a", "1 images, all of them taken for test and validation: none is left to train on"),
    ],
)
def test_bad_tables_are_named(rows, message, tmp_path):
    folder(tmp_path, 1)
    (tmp_path / "captions.csv").write_text(rows)
    with pytest.raises(RequestError, match=message):
        CaptionedFolder(root=tmp_path)
    with pytest.raises(RequestError, match="not a readable table"):
        CaptionedFolder(root=tmp_path / "none")
    with pytest.raises(RequestError, match="test 1.5: use a fraction of the images"):
        GeneratedCaptions(test=1.5)


def test_a_damaged_image_shows_before_training(tmp_path):
    root = folder(tmp_path)
    (root / "3.png").write_bytes(b"no image")
    data = CaptionedFolder(root=root, normalisation=UNIT)
    with pytest.raises(RequestError, match="3.png: not a readable"):
        data.train()


def test_generated_images_are_what_their_captions_say():
    data = GeneratedCaptions(count=240, normalisation=UNIT, test=0.5, batch_size=120, crop=1.0)
    assert len(set(data.captions)) == 480
    batch = next(iter(data.test()))
    reds = {"red": (205, 45, 40), "white": (235, 235, 235), "black": (25, 25, 25)}
    for image, (first, second) in zip(batch["image"], batch["captions"], strict=True):
        _, size, colour, figure, _, _, ground, _ = first.split()
        assert second == f"{ground} ground, and on it a {size} {colour} {figure}"
        if ground in reds:  # a corner shows the ground
            assert (image[:, :2, :2].mean((1, 2)) - torch.tensor(reds[ground]).float()).abs().max() < 15
        if colour in reds and figure != "ring":
            assert (image[:, 15:17, 15:17].mean((1, 2)) - torch.tensor(reds[colour]).float()).abs().max() < 20
    again = next(iter(GeneratedCaptions(count=240, normalisation=UNIT, test=0.5, batch_size=120, crop=1.0).test()))
    assert torch.equal(again["image"], batch["image"])
    with pytest.raises(RequestError, match="count 241 and side 32: 3 to 240"):
        GeneratedCaptions(count=241)
