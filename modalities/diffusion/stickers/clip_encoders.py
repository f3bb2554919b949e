"""What stands frozen around a video UNet: an autoencoder of frames and encoders of captions, or none of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import RequestError

LONGEST = 256  # tokens of a caption (released code)


class Latents:
    """An autoencoder of diffusers as a two-way map of clips; with ``name`` None clips are what they are: pixels.

    name: a folder or Hugging Face name of an ``AutoencoderKL``, or of a pipeline that holds one as ``vae``.
    """

    def __init__(self, name: str | None):
        self.vae: Any = None if name is None else _frozen("AutoencoderKL", "diffusers", name, "vae")
        self.channels: int | None = None if self.vae is None else self.vae.config.latent_channels
        self.factor: int = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, clip: Tensor, real: Tensor, *, draw: bool) -> Tensor:
        """clip (B, C, F, H, W) in -1 to 1 to latents (B, c, F, H / f, W / f), 0 where ``real`` (B, F) is.

        draw: from the autoencoder's distribution; else its mode.
        """
        mask = real.to(clip)[:, None, :, None, None]
        if self.vae is None:
            return clip * mask
        vae = self.vae.to(clip.device)
        found = vae.encode(clip.transpose(1, 2).flatten(0, 1).to(vae.dtype)).latent_dist
        latents = (found.sample() if draw else found.mode()) * vae.config.scaling_factor
        return latents.unflatten(0, (len(clip), -1)).transpose(1, 2).to(clip.dtype) * mask

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, F, h, w) to clips (B, C, F, H, W)."""
        if self.vae is None:
            return latents
        vae = self.vae.to(latents.device)
        frames = latents.transpose(1, 2).flatten(0, 1).to(vae.dtype) / vae.config.scaling_factor
        found = torch.cat([vae.decode(frame[None]).sample for frame in frames])  # one by one: memory for one image
        return found.unflatten(0, (len(latents), -1)).transpose(1, 2).to(latents.dtype)


class Texts:
    """Captions as tokens for a UNet: of a text encoder and a T5, or, without one, as fixed vectors of their words.

    text_encoder: a folder or Hugging Face name of a text model, or of a Chinese CLIP or CLIP that holds one (released:
    Chinese CLIP ViT-H), or of a pipeline with ``text_encoder``; its last hidden states are taken.  t5: of a T5.
    widths: of the UNet's tokens, of text and of T5.

    Raises RequestError where there is no such model, or its width is another.
    """

    def __init__(self, text_encoder: str | None, t5: str | None, widths: tuple[int, int | None]):
        self.width = widths[0]
        self.clip = None if text_encoder is None else _Encoder(text_encoder, "AutoModel")
        self.t5 = None if t5 is None else _Encoder(t5, "T5EncoderModel")
        for name, encoder, width in ((text_encoder, self.clip, widths[0]), (t5, self.t5, widths[1])):
            if encoder is not None and encoder.width != width:
                raise RequestError(f"{name}: its tokens have {encoder.width} channels, the UNet takes {width}")

    def __call__(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, N, width) and, where there is a T5, ``t5_hidden_states`` (B, M, width)."""
        if self.clip is None:
            found = {"encoder_hidden_states": words(captions, self.width).to(device)}
        else:
            found = {"encoder_hidden_states": self.clip(captions, device)}
        return found if self.t5 is None else found | {"t5_hidden_states": self.t5(captions, device)}


def words(captions: Sequence[str], width: int, most: int = 12) -> Tensor:
    """(B, most, width): each word by a fixed random vector, a place without a word by zeros.

    Stands in for a text encoder where a UNet is trained from scratch on few words: equal words have equal vectors, and
    nothing else is known of them. A word's place is not told.
    """
    found = torch.zeros(len(captions), most, width)
    for row, caption in zip(found, captions, strict=True):
        for place, word in enumerate(caption.lower().split()[:most]):
            row[place] = torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
    return found


class _Encoder:
    def __init__(self, name: str, kind: str):
        from transformers import AutoTokenizer

        self.model = _frozen(kind, "transformers", name, "text_encoder")
        self.model = getattr(self.model, "text_model", self.model)  # of a CLIP; transformers' text models are their own
        self.width: int = self.model.config.hidden_size
        folder = "tokenizer" if (Path(name) / "tokenizer").is_dir() else ""
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, subfolder=folder)
        except (OSError, ValueError) as error:
            raise RequestError(f"{name}: no tokenizer to load: {' '.join(str(error).split())[:200]}") from error
        self.longest = min(LONGEST, self.tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device) -> Tensor:
        told = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(device)
        model = self.model.to(device)
        return model(input_ids=told["input_ids"], attention_mask=told["attention_mask"])[0].float()


def _frozen(kind: str, library: str, name: str, part: str) -> Any:
    """A model of a library from its own folder or the part of a pipeline's, in eval mode, without gradients."""
    import importlib

    folder = {"subfolder": part} if not Path(name).is_dir() or (Path(name) / part).is_dir() else {}
    if library == "transformers" and not Path(name).is_dir():
        folder = {}  # the names in use are of models, not of pipelines
    try:
        model: nn.Module = getattr(importlib.import_module(library), kind).from_pretrained(
            name, use_safetensors=None if library == "transformers" else True, **folder
        )
    except (OSError, ValueError) as error:
        raise RequestError(f"{name}: no {part} to load: {' '.join(str(error).split())[:200]}") from error
    return model.requires_grad_(False).eval()
