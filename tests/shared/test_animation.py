"""Animations written and read back: pixels, transparency, times, facts; whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from modalities.diffusion.frames import read_frames
from shared.animation import read_facts, write_animation
from shared.errors import RequestError, WorkError

FACTS = {"prompt": "ein Tänzer \u2603", "seed": 7}


def moving(channels: int = 4) -> np.ndarray:
    """A red square that moves over nothing, half transparent at its edge."""
    frames = np.zeros((5, 12, 10, 4), np.uint8)
    for i, frame in enumerate(frames):
        frame[i : i + 5, 2:7] = (200, 30, 40, 255)
        frame[i + 5, 2:7] = (200, 30, 40, 90)
    return frames[..., :channels]


@pytest.mark.parametrize("ending", [".png", ".apng", ".webp"])
@pytest.mark.parametrize("channels", [3, 4])
def test_lossless_formats_give_back_what_was_written(tmp_path, ending, channels):
    path, frames = tmp_path / f"clip{ending}", moving(channels)
    write_animation(path, frames, [40, 50, 60, 70, 125], FACTS)
    found, durations = read_frames(path)
    assert np.array_equal(found[..., :channels][..., 3:], frames[..., 3:])
    shown = frames[..., 3:] > 0 if channels == 4 else np.ones_like(frames[..., :1], bool)
    assert np.array_equal(np.where(shown, found[..., :3], 0), np.where(shown, frames[..., :3], 0))
    assert durations.tolist() == [40, 50, 60, 70, 125]
    assert read_facts(path) == FACTS


def test_gif_keeps_colours_and_what_shows_at_all(tmp_path):
    path, frames = tmp_path / "clip.gif", moving()
    write_animation(path, frames, [40, 50, 64, 70, 1], FACTS)
    found, durations = read_frames(path)
    assert np.array_equal(found[..., 3], np.where(frames[..., 3] < 128, 0, 255))
    shown = found[..., 3] > 0
    assert np.array_equal(found[shown], frames[shown])
    assert durations.tolist() == [40, 50, 60, 70, 20]
    assert read_facts(path) == FACTS


def test_many_colours_come_near_in_a_gif(tmp_path):
    y, x = np.mgrid[:32, :32] * 8
    frames = np.stack([np.stack([y, x, np.full_like(y, 40 * i)], -1) for i in range(3)]).astype(np.uint8)
    write_animation(tmp_path / "clip.gif", frames, 100)
    found, durations = read_frames(tmp_path / "clip.gif")
    assert np.abs(found[..., :3].astype(int) - frames).mean() < 8
    assert durations.tolist() == [100] * 3
    assert read_facts(tmp_path / "clip.gif") == {}


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    frames = moving()
    with pytest.raises(RequestError, match="clip.mp4: animations are written as .gif, .webp, .png, .apng"):
        write_animation(tmp_path / "clip.mp4", frames, 100)
    with pytest.raises(RequestError, match=r"frames of shape \(12, 10, 4\)"):
        write_animation(tmp_path / "clip.gif", frames[0], 100)
    with pytest.raises(RequestError, match="5 frames want as many durations above 0"):
        write_animation(tmp_path / "clip.gif", frames, [100, 0])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="cannot be written"):
        write_animation(tmp_path / "file" / "clip.gif", frames, 100)
