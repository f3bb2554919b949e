"""Landsat-8 Biome: the layout, the folds and, where the tiles are present, their true numbers."""

import numpy as np
import pytest

from modalities.remote_sensing.data import LandsatBiome
from modalities.remote_sensing.data.biome import BANDS, CLASSES
from shared.errors import RequestError
from shared.rasters import read_image, read_mask


@pytest.fixture
def made(tmp_path, save):
    """Six tiles of five scenes in the layout of the set; scenes 0 to 2 have shadow, one pixel of each mask is fill."""
    random = np.random.default_rng(0)
    for scene, tile in ((0, "0101"), (0, "0102"), (1, "0101"), (2, "0101"), (3, "0101"), (4, "0101")):
        image = random.uniform(0.1, 1, (8, 16, 16)).astype(np.float32)
        image[7] += 280
        mask = np.full((1, 16, 16), 128, np.uint8)
        mask[0, 4:8], mask[0, 8:] = 192, 255
        mask[0, 0, : 8 * (scene < 3)] = 64
        mask[0, 15, 15] = 0
        image[:, 15, 15] = 0
        save(tmp_path / "images" / f"Forest_{scene:02d}_{tile}.tif", image)
        save(tmp_path / "masks" / f"Forest_{scene:02d}_{tile}.tif", mask)
    return tmp_path


def test_values_become_classes_and_fill_is_ignored(made):
    data = LandsatBiome(root=made, folds=3)
    batch = next(iter(data.test()))
    mask, image = batch["mask"][0], batch["image"][0]
    assert mask[15, 15] == 255
    assert (image[:, 15, 15] == 0).all()
    assert mask[:15, 0].tolist() == [1, 0, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    assert data.classes == ("clear", "cloud shadow", "thin cloud", "cloud")
    assert (data.bands, data.band_names) == (8, BANDS)


def test_folds_test_each_scene_once_and_share_out_the_shadows(made):
    parts = [LandsatBiome(root=made, fold=fold, folds=3).describe()["splits"] for fold in range(3)]
    assert sorted(scene for part in parts for scene in part["test"]["scenes"]) == [f"Forest_0{i}" for i in range(5)]
    for fold, part in enumerate(parts):
        assert part["validation"]["scenes"] == parts[(fold + 1) % 3]["test"]["scenes"]
        assert all(part[name]["pixels"]["cloud shadow"] > 0 for name in part)
    with pytest.raises(RequestError, match="fold 3: use 0 to 2"):
        LandsatBiome(root=made, fold=3, folds=3)


def test_scenes_and_bands_can_be_chosen(made):
    data = LandsatBiome(root=made, bands=("red", "green", "blue"), validation=["Forest_03"], test=["Forest_00"])
    assert data.describe()["reading"]["bands"] == [3, 2, 1]
    assert next(iter(data.test()))["name"] == ["Forest_00_0101", "Forest_00_0102"]
    with pytest.raises(RequestError, match="give both, or neither"):
        LandsatBiome(root=made, test=["Forest_00"])
    with pytest.raises(RequestError, match="images: no such folder"):
        LandsatBiome(root=made / "absent")


def test_the_real_tiles(real):
    root = real("cloud_landsat8_biome")
    data = LandsatBiome(root=root)
    splits = data.describe()["splits"]
    assert [splits[part]["images"] for part in splits] == [6, 2, 3]
    total = [sum(splits[part]["pixels"][name] for part in splits) for name in (*CLASSES, "ignored")]
    assert total == [338680, 24477, 138085, 219654, 0]
    image = np.concatenate([read_image(path).image.reshape(8, -1) for path in sorted((root / "images").iterdir())], 1)
    expected = [0.3006, 0.2761, 0.2794, 0.3757, 0.2461, 0.1798, 0.01868, 278.59]
    np.testing.assert_allclose(image.mean(1), expected, rtol=5e-4)
    assert data.display(next(iter(data.test()))["image"][0]).std() > 10


def test_every_real_fold_has_every_class_in_training_and_in_test(real):
    root = real("cloud_landsat8_biome")
    tested = []
    for fold in range(5):
        splits = LandsatBiome(root=root, fold=fold).describe()["splits"]
        tested += splits["test"]["scenes"]
        for part in ("train", "test"):
            assert all(splits[part]["pixels"][name] > 0 for name in CLASSES), (fold, part)
    assert len(tested) == len(set(tested)) == 11


def test_the_first_real_band_is_blue_and_the_third_red(real):
    """Dark ground through clear air: Rayleigh scattering lifts blue most; soil and vegetation tie red to SWIR 2."""
    for path in sorted((real("cloud_landsat8_biome") / "images").iterdir()):
        clear = read_mask(path.parent.parent / "masks" / path.name).labels == 128
        if clear.sum() > 3000:
            pixels = read_image(path).image[:, clear]
            blue, green, red = np.percentile(pixels[:3], 1, axis=1)
            assert blue > green > red
