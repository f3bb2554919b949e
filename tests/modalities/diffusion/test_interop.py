"""An adapted UNet beside ControlNet, IP-Adapter, FreeU, a peft LoRA and a sampler that holds the UNet itself.

In each case the reference is a UNet whose own weights were overwritten with the adapted ones.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from modalities.diffusion.backbones.unet import unet_sites
from modalities.diffusion.res_adapter import ResAdapter
from shared import Adapted, adapt
from tests.modalities.diffusion.conftest import inputs, shake, tiny


def adapted_and_reference(strength: float = 0.7) -> tuple[Adapted, Any]:
    backbone = tiny("tiny_sd15")
    reference = copy.deepcopy(backbone.unet)
    model = adapt(backbone.unet, ResAdapter(rank=4), sites=unet_sites(backbone.unet), name="res")
    shake(model, "res")
    model.activate("res", strength=strength)
    with torch.no_grad():
        for path, port in model.hosts().items():
            for parameter in port.on:
                host = backbone.unet.get_submodule(path)
                reference.get_submodule(path)._parameters[parameter].copy_(getattr(host, parameter))
    return model, reference


def agree(model: Adapted, reference: Any, given: dict[str, Any], plain: dict[str, Any]) -> None:
    """Both give the same; the adapter and the companion each change the output."""
    with torch.no_grad():
        ours, theirs = model(**given).sample, reference(**given).sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert float((ours - model(**plain).sample).abs().max()) > 1e-3
        with model.disabled():
            assert float((ours - model(**given).sample).abs().max()) > 1e-3


def test_residuals_of_a_controlnet():
    from diffusers import ControlNetModel

    model, reference = adapted_and_reference()
    given = inputs(tiny("tiny_sd15"), 8, 16)
    control = ControlNetModel.from_unet(reference, conditioning_channels=3).eval()
    with torch.no_grad():
        for parameter in (*control.controlnet_down_blocks.parameters(), *control.controlnet_mid_block.parameters()):
            parameter.add_(0.1)
        image = torch.rand(1, 3, 64, 128)
        down, mid = control(**given, controlnet_cond=image, return_dict=False)
    extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    agree(model, reference, {**given, **extra}, given)


def ip_adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights in the published layout: the image projection and two matrices for each cross attention."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    layers = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            layers |= {f"{index}.to_k_ip.weight": draw(width, 32), f"{index}.to_v_ip.weight": draw(width, 32)}
    projection = {"proj.weight": draw(4 * 32, 16), "proj.bias": draw(4 * 32)}
    projection |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    return {"image_proj": projection, "ip_adapter": layers}


@pytest.mark.parametrize("ours_first", [True, False])
def test_processors_of_an_ip_adapter(ours_first):
    from diffusers.loaders import UNet2DConditionLoadersMixin

    model, reference = adapted_and_reference()
    unet = model.backbone
    state = model.trained_state()
    if not ours_first:
        model.remove("res")
    for each in (unet, reference):
        UNet2DConditionLoadersMixin._load_ip_adapter_weights(each, [ip_adapter(each)], low_cpu_mem_usage=False)
        each.requires_grad_(False)
    if not ours_first:
        model = adapt(unet, ResAdapter(rank=4), sites=unet_sites(unet), name="res")
        model.load_trained_state(state)
        model.activate("res", strength=0.7)
    given = inputs(tiny("tiny_sd15"))
    given["added_cond_kwargs"] = {"image_embeds": [torch.randn(1, 1, 16)]}
    with torch.no_grad():
        ours = model(**given).sample
        torch.testing.assert_close(ours, reference(**given).sample, rtol=1e-5, atol=1e-6)
        given["added_cond_kwargs"] = {"image_embeds": [torch.zeros(1, 1, 16)]}
        assert float((ours - model(**given).sample).abs().max()) > 1e-4


def test_free_u():
    model, reference = adapted_and_reference()
    given = inputs(tiny("tiny_sd15"), 16, 8)
    with torch.no_grad():
        before = model(**given).sample
        for each in (model.backbone, reference):
            each.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        ours = model(**given).sample
        torch.testing.assert_close(ours, reference(**given).sample, rtol=1e-5, atol=1e-6)
    assert float((ours - before).abs().max()) > 1e-3


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_style_lora_of_peft(ours_first):
    peft = pytest.importorskip("peft")
    model, reference = adapted_and_reference()
    unet = model.backbone
    state = model.trained_state()
    if not ours_first:
        model.remove("res")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "downsamplers.0.conv"], init_lora_weights=False)
    for each in (unet, reference):
        torch.manual_seed(5)
        each.add_adapter(config, "style")
        each.requires_grad_(False)
    if not ours_first:
        model = adapt(unet, ResAdapter(rank=4), sites=unet_sites(unet), name="res")
        model.load_trained_state(state)
        model.activate("res", strength=0.7)
    given = inputs(tiny("tiny_sd15"))
    with torch.no_grad():
        ours = model(**given).sample
        torch.testing.assert_close(ours, reference(**given).sample, rtol=1e-5, atol=1e-5)
        unet.disable_adapters()
        assert float((ours - model(**given).sample).abs().max()) > 1e-3
        unet.enable_adapters()
        model.remove("res")
        assert float((ours - unet(**given).sample).abs().max()) > 1e-3


def test_a_sampler_that_holds_the_unet_sees_the_adapter_at_other_sizes():
    """As ElasticDiffusion works: global direction on a shrunken latent, windows of the full one, nothing but calls."""
    model, reference = adapted_and_reference()
    text = inputs(tiny("tiny_sd15"))["encoder_hidden_states"]

    def estimate(unet: Any, latent: torch.Tensor) -> torch.Tensor:
        def call(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return unet(x, torch.tensor([500]), encoder_hidden_states=tokens).sample

        small = torch.nn.functional.interpolate(latent, scale_factor=0.5, mode="nearest")
        direction = call(small, text) - call(small, torch.zeros_like(text))
        direction = torch.nn.functional.interpolate(direction, scale_factor=2, mode="nearest")
        windows = [call(latent[..., x : x + 8], torch.zeros_like(text)) for x in range(0, latent.shape[-1], 8)]
        return torch.cat(windows, -1) + 10 * direction

    latent = torch.randn(1, 4, 16, 24)
    with torch.no_grad():
        ours = estimate(model.backbone, latent)
        torch.testing.assert_close(ours, estimate(reference, latent), rtol=1e-4, atol=1e-5)
        with model.disabled():
            assert float((ours - estimate(model.backbone, latent)).abs().max()) > 1e-3
