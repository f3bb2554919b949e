"""Camera RAW with a class each: from folders, a table, generated; the model sees linear values, new files are read."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest
import torch

from modalities.images.backbones import TimmResNet
from modalities.images.classification import Classification
from modalities.images.data import GeneratedMosaics, Preparation, RawFolders, Sensor
from modalities.images.data.raw_images import exposed
from modalities.images.heads import LinearHead
from modalities.images.raw_adapter import RAWAdapter
from shared import adapt
from shared.errors import RequestError
from shared.training.optimiser import Optimiser


@pytest.fixture
def root(tmp_path):
    """Six mosaics of 10 bits in each of two folders, some dark, some bright; and files that are none."""
    random = np.random.default_rng(0)
    for name, most in (("dark", 200), ("light", 1023)):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = random.integers(64, most, (20, 24)).astype("<u2")
            pixels.tofile(tmp_path / name / f"{i}.raw")
        (tmp_path / name / "notes.txt").write_text("none")
    return tmp_path


def folders(root, **changes: Any) -> RawFolders:
    return RawFolders(**{"root": root, "bits": 10, "black": 64, "shape": (20, 24), "size": 8, "pattern": "GBRG",
                         "batch_size": 4, **changes})  # fmt: skip


def test_folders_give_linear_values_from_0_to_1(root) -> None:
    data = folders(root, crop=1, flip=None)
    batch = next(iter(data.test()))
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert data.classes == ("dark", "light")
    dark, light = batch["image"].mean((1, 2, 3)).tolist()
    assert abs(dark - (200 - 64) / 2 / 959) < 0.02
    assert abs(light - 0.5) < 0.07
    name = batch["name"][0]
    sensor = Sensor(pattern="GBRG", bits=10, black=64, shape=(20, 24))
    image = sensor.read(root / name)
    expected = Preparation.of(data.describe()).square(image)
    assert torch.allclose(batch["image"][0], expected, atol=1e-6)


def test_all_files_train_validate_or_test_once(root) -> None:
    members = folders(root).members
    assert sorted(i for part in members.values() for i in part) == list(range(12))
    assert {part: len(found) for part, found in members.items()} == {"train": 8, "validation": 2, "test": 2}


def test_a_table_names_files_and_classes(root) -> None:
    rows = [(f"{name}/{i}.raw", name) for name in ("dark", "light") for i in range(6)]
    with open(root / "files.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    assert folders(root / "files.csv").members == folders(root).members


def test_what_it_describes_reads_a_new_file_alike(root) -> None:
    described = json.loads(json.dumps(folders(root).describe()))
    assert described["sensor"] == {"pattern": "GBRG", "bits": 10, "black": 64, "white": None, "shape": [20, 24],
                                   "demosaic": "half"}  # fmt: skip
    preparation = Preparation.of(described)
    image = preparation.normalised(preparation.square(preparation.read(root / "dark" / "0.raw")))
    assert 0 <= image.min() < image.max() <= 136 / 959


def test_a_bad_file_is_named_before_training(root) -> None:
    file = root / "light" / "3.raw"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RequestError, match=r"light/3\.raw: truncated"):
        folders(root).train()
    (root / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no image .*npy"):
        folders(root)


def test_a_run_labels_new_files(root, tmp_path_factory) -> None:
    data = folders(root, size=32)
    small = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}
    backbone = TimmResNet(3, name="resnet18", weights="random", model_args=small)
    method = RAWAdapter(width=4, middle=(5, 6, 7), predictor=16, lut=8)
    task = Classification(adapt(backbone, method, head=LinearHead(20, 2)), data, Optimiser())
    out = tmp_path_factory.mktemp("out") / "labels.csv"
    task.predict_files([root / "light"], out, described=data.describe(), identity={})
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 6
    batch = next(iter(folders(root, size=32, crop=1, flip=None, validation="train").test()))
    scores = task.predict(batch["image"])
    by_name = {row["file"].rpartition("/")[2]: float(row["p/light"]) for row in rows}
    index = batch["label"].tolist().index(1)
    assert abs(by_name[batch["name"][index].rpartition("/")[2]] - float(scores[index, 1])) < 1e-4


# -- generated ---------------------------------------------------------------------------------------------------------


def test_generated_mosaics_depend_on_the_seed_alone() -> None:
    one, again, other = (GeneratedMosaics(count=3, seed=seed)._source.read(3) for seed in (0, 0, 1))
    assert one.shape == (3, 48, 48)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_light_scales_the_scene_and_saturates() -> None:
    means = {}
    for light in ("low", "normal", "over"):
        source = GeneratedMosaics(count=3, light=light, noise=0.0, seed=0)._source
        images = np.stack([source.read(i) for i in range(18)]) / 255
        means[light] = images.mean()
        assert images.min() >= 0
        assert images.max() <= 1
    assert means["low"] / means["normal"] == pytest.approx(0.1, rel=0.01)
    assert 1.3 < means["over"] / means["normal"] <= 1.5 + 1e-6


def test_an_exposure_is_whole_numbers_from_black_to_white() -> None:
    picture = np.full((3, 16, 16), 255, np.uint8)
    sensor = Sensor(bits=10, black=50)
    bright = exposed(picture, sensor, np.random.default_rng(0), light=5.0, noise=0.01)
    assert bright.dtype == np.uint16
    assert bright.max() == 1023
    dark = exposed(0 * picture, sensor, np.random.default_rng(0), light=1.0, noise=0.01)
    assert abs(dark.mean() - 50) < 2
    assert abs(dark.std() - 0.01 * 973) < 1


def test_a_picture_of_it_is_brightened() -> None:
    data = GeneratedMosaics(count=5)
    shown = data.display(np.full((3, 4, 4), 0.1, np.float32))
    assert shown.shape == (4, 4, 3)
    assert set(np.unique(shown)) == {round(255 * 0.1 ** (1 / 2.2))}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"side": 31}, "the side even"),
        ({"classes": ("disc",)}, "two or more out of"),
        ({"light": "dim"}, "light 'dim'"),
        ({"noise": -1.0}, "noise -1"),
        ({"pattern": "XXXX"}, "Bayer pattern 'XXXX'"),
    ],
)
def test_settings_that_make_no_sense(settings, words) -> None:
    with pytest.raises(RequestError, match=words):
        GeneratedMosaics(**settings)
