"""Pairs: what is read, how both dates are normalised and turned, and what is refused before anything is trained."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rasterio import Affine
from rasterio.crs import CRS

from modalities.remote_sensing.data import FolderPairs, GeneratedPairs
from modalities.remote_sensing.data.generated_pairs import generate
from shared.errors import RequestError
from shared.rasters import read_image, write_raster


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five georeferenced pairs of 40 x 40 pixels."""
    GeneratedPairs(count=5, size=40, seed=3).write(tmp_path / "pairs")
    return tmp_path / "pairs"


def test_a_sample_holds_the_bands_before_and_then_those_after(folder) -> None:
    data = FolderPairs(folder=folder, validation=["00003"], test=["00004"], augment=False)
    assert (data.bands, data.band_names, data.classes) == (3, ("red", "green", "blue"), ("unchanged", "change"))
    sample, made = data.samples("test")[0], generate(3, 4, 40)
    assert (sample["image"].shape, sample["mask"].shape) == ((6, 40, 40), (40, 40))
    for date, half in ((made.before, sample["image"][:3]), (made.after, sample["image"][3:])):
        np.testing.assert_allclose(data.normalisation.undo(half.numpy()), date, atol=1e-3)
    np.testing.assert_array_equal(sample["mask"].numpy(), made.mask)
    shown = data.displays(sample["image"])
    assert set(shown) == {"before, true colour", "after, true colour"}
    assert (shown["before, true colour"] != shown["after, true colour"]).any()


def test_both_dates_are_normalised_by_the_pixels_of_both(folder) -> None:
    """Which date comes first makes no difference."""
    data = FolderPairs(folder=folder, test=["00004"], validation=["00003"])
    swapped = FolderPairs(folder=folder, before="B", after="A", test=["00004"], validation=["00003"])
    values = np.concatenate([d.reshape(3, -1) for i in range(3) for d in generate(3, i, 40)[:2]], 1)
    np.testing.assert_allclose(data.normalisation.mean, values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(data.normalisation.std, values.std(1), rtol=1e-5)
    np.testing.assert_allclose(swapped.normalisation.mean, data.normalisation.mean, rtol=1e-9)
    one, other = data.samples("test")[0]["image"], swapped.samples("test")[0]["image"]
    np.testing.assert_allclose(one.numpy(), other.roll(3, 0).numpy(), atol=1e-5)


def test_both_dates_and_the_mask_are_turned_together(folder) -> None:
    data = FolderPairs(folder=folder, test=0.2, validation=0.2)
    plain, turned = data.samples("train"), data.samples("train", augment=True)
    different = 0
    for position in range(12):
        one, other = plain[position % len(plain)], turned[position]
        stack = np.concatenate([one["image"].numpy(), one["mask"].numpy()[None]])
        found = np.concatenate([other["image"].numpy(), other["mask"].numpy()[None]])
        views = [np.rot90(stack, k, (1, 2)) for k in range(4)]
        views += [view[..., ::-1] for view in views]
        assert sum(np.array_equal(view, found) for view in views) == 1
        different += not np.array_equal(stack, found)
    assert different > 3


def test_public_layouts_have_a_folder_for_each_split(folder, tmp_path) -> None:
    root = tmp_path / "levir"
    for split, names in (("train", ["00000", "00001"]), ("val", ["00002"]), ("test", ["00003"])):
        for part in ("A", "B", "label"):
            (root / split / part).mkdir(parents=True)
            for name in names:
                shutil.copy(folder / part / f"{name}.tif", root / split / part / f"{name}.tif")
    data = FolderPairs(folder=root, group="^[^/]+", validation=["val"], test=["test"])
    found = {part: facts["images"] for part, facts in data.describe()["splits"].items()}
    assert found == {"train": 2, "validation": 1, "test": 1}
    assert data.samples("train")[0]["name"] == "train/00000"


def test_generated_pairs_repeat_and_neither_date_alone_tells() -> None:
    assert all(np.array_equal(a, b) for a, b in zip(generate(1, 2, 48), generate(1, 2, 48), strict=True))
    pairs = [generate(7, i, 64) for i in range(30)]
    bright = [np.stack([d.mean(0) > 140 for d in pair[:2]]) for pair in pairs]
    changed = np.concatenate([pair.mask.ravel() == 1 for pair in pairs])
    both = np.concatenate([b.reshape(2, -1) for b in bright], 1)
    assert (both[0] != both[1])[changed].mean() > 0.9
    assert (both[0] != both[1])[~changed].mean() < 0.02
    static = both[0] & both[1]
    assert static.mean() > 0.02  # what stands at both dates
    assert min((both[0] & changed).sum(), (both[1] & changed).sum()) > 0.2 * changed.sum()  # lost, and built


def test_public_pairs_are_read_as_they_are(materials) -> None:
    for name, count in (("levir_cd", 6), ("dsifn_cd", 7)):
        root = materials / "data" / "change_detection" / name
        data = FolderPairs(folder=root, validation=1 / count, test=1 / count, tile=128, overlap=0)
        facts = data.describe()["splits"]
        assert sum(part["images"] for part in facts.values()) == count
        total = {kind: sum(part["pixels"][kind] for part in facts.values()) for kind in ("unchanged", "change")}
        masks = [np.array(Image.open(path)) for path in sorted((root / "label").iterdir())]
        assert total == {"unchanged": sum((m == 0).sum() for m in masks), "change": sum((m > 0).sum() for m in masks)}


# -- refusals ----------------------------------------------------------------------------------------------------------


def rewritten(path: Path, image: np.ndarray | None = None, **place: Any) -> None:
    """The raster at ``path`` with other pixels or another place."""
    raster = read_image(path)
    assert raster.georeference is not None
    where = replace(raster.georeference, **place) if place else raster.georeference
    write_raster(path, raster.image if image is None else image, georeference=where)


def test_what_does_not_lie_on_one_grid_is_refused_in_one_line(folder) -> None:
    after = folder / "B" / "00001.tif"
    kept = after.read_bytes()
    moved = Affine(0.5, 0, 401200, 0, -0.5, 5200000)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"image": np.zeros((3, 40, 36), np.float32)}, r"B/00001.tif: 40 x 36 pixels, .*A/00001.tif 40 x 40; both"),
        ({"crs": CRS.from_epsg(32634)}, r"B/00001.tif: is in EPSG:32634, .*A/00001.tif in EPSG:32633; cut or reproj"),
        ({"transform": moved}, r"B/00001.tif: lies up to 200 map units away from .*A/00001.tif; cut or reproject"),
    )
    for change, message in cases:
        rewritten(after, **change)
        with pytest.raises(RequestError, match=message) as caught:
            FolderPairs(folder=folder)
        assert "\n" not in str(caught.value)
        after.write_bytes(kept)
    FolderPairs(folder=folder)


def test_files_without_partners_and_strange_masks_are_refused(folder) -> None:
    (folder / "B" / "00002.tif").rename(folder / "B" / "other.tif")
    with pytest.raises(RequestError, match=r"A/00002.tif has no partner: .*B/00002.\* is missing"):
        FolderPairs(folder=folder)
    (folder / "B" / "other.tif").rename(folder / "B" / "00002.tif")
    mask = np.zeros((1, 40, 40), np.uint8)
    mask[0, 3, 4] = 7
    rewritten(folder / "label" / "00002.tif", mask)
    with pytest.raises(RequestError, match=r"label/00002.tif: values \[7\] stand for no class"):
        FolderPairs(folder=folder).train()
    rewritten(folder / "label" / "00002.tif", mask[:, :20])
    with pytest.raises(RequestError, match=r"label/00002.tif: 20 x 40 pixels, its image 40 x 40"):
        FolderPairs(folder=folder)
    with pytest.raises(RequestError, match="holds no folder A, nor does a folder in it"):
        FolderPairs(folder=folder / "A")
    with pytest.raises(RequestError, match="nowhere: no such folder"):
        FolderPairs(folder=folder / "nowhere")
    rewritten(folder / "label" / "00002.tif", mask * 0)
    rewritten(folder / "B" / "00002.tif", np.ones((4, 40, 40), np.float32))
    with pytest.raises(RequestError, match=r"B/00002.tif: 4 bands, .*A/00000.tif has 3"):
        FolderPairs(folder=folder)


def test_a_pixel_invalid_at_either_date_counts_for_nothing(folder) -> None:
    for part, row in (("A", 5), ("B", 9)):
        path = folder / part / "00001.tif"
        image = read_image(path).image
        image[1, row, :] = np.nan
        rewritten(path, image)
    data = FolderPairs(folder=folder, validation=["00000"], test=["00001"])
    sample = data.samples("test")[0]
    ignored = (sample["mask"] == 255).numpy()
    assert ignored[[5, 9]].all()
    assert ignored.sum() == 80
    assert (sample["image"].numpy()[:, [5, 9]] == 0).all()
    rewritten(folder / "B" / "00001.tif", np.full((3, 40, 40), np.nan, np.float32))
    with pytest.raises(RequestError, match="00001: no valid pixel"):
        FolderPairs(folder=folder).train()


def test_folders_of_other_grids_train_where_asked(folder) -> None:
    for path in (folder / "B").iterdir():
        raster = read_image(path)
        assert raster.georeference is not None
        a, b, c, d, e, f = raster.georeference.transform[:6]
        finer = Affine(a / 2, b / 2, c, d / 2, e / 2, f)
        image = raster.image.repeat(2, 1).repeat(2, 2)
        write_raster(path, image, georeference=replace(raster.georeference, transform=finer))
    with pytest.raises(RequestError, match="80 x 80 pixels"):
        FolderPairs(folder=folder)
    data = FolderPairs(folder=folder, reproject=True, test=["00004"], augment=False)
    sample, made = data.samples("test")[0], generate(3, 4, 40)
    assert (sample["mask"] != 255).all()
    found = data.normalisation.undo(sample["image"][3:].numpy())
    assert np.abs(found - made.after).mean() < 3  # bilinear: what is brought from a finer grid is smoothed
