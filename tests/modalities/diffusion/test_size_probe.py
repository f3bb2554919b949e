"""A model of our own trained whole, exported, adapted to other sizes, measured and used, as the recipes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modalities.diffusion import size_probe
from modalities.diffusion.backbones.unet import DiffusersUNet
from shared import cli, run
from shared.errors import RequestError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


def do(*words) -> None:
    assert cli.main([*map(str, words), "--debug"]) == 0


def pictures(folder: Path) -> list[np.ndarray]:
    found = []
    for path in sorted(folder.glob("0*.png")):
        with Image.open(path) as file:
            found.append(np.asarray(file).copy())
    return found


def test_from_a_base_of_ones_own_to_other_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = ("--tiny", "trainer.device=cpu", "trainer.steps=4")
    do("run", "diffusion/pixels", *tiny, "--output", "base")
    do("export", "base", "-o", "base_unet", "--as", "diffusers")
    base = run.load("base").task.unet.unet.state_dict()
    shape = {"block_out_channels": [8, 16, 16], "norm_num_groups": 4, "attention_head_dim": 4}
    adapt = ("run", "diffusion/pixels_res_adapter", *tiny, "data.checks=4")
    ours = (*adapt, "backbone.pretrained=base_unet")
    do(*ours, "--output", "sizes")
    adapted = run.load("sizes").task.model.backbone
    assert isinstance(adapted, DiffusersUNet)
    assert {name: adapted.unet.config[name] for name in shape} == shape
    assert all(torch.equal(tensor, base[name]) for name, tensor in adapted.unet.state_dict().items())
    common = ("--size", "48x16", "--count", 2, "--steps", 2)
    do("generate", "sizes", *common, "-o", "one")
    do("generate", "base", *common, "--adapter", "sizes/adapter.safetensors", "-o", "two")
    do("generate", "base", *common, "-o", "bare")
    one, two, bare = (pictures(tmp_path / name) for name in ("one", "two", "bare"))
    assert [image.shape for image in one] == [(16, 48, 3)] * 2
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], bare[0])
    assert "never trained" not in (tmp_path / "bare/page.html").read_text()
    capsys.readouterr()
    assert size_probe.main(["sizes", "--sizes", "16,24", "--samples", "4", "--steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["size", "16 x 16", "24 x 24"]
    assert all(line.count("±") == 5 for line in lines[1:])
    assert size_probe.main(["sizes", "--sizes", "16", "--samples", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == lines[1][:56].rstrip()
    for wrong in (("--sizes", "0"), ("--samples", "3"), ("--images", "3")):
        assert size_probe.main(["sizes", *wrong]) == 2
    do(*ours, "optimiser.learning_rate=0.03", "--output", "control")
    capsys.readouterr()

    def row(*runs, samples=0):
        assert size_probe.main([*runs, "--sizes", "16", "--samples", str(samples), "--steps", "1"]) == 0
        head, row = capsys.readouterr().out.splitlines()
        assert ("frozen" in head, "control" in head) == (len(runs) == 1, len(runs) == 2)
        return row.split()[3:]

    (frozen, adapted, *_), (same, other, *_) = row("sizes"), row("control")
    assert frozen == same
    assert adapted != other
    both = row("sizes", "control", samples=4)
    assert both[:2] == [other, adapted]
    assert float(both[2]) == pytest.approx(float(adapted) - float(other), abs=1.5e-5)
    assert row("control", "sizes", samples=4)[5:8] == both[8:11]  # of the distances, too, the control's is first
    do(*adapt, "seed=1", "--output", "random")
    for control, why in (("random", "another base"), ("base", "other test images")):
        assert size_probe.main(["sizes", control]) == 2
        assert f"error: {control}: {why}" in capsys.readouterr().err


class Colours(torch.nn.Module):
    """The mean colour of each image."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3)) / 255


def test_the_distance_tells_what_differs_from_what_does_not():
    generator = torch.Generator().manual_seed(0)
    real, same = torch.randint(0, 256, (2, 24, 3, 8, 8), generator=generator).to(torch.uint8)
    near, far = size_probe.distances(Colours(), real, same), size_probe.distances(Colours(), real, same // 2)
    assert abs(near.mean()) < 1 < 50 < far.mean()
    assert torch.equal(far, size_probe.distances(Colours(), real, same // 2))
    assert torch.equal(near, size_probe.distances(Colours(), torch.cat([real, same // 2]), same))  # the first 24 count
    with pytest.raises(RequestError, match="3 real and 24 made images: at least 4 of each"):
        size_probe.distances(Colours(), real[:3], same)


def test_its_error_is_that_of_other_images():
    """The deviation over halves is about that over sets drawn anew, alone and as a difference of two sets."""
    alone, difference, errors = [], [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (2, 40, 3, 2, 2), generator=generator).float()
        real, made, other = (x.to(torch.uint8) for x in (images[0], images[1] / 2, images[1] / 2.2))
        one, two = size_probe.distances(Colours(), real, made), size_probe.distances(Colours(), real, other)
        alone.append(one.mean())
        difference.append((two - one).mean())
        errors.append(torch.stack([one.std(), (two - one).std()]))
    found = torch.stack([torch.stack(alone).std(), torch.stack(difference).std()])
    ratio = torch.stack(errors).mean(0) / found
    assert ((ratio > 0.75) & (ratio < 1.33)).all(), ratio
    assert found[1] < found[0] / 2  # paired, the difference is surer than either


class Known:
    """A task whose prediction is wrong by a known share of the noise: the loss of an image is what the test says."""

    device = torch.device("cpu")

    def __init__(self, share: float, offset: float = 0.0):
        from modalities.diffusion.denoising import _schedule

        self.share, self.offset, self.schedule, self.seen = share, offset, _schedule(None), []

    def encode(self, image):
        return image

    def condition(self, batch, captions):
        return {}

    def _errors(self, x, noise, steps, condition):
        self.seen.append(steps)
        return (self.share * noise).square().mean((1, 2, 3)) + x.mean((1, 2, 3)) + self.offset


def test_the_losses_are_paired_and_each_image_sees_the_whole_schedule():
    batches = [{"image": torch.full((n, 3, 8, 8), float(n)), "caption": [""] * n} for n in (4, 2)]
    first, second = Known(0.5), Known(0.5, offset=-0.01)
    one, two = size_probe.losses(first, batches), size_probe.losses(second, batches)
    assert one.shape == (6,)
    assert one == pytest.approx(torch.tensor([4.25] * 4 + [2.25] * 2), abs=0.05)
    assert one.std() > 0.5
    change = two - one
    assert change == pytest.approx(torch.full((6,), -0.01), abs=1e-6)  # images and noise cancel
    assert torch.stack(first.seen[:4]).tolist() == [
        [31, 93, 156, 218], [281, 343, 406, 468], [531, 593, 656, 718], [781, 843, 906, 968]
    ]  # fmt: skip
