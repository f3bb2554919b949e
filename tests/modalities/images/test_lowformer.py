"""LowFormer: timm's numbers, published counts, sites that are what they say, frozen batch norms, the authors' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from modalities.images.backbones import LowFormer
from modalities.remote_sensing.heads import LightDecoder, SemanticFPN
from shared import adapt
from shared.errors import RequestError
from shared.methods import AdaptFormer, LoRA

TINY = {"width_list": [4, 8, 8, 12, 16], "depth_list": [0, 1, 1, 1, 2]}
COUNTS = {  # of the backbone alone, and with timm's classifier
    "b0": (9_642_384, 14_100_472, (32, 64, 128, 256)),
    "b1": (13_478_224, 17_936_312, (32, 64, 128, 256)),
    "b15": (24_775_780, 33_982_028, (40, 80, 160, 320)),
    "b3": (52_235_616, 57_086_920, (64, 128, 256, 512)),
    "e1": (9_690_020, 18_896_268, (40, 80, 160, 320)),
    "e2": (17_899_360, 22_750_664, (64, 128, 256, 512)),
    "e3": (36_465_504, 41_316_808, (64, 128, 256, 512)),
}


def tiny(name: str = "lowformer_b1", bands: int = 3, **options: Any) -> LowFormer:
    return LowFormer(bands, name=name, weights="random", model_args=TINY, **options).eval()


def perturbed(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("variant", COUNTS)
def test_counts_and_channels_are_those_published(variant: str) -> None:
    alone, whole, channels = COUNTS[variant]
    with torch.device("meta"):
        backbone = LowFormer(3, name=f"lowformer_{variant}", weights="random")
        full = timm.create_model(f"lowformer_{variant}")
    assert sum(p.numel() for p in backbone.parameters()) == alone
    assert sum(p.numel() for p in full.parameters()) == whole
    assert backbone.channels == channels


def test_maps_are_timms_features_at_strides_of_4_to_32() -> None:
    ours, image = tiny(seed=3), torch.randn(2, 3, 64, 96)
    theirs = timm.create_model("lowformer_b1", features_only=True, **TINY).eval()
    renamed = dict(zip(theirs.state_dict(), ours.model.state_dict().values(), strict=True))
    theirs.load_state_dict(renamed)
    with torch.no_grad():
        features = ours(image)
        for stage, (found, expected) in enumerate(zip(features.maps, theirs(image), strict=True)):
            assert torch.equal(found, expected)
            assert found.shape == (2, ours.channels[stage], 64 >> (stage + 2), 96 >> (stage + 2))
    torch.testing.assert_close(features.summary, features.maps[-1].mean((2, 3)))


def test_sizes_that_the_strides_do_not_divide_pass_backbone_adapters_and_heads() -> None:
    model = adapt(tiny(), LoRA(rank=2, roles=("attention.qkv", "mlp.up", "mlp.down", "conv")))
    features = model(torch.randn(1, 3, 250, 250))
    assert [x.shape[2] for x in features.maps] == [63, 32, 16, 8]
    for head in (
        LightDecoder(model.backbone.channels, 5, width=8),
        SemanticFPN(model.backbone.channels, 5, width=8, inner=8),
    ):
        assert head(features, (250, 250)).shape == (1, 5, 250, 250)


def test_frozen_it_keeps_every_batch_norm_and_gets_no_gradient() -> None:
    model = adapt(tiny(), LoRA(rank=2, roles=("attention.qkv",))).train()
    before = {name: tensor.clone() for name, tensor in model.backbone.named_buffers()}
    assert len(before) > 10
    model(torch.randn(2, 3, 64, 64)).summary.square().sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.named_buffers())
    frozen = [p for n, p in model.backbone.named_parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(p.grad is not None for p in model.trainable().values())


@pytest.mark.parametrize("method", [LoRA(rank=2, roles=("attention.qkv", "mlp.up", "conv")), AdaptFormer(width=4)])
def test_adapters_that_start_at_zero_leave_all_maps_bit_equal_and_then_change_them(method: Any) -> None:
    backbone, image = tiny(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        bare = backbone(image).maps
        model = adapt(backbone, method).eval()
        assert all(torch.equal(a, b) for a, b in zip(model(image).maps, bare, strict=True))
        changed = perturbed(model)(image).maps
    assert not torch.allclose(changed[-1], bare[-1], atol=1e-4)


def test_lora_merged_into_the_pointwise_projection_gives_the_same() -> None:
    model, image = adapt(tiny(), LoRA(rank=3, roles=("attention.qkv",))), torch.randn(2, 3, 64, 64)
    perturbed(model).eval()
    with torch.no_grad():
        apart = model(image).maps[-1]
        model.merge()
        torch.testing.assert_close(model(image).maps[-1], apart, atol=1e-5, rtol=1e-5)


def test_variants_without_attention_have_convolutions_alone() -> None:
    for name in ("lowformer_e1", "lowformer_e2"):
        sites = tiny(name).sites()
        assert set(sites.roles) == {"model", "conv", "norm", "block"}
        model = adapt(tiny(name), LoRA(rank=2, roles=("conv",)))
        assert set(model.bank["default"]) == {s.key for s in sites if s.role == "conv"}
    roles = tiny("lowformer_e3").sites().roles
    assert "attention.qkv" in roles
    assert not {"mlp", "mlp.up"} & set(roles)
    with pytest.raises(RequestError, match="no site with role 'attention.qkv'"):
        adapt(tiny("lowformer_e1"), LoRA(rank=2, roles=("attention.qkv",)))


def test_every_site_is_the_module_it_names() -> None:
    backbone = tiny()
    for site in backbone.sites():
        assert backbone.get_submodule(site.path) is site.module
        if site.role not in ("model", "block", "attention", "mlp"):
            assert site.weight.shape[0] == site.width
    with torch.device("meta"):
        sites = LowFormer(3, weights="random").sites()
    assert sum(site.role == "attention" for site in sites) == sum(site.role == "mlp" for site in sites) == 10


def test_the_adapter_file_lists_dotted_paths_and_holds_no_backbone(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = perturbed(adapt(tiny(), LoRA(rank=2, roles=("attention.qkv",))))
    assert all(name.startswith("adapter.default.model/stages/") for name in model.trainable())
    model.save(tmp_path / "adapter.safetensors")
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert {name.replace("adapter.", "adapter.default.", 1) for name in file.keys()} == set(model.trainable())  # noqa: SIM118


def test_weights_by_timms_and_by_the_authors_names_fill_it(tmp_path: Path) -> None:
    source = timm.create_model("lowformer_b1", num_classes=7, head_widths=(8, 9), **TINY).eval()
    state = source.state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    authors = {_published(name): tensor for name, tensor in state.items()}
    save_file(authors, tmp_path / "authors.safetensors")
    save_file({n: t for n, t in authors.items() if n.startswith("backbone.")}, tmp_path / "headless.safetensors")
    image = torch.randn(1, 3, 64, 64)
    for file in ("timm", "authors", "headless"):
        checkpoint = str(tmp_path / f"{file}.safetensors")
        ours = LowFormer(3, checkpoint=checkpoint, model_args=TINY).eval()
        with torch.no_grad():
            assert torch.equal(ours(image).maps[-1], source.forward_features(image))
    four = LowFormer(4, checkpoint=str(tmp_path / "timm.safetensors"), model_args=TINY)
    assert four.model.stem[0].conv.weight.shape[1] == 4


def _published(name: str) -> str:
    """A tensor's name in the authors' files."""
    head = {
        "in_conv": "head.op_list.0",
        "pre_classifier.0": "head.op_list.2.linear",
        "pre_classifier.1": "head.op_list.2.norm",
        "classifier": "head.op_list.3.linear",
    }
    if old := next((key for key in head if name.startswith(key)), None):
        return name.replace(old, head[old])
    part, index, rest = name.split(".", 2)
    if part == "stem":
        return f"backbone.input_stem.op_list.{index}.{rest}"
    block, rest = rest.split(".", 1)
    for ours, theirs in (("attn.", "total.0.0."), ("mlp.", "total.0.1."), ("local.", "total.1.")):
        rest = theirs + rest.removeprefix(ours) if rest.startswith(ours) else rest
    rest = (
        rest.replace("conv_proj.conv", "conv_proj.0")
        .replace("conv_proj.norm", "conv_proj.1")
        .replace("pwise.", "pwise.0.")
    )
    return f"backbone.stages.{index}.op_list.{block}.{rest}"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="lowformer_c1: no LowFormer of timm; nearest: lowformer_"):
        LowFormer(3, name="lowformer_c1", weights="random")
    with pytest.raises(RequestError, match="use the arguments bands and weights"):
        LowFormer(3, weights="random", model_args={"in_chans": 4})
    with pytest.raises(RequestError, match=r"images must be \(batch, 3 bands, height, width\)"):
        tiny()(torch.zeros(1, 4, 64, 64))
    save_file({"stem.0.conv.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(RequestError, match="missing"):
        LowFormer(3, checkpoint=str(tmp_path / "part.safetensors"), model_args=TINY)
