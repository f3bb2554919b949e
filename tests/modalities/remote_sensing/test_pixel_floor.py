"""The floor: what single pixels tell is found, what only their place tells is not, and the real set has its figure."""

from __future__ import annotations

import numpy as np
import pytest

from modalities.remote_sensing.data import LandsatBiome
from modalities.remote_sensing.pixel_floor import confusion, main
from modalities.remote_sensing.segmentation import measure

VALUES = np.array([128, 64, 192, 255], np.uint8)


@pytest.fixture
def made(tmp_path):
    """made(spectral): three scenes of 16 x 16 pixels whose class is in the first band, or in the row alone."""
    import warnings

    import rasterio

    def made(spectral: bool):
        random = np.random.default_rng(0)
        for part in ("images", "masks"):
            (tmp_path / part).mkdir()
        for scene in range(3):
            classes = np.repeat(random.permutation(4), 4)[:, None].repeat(16, 1)
            image = random.uniform(0.1, 0.2, (8, 16, 16)).astype(np.float32)
            image[0] += spectral * classes
            for part, array in (("images", image), ("masks", VALUES[classes][None])):
                size = {"driver": "GTiff", "count": len(array), "height": 16, "width": 16, "dtype": array.dtype}
                path = tmp_path / part / f"S_{scene}_0.tif"
                with warnings.catch_warnings(action="ignore"), rasterio.open(path, "w", **size) as file:
                    file.write(array)
        return tmp_path

    return made


@pytest.mark.parametrize(("spectral", "low", "high"), [(True, 0.99, 1.0), (False, 0.05, 0.35)])
def test_it_finds_what_a_pixel_tells_and_no_more(made, spectral, low, high):
    root = made(spectral)
    folds = [LandsatBiome(root=root, fold=k, folds=3, augment=False) for k in range(3)]
    counts = confusion(folds, 200, 0)
    assert counts.sum() == 3 * 256
    assert low <= measure(counts, folds[0].classes)["oa"] <= high


def test_the_command_prints_a_table_and_refuses_what_it_cannot_do(made, capsys, tmp_path):
    assert main([str(made(True)), "--folds", "3", "--pixels", "100", "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "miou", "oa", "iou/clear", "iou/cloud shadow", "iou/thin cloud", "iou/cloud",
    ]  # fmt: skip
    assert float(lines[0].split()[1]) > 0.99
    assert main([str(tmp_path / "gone")]) == 2
    assert main([str(tmp_path), "--pixels", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_on_the_real_scenes_in_four_folds(materials):
    root = materials / "data" / "cloud_landsat8_biome"
    folds = [LandsatBiome(root=root, fold=k, folds=4, augment=False) for k in range(4)]
    assert measure(confusion(folds, 500, 0), folds[0].classes)["miou"] == pytest.approx(0.375, abs=0.015)
