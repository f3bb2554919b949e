"""An adapted UNet beside ControlNet, IP-Adapter, FreeU, a peft LoRA and a sampler that holds the UNet itself.

In each case the reference is a UNet whose own weights were overwritten with the adapted ones.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.pipelines import attach, attached, detach
from modalities.diffusion.res_adapter import ResAdapter, save_official
from shared import Adapted, adapt
from tests.modalities.diffusion import elastic
from tests.modalities.diffusion.conftest import inputs, shake, tiny
from tests.modalities.diffusion.pipelines import save_pipeline


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


def test_elastic_diffusion_samples_other_sizes_from_the_adapted_unet():
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    model, reference = adapted_and_reference()
    text = inputs(tiny("tiny_sd15"))["encoder_hidden_states"][:1]
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    latent = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    sizes = set()

    def sampled(unet: Any) -> torch.Tensor:
        def seen(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.add(tuple(x.shape[-2:]))
            return unet(x, *args, **kwargs)

        return elastic.sample(seen, schedule, text, torch.zeros_like(text), latent)

    ours = sampled(model.backbone)
    assert ours.shape == latent.shape
    assert sizes == {(4, 8), (8, 8)}  # shrunken, and windows
    torch.testing.assert_close(ours, sampled(reference), rtol=1e-4, atol=1e-4)
    with model.disabled():
        assert float((ours - sampled(model.backbone)).abs().max()) > 1e-2


# -- any two of what users combine, on whole pipelines -----------------------------------------------------------------


class Companions:
    """A small pipeline and what can be put on it, each with its undoing; ``image`` runs it at a size of its own."""

    def __init__(self, folder: Path, adapter: Path):
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        self.pipe: Any = DiffusionPipeline.from_pretrained(folder)
        self.adapter, self.scheduler, self.given = adapter, self.pipe.scheduler, {}
        self.names: list[str] = []

    def on(self, name: str) -> None:
        getattr(self, f"_{name}")()

    def off(self) -> None:
        if attached(self.pipe):
            detach(self.pipe)
        self.pipe.unload_lora_weights()
        if self.pipe.unet.encoder_hid_proj is not None:
            self.pipe.unload_ip_adapter()
        self.pipe.disable_freeu()
        self.pipe.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        self.given, self.names = {}, []

    def image(self) -> torch.Tensor:
        from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline

        pipe, given = self.pipe, dict(self.given)
        if "controlnet" in given:
            parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
            pipe = StableDiffusionControlNetPipeline(
                **parts, controlnet=given.pop("controlnet"), requires_safety_checker=False
            )
        pipe.set_progress_bar_config(disable=True)
        made = pipe(
            "a cat", width=96, height=64, num_inference_steps=1, guidance_scale=1.5, output_type="np",
            generator=torch.Generator().manual_seed(0), **given,
        )  # fmt: skip
        return torch.tensor(made.images)

    def _ours(self) -> None:
        attach(self.pipe, self.adapter)

    def _style(self) -> None:
        self._lora("style", 1)

    def _lcm(self) -> None:
        from diffusers import LCMScheduler

        self._lora("lcm", 2)
        self.pipe.scheduler = LCMScheduler.from_config(self.pipe.scheduler.config)

    def _lora(self, name: str, seed: int) -> None:
        """In kohya's format, on attention and, as ours is, on a convolution."""
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for stem, down, up in (
            ("mid_block_attentions_0_transformer_blocks_0_attn1_to_q", (2, 16), (16, 2)),
            ("down_blocks_0_downsamplers_0_conv", (2, 8, 3, 3), (8, 2, 1, 1)),
        ):
            state[f"lora_unet_{stem}.lora_down.weight"] = 0.5 * torch.randn(down, generator=generator)
            state[f"lora_unet_{stem}.lora_up.weight"] = 0.5 * torch.randn(up, generator=generator)
            state[f"lora_unet_{stem}.alpha"] = torch.tensor(2.0)
        self.pipe.load_lora_weights(state, adapter_name=name)
        self.names.append(name)
        self.pipe.set_adapters(self.names)

    def _controlnet(self) -> None:
        from diffusers import ControlNetModel

        torch.manual_seed(0)
        control = ControlNetModel.from_unet(tiny("tiny_sd15").unet, conditioning_channels=3).eval()
        with torch.no_grad():
            for parameter in control.controlnet_down_blocks.parameters():
                parameter.add_(0.1)
        self.given |= {"controlnet": control, "image": torch.rand(1, 3, 64, 96)}

    def _ip(self) -> None:
        self.pipe.load_ip_adapter(ip_adapter(self.pipe.unet), subfolder="", weight_name="x", image_encoder_folder=None)
        self.given["ip_adapter_image_embeds"] = [torch.ones(2, 1, 16)]

    def _freeu(self) -> None:
        self.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@pytest.fixture(scope="module")
def companions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    backbone = tiny("tiny_sd15")
    model = adapt(backbone, ResAdapter(rank=4))
    shake(model, "default")
    save_official(model, folder / "adapter")
    found = Companions(save_pipeline(folder), folder / "adapter")
    found.base = found.image()
    found.weights = {name: tensor.clone() for name, tensor in found.pipe.unet.state_dict().items()}
    return found


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:Already found a `peft_config`:UserWarning"
)
@pytest.mark.parametrize("pair", list(itertools.combinations(("ours", "style", "lcm", "controlnet", "ip", "freeu"), 2)))
def test_any_two_work_together_in_either_order_and_come_off(companions, pair):
    images = []
    for order in (pair, pair[::-1]):
        try:
            for name in order:
                companions.on(name)
            images.append(companions.image())
        finally:
            companions.off()
    assert images[0].isfinite().all()
    torch.testing.assert_close(images[0], images[1], rtol=1e-4, atol=1e-4)
    assert float((images[0] - companions.base).abs().max()) > 1e-3
    state = companions.pipe.unet.state_dict()
    assert list(state) == list(companions.weights)
    assert all(torch.equal(tensor, companions.weights[name]) for name, tensor in state.items())
    assert torch.equal(companions.image(), companions.base)
