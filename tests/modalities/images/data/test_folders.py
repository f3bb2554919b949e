"""Images of folders and tables: classes, splits, draws, augmentation and normalisation; what is wrong is one line."""

from __future__ import annotations

import json
import os
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from modalities.images.data import ImageFolders
from shared.errors import RequestError


def save(path: Path, value: int = 0, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(path.as_posix().encode())).integers(0, 60, (*size, 3), np.uint8)
    Image.fromarray(pixels + np.uint8(value)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    for kind, value in (("bird", 0), ("cat", 90), ("dog", 180)):
        for index in range(10):
            save(tmp_path / "photos" / kind / f"{index}.png", value)
    return tmp_path / "photos"


def data(root: Path, **changes) -> ImageFolders:
    return ImageFolders(root=root, **{"size": 16, "normalisation": "measured", **changes})


def names(loader) -> list[str]:
    return [name for batch in loader for name in batch["name"]]


def table(path: Path, rows: list[tuple[str, str]], encoding: str = "utf-8") -> Path:
    path.write_text("path,label\n" + "".join(f"{p},{label}\n" for p, label in rows), encoding=encoding)
    return path


# -- classes and splits --------------------------------------------------------------------------------------------


def test_folders_are_classes_and_splits_are_stratified(root):
    found = data(root)
    assert found.classes == ("bird", "cat", "dog")
    assert {p: len(m) for p, m in found.members.items()} == {"train": 18, "validation": 6, "test": 6}
    for part in ("validation", "test"):
        assert Counter(name.split("/")[0] for name in names(getattr(found, part)())) == dict.fromkeys(found.classes, 2)
    batch = next(iter(found.test()))
    assert [found.classes[label] for label in batch["label"]] == [name.split("/")[0] for name in batch["name"]]
    assert batch["image"].shape[1:] == (3, 16, 16)
    assert batch["image"].dtype == torch.float32


def test_classes_may_be_ordered_but_must_be_those_found(root):
    assert data(root, classes=["dog", "bird", "cat"]).classes == ("dog", "bird", "cat")
    with pytest.raises(RequestError, match=r"bird/0.png: class 'bird' is none of those that train; nearest: 'birds'"):
        data(root, classes=["birds", "cat", "dog"])
    with pytest.raises(RequestError, match="no image of class 'fish'"):
        data(root, classes=["bird", "cat", "dog", "fish"])


def test_few_shot_draws_are_the_seed_s_and_all_others_test(root):
    one, again, other = (data(root, per_class=3, validation="train", test="rest", seed=s) for s in (1, 1, 2))
    assert one.members == again.members != other.members
    assert one.members["validation"] == one.members["train"]
    assert sorted(one.members["train"] + one.members["test"]) == list(range(30))
    assert Counter(i // 10 for i in one.members["train"]) == {0: 3, 1: 3, 2: 3}
    more = data(root, per_class=5, validation="train", test="rest", seed=1)
    assert set(one.members["train"]) < set(more.members["train"])


def test_a_text_names_the_images_of_a_split(root, tmp_path):
    (tmp_path / "test.txt").write_text("cat/3.png\ndog/1.png\nbird/9.png\n\n")
    found = data(root, test=tmp_path / "test.txt", validation=0.1)
    assert names(found.test()) == ["bird/9.png", "cat/3.png", "dog/1.png"]
    assert not set(names(found.train())) & {"bird/9.png", "cat/3.png", "dog/1.png"}
    assert len(names(found.train())) == 24
    (tmp_path / "test.txt").write_text("cat/33.png\n")
    (tmp_path / "one.txt").write_text("cat/3.png\n")
    with pytest.raises(RequestError, match="named for both validation and test"):
        data(root, test=tmp_path / "one.txt", validation=tmp_path / "one.txt")
    with pytest.raises(RequestError, match="'cat/33.png' is no image of"):
        data(root, test=tmp_path / "test.txt")


def test_another_folder_tests_and_must_hold_known_classes_and_other_images(root, tmp_path):
    save(tmp_path / "held" / "cat" / "new.png")
    found = data(root, test=tmp_path / "held")
    assert names(found.test()) == ["cat/new.png"]
    assert found.describe()["splits"]["test"]["by_class"] == {"bird": 0, "cat": 1, "dog": 0}
    save(tmp_path / "held" / "zebra" / "new.png")
    with pytest.raises(RequestError, match="new.png: class 'zebra' is none of those that train"):
        data(root, test=tmp_path / "held")
    with pytest.raises(RequestError, match="is an image of .* too; an image is in one split only"):
        data(root, test=root)


def test_a_table_gives_names_or_indices(root, tmp_path):
    rows = [(f"photos/{kind}/{i}.png", kind) for kind in ("bird", "cat") for i in range(6)]
    found = data(table(tmp_path / "a.csv", rows, encoding="utf-8-sig"))
    assert found.classes == ("bird", "cat")
    indices = [(path, str(int(kind == "cat"))) for path, kind in rows]
    by_index = data(table(tmp_path / "b.csv", indices), classes=["bird", "cat"])
    assert names(by_index.test()) == names(found.test())
    assert by_index.describe()["splits"] == found.describe()["splits"]
    assert data(table(tmp_path / "b.csv", indices)).classes == ("0", "1")


def test_names_of_any_script_and_composition(tmp_path):
    for kind in ("forêt", "море", "海"):
        for index in range(4):
            save(tmp_path / "a" / unicodedata.normalize("NFD", kind) / f"ü{index}.png")
    found = data(tmp_path / "a", classes=[unicodedata.normalize("NFC", k) for k in ("海", "forêt", "море")])
    assert json.loads(json.dumps(found.describe()))["classes"] == ["海", "forêt", "море"]
    (tmp_path / "test.txt").write_text(unicodedata.normalize("NFC", "forêt/ü1.png"), encoding="utf-8")
    assert names(data(tmp_path / "a", test=tmp_path / "test.txt").test()) == [
        unicodedata.normalize("NFC", "forêt/ü1.png")
    ]


# -- what is wrong -------------------------------------------------------------------------------------------------


def refused(match: str, make) -> None:
    with pytest.raises(RequestError, match=match) as error:
        make().describe()
    assert "\n" not in str(error.value)


def test_bad_folders(root, tmp_path):
    refused("wants a folder with one folder for each class", lambda: data(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    refused("empty: holds no folder", lambda: data(tmp_path / "empty"))
    (tmp_path / "empty" / "cat").mkdir()
    refused(r"empty/cat: holds no image", lambda: data(tmp_path / "empty"))
    save(tmp_path / "empty" / "cat" / "a.png")
    refused("classes cat: two or more different ones", lambda: data(tmp_path / "empty"))
    refused("classes cat, cat: two or more", lambda: data(root, classes=["cat", "cat"]))
    (root / "cat" / ".hidden.png").write_bytes(b"")
    (root / "cat" / "notes.txt").write_text("no image")
    assert len(data(root).members["train"]) == 18


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_bad_image_is_told_before_training(root, content):
    path = root / "cat" / "4.png"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    found = data(root)
    refused(r"cat/4.png: not a readable", lambda: found)
    with pytest.raises(RequestError, match=r"cat/4.png: not a readable"):
        found.train()


def test_bad_channels_and_names(root):
    Image.new("L", (8, 8)).save(root / "dog" / "grey.png")
    refused(r"dog/grey.png: channels 1 \(L\), wanted 3", lambda: data(root))
    (root / "dog" / "grey.png").unlink()
    try:
        os.rename(bytes(root / "dog" / "1.png"), bytes(root) + b"/dog/\xff.png")
    except OSError:
        pytest.skip("the file system takes valid names only")
    refused(r"not valid UTF-8; rename it", lambda: data(root))


def test_bad_tables(root, tmp_path):
    rows = [(f"photos/{kind}/{i}.png", kind) for kind in ("bird", "cat") for i in range(6)]

    def told(match: str, rows: list[tuple[str, str]], **changes) -> None:
        refused(match, lambda: data(table(tmp_path / "a.csv", rows), **changes))

    told("photos/dog/2.png: label 12 is out of range; the classes are 0 to 1",
         [*((p, "0") for p, _ in rows), ("photos/dog/2.png", "12")], classes=["a", "b"])  # fmt: skip
    told("label -1 is out of range", [*((p, "0") for p, _ in rows), ("photos/dog/2.png", "-1")], classes=["a", "b"])
    told("line 14 names photos/bird/0.png a second time", [*rows, ("photos/bird/0.png", "cat")])
    told("line 14 names ./photos/bird/0.png a second time", [*rows, ("./photos/bird/0.png", "cat")])
    told("line 14: no such file: .*nothing.png", [*rows, ("photos/nothing.png", "cat")])
    told("line 14 lacks a path or a label", [*rows, ("photos/dog/0.png", "")])
    told("holds no row", [])
    (tmp_path / "a.csv").write_text("file,kind\n")
    refused("wants a first line with path and label, got file, kind", lambda: data(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_bytes("path,label\nföt,a\n".encode("latin-1"))
    refused("not a readable table in UTF-8", lambda: data(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_class": 9}, "class 'bird' has 10 images, of which 4 are taken .*: too few, where 9 train"),
        ({"per_class": 10, "validation": "train", "test": "rest"}, "too few, where 10 train and 1 tests"),
        ({"test": "rest"}, "test rest: give per_class"),
        ({"per_class": 0}, "per_class 0"),
        ({"validation": 1.0}, "validation 1.0: use a fraction"),
        ({"bands": 4}, "bands 4: use 3"),
        ({"crop": 0}, "crop 0"),
        ({"size": 0}, "size 0"),
        ({"flip": "vertical"}, "flip 'vertical'"),
        ({"seed": -1}, "seed -1"),
        ({"normalisation": "imagenet"}, "normalisation 'imagenet'"),
        ({"normalisation": "backbone"}, "no backbone was given"),
    ],
)
def test_bad_settings(root, changes, message):
    refused(message, lambda: data(root, **changes))


def test_a_split_left_out_is_told(root):
    found = data(root, test=0)
    assert found.describe()["splits"]["test"]["images"] == 0
    with pytest.raises(RequestError, match="there is no test split"):
        found.test()


# -- samples -------------------------------------------------------------------------------------------------------


def test_normalisation_is_measured_given_or_the_backbone_s(root):
    measured = data(root, size=16, crop=1, flip=None)
    stored = np.stack([np.asarray(Image.open(root / measured._source.names[i])) for i in measured.members["train"]])
    np.testing.assert_allclose(measured.preparation.normalisation.mean, stored.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(measured.preparation.normalisation.std, stored.std((0, 1, 2)), rtol=1e-9)
    stated = data(root, normalisation="backbone")
    stated.normalise_by(SimpleNamespace(statistics=((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))))
    assert stated.describe()["normalisation"] == {"kind": "backbone", "mean": [1, 2, 3], "std": [4, 5, 6]}
    with pytest.raises(RequestError, match="plain states no mean and deviation"):
        data(root, normalisation="backbone").normalise_by(SimpleNamespace(name="plain"))
    chosen = data(root, normalisation={"mean": [9] * 3, "std": [2] * 3})
    chosen.normalise_by(SimpleNamespace(statistics=((1.0,) * 3, (1.0,) * 3)))
    assert chosen.describe()["normalisation"]["mean"] == [9, 9, 9]


def test_outside_training_the_middle_square_is_seen_as_it_is(root):
    found = data(root, size=16, normalisation={"mean": [10] * 3, "std": [2] * 3})
    batch = next(iter(found.test()))
    stored = np.asarray(Image.open(root / batch["name"][0]), np.float32)  # 20 rows, 16 columns
    np.testing.assert_array_equal(batch["image"][0].numpy(), (stored[2:18].transpose(2, 0, 1) - 10) / 2)
    np.testing.assert_array_equal(found.display(batch["image"][0]), stored[2:18])


def test_training_samples_follow_from_seed_and_epoch_alone(root):
    def epochs(workers: int = 0, seed: int = 3) -> list[torch.Tensor]:
        loader = data(root, seed=seed, workers=workers, batch_size=8).train()
        return [torch.cat([batch["image"] for batch in loader]) for _ in range(2)]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = epochs()
    assert torch.rand(3).equal(expected)  # loading leaves the global random state alone
    for first, other in zip(one, epochs(workers=2), strict=True):
        assert first.equal(other)
    assert not one[0].equal(one[1])
    assert not one[0].equal(epochs(seed=4)[0])


def test_crops_and_flips(root):
    def images(**changes) -> list[np.ndarray]:
        found = data(root, size=16, normalisation={"mean": [0] * 3, "std": [1] * 3}, batch_size=18, **changes)
        loader = found.train()
        pairs = [(n, i.numpy()) for _ in range(6) for b in loader for n, i in zip(b["name"], b["image"], strict=True)]
        return [image for name, image in pairs if name == found._source.names[found.members["train"][0]]]

    assert len(np.unique(np.stack(images(crop=1, flip=None)), axis=0)) == 1
    flipped = images(crop=1, flip="horizontal")
    assert {bool((i == flipped[0]).all() or (i == flipped[0][..., ::-1]).all()) for i in flipped} == {True}
    assert len(np.unique(np.stack(flipped), axis=0)) == 2
    assert len(np.unique(np.stack(images(crop=1, flip="both")), axis=0)) > 2
    assert len(np.unique(np.stack(images(crop=0.3, flip=None)), axis=0)) == 6


# -- real images ---------------------------------------------------------------------------------------------------


def test_the_real_sets_as_they_lie(materials):
    scenes = data(materials / "data" / "scene_rsscn7", per_class=7, validation="train", test="rest", size=32)
    assert scenes.classes == ("aGrass", "bField", "cIndustry", "dRiverLake", "eForest", "fResident", "gParking")
    assert [len(scenes.members[part]) for part in ("train", "validation", "test")] == [49, 49, 21]
    assert all(70 < mean < 130 for mean in scenes.describe()["normalisation"]["mean"])
    small = data(materials / "data" / "cifar10_images", size=32)
    assert len(small.classes) == 10
    assert [len(small.members[part]) for part in ("train", "validation", "test")] == [1200, 400, 400]
    assert next(iter(small.train()))["image"].shape == (32, 3, 32, 32)
