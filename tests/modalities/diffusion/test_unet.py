"""The UNet's sites, at the published shapes and on small models, and the backbone around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.backbones.unet_sites import unet_sites
from shared.errors import RequestError
from tests.modalities.diffusion.conftest import inputs, tiny


@pytest.fixture(scope="module")
def published() -> dict[str, DiffusersUNet]:
    with torch.device("meta"):
        return {name: DiffusersUNet(config=name) for name in ("sd15", "sdxl")}


@pytest.mark.parametrize(("config", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_published_shapes_have_the_published_number_of_parameters(published, config, parameters):
    assert sum(p.numel() for p in published[config].parameters()) == parameters


@pytest.mark.parametrize(
    ("config", "blocks", "resampling", "norms", "attention"), [("sd15", 9, 6, 88, 16), ("sdxl", 7, 4, 68, 70)]
)
def test_sites_of_the_published_shapes(published, config, blocks, resampling, norms, attention):
    sites = published[config].sites()
    assert sites.depth == len(sites.select("block")) == blocks
    assert len(sites.select("conv", tags="resample")) == resampling
    assert len(sites.select("norm", tags="resnet")) == norms  # a weight and a bias for each norm
    for role in ("attention", "attention.query", "attention.key", "attention.value", "attention.output"):
        assert len(sites.select(role, tags="self")) == len(sites.select(role, tags="cross")) == attention
    assert len(sites.select("mlp.up")) == len(sites.select("mlp.down")) == attention
    assert len({site.key for site in sites}) == len(sites)


def test_sites_name_the_modules_they_hold(backbone):
    modules = dict(backbone.named_modules())
    for site in backbone.sites():
        assert modules[site.path] is site.module
        assert site.parameter is None or site.weight.shape[0] == site.width


def test_every_convolution_of_resnets_and_resampling_is_a_site(backbone):
    sites = backbone.sites()
    ours = {site.path for site in sites.select("conv")}
    theirs = {name for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name for name in theirs if "resnets" in name or "samplers" in name} == ours


def test_depth_is_the_order_of_the_blocks():
    sites = tiny("tiny_sd15").sites()
    blocks = [site.path for site in sites.select("block")]
    assert blocks == [f"unet.{b}" for b in (*(f"down_blocks.{i}" for i in range(4)), "mid_block")] + [
        f"unet.up_blocks.{i}" for i in range(4)
    ]
    assert {s.path for s in sites.select("conv", depth=0, tags="resample")} == {
        "unet.down_blocks.0.downsamplers.0.conv"
    }
    assert {s.depth for s in sites if s.path.startswith("unet.mid_block")} == {4}


def test_paths_of_a_bare_unet_start_at_the_unet():
    assert "down_blocks.0.downsamplers.0.conv" in {site.path for site in unet_sites(tiny("tiny_sd15").unet)}


def test_a_layer_that_a_peft_adapter_wraps_is_looked_through():
    peft = pytest.importorskip("peft")
    unet = tiny("tiny_sd15").unet
    before = [(site.key, site.module) for site in unet_sites(unet)]
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "downsamplers.0.conv"]), "style")
    after = [(site.key, site.module) for site in unet_sites(unet)]
    assert after == before


def test_what_is_no_unet_is_refused():
    with pytest.raises(RequestError, match="Linear has no down_blocks, mid_block or up_blocks"):
        unet_sites(nn.Linear(2, 2))


def test_the_backbone_passes_through_and_is_repeatable(backbone):
    given = inputs(backbone)
    with torch.no_grad():
        assert torch.equal(backbone(**given).sample, backbone.unet(**given).sample)
    name = backbone.name
    first, again = DiffusersUNet(config=name, seed=4), DiffusersUNet(config=name, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.unet.conv_in.weight, DiffusersUNet(config=name, seed=5).unet.conv_in.weight)


def test_drawing_weights_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    DiffusersUNet(config="tiny_sdxl", seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_pretrained_weights_are_read_from_a_pipeline_folder_or_the_unet_itself(tmp_path):
    unet = tiny("tiny_sd15").unet
    unet.save_pretrained(tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "unet"):
        loaded = DiffusersUNet(config="tiny_sd15", pretrained=str(folder))
        assert torch.equal(loaded.unet.conv_in.weight, unet.conv_in.weight)
    with pytest.raises(RequestError, match=r"its UNet has sample_size 8; the config says 64"):
        DiffusersUNet(config="sd15", pretrained=str(tmp_path))
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RequestError, match="no UNet to load"):
        DiffusersUNet(config="tiny_sd15", pretrained=str(tmp_path))


def test_on_the_meta_device_nothing_is_read():
    with torch.device("meta"):
        backbone = DiffusersUNet(config="tiny_sd15", pretrained="/nowhere")
    assert next(backbone.parameters()).device.type == "meta"


def test_wrong_configs_are_named():
    with pytest.raises(RequestError, match="no UNet config 'sd3'; there are sd15, sdxl"):
        DiffusersUNet(config="sd3")
    with pytest.raises(RequestError, match="UNet config: .*channels"):
        DiffusersUNet(config={"channels": 3})
