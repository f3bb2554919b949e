"""Clips: moving dots, and folders of stickers; key frames and padding; bad files are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from modalities.diffusion.data import AnimatedStickers, MovingDots
from modalities.diffusion.data.clips import pixels
from shared.animation import write_animation
from shared.errors import RequestError


def spinning(count: int = 6, height: int = 20, width: int = 10) -> np.ndarray:
    frames = np.zeros((count, height, width, 4), np.uint8)
    for i, frame in enumerate(frames):
        frame[3 * i : 3 * i + 3] = (40 * i, 10, 200, 255)
    return frames


@pytest.fixture
def folder(tmp_path):
    for i, ending in enumerate((".gif", ".webp", ".png", ".gif")):
        write_animation(tmp_path / f"a_{i}{ending}", spinning(3 + i), 80)
    return tmp_path


def test_dots_move_as_their_caption_says():
    data = MovingDots(clips=40, key_frames=(8, 8))
    ways = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    for index in range(20):
        frames, caption, name = data.read("train", index)
        _, _, _, _, way, pace = caption.split()
        alpha = frames[..., 3].astype(float)
        turn = np.exp(2j * np.pi * (np.arange(16) + 0.5) / 16)  # the mean place on a circle: it leaves and comes in
        places = [
            np.unwrap([np.angle((a.sum(1 - axis) * turn).sum()) for a in alpha]) * 16 / (2 * np.pi) for axis in (0, 1)
        ]
        moved = np.array([place[-1] - place[0] for place in places])
        expected = np.array(ways[way]) * {"slowly": 0.03, "fast": 0.09}[pace] * 16 * 7
        np.testing.assert_allclose(moved, expected, atol=0.8)
        assert name == f"train/{index}"
    assert np.array_equal(data.read("train", 3)[0], frames) is False


def test_a_clip_is_its_key_frames_and_padding():
    data = MovingDots(clips=6, key_frames=(3, 5), batch_size=3)
    batch = next(iter(data.validation()))
    assert batch["clip"].shape == (3, 4, 8, 16, 16)
    counts = batch["frame_mask"].sum(1)
    for clip, mask, count in zip(batch["clip"], batch["frame_mask"], counts.int(), strict=True):
        assert 3 <= count <= 5
        assert mask.tolist() == [1] * count + [0] * (8 - count)
        assert (clip[:, count:] == 0).all()
        assert clip[:, :count].abs().amin((1, 2, 3)).max() > 0
        assert float(clip.min()) >= -1
        assert float(clip.max()) <= 1
    assert torch.equal(next(iter(data.validation()))["clip"], batch["clip"])
    np.random.seed(0)
    drawn = {int(data.sample("train", 0)["frame_mask"].sum()) for _ in range(30)}
    assert drawn == {3, 4, 5}
    ends = data.sample("train", 0)["clip"][:, 0], data.read("train", 0)[0]
    assert torch.equal(ends[0], pixels(ends[1][:1], 16, 4)[:, 0])


def test_pixels_keep_shape_and_alpha():
    frames = spinning(2)
    found = pixels(frames, 10, 4)
    assert found.shape == (4, 2, 10, 10)
    assert (found[3, :, :, :2] == -1).all()  # margins left and right show nothing
    assert (found[:3][:, found[3] == -1] == 1).all()  # white where nothing shows
    rgb = pixels(frames, 20, 3)
    assert rgb.shape == (3, 2, 20, 20)
    shown = pixels(frames, 20, 4)
    opaque = shown[3] == 1
    assert torch.equal(rgb[:, opaque], shown[:3][:, opaque])


def test_stickers_of_every_format_with_names_or_a_table_for_captions(folder):
    data = AnimatedStickers(folder=folder, size=8, bands=4, validation_share=0.25, test_share=0.25)
    assert data.describe()["clips"] == {"train": 2, "validation": 1, "test": 1}
    everything = [data.sample(split, i) for split in ("train", "validation", "test") for i in range(data.count(split))]
    assert {one["name"]: one["caption"] for one in everything} == {
        "a_0.gif": "a 0", "a_1.webp": "a 1", "a_2.png": "a 2", "a_3.gif": "a 3",
    }  # fmt: skip
    (folder / "captions.csv").write_text("file,caption\na_3.gif,six\na_0.gif,three\n")
    table = AnimatedStickers(folder=folder, size=8, bands=4, validation_share=0, test_share=0)
    assert sorted(table.sample("train", i)["caption"] for i in range(2)) == ["six", "three"]
    other = folder / "else.csv"
    other.write_text("file,caption\na_1.webp,four\n")
    only = AnimatedStickers(folder=folder, captions=other, size=8, validation_share=0, test_share=0, choice="luv")
    assert only.sample("train", 0)["clip"].shape == (3, 8, 8, 8)


def test_bad_files_are_named(folder):
    def load(**more):
        return AnimatedStickers(folder=folder, size=8, validation_share=0, test_share=0, **more)

    def every_clip():
        data = load()
        return [data.sample("train", i) for i in range(4)]

    whole = (folder / "a_3.gif").read_bytes()
    (folder / "a_3.gif").write_bytes(b"")
    with pytest.raises(RequestError, match=r"a_3.gif: an empty file \(0 bytes\)"):
        load()
    Image.new("RGBA", (8, 8), "red").save(folder / "a_3.gif")
    with pytest.raises(RequestError, match="a_3.gif: a clip of one frame; an animation has at least two"):
        load()
    (folder / "a_3.gif").write_bytes(b"GIF but not really")
    with pytest.raises(RequestError, match="a_3.gif: not a readable image"):
        load()
    for missing in (40, 200, len(whole) // 2):  # in the last frame, or sooner
        (folder / "a_3.gif").write_bytes(whole[: len(whole) - missing])
        with pytest.raises(RequestError, match="a_3.gif: not a readable image") as caught:
            every_clip()
        assert "\n" not in str(caught.value)
    (folder / "captions.csv").write_text("file,caption\ngone.gif,x\n")
    with pytest.raises(RequestError, match="gone.gif: no such file"):
        load()
    (folder / "captions.csv").write_text("name,caption\ngone.gif,x\n")
    with pytest.raises(RequestError, match="captions.csv: wants rows with file and caption"):
        load()


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(RequestError, match="no animated image in it"):
        AnimatedStickers(folder=tmp_path)
    with pytest.raises(RequestError, match="key_frames 3 to 9: from 2 to frames 8"):
        MovingDots(key_frames=(3, 9))
    with pytest.raises(RequestError, match="bands 1: 3, or 4 with alpha"):
        MovingDots(bands=1)
    with pytest.raises(RequestError, match="data.choice features and data.vgg16 go together"):
        MovingDots(choice="features")


def test_real_stickers(materials):
    folder = materials / "data" / "animated_stickers"
    if not folder.is_dir():
        pytest.skip("the animated stickers are not beside the project")
    data = AnimatedStickers(folder=folder, size=16, bands=4)
    assert sum(data.describe()["clips"].values()) == 79
    one = data.sample("train", 0)
    assert (one["clip"][3, 0] == -1).any()  # transparent around the parrot
    assert (one["clip"][3, 0] == 1).any()
