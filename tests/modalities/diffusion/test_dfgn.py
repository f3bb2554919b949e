"""The video UNet of RDTF: counts and names as released, the STI layer at its start, sites, weights from files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modalities.diffusion.backbones.dfgn import DFGN, WEIGHTS
from modalities.diffusion.backbones.sti import STI
from shared import LoRA, adapt
from shared.errors import RequestError

SMALL: dict[str, Any] = {
    "widths": (8, 16), "layers": 1, "head_width": 8, "groups": 4, "text_width": 16, "t5_width": 12, "sti_heads": 1,
    "sti_head_width": 8,
}  # fmt: skip


def small(**more: Any) -> DFGN:
    return DFGN(**{**SMALL, **more}).eval()


@pytest.fixture(scope="module")
def published() -> DFGN:
    with torch.device("meta"):
        return DFGN()


def test_the_released_class_has_as_many_parameters(published):
    layers = [module for module in published.modules() if isinstance(module, STI)]
    named = dict(published.unet.named_parameters())
    assert sum(p.numel() for p in named.values()) == 960_118_452
    assert len(layers) == 22
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == 19_442_604
    assert sum(p.numel() for n, p in named.items() if "temp_attentions" in n) == 207_943_360
    width = 320
    assert sum(p.numel() for p in published.unet.down_blocks[0].temp_convs[0].parameters()) == 331_042
    assert 4 * 256 * width + width + 2 * width + 2 + 2 * (2 * (8 * 8 * 9 + 8) + 4 * 8) == 331_042


def test_names_are_the_released_ones(published):
    names = set(published.unet.state_dict())
    path = "mid_block.temp_convs.1."
    layer = {name.removeprefix(path) for name in names if name.startswith(path)}
    convolutions = {f"conv_layers.{i}.{n}.{p}" for i in (0, 1) for n in ("norm1", "conv1", "norm2", "conv2")
                    for p in ("weight", "bias")}  # fmt: skip
    attention = {f"transformer_blocks.{n}" for n in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight",
                                                     "to_out.0.bias")}  # fmt: skip
    assert layer == {"w1", "w2", "norm.weight", "norm.bias"} | convolutions | attention
    tops = {name.split(".")[0] for name in names}
    assert tops == {
        "conv_in", "transformer_in", "context_T5_clip_embedding", "image_latents_proj_in",
        "image_latents_temporal_encoder", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_norm_out",
        "conv_out",
    }  # fmt: skip
    numbered = {"context_T5_clip_embedding": {"0", "2"}, "image_latents_proj_in": {"0", "2", "4"}}
    for part, places in numbered.items():
        assert {name.split(".")[1] for name in names if name.startswith(part)} == places
    assert {name.split(".")[2] for name in names if name.startswith("up_blocks.1")} == {
        "resnets", "temp_convs", "attentions", "temp_attentions", "upsamplers",
    }  # fmt: skip


def test_sti_starts_as_the_normed_details_and_w1_can_grow():
    layer = STI(16, heads=2, head_width=8, groups=4)
    x = torch.randn(16, 16, 5, 4)
    assert layer.w1.item() == 0
    assert layer.w2.item() == 1
    y = layer(x, num_frames=8)
    torch.testing.assert_close(y, layer.norm(layer._detail(x)))
    assert not torch.allclose(y, x, atol=0.1)  # no identity
    (y * torch.randn_like(y)).sum().backward()
    assert layer.w1.grad.abs().item() > 0
    assert layer.transformer_blocks.to_q.weight.grad.abs().max() == 0  # silent until w1 has moved


def test_semantics_reach_all_frames_of_a_clip_and_no_other():
    layer = STI(16, heads=2, head_width=8, groups=4).requires_grad_(False)
    layer.w1.fill_(1.0)
    x = torch.randn(16, 16, 4, 4)
    moved = x.clone()
    moved[3] += 1
    changed = (layer(moved, 8) - layer(x, 8)).abs().amax((1, 2, 3)) > 1e-6
    assert changed.tolist() == [True] * 8 + [False] * 8
    assert layer(x[:, :, :1, :1], 8).shape == (16, 16, 1, 1)


def test_weights_told_by_a_network_start_at_the_same_values_and_depend_on_the_clip():
    layer, plain = STI(16, heads=2, head_width=8, groups=4, fusion="mlp"), STI(16, heads=2, head_width=8, groups=4)
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if "weigh." not in n}, strict=False)
    x = torch.randn(16, 16, 4, 4)
    torch.testing.assert_close(layer(x, 8), plain(x, 8))
    torch.nn.init.normal_(layer.weigh[-1].weight)
    first, second = layer._weights(layer._semantic(x), layer._detail(x))
    assert first.shape == (16, 1, 1, 1)
    assert not torch.allclose(first[0], first[8])
    assert torch.equal(second[0], second[7])


def test_clips_of_another_length_are_refused():
    with pytest.raises(RequestError, match="clips of 4 frames: this network takes 8, pad them"):
        small()(torch.randn(1, 8, 4, 4, 4), torch.tensor([5]), torch.randn(1, 3, 16))


@torch.no_grad()
def test_every_input_counts_and_any_size_comes_out_as_it_went_in():
    backbone = small()
    sample, step, text, t5 = backbone.example()
    plain = backbone(sample, step, text, t5).sample
    assert plain.shape == (1, 4, 8, 4, 4)
    given = sample.clone()
    given[:, 4:] = 0
    for other in ((given, step, text, t5), (sample, step + 300, text, t5), (sample, step, 2 * text, t5),
                  (sample, step, text, 2 * t5), (sample, step, text)):  # fmt: skip
        assert (backbone(*other).sample - plain).abs().max() > 1e-5
    assert backbone(torch.randn(2, 8, 8, 5, 7), step, text.expand(2, -1, -1)).sample.shape == (2, 4, 8, 5, 7)


def test_the_attention_before_the_levels_may_have_fewer_heads():
    few, many = small(entry_heads=2), small()
    assert few.unet.transformer_in.proj_in.weight.shape == (2 * 8, 8)
    assert many.unet.transformer_in.proj_in.weight.shape == (8 * 8, 8)
    with torch.no_grad():
        assert few(*few.example()).sample.shape == (1, 4, 8, 4, 4)


def test_low_rank_adapters_find_its_sites():
    backbone = small()
    sites = backbone.sites()
    assert [s.path for s in sites.select("block")] == [
        f"unet.{name}" for name in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    ]
    assert len(sites.select("attention.query", tags="cross")) == 4  # one down, one middle, two up
    before = backbone(*backbone.example()).sample
    model = adapt(backbone, LoRA(rank=2))
    torch.testing.assert_close(model(*backbone.example()).sample, before, rtol=0, atol=1e-5)
    assert model.count()["adapter"] > 0


@pytest.mark.parametrize("folder", [False, True])
def test_weights_are_read_under_the_released_names(tmp_path, folder):
    source = small(seed=3)
    save_file(source.unet.state_dict(), tmp_path / WEIGHTS)
    path = tmp_path if folder else tmp_path / WEIGHTS
    loaded = small(seed=4, pretrained=str(path))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))
    assert not torch.equal(loaded.unet.conv_in.weight, small(seed=4).unet.conv_in.weight)
    state = source.unet.state_dict()
    del state["mid_block.temp_convs.0.w1"]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(RequestError, match=r"1 missing \(mid_block.temp_convs.0.w1\)"):
        small(pretrained=str(path))


def test_what_does_not_divide_is_named():
    with pytest.raises(RequestError, match=r"widths \[12\]: multiples of head_width 8 and groups 4"):
        DFGN(**{**SMALL, "widths": (8, 12)})
    with pytest.raises(RequestError, match="give the channels of the latents, or bands"):
        DFGN(latents=None)
    assert DFGN(3, **{**SMALL, "latents": None}).latent_channels == 3
