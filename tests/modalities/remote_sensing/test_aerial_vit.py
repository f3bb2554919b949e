"""The packaged backbone: its weights load, are small, and tell aerial scenes apart as its card says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from modalities.remote_sensing.backbones import MEAN, STD, WEIGHTS, AerialViT
from modalities.remote_sensing.scene_probe import (
    colour_features,
    logistic_regression,
    main,
    probe,
    read_scenes,
    summaries,
)
from shared import LoRA, adapt
from shared.errors import RequestError
from shared.methods import Probe

CARD = WEIGHTS.with_suffix(".md")
RECIPE = Path(__file__).parents[3] / "recipes" / "remote_sensing" / "pretrain.yaml"


class Summary(torch.nn.Module):
    """Two classes from a backbone's summary."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(192, 2)

    def forward(self, features, size):
        return self.linear(features.summary)


def test_the_weights_are_packaged_small_and_finite():
    from safetensors.torch import load_file

    assert WEIGHTS.stat().st_size <= 6_000_000
    tensors = load_file(WEIGHTS)
    assert sum(t.numel() for t in tensors.values()) <= 3_000_000
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    model = AerialViT(3)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())
    assert model.source == "packaged: aerial_vit.safetensors"
    assert torch.equal(model.model.blocks[3].mlp.fc1.weight, tensors["blocks.3.mlp.fc1.weight"].float())
    assert CARD.is_file()


@pytest.mark.parametrize(("bands", "size"), [(3, (96, 96)), (8, (64, 128)), (1, (40, 24))])
def test_any_bands_and_any_size(bands, size):
    model = AerialViT(bands).eval()
    with torch.no_grad():
        features = model(torch.randn(2, bands, *size))
    assert [tuple(m.shape) for m in features.maps] == [(2, 192, size[0] // 8, size[1] // 8)] * 4
    assert features.summary.shape == (2, 192)


def test_the_image_itself_is_the_first_map_where_asked_for():
    plain, with_pixels = AerialViT(8).eval(), AerialViT(8, pixels=True).eval()
    assert (plain.channels, with_pixels.channels) == ((192,) * 4, (8, 192, 192, 192, 192))
    image = torch.randn(1, 8, 16, 24)
    with torch.no_grad():
        one, other = plain(image), with_pixels(image)
    assert torch.equal(other.maps[0], image)
    assert all(torch.equal(a, b) for a, b in zip(one.maps, other.maps[1:], strict=True))


def test_eight_equal_bands_are_seen_as_the_mean_of_three():
    rgb, eight = AerialViT(3).eval(), AerialViT(8).eval()
    band = torch.randn(1, 1, 32, 32)
    kernel = rgb.model.patch_embed.proj.weight
    expected = kernel[:, [0, 1, 2, 0, 1, 2, 0, 1]].sum(1) * 3 / 8
    assert torch.allclose(eight.model.patch_embed.proj.weight.sum(1), expected, atol=1e-3)
    with torch.no_grad():
        assert torch.isfinite(eight(band.expand(-1, 8, -1, -1)).summary).all()


def test_lora_on_the_patch_kernel_tells_bands_apart_that_share_the_repeated_kernel():
    """Bands 0 and 3 both have the red kernel: which of the two is bright shows only once the kernel is adapted."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (64,), generator=generator)
    images = 0.1 * torch.randn(64, 8, 16, 16, generator=generator)
    images[torch.arange(64), 3 * labels] += 2 * torch.rand(64, 1, 1, generator=generator)
    right = {}
    for method in (Probe(), LoRA(rank=4, roles=("conv",))):
        torch.manual_seed(0)
        model = adapt(AerialViT(8), method, head=Summary())
        optimiser = torch.optim.AdamW(model.trainable().values(), lr=0.01)
        for _ in range(12):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(images[:48]), labels[:48]).backward()
            optimiser.step()
        right[type(method)] = (model.eval()(images[48:]).argmax(1) == labels[48:]).float().mean().item()
    assert right[Probe] < 0.8
    assert right[LoRA] > 0.9


def test_random_weights_follow_from_the_seed_and_differ_from_ours():
    one, same, other = (AerialViT(3, weights="random", seed=seed) for seed in (0, 0, 1))
    weight = [m.model.blocks[0].attn.qkv.weight for m in (one, same, other, AerialViT(3))]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])
    assert not torch.equal(weight[0], weight[3])
    assert one.source == "random (seed 0)"


def test_random_and_a_checkpoint_exclude_each_other(tmp_path):
    with pytest.raises(RequestError, match="exclude each other"):
        AerialViT(3, weights="random", checkpoint="x.safetensors")
    with pytest.raises(RequestError, match="no such file"):
        AerialViT(3, checkpoint=str(tmp_path / "x.safetensors"))


def test_on_real_scenes_it_is_far_above_random_weights_and_colours(materials):
    """The floor of colour features is about 0.5; the card states the figures of ten seeds."""
    photographs, labels, classes = read_scenes(materials / "data" / "scene_rsscn7")
    assert (len(labels), len(classes)) == (70, 7)
    ours, random = (
        probe(summaries(AerialViT(3, weights=weights), photographs, 128, MEAN, STD), labels, seeds=10).mean()  # type: ignore[arg-type]
        for weights in ("pretrained", "random")
    )
    colours = probe(colour_features(photographs), labels, seeds=10).mean()
    assert ours > 0.66
    assert ours > random + 0.1
    assert ours > colours + 0.1


def test_the_recipe_leaves_out_every_photograph_of_the_probe(materials):
    import yaml

    pattern = yaml.safe_load(RECIPE.read_text())["data"]["leave_out"]
    files = list((materials / "data" / "scene_rsscn7").glob("*/*.jpg"))
    assert len(files) == 70
    assert all(re.search(pattern, f"{file.parent.name}/{file.name}") for file in files)


def test_logistic_regression_separates_what_is_separable_and_shrinks():
    features = torch.randn(90, 5)
    labels = torch.arange(3).repeat(30)
    features[:, 2] += 8.0 * labels
    right = [
        (logistic_regression(features[:60], labels[:60], 3, decay)(features[60:]) == labels[60:]).float().mean()
        for decay in (1e-4, 1.0)
    ]
    assert right[0] > 0.9
    assert right[1] < right[0]  # the class in the middle needs large weights


def test_the_probe_of_noise_is_chance_and_of_the_label_is_perfect():
    labels = torch.arange(7).repeat_interleave(30)
    random = torch.Generator().manual_seed(0)
    noise = probe(torch.randn(210, 8, generator=random), labels)
    assert noise.shape == (10,)
    assert noise.mean() == pytest.approx(1 / 7, abs=0.06)
    assert noise.std() > 0
    assert probe(torch.nn.functional.one_hot(labels).float(), labels, seeds=2).tolist() == [1.0, 1.0]
    with pytest.raises(RequestError, match="1 to 29 of 30"):
        probe(torch.randn(210, 8), labels, train=30)


def test_colour_features_tell_colours_and_edges():
    plain = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    striped = plain.clone()
    striped[:, :, ::4] = 200
    features = colour_features([plain, plain + 60, striped])
    assert features.shape == (3, 60)
    assert features[1, 8] - features[0, 8] == pytest.approx(60 / 255, abs=1e-3)
    assert features[0, 38] == 0  # mean gradient of the first band
    assert features[2, 38] > 0.1


def test_the_command_prints_a_table_and_refuses_what_is_no_folder_of_scenes(tmp_path, capsys):
    from PIL import Image

    for kind, value in (("dark", 40), ("light", 200)):
        (tmp_path / kind).mkdir()
        for i in range(3):
            Image.fromarray(np.full((32, 32, 3), value + i, np.uint8)).save(tmp_path / kind / f"{i}.png")
    assert main([str(tmp_path), "--train", "2", "--seeds", "2", "--size", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 photographs, 2 classes, 2 of each train, 2 seeds"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "aerial_vit, packaged: aerial_vit.safetensors", "the same, random weights", "colour and gradient histograms",
    ]  # fmt: skip
    assert main([str(tmp_path / "dark")]) == 2
    assert "two or more folders" in capsys.readouterr().err
