"""The measure of given frames: models that use them and that do not are told apart, on equal noise, and the floors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from modalities.diffusion import frame_probe
from modalities.diffusion.backbones.dfgn import Clip
from modalities.diffusion.data import MovingDots
from shared import cli
from tests.modalities.diffusion.stickers.test_stickers import blank

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


class Still(MovingDots):
    """Clips of one grey each, lighter from one clip to the next, which never move."""

    def read(self, split, index):
        level = 40 + 30 * index + (15 if split == "train" else 0)
        return np.full((self.frames, self.size, self.size, 4), level, np.uint8), "", f"{split}/{index}"


def still(uses: bool) -> tuple[object, MovingDots]:
    """A model that takes the mean of the given frames, or whatever is given a middle grey, for all of the clip."""
    clips = Still(clips=6, checks=5, size=8)
    task = blank(clips, guidance=1.0)
    kept = task.schedule.alphas_cumprod

    def told(sample: Tensor, step: Tensor, **text: Tensor) -> Clip:
        noisy, given = sample.chunk(2, dim=1)
        at = kept[step].reshape(-1, 1, 1, 1, 1)
        shown = (given != 0).flatten(3).any(3).any(1)[:, None, :, None, None]
        clean = given.sum(2, keepdim=True) / shown.sum(2, keepdim=True).clamp(min=1) * uses
        return Clip((noisy - at.sqrt() * clean) / (1 - at).sqrt())

    task.model.forward = told  # type: ignore[method-assign]
    return task, clips


def test_a_model_that_uses_what_it_is_given_is_told_from_one_that_does_not():
    task, clips = still(True)
    for name, noise, pixels in frame_probe.measure(task, clips, 4, 2):
        assert noise.shape == (4, 5), name
        assert pixels.shape == (4, 7)
        assert noise[:, 0] == pytest.approx(torch.zeros(4), abs=1e-4)
        assert (noise[:, 1:3] > 1e-4).all()
        assert noise[:, 3] == pytest.approx(torch.zeros(4), abs=1e-4)
        assert noise[:, 4] == pytest.approx(noise[:, 2])  # one grey in all frames
        assert pixels[:, 0] == pytest.approx(torch.zeros(4), abs=1e-3)
        assert pixels[:, 1] == pytest.approx(torch.tensor([90.0, 30, 30, 30]) / 255, abs=1e-3)  # the clip before it
        assert pixels[:, 2] == pytest.approx((torch.tensor([40.0, 70, 100, 130]) / 255 - 0.5).abs(), abs=1e-3)
        assert pixels[:, 3:5] == pytest.approx(torch.zeros(4, 2), abs=1e-6)  # what never moves is repeated
        assert pixels[:, 5] == pytest.approx(torch.full((4,), 15 / 255), abs=1e-6)  # of the training clips
    task, clips = still(False)
    for _, noise, pixels in frame_probe.measure(task, clips, 4, 2):
        assert torch.equal(noise[:, 0], noise[:, 1])  # the same noise whatever is given
        assert torch.equal(noise[:, 0], noise[:, 2])
        assert torch.equal(pixels[:, 0], pixels[:, 1])
        assert (pixels[:, 0] > 0.02).any()


def test_what_needs_no_model():
    clips = torch.arange(8.0).expand(1, 1, 1, 1, 8).transpose(2, 4) / 10
    values = {
        "first frame": ([0] * 8, [0] * 8),
        "every second": ([0, 0, 2, 2, 4, 4, 6, 6], [0, 1, 2, 3, 4, 5, 6, 6]),
        "first half": ([0, 1, 2, 3, 3, 3, 3, 3], [0, 1, 2, 3, 3, 3, 3, 3]),
        "last half": ([4, 4, 4, 4, 4, 5, 6, 7], [4, 4, 4, 4, 4, 5, 6, 7]),
    }
    found = frame_probe.cases(8)
    assert list(found) == list(values)
    for name, given in found.items():
        for made, expected in zip((frame_probe.repeated, frame_probe.blended), values[name], strict=True):
            assert made(clips, given).flatten().tolist() == pytest.approx([v / 10 for v in expected]), name
    known = torch.cat([clips + 0.3, clips.flip(2), clips - 0.2])
    assert torch.equal(frame_probe.nearest(clips, found["first half"], known), known[2:])
    assert frame_probe.difference(clips, clips + 0.5, found["last half"] > 0).item() == pytest.approx(0.25)


def test_runs_are_measured_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = ["--tiny", "trainer.device=cpu", "trainer.steps=3", "data.checks=3", "--debug"]
    assert cli.main(["run", "diffusion/pixel_stickers", *tiny, "--output", "one"]) == 0
    capsys.readouterr()
    assert frame_probe.main(["one", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one: 3 clips"
    assert [line[:12].strip() for line in lines[2:6]] == [line[:12].strip() for line in lines[7:]]
    assert [line.count("±") for line in lines[1:]] == [0, 5, 5, 5, 5, 0, 7, 7, 7, 7]
    for wrong in (["one", "--clips", "1"], ["one", "--steps", "0"]):
        assert frame_probe.main(wrong) == 2
    assert "--clips from 2, --steps from 1" in capsys.readouterr().err
