"""Whole Stable Diffusion pipelines small enough for a test, saved as users find them: a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.modalities.diffusion.conftest import tiny


def save_pipeline(folder: Path, *, xl: bool = False) -> Path:
    """A pipeline with random parts around the small UNet of its kind; latents are an eighth of the image."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

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
    noise: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = EulerDiscreteScheduler(**noise)
    common: dict[str, Any] = {"vae": vae, "text_encoder": CLIPTextModel(_text()), "tokenizer": _tokenizer(folder)}
    if xl:
        pipeline: Any = StableDiffusionXLPipeline(
            **common,
            text_encoder_2=CLIPTextModelWithProjection(_text()),
            tokenizer_2=common["tokenizer"],
            unet=tiny("tiny_sdxl").unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            **common,
            unet=tiny("tiny_sd15").unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def _text() -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with single bytes as its words."""
    from transformers import CLIPTokenizer

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in plain}
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in plain)}
    letters = [spelled[byte] for byte in (*plain, *(b for b in range(256) if b not in plain))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    source = folder / "words"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    end = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {"model_max_length": 77, "bos_token": "<|startoftext|>", **end}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(source)
