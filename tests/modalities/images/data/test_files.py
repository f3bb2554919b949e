"""Reading an image file: every format and mode that is taken gives the stored values; all else is one clear line."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from modalities.images.data import read_image
from shared.errors import RequestError

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
def test_lossless_formats_give_the_stored_values(tmp_path, suffix):
    PICTURE.save(tmp_path / f"a.{suffix}")
    found = read_image(tmp_path / f"a.{suffix}")
    assert found.dtype == np.uint8
    assert (found == PIXELS.transpose(2, 0, 1)).all()


@pytest.mark.parametrize(("suffix", "settings"), [("jpg", {"quality": 95}), ("webp", {"lossless": True})])
def test_the_other_formats_come_near(tmp_path, suffix, settings):
    smooth = np.stack([np.arange(12) * 20 + row for row in range(9)])[..., None].repeat(3, 2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", **settings)
    assert abs(read_image(tmp_path / f"a.{suffix}").astype(int) - smooth.transpose(2, 0, 1)).max() <= 4


def test_palettes_are_looked_up_and_an_opaque_alpha_is_dropped(tmp_path):
    PICTURE.convert("P").save(tmp_path / "palette.png")
    assert (read_image(tmp_path / "palette.png").transpose(1, 2, 0) == PICTURE.convert("P").convert("RGB")).all()
    opaque = PICTURE.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "opaque.png")
    assert (read_image(tmp_path / "opaque.png") == PIXELS.transpose(2, 0, 1)).all()
    PICTURE.convert("L").save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png", bands=1)[0] == np.asarray(PICTURE.convert("L"))).all()


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    PICTURE.save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png").transpose(1, 2, 0) == np.rot90(PIXELS, -1)).all()


def test_an_open_file_is_read_and_errors_name_it():
    buffer = io.BytesIO()
    PICTURE.save(buffer, "png")
    assert read_image(io.BytesIO(buffer.getvalue())).shape == (3, 9, 12)
    with pytest.raises(RequestError, match=r"^a\.tar: b\.png: not a readable"):
        read_image(io.BytesIO(buffer.getvalue()[:50]), "a.tar: b.png")


def encoded(picture: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "the file is empty"),
        ("a.png", b"no picture", "not a readable"),
        ("a.png", encoded(PICTURE, "png")[:-40], "not a readable"),
        ("a.jpg", encoded(PICTURE, "jpeg")[:-60], "not a readable"),
        ("a.tif", encoded(PICTURE, "tiff")[:200], "not a readable"),
        ("a.webp", encoded(PICTURE, "webp")[:-60], "not a readable"),
        ("a.png", encoded(PICTURE, "gif"), "not a readable"),
        ("a.png", encoded(PICTURE.convert("L"), "png"), r"channels 1 \(L\), wanted 3 of 8 bits \(RGB\)"),
        ("a.png", encoded(PICTURE.convert("RGBA").rotate(9), "png"), r"channels 4 \(RGBA\), wanted 3"),
        ("a.jpg", encoded(PICTURE.convert("CMYK"), "jpeg"), r"channels 4 \(CMYK\), wanted 3"),
        ("a.png", encoded(Image.fromarray(np.ones((4, 4), np.uint16)), "png"), r"channels 1 \(I;16\), wanted 3"),
        ("a.tif", encoded(PICTURE, "tiff", save_all=True, append_images=[PICTURE]), "holds 2 images"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_that_names_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message) as error:
        read_image(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_an_absent_file_and_a_colour_file_where_grey_is_wanted(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        read_image(tmp_path / "absent.png")
    PICTURE.save(tmp_path / "a.png")
    with pytest.raises(RequestError, match=r"channels 3 \(RGB\), wanted 1 of 8 bits \(grey\)"):
        read_image(tmp_path / "a.png", bands=1)
