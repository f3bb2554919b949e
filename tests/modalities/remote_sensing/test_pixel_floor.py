"""The floor: what single pixels tell is found, what only their place tells is not, and the real set has its figure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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


def test_a_rare_class_is_answered_where_the_draw_is_balanced():
    """Of single pixels that differ by noise, one in eight is of the second class: odds never reach a half."""
    random = np.random.default_rng(0)

    class Data:
        classes, bands, ignore_index = ("ground", "road"), 1, 255

        def train(self):
            mask = torch.from_numpy(random.random((1, 64, 64)) < 0.125).long()
            noise = torch.from_numpy(random.normal(0, 2, (1, 1, 64, 64))).float()
            return [{"image": mask[:, None] + noise, "mask": mask, "name": ["a"]}]

        test = train

    plain, even = (measure(confusion([Data()], 4096, 0, balanced=b), Data.classes)["iou/road"] for b in (False, True))
    assert plain < 0.01
    assert even == pytest.approx(0.158, abs=0.03)


def test_two_dates_are_told_by_how_far_they_lie_apart():
    before = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(32) % 4 == 0).long().expand(1, 32, 32)
    sign = 1 - 2 * (torch.arange(32) % 8 == 0).float()  # as often brighter as darker, so no single date tells

    class Data:
        classes, bands, ignore_index = ("unchanged", "change"), 1, 255

        def train(self):
            return [{"image": torch.cat([before, before + sign * mask[:, None]], 1), "mask": mask, "name": ["a"]}]

        test = train

    assert measure(confusion([Data()], 1024, 0), Data.classes)["oa"] == 1


def test_the_command_prints_a_table_and_refuses_what_it_cannot_do(made, capsys, tmp_path):
    name = "remote_sensing/landsat_biome"
    assert main([name, f"data.root={made(True)}", "--folds", "3", "--pixels", "100", "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "miou", "oa", "iou/clear", "iou/cloud shadow", "iou/thin cloud", "iou/cloud",
        "all clear", "all cloud shadow", "all thin cloud", "all cloud",
    ]  # fmt: skip
    assert float(lines[0].split()[1]) > 0.99
    assert [float(line.split()[-1]) for line in lines[6:]] == [0.25] * 4
    assert main([name, f"data.root={tmp_path / 'gone'}"]) == 2
    assert main([name, "--pixels", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_on_the_real_scenes_in_four_folds(materials):
    root = materials / "data" / "cloud_landsat8_biome"
    folds = [LandsatBiome(root=root, fold=k, folds=4, augment=False) for k in range(4)]
    assert measure(confusion(folds, 500, 0), folds[0].classes)["miou"] == pytest.approx(0.375, abs=0.015)
