"""Clips: drawn ones, and folders of animated images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from modalities.diffusion.buckets import Size
from modalities.diffusion.data import CaptionedClips, MovingShapes
from shared.errors import RequestError


def test_moving_shapes_move_as_their_caption_says():
    data = MovingShapes(low=64, high=64, frames=6, clips=24, batch_size=2, checks=2)
    seen = set()
    for index in range(24):
        sample = data.sample("train", (index, Size(64, 64), None))
        clip, way = sample["clip"], sample["caption"].split()[-1]
        assert clip.shape == (3, 6, 64, 64)
        assert -1 <= float(clip.min()) < float(clip.max()) <= 1
        still = clip.median(dim=1).values  # where the shape mostly is not
        moved = (clip[:, -1] - clip[:, 0]).abs().sum(0)
        far = (clip - still[:, None]).abs().sum(0)
        weight = torch.stack([far[0] * (moved > 0.1), far[-1] * (moved > 0.1)]) + 1e-9
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        centre = [(float((w * y).sum() / w.sum()), float((w * x).sum() / w.sum())) for w in weight]
        down, right = centre[1][0] - centre[0][0], centre[1][1] - centre[0][1]
        found = ("down" if down > 0 else "up") if abs(down) > abs(right) else ("right" if right > 0 else "left")
        assert found == way
        seen.add(way)
    assert len(seen) == 4
    batches = list(data.train())
    assert len(batches) == 12
    assert batches[0]["clip"].shape == (2, 3, 6, 64, 64)
    assert torch.equal(next(iter(data.validation()))["clip"], next(iter(data.validation()))["clip"])
    told = data.describe()
    assert (told["frames"], told["step"], told["bands"], told["clips"]["train"]) == (6, 64, 3, 24)
    assert "images" not in told


def write(folder, name: str, values: list[int], size=(20, 16)) -> None:
    frames = [Image.new("RGB", size, (v, v, v)) for v in values]
    frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=50)


def test_clips_of_a_folder_are_cut_in_time_and_space(tmp_path):
    write(tmp_path, "a.gif", [0, 60, 120, 180, 240])
    (tmp_path / "b").mkdir()
    for i in range(3):
        Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "b" / f"{i}.png")
    (tmp_path / "captions.csv").write_text("file,caption\na.gif,it gets bright\nb,nothing\n")
    settings = {"low": 16, "high": 16, "step": 16, "validation_share": 0, "test_share": 0}
    data = CaptionedClips(folder=tmp_path, frames=4, stride=2, **settings)
    by_name = {data.rows["train"][i][0]: data.sample("train", (i, Size(16, 16), None)) for i in range(2)}
    assert by_name["b"]["caption"] == "nothing"
    assert by_name["b"]["clip"].shape == (3, 4, 16, 16)
    assert (by_name["b"]["clip"] == 1).all()
    levels = (by_name["a.gif"]["clip"][0, :, 0, 0] + 1) * 127.5
    assert levels.round().tolist() == [0, 120, 240, 60]  # every second frame, then from the start again
    index = [name for name, _ in data.rows["train"]].index("a.gif")
    starts = {
        int(((data.sample("train", (index, Size(16, 16), s))["clip"][0, 0, 0, 0] + 1) * 127.5).round())
        for s in range(30)
    }
    assert starts == {0, 60, 120, 180, 240}


def test_without_a_table_names_are_captions(tmp_path):
    write(tmp_path, "waving_cat.gif", [0, 90])
    data = CaptionedClips(folder=tmp_path, low=16, high=16, step=16, frames=2, validation_share=0, test_share=0)
    assert data.rows["train"] == [("waving_cat.gif", "waving cat")]


def test_real_stickers(materials):
    data = CaptionedClips(
        folder=materials / "data" / "animated_stickers", low=64, high=64, frames=8, checks=2, batch_size=2
    )
    assert {split: data.count(split) for split in ("train", "validation", "test")} == {
        "train": 71,
        "validation": 4,
        "test": 4,
    }
    batch = next(iter(data.test()))
    assert batch["clip"].shape == (2, 3, 8, 64, 64)
    assert float((batch["clip"][:, :, 1] - batch["clip"][:, :, 0]).abs().max()) > 0.1


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(RequestError, match="no such folder"):
        CaptionedClips(folder=tmp_path / "absent")
    with pytest.raises(RequestError, match="neither captions.csv"):
        CaptionedClips(folder=tmp_path)
    write(tmp_path, "still.gif", [7])
    data = CaptionedClips(folder=tmp_path, low=64, high=64, validation_share=0, test_share=0)
    with pytest.raises(RequestError, match="still.gif: one frame is no clip"):
        data.sample("train", (0, Size(64, 64), None))
    (tmp_path / "captions.csv").write_text("file,caption\ngone.gif,x\n")
    with pytest.raises(RequestError, match=r"1 of its files are not there \(first: gone.gif\)"):
        CaptionedClips(folder=tmp_path)
    (tmp_path / "captions.csv").write_text("name,text\na,x\n")
    with pytest.raises(RequestError, match="wants rows with file and caption"):
        CaptionedClips(folder=tmp_path)
    with pytest.raises(RequestError, match="frames 1: a clip has at least 2"):
        MovingShapes(frames=1)
    with pytest.raises(RequestError, match="stride 0"):
        CaptionedClips(folder=tmp_path, stride=0)
