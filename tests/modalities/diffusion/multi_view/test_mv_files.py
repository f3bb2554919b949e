"""Released MV-Adapter files: their layout to the key, written back as they were, and wrong files refused."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modalities.diffusion.backbones.unet import CONFIGS, DiffusersUNet
from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.multi_view.mv_adapter import (
    MVAdapter,
    is_official,
    load_official,
    official_names,
    save_official,
)
from shared import adapt
from shared.errors import RequestError
from tests.modalities.diffusion.conftest import inputs, shake, tiny


def saved(path, config="tiny_sd21", **settings):
    """A small adapter in the official layout, and what its UNet gives with it."""
    unet = tiny(config).unet
    model = adapt(unet, MVAdapter(**settings), name="mv", sites=unet_sites(unet))
    shake(model, "mv")
    save_official(model, path)
    return model.eval()


def output(model, config="tiny_sd21"):
    wanted = {"num_views": 6, "control": torch.full((6, 6, 1, 1), 0.3)}
    with torch.no_grad():
        return model(**inputs(tiny(config), batch=6), cross_attention_kwargs=wanted).sample


@pytest.mark.parametrize(
    ("config", "reference", "copies"),
    [("sdxl", False, 350), ("sdxl", True, 700), ("sd21", False, 80), ("sd21", True, 160)],
)
def test_the_published_layout(config, reference, copies):
    with torch.device("meta"):
        backbone = DiffusersUNet(config=config)
    names = official_names(MVAdapter(reference=reference), backbone.sites())
    encoder = [n for n in names if n.startswith("adapter.")]
    assert len(names) - len(encoder) == copies
    assert len(encoder) == 38
    block = "down_blocks.2.attentions.1.transformer_blocks.0.attn1.processor"
    assert {f"{block}.to_q_mv.weight", f"{block}.to_out_mv.0.weight", f"{block}.to_out_mv.0.bias"} <= names.keys()
    assert ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_k_ref.weight" in names) == reference
    assert {"adapter.conv_in.weight", "adapter.body.1.in_conv.weight", "adapter.body.2.in_conv.bias"} <= names.keys()
    assert "adapter.body.3.resnets.1.block2.weight" in names
    assert is_official(list(names))
    assert not is_official(encoder)


@pytest.mark.parametrize("settings", [{"reference": True}, {"views": "row_column"}, {"condition": False}])
@pytest.mark.parametrize("config", ["tiny_sd21", "tiny_sdxl"])
def test_written_and_read_again(tmp_path, settings, config):
    path = tmp_path / "mvadapter.safetensors"
    model = saved(path, config, **settings)
    other = load_official(tiny(config).unet, path).eval()
    ours, theirs = (list(m.bank[n].state_dict().values()) for m, n in ((model, "mv"), (other, "mv_adapter")))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    method = other.methods["mv_adapter"]
    assert {n: getattr(method, n) for n in settings} == settings
    if settings != {"condition": False}:
        assert torch.equal(output(other, config), output(model, config))
    save_official(other, tmp_path / "again.safetensors")
    first, second = (load_file(tmp_path / n) for n in ("mvadapter.safetensors", "again.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_released_file_says_by_its_name_how_views_attend(tmp_path):
    saved(tmp_path / "ours.safetensors", "tiny_sdxl")
    tensors = load_file(tmp_path / "ours.safetensors")
    for name, views in (("mvadapter_tg2mv_sdxl", "row_column"), ("mvadapter_t2mv_sdxl", "row")):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / f"{name}.safetensors")
        model = load_official(tiny("tiny_sdxl").unet, tmp_path / name)
        assert model.methods["mv_adapter"].views == views
    save_file(tensors, tmp_path / name / "second.safetensors")
    with pytest.raises(RequestError, match="2 .safetensors files in this folder"):
        load_official(tiny("tiny_sdxl").unet, tmp_path / name)


def meta(config, **more):
    with torch.device("meta"):
        return DiffusersUNet(config=CONFIGS[config] | more)


def shaped(config):
    """The shapes of a released text model's tensors by their keys."""
    method = MVAdapter()
    model = adapt(meta(config), method)
    names = official_names(method, model.sites())
    return {key: tuple(model.bank["default"][s.key].get_parameter(n).shape) for key, (s, n) in names.items()}


def test_a_file_for_another_base_is_named_as_such(tmp_path, monkeypatch):
    from shared import weights

    path = tmp_path / "mvadapter_i2mv_sd21.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    shapes = shaped("sd21")
    monkeypatch.setattr(weights, "read", lambda _: {n: torch.zeros(1).expand(s) for n, s in shapes.items()})
    with pytest.raises(
        RequestError, match=r"made for SD2.1 \(16 self-attentions, .*; this UNet is SDXL \(70, 640 to 1280"
    ):
        load_official(meta("sdxl"), path)
    with pytest.raises(RequestError, match="reads text of width 1024; this one's text is 768 wide"):
        load_official(meta("sd15"), path)
    assert load_official(meta("sd21"), path).count()["adapter"] == 127_496_320
    shapes = shaped("sdxl")
    with pytest.raises(
        RequestError, match=r"made for SDXL \(70 self-attentions, .*; this UNet is SD2.1 \(16, 320 to 1280"
    ):
        load_official(meta("sd21"), path)


def test_wrong_files_change_nothing(tmp_path):
    path = tmp_path / "mv.safetensors"
    saved(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    unet = tiny("tiny_sd21").unet
    trainable = [p.requires_grad for p in unet.parameters()]
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_mv.0.bias"

    def refused(changed, message, metadata=told):
        save_file({n: t.contiguous() for n, t in changed.items()}, path, metadata)
        with pytest.raises(RequestError, match=message):
            load_official(unet, path)
        assert not any("_port" in m.__dict__ for m in unet.modules())
        assert [p.requires_grad for p in unet.parameters()] == trainable

    refused({**tensors, "adapter.extra.weight": torch.zeros(1)}, "1 of its 117 keys not used .first: adapter.extra")
    refused({n: t for n, t in tensors.items() if n != key}, f"1 missing .first: {key}")
    refused({**tensors, key: torch.zeros(1)}, "1 tensors of another shape .*bias .1,., here .16,.")
    refused({**tensors, key: torch.full((16,), torch.nan)}, "to_out_mv.0.bias holds numbers that are not finite")
    refused({n: t for n, t in tensors.items() if n.startswith("adapter.")}, "no MV-Adapter: none of its 36 keys")
    refused(tensors, "reads text of width 64; this one's text is 32 wide", told | {"cross_attention_dim": "64"})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RequestError, match="mv.safetensors"):
        load_official(unet, path)
    with pytest.raises(RequestError, match="no such file"):
        load_official(unet, tmp_path / "absent.safetensors")
