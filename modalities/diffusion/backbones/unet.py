"""The text-to-image UNets of diffusers: the published shapes, and a frozen backbone around one of them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from modalities.diffusion.backbones.unet_sites import unet_sites
from shared.backbone import Backbone
from shared.errors import RequestError
from shared.sites import Sites

# What the published models set beyond the defaults of diffusers' UNet2DConditionModel (their unet/config.json), and a
# small model of each kind for trials, with the same block types.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sd21": {
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "tiny_sd15": {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
    "tiny_sd21": {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4, 4, 4),
        "use_linear_projection": True,
    },
    "tiny_sdxl": {
        "sample_size": 8,
        "block_out_channels": (8, 16, 32),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 4),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}
CONFIGS["sd21_base"] = {**CONFIGS["sd21"], "sample_size": 64}


class DiffusersUNet(Backbone):
    """A text-to-image UNet of diffusers; calling it is calling the library's model, and ``unet`` is that model.

    bands: channels of the images, for a config that leaves ``in_channels`` and ``out_channels`` open; those named
    below take the 4 channels of latents, and so does an open one without bands.
    config: the name of a published shape or small trial shape (a key of ``CONFIGS``), or the arguments of diffusers'
    ``UNet2DConditionModel``.
    pretrained: a folder or a Hugging Face name that holds a pipeline with such a UNet, or the UNet itself; None draws
    random weights. On the meta device nothing is read.
    seed: of the random weights.

    Raises RequestError where the config is unknown or refused by diffusers, or the pretrained UNet has another one.
    """

    def __init__(
        self,
        bands: int | None = None,
        *,
        config: str | dict[str, Any] = "sd15",
        pretrained: str | None = None,
        seed: int = 0,
    ):
        super().__init__(pretrained or (config if isinstance(config, str) else "UNet2DConditionModel"))
        arguments = _arguments(config, 4 if bands is None else bands)
        self.source = pretrained or f"random (seed {seed})"
        meta = torch.get_default_device().type == "meta"
        self.unet: Any = _random(arguments, seed) if pretrained is None or meta else _load(pretrained, arguments)

    @classmethod
    def around(cls, unet: nn.Module) -> DiffusersUNet:
        """A backbone around a UNet that is there already, such as a pipeline's; nothing of it is copied or changed."""
        backbone = cls.__new__(cls)
        Backbone.__init__(backbone, _shape(unet))
        backbone.source, backbone.unet = "as given", unet
        return backbone

    def sites(self) -> Sites:
        return unet_sites(self.unet, "unet")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """sample (B, C, h, w), timestep, encoder_hidden_states (B, tokens, width) to a ``UNet2DConditionOutput``."""
        return self.unet(*args, **kwargs)

    def blank(self, batch: int) -> dict[str, Any]:
        """Conditioning that says nothing, as keyword arguments: one zero token a sample, and SDXL's extra vectors."""
        config, weight = self.unet.config, next(self.unet.parameters())
        width = config.encoder_hid_dim or config.cross_attention_dim
        given: dict[str, Any] = {"encoder_hidden_states": weight.new_zeros(batch, 1, _first(width))}
        extra: dict[str, Any] = {}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            extra = {"text_embeds": weight.new_zeros(batch, pooled), "time_ids": weight.new_zeros(batch, 6)}
        if config.encoder_hid_dim_type == "ip_image_proj":  # an IP-Adapter is loaded
            layers = self.unet.encoder_hid_proj.image_projection_layers
            extra["image_embeds"] = [weight.new_zeros(batch, 1, *_image_tokens(layer)) for layer in layers]
        return {**given, "added_cond_kwargs": extra} if extra else given

    def example(self) -> tuple[Any, ...]:
        """One noisy sample of the smallest size whose lowest level has more than one pixel, at timestep 500; of a UNet
        with motion modules, two frames."""
        config, weight = self.unet.config, next(self.unet.parameters())
        side = 2 ** len(config.block_out_channels)
        noise = torch.randn(1, config.in_channels, side, side, generator=torch.Generator().manual_seed(0), device="cpu")
        given = self.blank(1)
        tokens: Tensor = given["encoder_hidden_states"]
        text = torch.randn(1, 3, tokens.shape[-1], generator=torch.Generator().manual_seed(1), device="cpu")
        step, extra = torch.tensor([500], device=weight.device), given.get("added_cond_kwargs")
        if _has_motion(self.unet):  # whose call takes no class labels
            clip = torch.stack([noise, noise.flip(-1)], 2).to(weight)
            return clip, step, text.to(weight).repeat(2, 1, 1), None, None, None, extra
        return noise.to(weight), step, text.to(weight), None, None, None, None, extra

    def own_state(self) -> dict[str, Tensor]:
        """Its weights by their own names: LoRA layers of peft are looked through, what others added is left out."""
        kept = {}
        for name, tensor in self.state_dict().items():
            if re.search(r"\.lora_(A|B|embedding|magnitude)|\.processor\.|encoder_hid_proj\.image_projection", name):
                continue
            kept[name.replace(".base_layer.", ".")] = tensor
        return kept

    def files(self) -> dict[str, bytes]:
        """The UNet as diffusers saves it: what ``pretrained`` reads from the folder these files are written to."""
        from safetensors.torch import save

        tensors = {name.removeprefix("unet."): t.detach().cpu().contiguous() for name, t in self.own_state().items()}
        config = self.unet.to_json_string().encode()
        weights = save(tensors, metadata={"format": "pt"})
        return {"unet/config.json": config, "unet/diffusion_pytorch_model.safetensors": weights}


def _shape(unet: Any) -> str:
    """The name of the published shape that a UNet has, else its class."""
    for name, arguments in CONFIGS.items():
        if all(_same(unet.config.get(key), value) for key, value in arguments.items() if key != "sample_size"):
            return name
    return type(unet).__name__


def _same(have: Any, wanted: Any) -> bool:
    return (tuple(have) if isinstance(have, list) else have) == (tuple(wanted) if isinstance(wanted, list) else wanted)


def _has_motion(unet: Any) -> bool:
    return "motion_max_seq_length" in unet.config


def _image_tokens(layer: nn.Module) -> tuple[int, ...]:
    """The shape of one image for a projection of an IP-Adapter: a vector, or tokens for one with queries of its own."""
    width = next(module.in_features for module in layer.modules() if isinstance(module, nn.Linear))
    return (3, width) if hasattr(layer, "latents") else (width,)


def _first(width: int | tuple[int, ...]) -> int:
    return width if isinstance(width, int) else width[0]


def _arguments(config: str | dict[str, Any], bands: int) -> dict[str, Any]:
    if not isinstance(config, str):
        return {"in_channels": bands, "out_channels": bands, **config}
    if config not in CONFIGS:
        raise RequestError(f"no UNet config {config!r}; there are {', '.join(CONFIGS)}, or give its arguments")
    return {"in_channels": 4, "out_channels": 4, **CONFIGS[config]}


def _library() -> Any:
    try:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError as error:
        raise RequestError("this backbone needs diffusers: pip install 'omniadapt[diffusion]'") from error
    return UNet2DConditionModel


def _random(arguments: dict[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return _library()(**arguments)
        except (TypeError, ValueError) as error:
            raise RequestError(f"UNet config: {' '.join(str(error).split())}") from error


def _load(pretrained: str, arguments: dict[str, Any]) -> nn.Module:
    from pathlib import Path

    folder = Path(pretrained)
    subfolder = None if (folder / "config.json").is_file() else "unet"
    try:
        unet = _library().from_pretrained(pretrained, subfolder=subfolder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise RequestError(f"{pretrained}: no UNet to load: {' '.join(str(error).split())[:200]}") from error
    for name, wanted in arguments.items():
        if not _same(have := unet.config.get(name), wanted):
            raise RequestError(f"{pretrained}: its UNet has {name} {have}; the config says {wanted}")
    return unet
