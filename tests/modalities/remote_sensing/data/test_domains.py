"""Two domains: what training sees of the target, how both are measured and normalised, and refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modalities.remote_sensing.data import FolderDomains, GeneratedDomains
from modalities.remote_sensing.data.domains import Resensed
from modalities.remote_sensing.data.generated import GeneratedSource
from shared.errors import RequestError
from shared.mapping import Feed
from shared.rasters import Window

CLASSES = ("water", "field", "town")


def write(folder: Path, domain: str, count: int, offset: int, labels: int = 0) -> dict[str, Any]:
    """``count`` images of 24 x 24 with masks 1 to 3 (0: no label), whose labels ``labels`` draws anew."""
    from PIL import Image

    random, drawn = np.random.default_rng(offset), np.random.default_rng([offset, labels])
    for part in ("images", "masks"):
        (folder / domain / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = random.integers(0, 200, (24, 24, 3)) + offset
        Image.fromarray(image.astype(np.uint8)).save(folder / domain / "images" / f"s{i}_a.png")
        mask = drawn.integers(0, 4, (24, 24))
        Image.fromarray(mask.astype(np.uint8)).save(folder / domain / "masks" / f"s{i}_a.png")
    return {"images": folder / domain / "images", "masks": folder / domain / "masks"}


def domains(folder: Path, labels: int = 0, **more: Any) -> FolderDomains:
    source, target = write(folder, "source", 6, 0), write(folder, "target", 5, 40, labels)
    given: dict[str, Any] = {
        **source, "target_images": target["images"], "target_masks": target["masks"], "classes": CLASSES,
        "label_values": (1, 2, 3), "ignore_value": 0, "group": r"(?P<scene>s\d)_", "validation": ["s0"], "test": ["s1"],
        "target_validation": ["s3"], "target_test": ["s4"], **more,
    }  # fmt: skip
    return FolderDomains(**given)


def samples(data: Any, epochs: int = 1) -> list[dict[str, Any]]:
    """Training samples in the order of ``epochs``."""
    loader = data.train()
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found += [loader.dataset[position] for position in loader.sampler]
    return found


def tiles(domain: Any) -> list[dict[str, Any]]:
    """A domain's training tiles, labels and all."""
    own = domain.samples("train")
    return [own[i] for i in range(len(own))]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if hasattr(a[k], "shape") else a[k] == b[k] for k in a)
        for a, b in zip(one, other, strict=True)
    )


def test_a_training_sample_has_a_target_image_and_none_of_its_labels(tmp_path) -> None:
    data = domains(tmp_path, augment=False)
    found = samples(data)
    assert len(found) == 4
    assert {s["name"] for s in found} == {f"s{i}_a" for i in (2, 3, 4, 5)}
    for sample in found:
        assert set(sample) == {"image", "mask", "name", "target", "target_valid", "target_name"}
        assert sample["target_name"] in {"s0_a", "s1_a", "s2_a"}  # what validates and tests never trains
        assert sample["target_valid"].all()
        (own,) = [s for s in tiles(data.target) if s["name"] == sample["target_name"]]
        assert torch.equal(sample["target"], own["image"])


@pytest.mark.parametrize("labels", [1, 2])
def test_other_labels_of_the_target_change_no_training_sample(tmp_path, labels) -> None:
    plain, other = domains(tmp_path / "plain"), domains(tmp_path / "other", labels)
    evaluated = [next(iter(d.target.test()))["mask"] for d in (plain, other)]
    assert not torch.equal(*evaluated)
    assert same(samples(plain, 3), samples(other, 3))


def test_a_target_without_any_label_in_its_train_split_trains(tmp_path) -> None:
    from PIL import Image

    data = domains(tmp_path)
    for scene in ("s0", "s1", "s2"):
        Image.new("L", (24, 24)).save(tmp_path / "target" / "masks" / f"{scene}_a.png")
    assert same(samples(data), samples(domains(tmp_path / "again")))
    assert data.describe()["splits"]["train"]["pixels"] == {**dict.fromkeys(CLASSES, 0), "ignored": 3 * 24 * 24}


def test_target_tiles_come_equally_often_in_an_order_of_their_own(tmp_path) -> None:
    data = domains(tmp_path, validation=["s0"], test=["s1"])
    found = samples(data, epochs=9)  # 36 samples are 12 passes over 3 target tiles
    assert Counter(s["target_name"] for s in found) == dict.fromkeys(("s0_a", "s1_a", "s2_a"), 12)
    pairs = {(s["name"], s["target_name"]) for s in found}
    assert len(pairs) == 12  # every source tile meets every target tile
    dataset = data.train().dataset
    assert same([dataset[17]], [data.train().dataset[17]])  # a position is the same whenever it is asked for


def test_without_pairs_nothing_of_the_target_trains(tmp_path) -> None:
    data = domains(tmp_path, pairs=False)
    assert same(samples(data, 2), [data.source.train().dataset[int(p)] for p in _order(data, 2)])
    assert all(set(sample) == {"image", "mask", "name"} for sample in samples(data))


def _order(data: Any, epochs: int) -> list[int]:
    sampler, found = data.train().sampler, []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += list(sampler)
    return found


def test_evaluation_is_of_both_domains_never_in_one_batch(tmp_path) -> None:
    data = domains(tmp_path, validation=["s0", "s1", "s2"], test=["s3"], batch_size=2)
    batches = list(data.validation())
    assert [b["domain"].tolist() for b in batches] == [[0, 0], [0], [1]]
    assert [b["name"] for b in batches] == [["source/s0_a", "source/s1_a"], ["source/s2_a"], ["target/s3_a"]]
    (own,) = data.target.validation()
    assert torch.equal(batches[-1]["mask"], own["mask"])
    assert torch.equal(batches[-1]["image"], own["image"])


def test_both_are_normalised_as_the_source_measures_or_as_stated(tmp_path) -> None:
    data = domains(tmp_path)
    assert data.source.normalisation == data.target.normalisation
    source = torch.cat([s["image"].flatten(1) for s in tiles(data.source)], 1)
    target = torch.cat([s["image"].flatten(1) for s in tiles(data.target)], 1)
    torch.testing.assert_close(source.mean(1), torch.zeros(3), rtol=0, atol=1e-3)
    assert (target.mean(1) > 0.5).all()  # 40 of 255 brighter, a deviation of 58
    stated = domains(tmp_path / "stated", normalisation={"mean": [1, 2, 3], "std": [4, 5, 6]})
    assert stated.target.normalisation == stated.source.normalisation
    assert stated.target.normalisation.mean == (1, 2, 3)


def test_what_they_say_of_themselves_feeds_new_files(tmp_path) -> None:
    said = domains(tmp_path, tile=16).describe()
    assert (said["kind"], said["pairs"], said["source"]["splits"]["train"]["images"]) == ("FolderDomains", True, 4)
    assert said["splits"]["train"]["scenes"] == ["s0", "s1", "s2"]
    assert Feed.of(said).window == 16


def test_refusals(tmp_path) -> None:
    with pytest.raises(RequestError, match=r"target_bands \[1, 2, 3\]: the source has 2; give as many"):
        domains(tmp_path / "bands", bands=[1, 2], target_bands=[1, 2, 3])
    everything: dict[str, Any] = {"target_validation": ["s0", "s1"], "target_test": ["s2", "s3", "s4"]}
    with pytest.raises(RequestError, match="no scene is left to train on"):
        domains(tmp_path / "all", **everything)
    with pytest.raises(RequestError, match="names 's9', which is no scene"):
        domains(tmp_path / "scene", target_test=["s9"])
    with pytest.raises(RequestError, match=r"biomes \['Sea'\]"):
        GeneratedDomains(biomes=["Sea"])
    with pytest.raises(RequestError, match="sensor -1"):
        GeneratedDomains(sensor=-1)


# -- generated ---------------------------------------------------------------------------------------------------------


def test_generated_domains_differ_in_ground_and_sensor() -> None:
    data = GeneratedDomains(count=4, target_count=4, size=32, bands=("red", "nir", "tir1"), seed=3)
    said = data.describe()
    scenes = [{s for part in d["splits"].values() for s in part["scenes"]} for d in (said["source"], said)]
    assert scenes[0] == {"00000_Forest", "00001_GrassCrops", "00002_Shrubland", "00003_Urban"}
    assert scenes[1] == {"00004_Barren", "00005_SnowIce", "00006_Water", "00007_Wetlands"}
    again = GeneratedDomains(count=4, target_count=4, size=32, bands=("red", "nir", "tir1"), seed=3)
    assert same(samples(data), samples(again))


def test_another_sensor_is_one_gain_and_offset_a_band_in_all_scenes() -> None:
    source, window = GeneratedSource(3, 32, ("red", "nir", "tir1"), 1), Window(0, 0, 32, 32)
    other = Resensed(source, 0.2, 1, (0.1, 0.1, 10.0))
    seen = []
    for index in range(3):
        plain, valid, mask = source.read(index, window)
        image, valid_too, mask_too = other.read(index, window)
        assert (valid == valid_too).all()
        assert (mask == mask_too).all()
        assert (image[:, ~valid] == 0).all()
        lines = [
            np.polyfit(a[valid].astype(float), b[valid].astype(float), 1) for a, b in zip(plain, image, strict=True)
        ]
        seen.append(np.array(lines))
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(seen[0], seen[2], rtol=1e-3, atol=1e-3)
    assert np.abs(seen[0][:2, 0] - 1).min() > 0.01
    assert seen[0][2, 0] == pytest.approx(1, abs=1e-4)  # kelvin: no gain
    same_sensor = Resensed(source, 0.0, 1, (0.1, 0.1, 10.0))
    np.testing.assert_array_equal(same_sensor.read(0, window)[0], source.read(0, window)[0])
