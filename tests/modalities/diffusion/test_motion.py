"""The video UNet: the published shapes, weights from AnimateDiff's own files, norms per frame, the content branch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modalities.diffusion.backbones.motion import MotionUNet, norm_per_frame
from shared.errors import RequestError
from tests.modalities.diffusion.conftest import tiny

NAMES = {
    "norm1": "norms.0",
    "norm2": "norms.1",
    "norm3": "ff_norm",
    "attn1": "attention_blocks.0",
    "attn2": "attention_blocks.1",
}


def original(unet: Any, *, whole: bool = False, positions: int = 24) -> dict[str, Tensor]:
    """The tensors with AnimateDiff's own names."""
    found = {}
    for name, tensor in unet.state_dict().items():
        block, _, inner = name.partition(".motion_modules.")
        if not inner:
            if whole:
                found[name] = tensor.clone()
            continue
        number, _, inner = inner.partition(".")
        parts = [NAMES.get(part) or part for part in inner.split(".")]
        inner = ".".join(parts)
        if inner.endswith("pos_embed.pe"):
            width = tensor.shape[-1]
            for i in (0, 1):
                key = f"{block}.motion_modules.{number}.temporal_transformer.transformer_blocks.0.attention_blocks.{i}"
                found[f"{key}.pos_encoder.pe"] = torch.zeros(1, positions, width)
            continue
        found[f"{block}.motion_modules.{number}.temporal_transformer.{inner}"] = tensor.clone()
    return found


def call(backbone: MotionUNet, frames: int = 3, seed: int = 0, **extra: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, frames, 16, 16, generator=generator)
    text = torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return backbone(x, torch.tensor(300), text, **extra).sample


def test_the_published_motion_modules_have_the_published_number_of_parameters():
    with torch.device("meta"):
        backbone = MotionUNet()
    motion = {n: p for n, p in backbone.named_parameters() if ".motion_modules." in n}
    assert sum(p.numel() for p in motion.values()) == 417_137_600
    assert sum(p.numel() for p in backbone.parameters()) == 417_137_600 + 859_520_964
    sites = backbone.sites()
    assert len(sites.select("attention", tags="self")) == len(sites.select("attention", tags="cross")) == 16
    assert not any("motion_modules" in site.path for site in sites)


def test_single_frames_keep_their_weights_and_the_seed_decides_the_others():
    ours = MotionUNet(config="tiny_sd15", seed=3).unet.state_dict()
    flat = tiny("tiny_sd15", seed=3).unet.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in flat.items() if "norm" not in name)
    again = MotionUNet(config="tiny_sd15", seed=3).unet.state_dict()
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    other = MotionUNet(config="tiny_sd15", seed=4).unet.state_dict()
    assert not torch.equal(ours["down_blocks.0.motion_modules.0.proj_in.weight"],
                           other["down_blocks.0.motion_modules.0.proj_in.weight"])  # fmt: skip


def test_text_is_repeated_for_every_frame():
    backbone = MotionUNet(config="tiny_sd15").eval()
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 3, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        ours = backbone(x, torch.tensor(300), text).sample
        theirs = backbone.unet(x, torch.tensor(300), text.repeat_interleave(3, 0)).sample
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, backbone(x, torch.tensor(300), text.repeat_interleave(3, 0)).sample)
    with pytest.raises(RequestError, match="25 frames: the motion modules know 24 positions"):
        backbone(x.new_zeros(1, 4, 25, 8, 8), torch.tensor(300), text[:1])


def test_the_norm_takes_each_frame_by_itself_or_all_together():
    backbone = MotionUNet(config="tiny_sd15").eval()
    library = MotionUNet(config="tiny_sd15", per_frame_norm=False).eval()
    ours, theirs = call(backbone), call(library)
    assert float((ours - theirs).abs().max()) > 1e-3
    norm_per_frame(backbone.unet, False)
    assert torch.equal(call(backbone), theirs)
    norm_per_frame(library.unet)
    assert torch.equal(call(library), ours)
    norm = backbone.unet.down_blocks[0].motion_modules[0].norm
    x = torch.randn(2, 8, 3, 5, 4)
    norm_per_frame(backbone.unet)
    torch.testing.assert_close(norm(x)[:, :, 1], norm(x[:, :, 1:2])[:, :, 0], rtol=0, atol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_with_the_original_names_fills_the_motion_modules_or_all(tmp_path, whole):
    source = MotionUNet(config="tiny_sd15", seed=5)
    torch.save({"state_dict": original(source.unet, whole=whole)}, tmp_path / "mm.ckpt")
    loaded = MotionUNet(config="tiny_sd15", seed=0, motion=str(tmp_path / "mm.ckpt"))
    fresh, given = MotionUNet(config="tiny_sd15", seed=0).unet.state_dict(), source.unet.state_dict()
    for name, tensor in loaded.unet.state_dict().items():
        wanted = given if whole or ".motion_modules." in name else fresh
        assert torch.equal(tensor, wanted[name]), name


def test_a_folder_of_the_library_fills_the_motion_modules(tmp_path):
    from diffusers.models.unets.unet_motion_model import MotionAdapter

    source = MotionAdapter(block_out_channels=(8, 16, 16, 16), motion_norm_num_groups=4, motion_num_attention_heads=2,
                           motion_max_seq_length=24, use_motion_mid_block=False)  # fmt: skip
    source.save_pretrained(tmp_path)
    loaded = MotionUNet(config="tiny_sd15", motion=str(tmp_path)).unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.state_dict().items())
    with pytest.raises(RequestError, match="motion_max_seq_length 24; the config says 32"):
        MotionUNet(config="tiny_sd15", motion=str(tmp_path), motion_config={"motion_max_seq_length": 32})


def test_motion_files_for_another_unet_are_named(tmp_path):
    state = original(MotionUNet(config="tiny_sd15").unet)
    name = next(iter(state))

    def refused(tensors: dict[str, Tensor], said: str) -> None:
        save_file(tensors, tmp_path / "mm.safetensors")
        with pytest.raises(RequestError, match=said):
            MotionUNet(config="tiny_sd15", motion=str(tmp_path / "mm.safetensors"))

    refused({n: t for n, t in state.items() if n != name}, "made for another UNet: 1 tensors missing")
    refused({**state, name.replace("down_blocks.0", "down_blocks.7"): torch.zeros(2)}, "1 tensors not used")
    refused({**state, name: torch.zeros(3)}, "1 tensors of another shape")
    refused({"conv_in.weight": torch.zeros(1)}, "no motion modules in it")
    refused(original(MotionUNet(config="tiny_sd15").unet, positions=32), "32 positions; the config says 24")
    with pytest.raises(RequestError, match="no motion modules for UNet config 'sdxl'"):
        MotionUNet(config="sdxl")
    with pytest.raises(RequestError, match="nowhere: no motion modules to load"):
        MotionUNet(config="tiny_sd15", motion=str(tmp_path / "nowhere"))
    with pytest.raises(RequestError, match="another number of blocks|different number of blocks"):
        MotionUNet(config="tiny_sd15", motion_config={"block_out_channels": (8, 16)})


# -- content branch ----------------------------------------------------------------------------------------------------


def plus(unet: Any, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """A small IP-Adapter-Plus with the published names: a Resampler of 4 layers, and matrices by number."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    image: dict[str, Tensor] = {"latents": draw(1, 4, 16), "proj_in.weight": draw(16, 12), "proj_in.bias": draw(16)}
    image |= {"proj_out.weight": draw(32, 16), "proj_out.bias": draw(32)}
    image |= {"norm_out.weight": torch.ones(32), "norm_out.bias": draw(32)}
    for i in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            image |= {f"layers.{i}.{name}.weight": torch.ones(16), f"layers.{i}.{name}.bias": draw(16)}
        image |= {f"layers.{i}.0.to_q.weight": draw(64, 16), f"layers.{i}.0.to_kv.weight": draw(128, 16)}
        image |= {f"layers.{i}.0.to_out.weight": draw(16, 64), f"layers.{i}.1.1.weight": draw(64, 16)}
        image |= {f"layers.{i}.1.3.weight": draw(16, 64)}
    paths = [n for n in unet.attn_processors if n.endswith("attn2.processor") and "motion_modules" not in n]
    layers: dict[str, Tensor] = {}
    for i, path in enumerate(paths):
        width = unet.get_submodule(path.removesuffix(".processor")).to_q.out_features
        layers |= {f"{2 * i + 1}.to_k_ip.weight": draw(width, 32), f"{2 * i + 1}.to_v_ip.weight": draw(width, 32)}
    return {"image_proj": image, "ip_adapter": layers}


def write(content: dict[str, dict[str, Tensor]], path: Path) -> str:
    if path.suffix == ".bin":
        torch.save(content, path)
    else:
        save_file({f"{part}.{name}": t for part, state in content.items() for name, t in state.items()}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_content_branch_sees_the_image_and_is_frozen_with_the_rest(tmp_path, suffix):
    content = plus(MotionUNet(config="tiny_sd15").unet)
    backbone = MotionUNet(config="tiny_sd15", content=write(content, tmp_path / f"ip{suffix}")).eval()
    assert not any(p.requires_grad for n, p in backbone.named_parameters() if "_ip" in n or "encoder_hid" in n)
    outputs = [
        call(backbone, added_cond_kwargs={"image_embeds": [x]})
        for x in (torch.zeros(2, 1, 5, 12), torch.ones(2, 1, 5, 12))
    ]
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-4
    assert backbone.blank(2)["added_cond_kwargs"]["image_embeds"][0].shape == (2, 1, 3, 12)
    for processor in backbone.unet.attn_processors.values():
        if hasattr(processor, "to_v_ip"):
            processor.scale = [0.0]
    bare = MotionUNet(config="tiny_sd15").eval()
    ours = call(backbone, added_cond_kwargs={"image_embeds": [torch.ones(2, 1, 5, 12)]})
    torch.testing.assert_close(ours, call(bare), rtol=1e-5, atol=1e-5)


def test_a_whole_file_brings_the_content_branchs_attention(tmp_path):
    source = MotionUNet(config="tiny_sd15", seed=5)
    content = plus(source.unet, 1)
    numbered = MotionUNet(config="tiny_sd15", seed=5, content=write(content, tmp_path / "ip.bin")).eval()
    state = original(source.unet, whole=True)
    paths = [n.removesuffix(".processor") for n in numbered.unet.attn_processors if n.endswith("attn2.processor")]
    for i, path in enumerate(p for p in paths if "motion_modules" not in p):
        for part in ("to_k_ip", "to_v_ip"):
            state[f"{path}.{part}.weight"] = content["ip_adapter"][f"{2 * i + 1}.{part}.weight"]
    torch.save(state, tmp_path / "ipplus.pth")
    image = write({"image_proj": content["image_proj"], "ip_adapter": {}}, tmp_path / "image.bin")
    loaded = MotionUNet(config="tiny_sd15", motion=str(tmp_path / "ipplus.pth"), content=image).eval()
    told = {"image_embeds": [torch.ones(2, 1, 5, 12)]}
    assert torch.equal(call(loaded, added_cond_kwargs=told), call(numbered, added_cond_kwargs=told))
    with pytest.raises(RequestError, match="give its image projection as content"):
        MotionUNet(config="tiny_sd15", motion=str(tmp_path / "ipplus.pth"))
    with pytest.raises(RequestError, match="0 of the 32 matrices of its attention"):
        MotionUNet(config="tiny_sd15", content=image)


def test_what_is_no_content_is_refused(tmp_path):
    content = plus(MotionUNet(config="tiny_sd15").unet)
    save_file({"unet.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="unet.weight is neither of its image_proj nor of its ip_adapter"):
        MotionUNet(config="tiny_sd15", content=str(tmp_path / "other.safetensors"))
    torch.save({"ip_adapter": content["ip_adapter"]}, tmp_path / "half.bin")
    with pytest.raises(RequestError, match="it has no image_proj"):
        MotionUNet(config="tiny_sd15", content=str(tmp_path / "half.bin"))
    del content["ip_adapter"]["5.to_k_ip.weight"]
    with pytest.raises(RequestError, match="an IP-Adapter for another UNet"):
        MotionUNet(config="tiny_sd15", content=write(content, tmp_path / "less.bin"))
