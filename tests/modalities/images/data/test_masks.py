"""Images with masks: folders of them, their crops and splits, and generated shadows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from modalities.images.data import FolderMasks, GeneratedShadows
from modalities.images.data.generated_shadows import draw
from modalities.images.data.masked import cropped, resize, split
from shared import RequestError


@pytest.fixture
def folders(tmp_path):
    """Six photographs of different sizes with soft masks."""
    random = np.random.default_rng(0)
    for index in range(6):
        size = (20 + index, 30 - index)
        for part, array in (
            ("images", random.integers(0, 255, (*size, 3))),
            ("masks", np.tile(np.linspace(0, 255, size[1]), (size[0], 1))),
        ):
            (tmp_path / part / "a").mkdir(parents=True, exist_ok=True)
            suffix = "jpg" if part == "images" else "png"
            Image.fromarray(array.astype(np.uint8)).save(tmp_path / part / "a" / f"{index}.{suffix}")
    return {"images": tmp_path / "images", "masks": tmp_path / "masks"}


def test_pairs_are_read_resized_and_split(folders) -> None:
    data = FolderMasks(**folders, size=16, normalisation="measured", test=["a/1"], validation=0.2)
    assert data.members["test"] == [1]
    assert [len(data.members[part]) for part in ("train", "validation")] == [4, 1]
    (batch,) = list(data.test())
    assert batch["name"] == ["a/1"]
    assert batch["image"].shape == (1, 3, 16, 16)
    assert batch["mask"].shape == (1, 21, 29)  # its own size
    assert batch["mask"][0, 0].tolist() == [0] * 15 + [1] * 14  # above 127 is inside
    train = next(iter(data.train()))
    assert train["mask"].shape == (2, 16, 16)
    assert set(train["mask"].unique().tolist()) == {0, 1}
    described = data.describe()
    assert described["splits"]["train"]["images"] == 4
    assert described["splits"]["test"]["share"] == pytest.approx(14 / 29)
    whole = torch.cat([sample["image"] for sample in data.train()])
    assert float(whole.mean().abs()) < 0.2  # measured on the images that train
    assert data.display(train["image"][0]).shape == (16, 16, 3)


def test_training_samples_follow_from_seed_and_epoch(folders) -> None:
    def epochs(seed: int) -> list[torch.Tensor]:
        data = FolderMasks(**folders, size=16, normalisation="measured", seed=seed, test=["a/1"], validation=["a/2"])
        loader = data.train()
        return [torch.cat([batch["image"] for batch in loader]) for _ in range(2)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_a_crop_keeps_image_and_mask_together() -> None:
    image = np.arange(20 * 30).reshape(1, 20, 30)
    seen = set()
    for seed in range(30):
        part, mask = cropped(image, image[0] % 2 == 0, 0.9, True, np.random.default_rng(seed))
        assert part.shape == (1, 18, 27)
        assert np.array_equal(mask, part[0] % 2 == 0)
        seen.add(bool(part[0, 0, 0] > part[0, 0, 1]))
    assert seen == {True, False}  # some mirrored, some not
    whole, _ = cropped(image, image[0] % 2 == 0, 1.0, False, np.random.default_rng(0))
    assert np.array_equal(whole, image)


def test_resizing_keeps_the_mean() -> None:
    image = torch.rand(3, 40, 60)
    assert torch.allclose(resize(image, 20).mean(), image.mean(), atol=0.01)
    assert torch.equal(resize(image[:, :, :40], 40), image[:, :, :40])


def test_normalisation_waits_for_the_backbone(folders) -> None:
    from modalities.images.backbones import SAM

    data = FolderMasks(**folders, size=16)
    with pytest.raises(RequestError, match="no backbone was given"):
        data.normalisation  # noqa: B018
    data.normalise_by(SAM(3, size="tiny", weights="random"))
    assert data.normalisation.mean == (123.675, 116.28, 103.53)
    stated = FolderMasks(**folders, size=16, normalisation={"mean": [0, 0, 0], "std": [255, 255, 255]})
    stated.normalise_by(SAM(3, size="tiny", weights="random"))
    assert stated.normalisation.std == (255, 255, 255)


def test_what_is_wrong_with_the_files_is_one_line(folders, tmp_path) -> None:
    def grey(path, size=(25, 25), kind="L") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(kind, size).save(path)

    grey(tmp_path / "b" / "images" / "x.png", kind="RGB")
    grey(tmp_path / "b" / "masks" / "y.png")
    grey(tmp_path / "c" / "images" / "x.png", kind="RGB")
    grey(tmp_path / "c" / "masks" / "x.png", (25, 24))
    grey(tmp_path / "d" / "images" / "x.png", kind="RGB")
    grey(tmp_path / "d" / "images" / "x.jpg", kind="RGB")
    (tmp_path / "e").mkdir()
    cases = {
        "image .*x.png has no mask": ("b/images", "b/masks"),
        "share one name": ("d/images", "b/masks"),
        "no such folder": ("nowhere", "b/masks"),
        "holds no image": ("e", "b/masks"),
        "are the same folder": ("b/images", "b/images"),
    }
    for message, (images, masks) in cases.items():
        with pytest.raises(RequestError, match=message):
            FolderMasks(images=tmp_path / images, masks=tmp_path / masks)
    grey(tmp_path / "c" / "images" / "z.png", kind="RGB")
    grey(tmp_path / "c" / "masks" / "z.png")
    data = FolderMasks(
        images=tmp_path / "c" / "images", masks=tmp_path / "c" / "masks", normalisation="measured", test=0, validation=0
    )
    with pytest.raises(RequestError, match="x.png: 24 x 25 pixels, its image 25 x 25; a mask has its image's size"):
        data.train()
    for message, settings in {
        "two names": {"classes": ["a", "b", "c"]},
        "crop 0": {"crop": 0},
        "size 0": {"size": 0},
        "threshold 300": {"threshold": 300},
        "no image is called 'q'": {"test": ["q"]},
        "named for both": {"test": ["a/1"], "validation": ["a/1"]},
        "use a fraction from 0 to below 1": {"test": 1.0},
        "6 images: none is left to train on": {"test": 0.5, "validation": 0.5},
    }.items():
        with pytest.raises(RequestError, match=message):
            FolderMasks(**folders, **settings)
    with pytest.raises(RequestError, match="there is no test split"):
        FolderMasks(**folders, size=16, normalisation="measured", test=0).test()


def test_splits_do_not_overlap() -> None:
    names = [str(i) for i in range(20)]
    found = split(names, 0.2, 0.25, 3)
    assert sorted(i for part in found.values() for i in part) == list(range(20))
    assert [len(found[part]) for part in ("train", "validation", "test")] == [11, 4, 5]


def test_generated_shadows_are_dark_and_masked() -> None:
    darker, shares = [], []
    for seed in range(10):
        image, mask = draw(np.random.default_rng(seed), 48)
        assert image.shape == (3, 48, 48)
        shares.append(mask.mean())
        darker.append(image[:, mask].mean() < image[:, ~mask].mean())
    assert all(darker)
    assert min(shares) > 0.02
    assert max(shares) < 0.6
    again, _ = draw(np.random.default_rng(9), 48)
    assert np.array_equal(again, image)
    data = GeneratedShadows(count=6, side=32, size=16, normalisation="measured")
    assert next(iter(data.train()))["image"].shape == (4, 3, 16, 16)


def test_real_photographs_with_shadows(materials) -> None:
    root = materials / "data" / "shadow"
    data = FolderMasks(images=root / "images", masks=root / "masks", size=32, normalisation="measured")
    assert sum(len(chosen) for chosen in data.members.values()) == 38
    batch = next(iter(data.validation()))
    assert batch["image"].shape == (1, 3, 32, 32)
    assert set(batch["mask"].unique().tolist()) == {0, 1}
