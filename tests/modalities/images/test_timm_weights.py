"""Weights of TimmViT: from files in timm's and the authors' naming, resampled as timm does, strictly and explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from modalities.images.backbones import TimmViT
from shared.errors import RequestError

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
VIT, DINOV2, REG4, DINOV3 = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
)
State = dict[str, Tensor]


def make(name: str = VIT, bands: int = 3, **options) -> TimmViT:
    arguments: dict[str, Any] = {"image_size": 64, "patch_size": 16, "model_args": TINY} | options
    return TimmViT(bands, name=name, **arguments).eval()


def state_of(backbone: TimmViT) -> State:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def same(backbone: TimmViT, state: State) -> bool:
    mine = backbone.model.state_dict()
    return mine.keys() == state.keys() and all(torch.equal(mine[n], state[n]) for n in mine)


@pytest.fixture
def state() -> State:
    return state_of(make(weights="random", seed=5))


def saved(state: dict, path: Path) -> str:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


WRAPPED: dict[str, Callable[[State], dict]] = {
    "plain.safetensors": dict,
    "head.pth": lambda s: s | {"head.weight": torch.ones(9, 48), "head.bias": torch.ones(9)},
    "module.pt": lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}, "epoch": 3},
    "backbone.bin": lambda s: {"model": {f"module.backbone.{n}": t for n, t in s.items()}},
    "half.safetensors": lambda s: {n: t.half().float().half() for n, t in s.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_file_fills_the_model_whatever_is_around_its_tensors(name, state, tmp_path):
    state = {n: t.half().float() for n, t in state.items()}
    file = saved(WRAPPED[name](state), tmp_path / name)
    backbone = make(checkpoint=file)
    assert backbone.source == f"file: {file}"
    assert same(backbone, state)


def test_patch_kernel_and_positions_are_resampled(tmp_path):
    old = state_of(make(DINOV2, image_size=518, patch_size=14, weights="random", seed=5))  # the published 37 x 37 grid
    backbone = make(DINOV2, image_size=(64, 96), patch_size=16, checkpoint=saved(old, tmp_path / "old.safetensors"))
    new = state_of(backbone)
    kernel = resample_patch_embed(old["patch_embed.proj.weight"], [16, 16])
    positions = resample_abs_pos_embed(old["pos_embed"], [4, 6], [37, 37])
    assert new["pos_embed"].shape == (1, 25, 48)
    assert torch.equal(new["patch_embed.proj.weight"], kernel)
    assert torch.equal(new["pos_embed"], positions)
    assert torch.equal(new["blocks.1.mlp.fc2.weight"], old["blocks.1.mlp.fc2.weight"])


def test_a_kernel_of_twice_the_size_sees_an_enlarged_image_alike(tmp_path):
    small = make(patch_size=8, image_size=32, weights="random", seed=5)
    large = make(patch_size=16, image_size=64, checkpoint=saved(state_of(small), tmp_path / "small.pth"))
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4), size=(32, 32), mode="bilinear")
    doubled = torch.nn.functional.interpolate(image, scale_factor=2, mode="bicubic", antialias=True)
    with torch.no_grad():
        a, b = small(image).maps[-1], large(doubled).maps[-1]
    assert float((a - b).norm() / a.norm()) < 0.1


@pytest.mark.parametrize("bands", [1, 2, 6])
def test_other_bands_than_rgb_are_adapted_as_timm_does(bands, state, tmp_path):
    kernel = make(bands=bands, checkpoint=saved(state, tmp_path / "rgb.pth")).model.patch_embed.proj.weight
    rgb = state["patch_embed.proj.weight"]
    expected = rgb.sum(1, keepdim=True) if bands == 1 else rgb.repeat(1, 2, 1, 1)[:, :bands] * (3 / bands)
    torch.testing.assert_close(kernel.detach(), expected)
    own = saved(state_of(make(bands=bands, weights="random", seed=9)), tmp_path / "own.pth")
    assert make(bands=bands, checkpoint=own).source == f"file: {own}"
    with pytest.raises(RequestError, match=f"its patch kernel takes {4} bands, the backbone {bands}"):
        make(bands=bands, checkpoint=saved(state_of(make(bands=4, weights="random")), tmp_path / "four.pth"))


def test_the_authors_names_of_dinov2_with_registers(tmp_path):
    backbone = make(REG4, weights="random", seed=5)
    state, theirs = state_of(backbone), {}
    for name, tensor in state.items():
        theirs[name.replace("reg_token", "register_tokens")] = tensor
    # The authors keep a position for the class token; timm adds it to the token.
    theirs["pos_embed"] = torch.cat([torch.full((1, 1, 48), 0.5), state["pos_embed"]], 1)
    theirs["mask_token"] = torch.zeros(1, 48)
    loaded = make(REG4, checkpoint=saved(theirs, tmp_path / "dinov2_vits14_reg4_pretrain.pth"))
    assert same(loaded, state | {"cls_token": state["cls_token"] + 0.5})


def test_the_authors_names_of_dinov3(tmp_path, capsys):
    backbone = make(DINOV3, weights="random", seed=5)
    state, theirs = state_of(backbone), {}
    for name, tensor in state.items():
        for ours, official in (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens")):
            name = name.replace(ours, official)
        theirs[name] = tensor
    theirs |= {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}
    theirs |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(144) for i in range(2)}
    assert same(make(DINOV3, checkpoint=saved(theirs, tmp_path / "dinov3_vits16_pretrain.pth")), state)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if "fc1" not in n}, r"4 missing \(blocks.0.mlp.fc1.weight, "),
        (lambda s: s | {"decoder.x": torch.ones(2)}, r"30 of the 30 .*; 1 unexpected \(decoder.x\)"),
        (
            lambda s: {f"vit.{n}": t for n, t in s.items()},
            r"0 of the 30 tensors of vit_tiny.*30 missing.*30 unexpected",
        ),
        (lambda s: s | {"norm.bias": torch.ones(7)}, r"1 of another shape \(norm.bias \(7,\) for \(48,\)\)"),
        (lambda s: s | {"pos_embed": torch.ones(1, 1 + 15, 48)}, "timm cannot bring it into the form of vit_tiny"),
        (
            lambda s: s | {"norm.bias": torch.full((48,), torch.nan)},
            "tensor norm.bias holds numbers that are not finite",
        ),
    ],
)
def test_a_file_that_does_not_fit_says_what_is_wrong_and_changes_nothing(change, message, state, tmp_path):
    file = saved(change(state), tmp_path / "wrong.pth")
    with pytest.raises(RequestError, match=message) as caught:
        make(checkpoint=file)
    assert "wrong.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pretrained_comes_from_the_hub_cache_by_name(state, tmp_path, monkeypatch):
    file, asked = saved(state, tmp_path / "model.safetensors"), []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: asked.append(args) or file)
    backbone = make("vit_tiny_patch16_224.augreg_in21k")
    assert backbone.source == "timm hub: timm/vit_tiny_patch16_224.augreg_in21k"
    assert asked[0] == ("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors")
    assert same(backbone, state)


def test_without_a_network_the_error_says_how_to_get_the_weights(monkeypatch):
    def offline():
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("huggingface_hub.get_session", offline)
    with pytest.raises(RequestError) as caught:
        make("vit_large_patch14_dinov2")
    assert str(caught.value) == (
        "vit_large_patch14_dinov2: its weights cannot be fetched (OSError: Name or service not known); where there is "
        "a network run `hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors` and add checkpoint=FILE "
        "with the path it prints"
    )


def test_names_without_hub_weights_say_so():
    with pytest.raises(RequestError, match=r"download https://.*ijepa.*\.tar and give it as checkpoint=FILE"):
        make("vit_giant_patch16_gap_224")
    with pytest.raises(RequestError, match="timm has no weights for it; give checkpoint=FILE or weights='random'"):
        make("vit_small_patch16_36x1_224")
