"""Band files: scenes whose bands are files of their own, found by pattern, read as one raster, mapped by the folder."""

from pathlib import Path

import numpy as np
import pytest

from modalities.remote_sensing.data import FolderScenes
from shared.errors import RequestError
from shared.mapping import Feed, map_files
from shared.rasters import Georeference, Window, gather, open_stack, read_stack_header, write_raster

PATTERNS = {"red": "red_*", "nir": "nir_*"}


@pytest.fixture
def folder(tmp_path, save) -> Path:
    """Three scenes of 16 x 24 pixels: red is 10, 20, 30, near infrared ten times that plus the column; cloud on top."""
    for scene in (1, 2, 3):
        red = np.full((1, 16, 24), 10 * scene, np.uint16)
        save(tmp_path / "train_red" / f"red_s{scene}_x.tif", red)
        save(tmp_path / "train_nir" / f"nir_s{scene}_x.tif", 10 * red + np.arange(24, dtype=np.uint16))
        mask = np.zeros((1, 16, 24), np.uint8)
        mask[:, :8] = 250
        save(tmp_path / "train_gt" / f"gt_s{scene}_x.png", mask)
    return tmp_path


def scenes(folder: Path, **more) -> FolderScenes:
    settings = {
        "images": folder, "masks": folder, "classes": ("clear", "cloud"), "label_values": ["0-127", "128-255"],
        "band_files": PATTERNS, "mask_files": "gt_*", "validation": ["s2_x"], "test": ["s3_x"], "batch_size": 1,
        "augment": False, "normalisation": {"mean": [0, 0], "std": [1, 1]},
    }  # fmt: skip
    return FolderScenes(**settings | more)


def test_files_are_found_by_the_end_of_their_path(folder, save):
    found = gather(folder, PATTERNS)
    assert list(found) == ["s1_x", "s2_x", "s3_x"]
    assert [path.name for path in found["s2_x"]] == ["red_s2_x.tif", "nir_s2_x.tif"]
    for band in ("B04", "B08"):
        save(folder / "S2" / band / "t1.tif", np.ones((1, 4, 4), np.uint8))
    assert list(gather(folder, {"red": "B04/*", "nir": "B08/*"})) == ["t1"]


def test_what_is_missing_or_double_is_named(folder, save):
    with pytest.raises(RequestError, match=r"band_files: red: 'red' needs one \* for the name of a scene"):
        gather(folder, {"red": "red"})
    with pytest.raises(RequestError, match=r"no raster below it is named swir_\* \(swir\)"):
        gather(folder, PATTERNS | {"swir": "swir_*"})
    with pytest.raises(RequestError, match="gone: no such folder"):
        gather(folder / "gone", PATTERNS)
    (folder / "train_nir" / "nir_s2_x.tif").unlink()
    with pytest.raises(RequestError, match=r"red_s2_x.tif has no nir: a file nir_s2_x.\* is missing"):
        gather(folder, PATTERNS)
    save(folder / "more" / "red_s1_x.tif", np.ones((1, 4, 4), np.uint8))
    with pytest.raises(RequestError, match=r"more/red_s1_x.tif and .*train_red/red_s1_x.tif are both red of s1_x"):
        gather(folder, PATTERNS)


def test_a_sample_has_the_bands_in_the_order_wanted(folder):
    data = scenes(folder, bands=["nir", "red"], normalisation={"mean": [0, 0], "std": [1, 1]})
    (batch,) = data.train()
    image, mask = batch["image"][0].numpy(), batch["mask"][0].numpy()
    assert data.band_names == ("nir", "red")
    assert (image[1] == 10).all()
    assert (image[0] == 100 + np.arange(24)).all()
    assert (mask[:8] == 1).all()
    assert (mask[8:] == 0).all()
    assert data.describe()["reading"] == {"bands": [2, 1], "layout": None, "fill": None, "band_files": PATTERNS}
    assert data.describe()["file_bands"] == ["red", "nir"]


def test_windows_validity_and_fill_are_of_all_bands(folder, save):
    red, nir = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8), np.full((1, 8, 8), 7, np.uint8)
    red[0, 0, 0] = nir[0, 0, 0] = 0
    red[0, 0, 1] = 0
    files = [save(folder / "r.tif", red), save(folder / "n.tif", nir, nodata=9)]
    nir[0, 5, 5] = 9
    save(folder / "n.tif", nir, nodata=9)
    with open_stack(files, fill=0) as stack:
        image, valid, _ = stack.read(Window(0, 0, 6, 6))
        assert image.shape == (2, 6, 6)
        assert np.argwhere(~valid).tolist() == [[0, 0], [5, 5]]
        assert (image[:, ~valid] == 0).all()
        assert image[:, 1, 2].tolist() == [11, 7]
    with open_stack(files, bands=[2]) as stack:
        assert stack.read().image[0, 0, 1] == 7
    grey = [save(folder / "g.png", np.repeat(red, 3, 0)), files[1]]
    with open_stack(grey) as stack:
        assert stack.read().image[0, 3, 3] == red[0, 3, 3]
    save(folder / "g.png", np.concatenate([red, red, nir]))
    with open_stack(grey) as stack, pytest.raises(RequestError, match=r"g.png: 3 bands that differ; a band file holds"):
        stack.read()


def test_bands_of_other_grids_are_refused(folder, save):
    from rasterio import Affine
    from rasterio.crs import CRS

    red, coarse = folder / "train_red" / "red_s1_x.tif", save(folder / "c.tif", np.ones((1, 8, 12), np.uint8))
    with pytest.raises(RequestError, match=r"c.tif: 8 x 12 pixels, .*red_s1_x.tif 16 x 24; resample the bands"):
        read_stack_header([red, coarse])
    for name, left in (("a", 500000), ("b", 500090), ("d", 500000)):
        place = Georeference(CRS.from_epsg(32632), Affine(30, 0, left, 0, -30, 5000000))
        write_raster(folder / f"{name}.tif", np.ones((1, 4, 4), np.uint8), georeference=place)
    assert read_stack_header([folder / "a.tif", folder / "d.tif"], ["x", "y"]).band_names == ("x", "y")
    with pytest.raises(RequestError, match=r"b.tif: lies elsewhere than .*a.tif; bring the bands of a scene to one"):
        read_stack_header([folder / "a.tif", folder / "b.tif"])


def test_settings_that_do_not_go_together(folder):
    with pytest.raises(RequestError, match="band_names and band_files: give one"):
        scenes(folder, band_names=["red", "nir"])
    with pytest.raises(RequestError, match=r"no band 'blue'; it has 1 red, 2 nir"):
        scenes(folder, bands=["blue"])
    (folder / "train_gt" / "gt_s3_x.png").unlink()
    with pytest.raises(RequestError, match=r"image .*red_s3_x.tif has no mask: .*s3_x.\* is missing"):
        scenes(folder)


def test_the_folder_is_mapped_scene_by_scene(folder, tmp_path, capsys):
    """A model of near infrared and red, in that order: class 1 where near infrared exceeds 210."""
    import torch

    feed = Feed.of(scenes(folder, bands=["nir", "red"], tile=16).describe())
    assert feed.band_files == (("red", "red_*"), ("nir", "nir_*"))

    def scores(image):
        above = (image[:, 0] > 210).float()
        return torch.stack([1 - above, above], 1)

    done = map_files(scores, feed, [folder], folder / "maps")
    assert [mapped.target.name for mapped in done] == ["s1_x.tif", "s2_x.tif", "s3_x.tif"]
    assert [mapped.pixels for mapped in done] == [
        {"clear": 384, "cloud": 0}, {"clear": 11 * 16, "cloud": 13 * 16}, {"clear": 0, "cloud": 384},
    ]  # fmt: skip
    capsys.readouterr()
    map_files(scores, feed, [folder], folder / "maps")
    assert capsys.readouterr().out.count("done before") == 3
    one = folder / "train_red" / "red_s1_x.tif"
    with pytest.raises(RequestError, match=r"red_s1_x.tif: the model reads every band from a file of its own: red_\* "):
        map_files(scores, feed, [one], tmp_path / "more")
    with pytest.raises(RequestError, match="scenes of band files are written to a folder"):
        map_files(scores, feed, [folder], tmp_path / "one.tif")
    with pytest.raises(RequestError, match=r"1 red_\*|no raster below it is named red_\*"):
        map_files(scores, feed, [folder / "train_nir"], tmp_path / "more")


def test_a_stack_for_a_model_of_one_file_is_refused(folder):
    from shared.mapping import map_raster

    described = scenes(folder).describe()
    del described["reading"]["band_files"]
    with pytest.raises(RequestError, match="reads all bands from one file, not from 2"):
        map_raster(lambda image: image, list(gather(folder, PATTERNS)["s1_x"]), folder / "m.tif", Feed.of(described))
