"""Reading rasters: the same numbers from every format, what is valid, where it lies, and damaged files refused."""

import numpy as np
import pytest
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp

from shared.errors import RequestError, WorkError
from shared.rasters import Georeference, Window, read_header, read_image, read_mask, write_raster

HERE = Georeference(CRS.from_epsg(32633), Affine(30, 0, 500000, 0, -30, 5000000))


def noise(bands: int, dtype: str, height: int = 40, width: int = 56) -> np.ndarray:
    random = np.random.default_rng(0)
    if np.issubdtype(dtype, np.floating):
        return random.normal(100, 300, (bands, height, width)).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return random.integers(low, high, (bands, height, width), dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    ("suffix", "bands", "dtype"),
    [
        (".tif", 1, "uint8"), (".tif", 3, "uint16"), (".tif", 5, "int16"), (".tif", 8, "float32"),
        (".tif", 2, "float64"),
        (".png", 1, "uint8"), (".png", 3, "uint8"), (".png", 1, "uint16"), (".png", 3, "uint16"),
        (".npy", 7, "float32"), (".npy", 4, "uint8"), (".npy", 1, "int32"),
    ],
)  # fmt: skip
def test_the_values_come_back_as_float32(tmp_path, save, suffix, bands, dtype):
    array = noise(bands, dtype)
    image, valid, place = read_image(save(tmp_path / f"image{suffix}", array))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, array.astype(np.float32))
    assert valid.all()
    assert place is None


def test_a_jpeg_comes_back_nearly(tmp_path, save):
    rows, columns = np.mgrid[:64, :64]
    array = np.stack([rows * 3, columns * 3, rows + columns]).astype(np.uint8)
    image, valid, _ = read_image(save(tmp_path / "image.jpg", array, quality=95))
    assert np.abs(image - array).mean() < 2
    assert valid.all()


def test_npy_layouts_agree(tmp_path):
    array = noise(3, "float32")
    np.save(tmp_path / "chw.npy", array)
    np.save(tmp_path / "hwc.npy", array.transpose(1, 2, 0))
    np.save(tmp_path / "hw.npy", array[0])
    np.testing.assert_array_equal(read_image(tmp_path / "chw.npy").image, array)
    np.testing.assert_array_equal(read_image(tmp_path / "hwc.npy").image, array)
    np.testing.assert_array_equal(read_image(tmp_path / "hwc.npy", layout="HWC").image, array)
    np.testing.assert_array_equal(read_image(tmp_path / "hw.npy").image, array[:1])
    assert read_header(tmp_path / "chw.npy", layout="HWC").bands == 56


@pytest.mark.parametrize("suffix", [".tif", ".png", ".npy"])
def test_a_window_is_a_part_of_the_whole_with_chosen_bands(tmp_path, save, suffix):
    array = noise(3, "uint8")
    path = save(tmp_path / f"image{suffix}", array)
    image = read_image(path, bands=[3, 1], window=Window(5, 7, 11, 13)).image
    np.testing.assert_array_equal(image, array[[2, 0], 5:16, 7:20])


def test_georeference_and_names_survive_writing_and_move_with_a_window(tmp_path):
    array = noise(2, "float32")
    write_raster(tmp_path / "a.tif", array, georeference=HERE, band_names=["nir", "red"])
    header, raster = read_header(tmp_path / "a.tif"), read_image(tmp_path / "a.tif", window=Window(2, 3, 4, 5))
    assert header.band_names == ("nir", "red")
    assert header.georeference == HERE
    assert raster.georeference is not None
    assert raster.georeference.crs == HERE.crs
    assert raster.georeference.at(0, 0) == (500000 + 3 * 30, 5000000 - 2 * 30)
    assert raster.georeference.at(0, 0) == HERE.at(3, 2)


def test_pixels_without_data_are_invalid_and_zero(tmp_path, save):
    array = noise(2, "float32")
    array[0, 0, 0], array[1, 3, 4], array[0, 5, 6], array[:, 8, 9] = -9999, np.nan, np.inf, 7
    image, valid, _ = read_image(save(tmp_path / "a.tif", array, nodata=-9999), fill=7)
    assert sorted(zip(*np.nonzero(~valid), strict=True)) == [(0, 0), (3, 4), (5, 6), (8, 9)]
    assert (image[:, ~valid] == 0).all()
    np.testing.assert_array_equal(image[:, valid], array[:, valid])
    # One band of two at the fill value is a value.
    array[0, 8, 9] = 8
    assert read_image(save(tmp_path / "b.tif", array), fill=7).valid[8, 9]


def test_nodata_of_a_band_left_out_does_not_count(tmp_path, save):
    array = noise(2, "int16")
    array[1, 0, :] = -32000
    path = save(tmp_path / "a.tif", array, nodata=-32000)
    assert not read_image(path).valid[0].any()
    assert read_image(path, bands=[1]).valid.sum() == (array[0] != -32000).sum()


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_alpha_is_validity_unless_asked_for_as_a_band(tmp_path, save, suffix):
    array = noise(4, "uint8")
    array[3] = 255
    array[3, :, :10] = 0
    colour = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    path = save(tmp_path / f"a{suffix}", array, colorinterp=colour if suffix == ".tif" else None)
    image, valid, _ = read_image(path)
    assert image.shape == (3, 40, 56)
    assert not valid[:, :10].any()
    assert valid[:, 10:].all()
    image, valid, _ = read_image(path, bands=[1, 2, 3, 4])
    np.testing.assert_array_equal(image, array)
    assert valid.all()


def test_masks_are_whole_numbers_with_undeclared_pixels_marked(tmp_path, save):
    array = np.array([[[0, 3, 255], [7, 255, 1]]], np.uint8)
    labels, valid = read_mask(save(tmp_path / "m.tif", array, nodata=255))
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(valid, array[0] != 255)
    np.testing.assert_array_equal(labels[valid], [0, 3, 7, 1])
    assert read_mask(
        save(tmp_path / "m.npy", array[0].astype(np.int32)), window=Window(1, 0, 1, 2)
    ).labels.tolist() == [[7, 255]]


@pytest.mark.parametrize("profile", [
    (".png", 3, {}), (".png", 1, {}), (".jpg", 3, {}), (".jpg", 3, {"progressive": True}), (".npy", 3, {}),
    (".tif", 3, {}), (".tif", 3, {"compress": "deflate"}),
    (".tif", 3, {"tiled": True, "blockxsize": 16, "blockysize": 16}),
])  # fmt: skip
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, save, profile):
    suffix, bands, options = profile
    whole = save(tmp_path / f"whole{suffix}", noise(bands, "uint8", 64, 64), **options).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    # The last 12 bytes of a PNG only say that it ends.
    for length in [1, 9, len(whole) // 50, len(whole) // 3, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 13]:
        cut.write_bytes(whole[:length])
        with pytest.raises(RequestError, match=r"cut.*damaged") as error:
            read_image(cut)
        assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def test_bad_files_are_refused_with_their_name(tmp_path, save):
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.tif").write_text("not a raster")
    (tmp_path / "image.gif").write_bytes(b"GIF89a")
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.save(tmp_path / "cube.npy", np.zeros((16, 20, 24)))
    np.save(tmp_path / "vector.npy", np.zeros(16))
    save(tmp_path / "named.png", noise(3, "uint8")).rename(tmp_path / "named.tif")
    save(tmp_path / "nan.tif", np.full((2, 8, 8), np.nan, np.float32))
    save(tmp_path / "nan.npy", np.full((2, 8, 8), np.nan, np.float32))
    three = save(tmp_path / "three.tif", noise(3, "uint8"))
    refused = {
        "absent.tif": "no such file", "empty.tif": "0 bytes", "text.tif": "damaged, or not GTiff",
        "image.gif": "use .tif",
        "evil.npy": "plain .npy", "cube.npy": "state layout", "vector.npy": r"holds float64 \(16,\)",
        "named.tif": "damaged, or not GTiff", "nan.tif": "no valid pixel", "nan.npy": "no valid pixel",
    }  # fmt: skip
    for name, reason in refused.items():
        with pytest.raises(RequestError, match=f"{name}.*{reason}"):
            read_image(tmp_path / name)
    with pytest.raises(RequestError, match=r"three.tif: no band 4; it has bands 1 to 3"):
        read_image(three, bands=[1, 4])
    with pytest.raises(RequestError, match=r"three.tif.*outside its 40 x 56"):
        read_image(three, window=Window(30, 0, 11, 5))
    with pytest.raises(RequestError, match=r"three.tif: a mask has one band.*has 3"):
        read_mask(three)
    with pytest.raises(RequestError, match=r"half.tif: a mask holds whole.*holds 0.5"):
        read_mask(save(tmp_path / "half.tif", np.full((1, 4, 4), 0.5, np.float32)))
    with pytest.raises(RequestError, match=r"radar.tif: holds complex"):
        read_image(save(tmp_path / "radar.tif", np.ones((1, 4, 4), np.complex64)))
    with pytest.raises(RequestError, match="use 'HWC' or 'CHW'"):
        read_image(tmp_path / "cube.npy", layout="WHC")


def test_palette_indices_are_labels_and_no_image(tmp_path, save):
    from rasterio.enums import ColorInterp

    array = np.array([[[0, 1], [2, 1]]], np.uint8)
    path = save(tmp_path / "p.tif", array, colorinterp=[ColorInterp.palette])
    assert read_mask(path).labels.tolist() == array[0].tolist()
    with pytest.raises(RequestError, match=r"p.tif.*convert it to RGB"):
        read_image(path)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path, array = tmp_path / "a.tif", noise(2, "float32")
    with pytest.raises(WorkError, match=r"absent/a.tif: cannot be written"):
        write_raster(tmp_path / "absent" / "a.tif", array)
    write_raster(path, array)
    with pytest.raises(ValueError, match="description"):  # raised after the pixels are written
        write_raster(path, array * 2, band_names=["red"])
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(read_image(path).image, array)


def test_four_bytes_per_pixel_are_four_bands(tmp_path):
    array = noise(4, "uint8")
    write_raster(tmp_path / "rgbn.tif", array)
    np.testing.assert_array_equal(read_image(tmp_path / "rgbn.tif").image, array)


def test_real_geotiffs(real):
    folder = real("geotiff")
    rgb = read_image(folder / "RGB.byte.tif")
    assert rgb.image.shape == (3, 718, 791)
    assert rgb.valid.mean() == pytest.approx(0.6733, abs=1e-4)
    np.testing.assert_allclose(rgb.image[:, rgb.valid].mean(1), [44.474, 66.107, 71.456], atol=1e-3)
    assert rgb.georeference is not None
    assert rgb.georeference.crs.to_epsg() == 32618
    rgba = read_image(folder / "RGBA.uint16.tif")
    assert rgba.image.shape == (3, 411, 634)
    assert rgba.valid.mean() == pytest.approx(0.4886, abs=1e-4)
    hls = read_image(folder / "hls_agb_input.tif")
    assert hls.image.shape == (10, 224, 224)
    assert hls.image[0].mean() == pytest.approx(458.3565, abs=1e-2)
    assert read_image(folder / "float_raster_with_nodata.tif").valid.mean() == pytest.approx(98 / 156)
