"""Camera RAW: Bayer orders, levels and bits, flat files and containers, and what is refused in one line."""

from __future__ import annotations

import contextlib
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from modalities.images.data.raw import PATTERNS, Sensor, demosaic, linear, mosaiced
from shared.errors import RequestError


def scene(rows: int = 12, columns: int = 16) -> np.ndarray:
    """A smooth picture, float32 (3, rows, columns) from 0 to 1, linear in place."""
    y, x = np.mgrid[:rows, :columns] / max(rows, columns)
    return np.stack([x, 0.2 + 0.5 * y, 0.9 - 0.4 * x - 0.3 * y]).astype(np.float32)


def stored(pattern: str, bits: int = 12, black: int = 64) -> np.ndarray:
    levels = black + mosaiced(scene(), pattern) * (2**bits - 1 - black)
    return levels.round().astype(np.uint8 if bits <= 8 else np.uint16)


def blocks(pattern: str, image: np.ndarray) -> np.ndarray:
    """A mosaic whose 2 x 2 blocks hold one red, two green (upper first) and one blue value of ``image`` (4, h, w)."""
    mosaic = np.empty((2 * image.shape[1], 2 * image.shape[2]), image.dtype)
    greens = iter((1, 2))
    for i, colour in enumerate(pattern):
        mosaic[i // 2 :: 2, i % 2 :: 2] = image[{"R": 0, "B": 3}.get(colour) if colour != "G" else next(greens)]
    return mosaic


# -- demosaicing -------------------------------------------------------------------------------------------------------


def test_the_same_values_in_any_order_give_the_same_image() -> None:
    values = np.random.default_rng(0).random((4, 5, 7), np.float32)
    images = [demosaic(blocks(pattern, values), pattern) for pattern in PATTERNS]
    assert all(np.array_equal(image, images[0]) for image in images)
    assert np.array_equal(images[0], np.stack([values[0], (values[1] + values[2]) / 2, values[3]]))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bilinear_keeps_what_was_measured_and_finds_a_plane(pattern) -> None:
    picture = scene()
    mosaic = mosaiced(picture, pattern)
    image = demosaic(mosaic, pattern, "bilinear")
    assert np.array_equal(mosaiced(image, pattern), mosaic)
    assert np.allclose(image[:, 1:-1, 1:-1], picture[:, 1:-1, 1:-1], atol=1e-6)
    flat = np.broadcast_to(np.array([0.1, 0.5, 0.9], np.float32)[:, None, None], (3, 6, 8))
    assert np.allclose(demosaic(mosaiced(flat, pattern), pattern, "bilinear"), flat, atol=1e-7)  # borders too


def test_a_shifted_scene_in_a_shifted_order_is_the_same_inside() -> None:
    mosaic = np.random.default_rng(0).random((12, 14)).astype(np.float32)
    whole = demosaic(mosaic, "RGGB", "bilinear")
    for (down, across), pattern in {(0, 1): "GRBG", (1, 0): "GBRG", (1, 1): "BGGR"}.items():
        part = mosaic[down : down + 10, across : across + 12]
        image = demosaic(part, pattern, "bilinear")
        cut = whole[:, down : down + 10, across : across + 12]
        assert np.allclose(image[:, 1:-1, 1:-1], cut[:, 1:-1, 1:-1], atol=1e-6)


def test_a_wrong_order_is_a_wrong_image() -> None:
    right, wrong = (demosaic(mosaiced(scene(), "RGGB"), pattern) for pattern in ("RGGB", "BGGR"))
    assert np.allclose(right[0], wrong[2])
    assert not np.allclose(right, wrong, atol=0.1)


# -- levels ------------------------------------------------------------------------------------------------------------


def test_black_is_zero_white_is_one_and_less_than_black_is_zero() -> None:
    pixels = np.array([[600, 8491], [16383, 590]], np.uint16)
    assert np.allclose(linear(pixels, 600, 16383, "x"), [[0, 0.5], [1, 0]], atol=1e-4)
    levels = np.array([[600.0, 91.0], [0.0, 590.0]])
    assert np.allclose(linear(pixels, levels, 16383, "x"), [[0, 8400 / 16292], [1, 0]])


@pytest.mark.parametrize(("bits", "black"), [(8, 0), (10, 16), (12, 64), (14, 600), (16, 0)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flat_files_of_any_depth_and_order_are_the_scene(pattern, bits, black, tmp_path) -> None:
    pixels = stored(pattern, bits, black)
    pixels.tofile(tmp_path / "a.raw")
    np.save(tmp_path / "a.npy", pixels)
    sensor = Sensor(pattern=pattern, bits=bits, black=black, shape=(12, 16), demosaic="bilinear")
    image = sensor.read(tmp_path / "a.raw")
    assert image.dtype == np.float32
    assert np.array_equal(image, sensor.read(tmp_path / "a.npy"))
    assert np.allclose(image[:, 1:-1, 1:-1], scene()[:, 1:-1, 1:-1], atol=1.01 / 2**bits)
    assert Sensor(pattern=pattern, bits=bits, black=black, shape=(12, 16)).read(tmp_path / "a.raw").shape == (3, 6, 8)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pattern": "RGBG"}, "Bayer pattern 'RGBG': use one of RGGB, GRBG, GBRG, BGGR"),
        ({"pattern": "rggb"}, "Bayer pattern 'rggb'"),
        ({"bits": 17}, "bits 17: use 1 to 16"),
        ({"bits": 10, "white": 1024}, "0 <= black < white <= 1023"),
        ({"black": 16383}, "0 <= black < white"),
        ({"black": -1}, "black level -1"),
        ({"shape": (5, 4)}, "even sides"),
        ({"shape": (4,)}, "use .rows, columns."),
        ({"demosaic": "best"}, "demosaic 'best': use half or bilinear"),
    ],
)
def test_settings_that_make_no_sense(settings, words) -> None:
    with pytest.raises(RequestError, match=words):
        Sensor(**settings)


def refused(sensor: Sensor, file: Path, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        sensor.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_such_mosaic(tmp_path) -> None:
    pixels, sensor, file = stored("RGGB"), Sensor(bits=12, shape=(12, 16)), tmp_path / "a.raw"
    refused(sensor, file, "no such file")
    file.write_bytes(pixels.tobytes()[:-3])
    refused(sensor, file, "truncated, or of another shape: 381 bytes, where 12 x 16 pixels of 2 bytes are 384 bytes")
    file.write_bytes(b"")
    refused(sensor, file, "truncated")
    file.write_bytes(pixels.tobytes() * 2)
    refused(sensor, file, "too large, or of another shape")
    file.write_bytes(pixels.tobytes())
    refused(Sensor(bits=12), file, "give shape=.rows, columns.")
    refused(Sensor(bits=10, shape=(12, 16)), file, "a pixel is [0-9]+, where .* white 1023; check bits")
    refused(Sensor(bits=12, white=2000, shape=(12, 16)), file, "white 2000")
    (tmp_path / "a.png").write_bytes(b"x")
    refused(sensor, tmp_path / "a.png", "no camera RAW by its name")


def test_arrays_that_are_no_such_mosaic(tmp_path) -> None:
    pixels, sensor, file = stored("RGGB"), Sensor(bits=12), tmp_path / "a.npy"
    np.save(file, pixels)
    whole = file.read_bytes()
    for part in (whole[:-5], whole[:20], b"", b"hello"):
        file.write_bytes(part)
        refused(sensor, file, "not a readable .npy array, or truncated")
    np.save(file, pixels)
    refused(Sensor(bits=12, shape=(16, 12)), file, "12 x 16 pixels, where shape says 16 x 12")
    for array, words in (
        (pixels.astype(np.float32), "whole numbers"),
        (pixels[None], "whole numbers"),
        (pixels[:, :15], "even sides"),
        (pixels[:0], "even sides"),
        (-pixels.astype(np.int32), "a pixel is -"),
    ):
        np.save(file, array)
        refused(sensor, file, words)
    np.save(file, np.array([{}]), allow_pickle=True)
    refused(sensor, file, "not a readable .npy array")


# -- containers --------------------------------------------------------------------------------------------------------


def dng(pixels: np.ndarray, pattern: str, black: int, white: int) -> bytes:
    """A little-endian DNG of one uncompressed strip of 16-bit pixels."""
    height, width = pixels.shape
    unit = (10000, 10000)
    zero = (0, 10000)
    tags = [
        (254, 4, [0]), (256, 4, [width]), (257, 4, [height]), (258, 3, [16]), (259, 3, [1]), (262, 3, [32803]),
        (271, 2, b"Maker\0"), (272, 2, b"Model\0"), (273, 4, [0]), (274, 3, [1]), (277, 3, [1]), (278, 4, [height]),
        (279, 4, [pixels.nbytes]), (284, 3, [1]), (33421, 3, [2, 2]),
        (33422, 1, bytes("RGB".index(c) for c in pattern)),
        (50706, 1, bytes([1, 4, 0, 0])), (50708, 2, b"Maker Model\0"), (50714, 3, [black]), (50717, 3, [white]),
        (50721, 10, [*unit, *zero, *zero, *zero, *unit, *zero, *zero, *zero, *unit]),
        (50728, 5, [*unit, *unit, *unit]), (50778, 3, [21]),
    ]  # fmt: skip
    formats = {1: "B", 2: "B", 3: "H", 4: "I", 5: "I", 10: "i"}
    start = 8 + 2 + 12 * len(tags) + 4
    packed = {t: struct.pack(f"<{len(v)}{formats[kind]}", *v) for t, kind, v in tags}
    extra = sum(len(p) + len(p) % 2 for p in packed.values() if len(p) > 4)
    packed[273] = struct.pack("<I", start + extra)
    head, tail = struct.pack("<2sHIH", b"II", 42, 8, len(tags)), b""
    for tag, kind, values in tags:
        body, count = packed[tag], len(values) // (2 if kind in (5, 10) else 1)
        if len(body) > 4:
            place, tail = struct.pack("<I", start + len(tail)), tail + body + b"\0" * (len(body) % 2)
        else:
            place = body.ljust(4, b"\0")
        head += struct.pack("<HHI", tag, kind, count) + place
    return head + struct.pack("<I", 0) + tail + pixels.astype("<u2").tobytes()


def large(pattern: str) -> np.ndarray:
    """LibRaw takes no sensor of a few pixels."""
    picture = np.kron(scene(32, 48), np.ones((1, 2, 2), np.float32))
    return (64 + mosaiced(picture, pattern) * (4095 - 64)).round().astype(np.uint16)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_container_states_its_own_order_and_levels(pattern, tmp_path) -> None:
    pytest.importorskip("rawpy")
    pixels = large(pattern)
    (tmp_path / "a.dng").write_bytes(dng(pixels, pattern, 64, 4095))
    mosaic = Sensor(pattern="RGGB", bits=8).mosaic(tmp_path / "a.dng")
    assert mosaic.pattern == pattern
    assert np.allclose(mosaic.values, linear(pixels, 64, 4095, "x"), atol=1e-6)
    flat = Sensor(pattern=pattern, bits=12, black=64, shape=pixels.shape)
    pixels.tofile(tmp_path / "a.raw")
    assert np.allclose(Sensor().read(tmp_path / "a.dng"), flat.read(tmp_path / "a.raw"), atol=1e-6)


def test_beyond_a_containers_own_white_is_saturated(tmp_path) -> None:
    pytest.importorskip("rawpy")
    pixels = large("RGGB")
    (tmp_path / "a.dng").write_bytes(dng(pixels, "RGGB", 64, 2000))
    values = Sensor().mosaic(tmp_path / "a.dng").values
    assert values.max() == 1
    assert (values == 1).sum() == (pixels >= 2000).sum()


def test_damaged_containers_are_refused(tmp_path) -> None:
    pytest.importorskip("rawpy")
    file, whole = tmp_path / "a.dng", dng(large("RGGB"), "RGGB", 64, 4095)
    for part in (b"", b"hello" * 100, whole[:60], whole[:2000], whole[:-500]):
        file.write_bytes(part)
        refused(Sensor(), file, "not a readable RAW file, or truncated")


def test_without_the_library_a_container_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rawpy", None)
    (tmp_path / "a.dng").write_bytes(b"x")
    with pytest.raises(RequestError, match="pip install 'omniadapt.raw.'"):
        Sensor().read(tmp_path / "a.dng")


@pytest.mark.parametrize("tile", [None, np.arange(36).reshape(6, 6) % 3, np.zeros((2, 2), int)])
def test_other_sensors_than_bayers_are_refused(tile, tmp_path, monkeypatch) -> None:
    """Three-layer sensors have no pattern, X-Trans one of 6 x 6, monochrome ones a single colour."""
    found = SimpleNamespace(raw_pattern=tile, color_desc=b"RGBG", raw_image_visible=np.zeros((12, 12), np.uint16),
                            black_level_per_channel=[0] * 4, white_level=4095)  # fmt: skip
    library = SimpleNamespace(imread=lambda _: contextlib.nullcontext(found), LibRawError=OSError)
    monkeypatch.setitem(sys.modules, "rawpy", library)
    (tmp_path / "a.raf").write_bytes(b"x")
    refused(Sensor(), tmp_path / "a.raf", "is no Bayer mosaic of red, green and blue")


# -- real files --------------------------------------------------------------------------------------------------------


def test_a_real_scene_is_the_same_image_in_every_order(materials) -> None:
    folder = materials / "data" / "camera_raw"
    images = [
        Sensor(pattern=file.stem[-4:].upper(), bits=14, black=600, shape=(512, 768)).read(file)
        for file in sorted(folder.glob("DSC_1339_768x512_*.raw"))
    ]
    assert len(images) >= 3
    assert images[0].shape == (3, 256, 384)
    assert all(np.array_equal(image, images[0]) for image in images)
    assert np.allclose(images[0].mean((1, 2)), [0.0976, 0.0722, 0.0350], atol=1e-4)


def test_a_real_sensor_of_ten_bits(materials) -> None:
    file = materials / "data" / "camera_raw" / "openisp_test.RAW"
    image = Sensor(pattern="RGGB", bits=10, shape=(1080, 1920), demosaic="bilinear").read(file)
    assert image.shape == (3, 1080, 1920)
    assert 0.9 < image.max() <= 1
    refused(Sensor(bits=10, shape=(1920, 1088)), file, "truncated, or of another shape")
    refused(Sensor(bits=9, shape=(1080, 1920)), file, "where the levels go from 0 to white 511")
