"""A small AnimateDiff pipeline around a small video UNet, saved as users find them: a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modalities.diffusion.backbones.motion import MotionUNet
from tests.modalities.diffusion.pipelines import _text, _tokenizer


def moving(seed: int = 0, **settings: Any) -> MotionUNet:
    """A small video UNet whose norms are not the identity."""
    backbone = MotionUNet(config="tiny_sd15", seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone.eval()


def animate_diff(folder: Path, unet: Any, *, sees: bool = False) -> Any:
    """A pipeline of diffusers around ``unet``.  sees: whether it has an image encoder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.animatediff.pipeline_animatediff import AnimateDiffPipeline
    from transformers import (
        CLIPImageProcessor,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from modalities.diffusion.video.image_to_video import sampled

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
    )
    parts: dict[str, Any] = {"vae": vae, "text_encoder": CLIPTextModel(_text()), "tokenizer": _tokenizer(folder)}
    if sees:
        config = CLIPVisionConfig(
            hidden_size=12, projection_dim=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
            image_size=32, patch_size=8,
        )  # fmt: skip
        parts["image_encoder"] = CLIPVisionModelWithProjection(config)
        parts["feature_extractor"] = CLIPImageProcessor(size=32, crop_size=32)
    pipeline = AnimateDiffPipeline(**parts, unet=unet, motion_adapter=None, scheduler=sampled(4)[0])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
