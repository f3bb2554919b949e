"""EfficientMod: published counts and shapes, what its blocks compute, sites, and the authors' names of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from modalities.images.backbones import EfficientMod
from modalities.images.backbones.efficientmod import AttentionBlock, Modulation, ModulationBlock
from shared import adapt
from shared.errors import RequestError
from shared.methods import LoRA

SMALL = {"widths": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
COUNTS = {"xxs": 4_736_264, "xs": 6_627_544, "s": 12_897_184, "s_conv": 12_872_336}
WIDTHS = {"xxs": (32, 64, 128, 256), "xs": (32, 64, 144, 288), "s": (32, 64, 144, 312), "s_conv": (40, 80, 160, 344)}


def small(bands: int = 3, **options: Any) -> EfficientMod:
    return EfficientMod(bands, name="efficientmod_xxs", weights="random", shape=SMALL, **options).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_maps_are_those_published(name: str) -> None:
    with torch.device("meta"):
        backbone = EfficientMod(3, name=f"efficientmod_{name}", weights="random")
        maps = backbone(torch.zeros(1, 3, 224, 224)).maps
    classifier = 1000 * backbone.channels[-1] + 1000
    assert sum(p.numel() for p in backbone.parameters()) + classifier == COUNTS[name]
    assert [tuple(x.shape[1:]) for x in maps] == [(w, s, s) for w, s in zip(WIDTHS[name], (56, 28, 14, 7), strict=True)]
    assert backbone.channels == WIDTHS[name]


def test_without_its_scale_a_block_is_the_identity() -> None:
    block, x = ModulationBlock(6, 4), torch.randn(2, 5, 7, 6)
    assert not torch.equal(block(x), x)
    torch.nn.init.zeros_(block.gamma_1)
    assert torch.equal(block(x), x)


def test_with_ratio_1_the_product_is_linear_in_context_and_value() -> None:
    mlp, x = Modulation(6, 1), torch.randn(2, 5, 7, 6)
    with torch.no_grad():
        plain = mlp(x) - mlp.fc2.bias
        mlp.context_layer.g.weight.mul_(2)
        mlp.context_layer.g.bias.mul_(2)
        torch.testing.assert_close(mlp(x) - mlp.fc2.bias, 2 * plain)
        value, context = mlp.fc1(x), mlp.context_layer(x)
        assert (value < 0).any()
        torch.testing.assert_close(mlp(x), mlp.fc2(value * context))


def test_the_context_is_tiled_over_the_hidden_channels() -> None:
    mlp, x = Modulation(3, 4), torch.randn(2, 5, 7, 3)
    with torch.no_grad():
        value, context = F.gelu(mlp.fc1(x)), mlp.context_layer(x)
        hidden = torch.stack([value[..., j] * context[..., j % 3] for j in range(12)], -1)
        torch.testing.assert_close(mlp(x), mlp.fc2(hidden))


def test_attention_has_heads_of_at_least_32_channels() -> None:
    inside = {width: AttentionBlock(width, 2).attn.proj.in_features for width in (128, 144, 256, 288, 312)}
    assert inside == {128: 256, 144: 256, 256: 256, 288: 288, 312: 312}


def test_training_and_evaluation_give_the_same_and_frozen_it_gets_no_gradient() -> None:
    model, image = adapt(small(), LoRA(rank=2)), torch.randn(2, 3, 32, 64)
    trained = model.train()(image).summary
    trained.square().sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image).summary, trained.detach())


def test_images_of_any_shape_pass() -> None:
    maps = small()(torch.randn(1, 3, 100, 161)).maps
    assert [tuple(x.shape[2:]) for x in maps] == [(25, 41), (13, 21), (7, 11), (4, 6)]


def test_sites_are_what_they_say_and_adapters_act_on_each_role() -> None:
    backbone, image = small(), torch.randn(1, 3, 64, 64)
    sites = backbone.sites()
    for site in sites:
        assert backbone.get_submodule(site.path) is site.module
        if site.role not in ("model", "block", "attention", "mlp"):
            assert site.weight.shape[0] == site.width
    assert sum(site.role == "block" for site in sites) == 8 == sites.depth
    with torch.no_grad():
        bare = backbone(image).summary
    for role in ("attention.query", "attention.qkv", "attention.output", "mlp.up", "mlp.down", "linear", "conv"):
        model = adapt(backbone, LoRA(rank=2, roles=(role,))).eval()
        with torch.no_grad():
            assert torch.equal(model(image).summary, bare), role
            for parameter in model.trainable().values():
                parameter.normal_()
            assert not torch.allclose(model(image).summary, bare), role
        model.remove()
        with torch.no_grad():
            assert torch.equal(backbone(image).summary, bare)


def test_the_authors_file_fills_it_whatever_wraps_it(tmp_path: Path) -> None:
    source, image = small(seed=5), torch.randn(1, 3, 64, 64)
    state = source.model.state_dict() | {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    save_file(state, tmp_path / "plain.safetensors")
    for file in ("wrapped.pth", "plain.safetensors"):
        ours = EfficientMod(3, name="efficientmod_xxs", checkpoint=tmp_path / file, shape=SMALL).eval()
        with torch.no_grad():
            assert torch.equal(ours(image).maps[-1], source(image).maps[-1])
    assert {"layers.0.blocks.0.mlp.context_layer.context_list.0.weight", "layers.2.blocks.2.attn.qkv.weight"} < set(
        state
    )
    five = EfficientMod(5, name="efficientmod_xxs", checkpoint=tmp_path / "plain.safetensors", shape=SMALL)
    assert five.model.patch_embed.proj.weight.shape[1] == 5


def test_refusals() -> None:
    with pytest.raises(RequestError, match="no such network; nearest: efficientmod_s"):
        EfficientMod(3, name="efficientmod_m", weights="random")
    with pytest.raises(RequestError, match="give checkpoint=FILE"):
        EfficientMod(3, name="efficientmod_s")
    with pytest.raises(RequestError, match=r"shape\.width: there is none; nearest: widths"):
        EfficientMod(3, weights="random", shape={"width": [1, 2, 3, 4]})
    with pytest.raises(RequestError, match=r"shape\.depths \[1\]: a number for each of the 4 stages"):
        EfficientMod(3, weights="random", shape={"depths": [1]})
