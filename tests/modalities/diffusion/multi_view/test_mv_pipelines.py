"""MV-Adapter in whole pipelines, which stay as they are, and beside what users load there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.multi_view.mv_adapter import MVAdapter
from shared import Adapted, adapt
from tests.modalities.diffusion.conftest import inputs, shake, tiny
from tests.modalities.diffusion.pipelines import save_pipeline
from tests.modalities.diffusion.test_interop import ip_adapter

# Of numpy 2 to diffusers, when its Euler scheduler makes an array of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
MAPS = torch.linspace(0, 1, 18).view(3, 6, 1, 1)


def adapted(config: str = "tiny_sd15", unet: Any = None, **settings: Any) -> Adapted:
    unet = tiny(config).unet if unet is None else unet
    torch.manual_seed(1)
    model = adapt(unet, MVAdapter(reference=True, **settings), sites=unet_sites(unet), name="mv")
    shake(model, "mv")
    return model.eval()


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "sdxl"])
def pipeline(request, tmp_path_factory):
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(save_pipeline(tmp_path_factory.mktemp("pipe"), xl=request.param))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, wanted: dict[str, Any] | None = None, **more: Any) -> np.ndarray:
    given = {"num_images_per_prompt": 3, "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    given |= {"generator": torch.Generator().manual_seed(0), "cross_attention_kwargs": wanted} | more
    return pipe("a cat", **given).images


def test_an_untouched_pipeline_makes_views(pipeline):
    bare = images(pipeline)
    model = adapted(unet=pipeline.unet)
    try:
        wanted = {"num_views": 3, "control": MAPS, "ref_latents": torch.randn(1, 4, 8, 8)}
        made = images(pipeline, wanted)
        assert made.shape == (3, 4, 8, 8)
        assert float((made - bare).abs().max()) > 1e-3
        assert float((images(pipeline, wanted | {"num_views": 1, "ref_latents": None}) - made).abs().max()) > 1e-3
        assert torch.equal(images(pipeline, wanted), made)
        # Scales of 0 leave the pipeline as it was, at guidance or without it.
        none = wanted | {"mv_scale": 0.0, "ref_scale": 0.0, "control_scale": 0.0}
        assert torch.equal(images(pipeline, none), bare)
        lone = images(
            pipeline, wanted, guidance_scale=1.0, height=48, width=80, cross_attention_kwargs={"num_views": 3}
        )
        assert lone.shape == (3, 4, 6, 10)
    finally:
        model.remove("mv")
    assert torch.equal(images(pipeline), bare)


def test_the_reference_is_looked_at_once_a_generation(pipeline, monkeypatch):
    model = adapted(unet=pipeline.unet)
    condition: Any = model.bank["mv"]["model"]  # type: ignore[index]
    looks, real = [], condition._look
    monkeypatch.setattr(condition, "_look", lambda *a: (looks.append(1), real(*a))[1])
    try:
        for _ in range(2):
            images(pipeline, {"num_views": 3, "ref_latents": torch.ones(1, 4, 8, 8)}, num_inference_steps=3)
    finally:
        model.remove("mv")
    assert len(looks) == 2


WANTED = {"num_views": 3, "control": MAPS}


def change(model: Adapted, given: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, **more, cross_attention_kwargs=WANTED).sample


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_style_lora_changes_the_output_and_its_removal_restores_it(ours_first):
    peft = pytest.importorskip("peft")
    unet, given = tiny("tiny_sd15").unet, inputs(tiny("tiny_sd15"), batch=3)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    alone = change(adapted(), given)
    if ours_first:
        model = adapted(unet=unet)
        torch.manual_seed(5)
        unet.add_adapter(config, "style")
    else:
        torch.manual_seed(5)
        unet.add_adapter(config, "style")
        model = adapted(unet=unet)
    styled = change(model, given)
    assert float((styled - alone).abs().max()) > 1e-3
    unet.disable_adapters()
    torch.testing.assert_close(change(model, given), alone)
    unet.enable_adapters()
    assert torch.equal(change(model, given), styled)
    model.remove("mv")
    with torch.no_grad():
        assert float((unet(**given).sample - styled).abs().max()) > 1e-3


def test_a_controlnet_with_one_image_for_each_view():
    from diffusers import ControlNetModel

    model, given = adapted(), inputs(tiny("tiny_sd15"), batch=3)
    alone = change(model, given)
    control = ControlNetModel.from_unet(tiny("tiny_sd15").unet, conditioning_channels=3).eval()
    with torch.no_grad():
        for parameter in (*control.controlnet_down_blocks.parameters(), *control.controlnet_mid_block.parameters()):
            parameter.add_(0.1)
        down, mid = control(**given, controlnet_cond=torch.rand(3, 3, 64, 64), return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert float((change(model, given, **residuals) - alone).abs().max()) > 1e-3
    assert torch.equal(change(model, given), alone)


@pytest.mark.parametrize("ours_first", [True, False])
def test_an_ip_adapter_in_either_order(ours_first):
    from diffusers.loaders import UNet2DConditionLoadersMixin

    unet, given = tiny("tiny_sd15").unet, inputs(tiny("tiny_sd15"), batch=3)
    given["added_cond_kwargs"] = {"image_embeds": [torch.randn(3, 1, 16)]}
    if not ours_first:
        UNet2DConditionLoadersMixin._load_ip_adapter_weights(unet, [ip_adapter(unet)], low_cpu_mem_usage=False)
    model = adapted(unet=unet)
    if ours_first:
        UNet2DConditionLoadersMixin._load_ip_adapter_weights(unet, [ip_adapter(unet)], low_cpu_mem_usage=False)
    wanted = WANTED | {"ref_latents": torch.randn(1, 4, 8, 8)}
    with torch.no_grad():
        both = model(**given, cross_attention_kwargs=wanted).sample
        with model.disabled():
            theirs = model(**given).sample
        assert float((both - theirs).abs().max()) > 1e-3
        given["added_cond_kwargs"] = {"image_embeds": [torch.zeros(3, 1, 16)]}
        assert float((model(**given, cross_attention_kwargs=wanted).sample - both).abs().max()) > 1e-4


def test_free_u_acts_beside_it():
    model, given = adapted(), inputs(tiny("tiny_sd15"), batch=3)
    alone = change(model, given)
    model.backbone.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert float((change(model, given) - alone).abs().max()) > 1e-3
    model.backbone.disable_freeu()
    assert torch.equal(change(model, given), alone)
