"""Files cut short anywhere: refused, or read as the whole file is, never with less than it holds."""

from __future__ import annotations

import numpy as np
import pytest
from rasterio import Affine

from shared.errors import RequestError
from shared.rasters import read_header, read_image

LAYOUTS = {
    "plain": {},
    "deflate": {"compress": "deflate", "predictor": 2},
    "tiled": {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "lzw"},
    "names and nodata behind the pixels": {"nodata": 0},
    "png": {},
    "npy": {},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(6, 7), (40, 44)], ids=str)
def test_no_cut_goes_unseen(tmp_path, save, layout, size):
    suffix = layout if layout in ("png", "npy") else "tif"
    pixels = np.random.default_rng(1).integers(1, 255, (3, *size), dtype=np.uint8)
    place = {"crs": "EPSG:32633", "transform": Affine(30, 0, 5e5, 0, -30, 5e6)} if suffix == "tif" else {}
    path = save(tmp_path / f"whole.{suffix}", pixels, **LAYOUTS[layout], **place)
    if layout.startswith("names"):
        import rasterio

        with rasterio.open(path, "r+") as dataset:
            dataset.descriptions = ("red", "green", "blue")
    data, whole = path.read_bytes(), read_image(path)
    names = read_header(path).band_names
    cut, refused = tmp_path / f"cut.{suffix}", 0
    lengths = {*range(1, len(data), len(data) // 80 + 1), *range(max(1, len(data) - 400), len(data), 7)}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        try:
            found = read_image(cut)
        except RequestError:
            refused += 1
            continue
        np.testing.assert_array_equal(found.image, whole.image)
        np.testing.assert_array_equal(found.valid, whole.valid)
        assert found.georeference == whole.georeference
        assert read_header(cut).band_names == names
    assert refused > 0.9 * len(lengths)
