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
    do(
        "run",
        "diffusion/pixels_res_adapter",
        *tiny,
        "backbone.pretrained=base_unet",
        "data.checks=4",
        "--output",
        "sizes",
    )
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
    assert size_probe.main(["sizes", "--sizes", "0"]) == 2


class Colours(torch.nn.Module):
    """The mean colour of each image."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3)) / 255


def test_the_distance_tells_what_differs_from_what_does_not():
    generator = torch.Generator().manual_seed(0)
    real, same = torch.randint(0, 256, (2, 24, 3, 8, 8), generator=generator).to(torch.uint8)
    near, far = size_probe.distance(Colours(), real, same), size_probe.distance(Colours(), real, same // 2)
    assert abs(near[0]) < 1 < 50 < far[0]
    assert far == size_probe.distance(Colours(), real, same // 2)
    with pytest.raises(RequestError, match="3 real and 24 made images: at least 4 of each"):
        size_probe.distance(Colours(), real[:3], same)
