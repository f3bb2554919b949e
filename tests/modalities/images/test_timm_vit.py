"""TimmViT: the library's own numbers at any grid, sites that are what they say, weights that fit or say why not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modalities.images.backbones import TimmViT
from shared import adapt
from shared.errors import RequestError
from shared.methods import LoRA

TINY = {"embed_dim": 48, "depth": 4, "num_heads": 3}
NAMES = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_clip_224",  # norm before the blocks
    "vit_base_patch16_siglip_224",  # no class token, attention pool
    "vit_medium_patch16_gap_256",  # no class token, norm after the pool
    "vit_so150m_patch16_reg4_gap_256",  # registers and no class token
    "deit_tiny_distilled_patch16_224",  # class and distillation token
    "vit_small_patch14_dinov2",
    "vit_giant_patch14_reg4_dinov2",  # registers, packed SwiGLU
    "vit_small_patch16_dinov3",  # rotary positions, no bias on q, k, v
    "vit_small_patch16_dinov3_qkvb",  # bias on q and v apart from the fused matrix
    "vit_small_plus_patch16_dinov3",  # SwiGLU in two matrices
    "eva02_tiny_patch14_224",  # q, k, v in three matrices
    "eva02_base_patch16_clip_224",  # and a norm inside the MLP
)
LINEAR = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.gate", "mlp.up", "mlp.down")


def tiny(name: str = NAMES[0], bands: int = 3, **options) -> TimmViT:
    arguments: dict[str, Any] = {"image_size": 64, "patch_size": 16, "weights": "random", "model_args": TINY} | options
    return TimmViT(bands, name=name, **arguments).eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normed", [True, False])
def test_equals_the_library_bit_for_bit_on_a_grid_that_is_not_square(name, normed):
    backbone, image = tiny(name, depths=(0, 2, -1), normed=normed), torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        maps, summary = backbone(image)
        last, expected = backbone.model.forward_intermediates(image, indices=[0, 2, 3], norm=normed)
        features = backbone.model.forward_features(image)
        pooled = backbone.model.forward_head(features, pre_logits=True)
    assert [m.shape for m in maps] == [(2, 48, 3, 5)] * 3
    assert backbone.channels == (48, 48, 48)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))
    assert torch.equal(last, features)
    plain = backbone.model.attn_pool is None and isinstance(backbone.model.fc_norm, nn.Identity)
    has_class = backbone.model.cls_token is not None
    assert torch.equal(summary, features[:, 0] if has_class and plain else pooled)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(("vit_tiny_patch16_224", "vit_small_patch16_dinov3")))
def test_any_grid_of_whole_patches(rows, columns, name):
    backbone = tiny(name, patch_size=4, image_size=16, depths=[1], model_args=TINY | {"depth": 2})
    image = torch.randn(1, 3, 4 * rows, 4 * columns)
    with torch.no_grad():
        (only,), _ = backbone(image)
        expected = backbone.model.forward_intermediates(image, indices=[1], norm=True, intermediates_only=True)
    assert only.shape == (1, 48, rows, columns)
    assert torch.equal(only, expected[0])


def test_bands_and_context():
    backbone = tiny(bands=5)
    maps, summary = backbone(torch.randn(1, 5, 32, 48))
    assert (len(maps), summary.shape, backbone.context.grid) == (4, (1, 48), (2, 3))


@pytest.mark.parametrize(
    ("blocks", "expected"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (4, (0, 1, 2, 3)), (2, (0, 1))]
)
def test_four_evenly_spaced_depths_unless_told(blocks, expected):
    with torch.device("meta"):
        assert tiny(model_args=TINY | {"depth": blocks}).depths == expected
        assert tiny(depths=[-1, 3, 0], model_args=TINY).depths == (0, 3)


@pytest.mark.parametrize(
    ("name", "options", "width", "blocks", "parameters"),
    [
        ("vit_small_patch16_224", {}, 384, 12, 21_665_664),
        ("vit_large_patch14_dinov2", {}, 1024, 24, 304_367_616),
        ("vit_large_patch14_dinov2", {"image_size": 512, "patch_size": 16}, 1024, 24, 304_198_656),
        ("vit_base_patch14_reg4_dinov2", {}, 768, 12, 86_582_016),
        ("vit_large_patch16_dinov3", {"image_size": (512, 768)}, 1024, 24, 303_079_424),
    ],
)
def test_published_sizes_on_the_meta_device_without_reading_weights(name, options, width, blocks, parameters):
    with torch.device("meta"):
        backbone = TimmViT(3, name=name, **options)
    assert (backbone.width, len(backbone.model.blocks)) == (width, blocks)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone.source.endswith("(not loaded: meta device)")
    assert backbone.sites().depth == blocks


def test_random_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    first, again, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.blocks[0].attn.qkv.weight, other.model.blocks[0].attn.qkv.weight)


def test_says_in_one_line_what_it_is():
    line = "TimmViT(vit_tiny_patch16_224, 4 bands, image 64 x 96, patch 16 x 16, maps after blocks (1, 3), weights: "
    assert repr(tiny(bands=4, image_size=(64, 96), depths=(1, 3), seed=7)) == line + "random (seed 7))"


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_where_they_say(name):
    backbone = tiny(name)
    sites = backbone.sites()
    assert all(backbone.get_submodule(site.path) is site.module for site in sites)
    assert len({site.key for site in sites}) == len(sites)
    assert {site.prefix for site in sites if site.role == "block"} == {backbone.prefix}
    fused: dict[tuple, list] = {}
    for site in sites:
        if site.parameter is not None:
            assert site.width == site.weight.shape[0]
        if site.rows is not None:
            fused.setdefault((site.path, site.parameter), []).append(site)
    for parts in fused.values():
        ends = sorted(part.rows for part in parts)
        assert ends[0][0] == 0
        assert ends[-1][1] == len(parts[0].module.weight)
        assert all(a[1] == b[0] for a, b in pairwise(ends))


def test_sites_of_a_plain_vit():
    sites = tiny().sites()
    count = {role: sum(site.role == role for site in sites) for role in sites.roles}
    blockwise = ("block", "attention", "attention.qkv", *LINEAR[:4], "mlp", "mlp.up", "mlp.down")
    assert count == {"model": 1, "conv": 1, "norm": 18} | dict.fromkeys(blockwise, 4)
    assert sites.depth == 4
    norms = sites.select("norm", "last 1", "norm1")
    assert [(s.path, s.parameter) for s in norms] == [("model.blocks.3.norm1", p) for p in ("weight", "bias")]
    assert [s.path for s in sites.select("norm", tags="final")] == ["model.norm"] * 2
    conv = sites.select("conv")[0]
    assert (conv.depth, conv.path, conv.layout, conv.width) == (-1, "model.patch_embed.proj", "BCHW", 48)
    assert (sites.select("model")[0].path, sites.select("model")[0].parameter) == ("", None)


@pytest.mark.parametrize("name", NAMES)
def test_query_key_and_value_sites_change_just_that(name, monkeypatch):
    backbone, image = tiny(name, model_args=TINY | {"depth": 1}), torch.randn(1, 3, 32, 48)
    seen: list[tuple] = []
    attend = nn.functional.scaled_dot_product_attention
    spy = lambda q, k, v, **more: seen.append((q, k, v)) or attend(q, k, v, **more)  # noqa: E731
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)

    def first_attention() -> tuple:
        seen.clear()
        backbone(image)
        return seen[0]

    with torch.no_grad():
        before = first_attention()
        for index, role in enumerate(LINEAR[:3]):
            weight = backbone.sites().select(role)[0].weight
            kept = weight.clone()
            weight.mul_(1.5)
            changed = [not torch.equal(a, b) for a, b in zip(first_attention(), before, strict=True)]
            assert changed == [index == i for i in range(3)]
            weight.copy_(kept)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[7], NAMES[10], NAMES[11]])
def test_gate_is_what_the_activation_sees(name):
    backbone, tokens = tiny(name), torch.randn(1, 7, 48)
    mlp, gated = backbone.model.blocks[2].mlp, "mlp.gate" in backbone.sites().roles
    seen: list = []
    mlp.act.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for role in ("mlp.gate", "mlp.up") if gated else ("mlp.up",):
        with torch.no_grad():
            before = mlp(tokens)
            backbone.sites().select(role, 2)[0].weight.mul_(1.5)
            assert not torch.equal(mlp(tokens), before)
        assert torch.equal(seen[-1], seen[-2]) == (role == "mlp.up" and gated)


@pytest.mark.parametrize("name", NAMES)
def test_adapts_at_every_projection(name):
    backbone = tiny(name)
    roles = [role for role in backbone.sites().roles if role in LINEAR]
    model = adapt(backbone, LoRA(rank=2, roles=roles))  # ends with the proof that every adapter acts
    assert len(list(model.bank["default"].children())) == 4 * len(roles)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_small_patch16_24", {}, "no model of timm; nearest: vit_small_patch16_224"),
        ("resnet50", {}, "a timm model but no ViT or Eva"),
        ("vit_tiny_patch16_224.none", {}, "no such weights; vit_tiny_patch16_224 has vit_tiny_patch16_224.augreg"),
        ("vit_small_patch16_18x2_224", {"model_args": TINY}, r"without one attn and one mlp \(ParallelThingsBlock\)"),
        ("vit_small_patch16_rope_mixed_224", {}, "differ from block to block"),
        (NAMES[0], {"image_size": (64, 100)}, "width 100 is no multiple of its patch of 16 pixels; 96 and 112 are"),
        (NAMES[0], {"image_size": 8}, "8 is no multiple of its patch of 16 pixels; 16 is"),
        (NAMES[0], {"image_size": 0}, "at least 1 pixel"),
        (NAMES[0], {"patch_size": -4}, "at least 1"),
        (NAMES[0], {"depths": [4]}, r"depths \[4\] of vit_tiny_patch16_224: it has blocks 0 to 3"),
        (NAMES[0], {"model_args": {"embed_dims": 9}}, "unexpected keyword argument 'embed_dims'"),
        (NAMES[0], {"model_args": {"embed_dim": 50, "num_heads": 3}}, "divisible by num_heads"),
        (NAMES[0], {"model_args": {"img_size": 9}}, "use the arguments bands, image_size"),
        (NAMES[0], {"checkpoint": "x.pth"}, "exclude each other"),
    ],
)
def test_wrong_requests_say_what_would_be_right(name, options, message):
    with torch.device("meta"), pytest.raises(RequestError, match=message):
        tiny(name, **options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 50, 64), "height 50 .* 48 and 64 are"), ((1, 4, 64, 64), "3 bands"), ((3, 64, 64), "got \\(3, 64, 64\\)")],
)
def test_wrong_images_are_refused(shape, message):
    with pytest.raises(RequestError, match=message):
        tiny()(torch.randn(shape))
