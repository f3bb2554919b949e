"""Animated images are read frame by frame as a viewer shows them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from modalities.diffusion.frames import over_white, read_frames
from shared.errors import RequestError


def clip(frames: int = 3, alpha: bool = True) -> np.ndarray:
    """A red square that moves over nothing (or black), uint8 (F, 6, 8, 4)."""
    pixels = np.zeros((frames, 6, 8, 4), np.uint8)
    pixels[..., 3] = 0 if alpha else 255
    for i in range(frames):
        pixels[i, 1:4, i : i + 3] = (255, 0, 0, 255)
    return pixels


@pytest.mark.parametrize(("suffix", "extra"), [("gif", {"disposal": 2}), ("png", {}), ("webp", {"lossless": True})])
def test_frames_and_times_come_back(tmp_path, suffix, extra):
    pixels, times = clip(), [40, 100, 250]
    pictures = [Image.fromarray(frame) for frame in pixels]
    path = tmp_path / f"clip.{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, **extra)
    frames, durations = read_frames(path)
    assert frames.dtype == np.uint8
    assert frames.shape == pixels.shape
    assert np.array_equal(frames[..., 3], pixels[..., 3])
    assert np.array_equal(over_white(frames), over_white(pixels))
    assert durations.tolist() == times


def test_the_still_picture_of_an_apng_is_no_frame(tmp_path):
    pictures = [Image.fromarray(frame) for frame in clip(alpha=False)]
    still = Image.new("RGBA", (8, 6), "blue")
    still.save(tmp_path / "a.png", save_all=True, append_images=pictures, default_image=True, duration=50)
    assert np.array_equal(read_frames(tmp_path / "a.png")[0], clip(alpha=False))


def test_a_folder_counts_its_pictures(tmp_path):
    for i, number in enumerate([2, 9, 10]):
        Image.fromarray(clip()[i]).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    frames, durations = read_frames(tmp_path)
    assert np.array_equal(frames, clip())
    assert durations.tolist() == [0, 0, 0]


def test_a_still_image_is_one_frame(tmp_path):
    Image.new("L", (5, 4), 7).save(tmp_path / "a.png")
    frames, durations = read_frames(tmp_path / "a.png")
    assert frames.shape == (1, 4, 5, 4)
    assert (frames == [7, 7, 7, 255]).all()
    assert durations.tolist() == [0]


def test_half_transparent_goes_half_white():
    assert over_white(np.array([[[[0, 100, 255, 128]]]], np.uint8)).tolist() == [[[[127, 177, 255]]]]


def test_what_is_wrong_is_named(tmp_path):
    pictures = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), np.uint8)]
    pictures[0].save(tmp_path / "cut.gif", save_all=True, append_images=pictures[1:])
    (tmp_path / "cut.gif").write_bytes((tmp_path / "cut.gif").read_bytes()[:900])
    (tmp_path / "text.gif").write_text("GIF?")
    for name in ("cut.gif", "text.gif", "absent.gif"):
        with pytest.raises(RequestError, match=f"{name}: not a readable image"):
            read_frames(tmp_path / name)
    folder = tmp_path / "frames"
    folder.mkdir()
    with pytest.raises(RequestError, match="no pictures"):
        read_frames(folder)
    Image.new("L", (5, 4)).save(folder / "1.png")
    Image.new("L", (4, 5)).save(folder / "2.png")
    with pytest.raises(RequestError, match="2.png: frames of one clip must have one size, this one has 4 x 5, 1.png 5"):
        read_frames(folder)
