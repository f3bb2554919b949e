"""DFGN, the video UNet of RDTF (2025, arXiv 2503.17735): short clips from text and from any of their frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modalities.diffusion.backbones.sti import STI
from modalities.diffusion.backbones.unet_sites import unet_sites
from shared import weights
from shared.backbone import Backbone
from shared.errors import RequestError
from shared.sites import Sites

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the file of a folder that diffusers' save_pretrained made


class Clip(NamedTuple):
    """What a video UNet gives, as diffusers' own: sample (B, C, F, h, w)."""

    sample: Tensor


class DFGN(Backbone):
    """Discrete frame generation network: an I2VGen-XL UNet of diffusers' blocks with STI for temporal convolutions.

    bands: channels of the clips it denoises, for ``latents`` None.
    latents: channels of the latents, or of pixels (released: 4); None: ``bands``.
    widths: channels of the levels; all but the lowest have attention to the text.  layers: of each level.
    head_width: of spatial and temporal attention.  entry_heads: of the temporal attention before the levels (released:
    8, which at small widths cost more than the levels do).  groups: of all group norms.
    text_width, t5_width: channels of the tokens of the two text encoders (released: Chinese CLIP ViT-H's RoBERTa-large,
    a T5 base).
    frames: of a clip, padding included.  sti_heads, sti_head_width: of the attention within STI.  fusion: see ``STI``.
    pretrained: a .safetensors file, or a folder diffusers wrote, with the released names (no weights were released);
    None draws random ones, to be trained whole (``method: Full``).  seed: of random weights.

    Defaults are the released class's: 960,118,452 parameters. Its config file lists (320, 640, 1280, 1280) and the
    paper's size says otherwise.

    Raises RequestError where widths, heads and groups do not divide, or the pretrained weights do not fit.
    """

    def __init__(
        self,
        bands: int | None = None,
        *,
        latents: int | None = 4,
        widths: tuple[int, ...] = (320, 640, 1024, 1280),
        layers: int = 2,
        head_width: int = 64,
        entry_heads: int = 8,
        groups: int = 32,
        text_width: int = 1024,
        t5_width: int = 768,
        frames: int = 8,
        sti_heads: int = 8,
        sti_head_width: int = 32,
        fusion: Literal["scalars", "mlp"] = "scalars",
        pretrained: str | None = None,
        seed: int = 0,
    ):
        super().__init__("DFGN")
        channels = bands if latents is None else latents
        if channels is None:
            raise RequestError("DFGN: give the channels of the latents, or bands")
        if bad := [w for w in widths if w % head_width or w % groups]:
            raise RequestError(f"DFGN: widths {bad}: multiples of head_width {head_width} and groups {groups}")
        self.latent_channels, self.text_width, self.t5_width, self.frames = channels, text_width, t5_width, frames
        self.source = pretrained or f"random (seed {seed})"
        sti = {"frames": frames, "heads": sti_heads, "head_width": sti_head_width, "groups": groups, "fusion": fusion}
        self.unet = weights.build(
            lambda: Network(
                channels, tuple(widths), layers, head_width, entry_heads, groups, text_width, t5_width, sti
            ),
            seed,
        )
        if pretrained is not None and not weights.is_meta(self):
            path = Path(pretrained) / WEIGHTS if Path(pretrained).is_dir() else Path(pretrained)
            weights.fill(self.unet, weights.read(path), "DFGN", f"checkpoint {path}")

    def sites(self) -> Sites:
        return unet_sites(self.unet, "unet")

    def forward(self, *args: Any, **kwargs: Any) -> Clip:
        """See ``Network.forward``."""
        return self.unet(*args, **kwargs)

    def example(self) -> tuple[Any, ...]:
        """One noisy clip of the smallest size at timestep 500, whose first frame is given, with three words."""
        weight = next(self.parameters())
        side = 2 ** len(self.unet.down_blocks)
        random = torch.Generator().manual_seed(0)
        sample = torch.randn(1, 2 * self.latent_channels, self.frames, side, side, generator=random, device="cpu")
        sample[:, self.latent_channels :, 1:] = 0
        text = torch.randn(1, 3, self.text_width, generator=random, device="cpu")
        t5 = torch.randn(1, 3, self.t5_width, generator=random, device="cpu")
        return sample.to(weight), torch.tensor([500], device=weight.device), text.to(weight), t5.to(weight)


class Network(nn.Module):
    """The modules, in the order and with the names of the released class, and how they run."""

    def __init__(
        self, channels: int, widths: tuple[int, ...], layers: int, head: int, entry_heads: int, groups: int,
        text: int, t5: int, sti: dict[str, Any],
    ):  # fmt: skip
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

        first, time = widths[0], 4 * widths[0]
        self.conv_in = nn.Conv2d(2 * channels, first, 3, padding=1)
        self.transformer_in = TransformerTemporalModel(
            num_attention_heads=entry_heads, attention_head_dim=head, in_channels=first, norm_num_groups=groups
        )
        self.context_T5_clip_embedding = nn.Sequential(nn.Linear(t5, 2 * text), nn.SiLU(), nn.Linear(2 * text, text))
        self.image_latents_proj_in = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.SiLU(),
            nn.Conv2d(4 * channels, 4 * channels, 3, padding=1), nn.SiLU(),
            nn.Conv2d(4 * channels, channels, 3, padding=1),
        )  # fmt: skip
        self.image_latents_temporal_encoder = temporal_encoder(channels)
        self.time_proj = Timesteps(first, True, 0)
        self.time_embedding = TimestepEmbedding(first, time)
        self.down_blocks, self.mid_block, self.up_blocks = _levels(widths, layers, head, groups, text, time, sti)
        self.conv_norm_out = nn.GroupNorm(groups, first, eps=1e-5)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(first, channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        t5_hidden_states: Tensor | None = None,
    ) -> Clip:
        """sample (B, 2 C, F, h, w): noisy latents, then condition latents, zero where nothing is given; timestep (B,)
        or (1,); encoder_hidden_states (B, N, text_width); t5_hidden_states (B, M, t5_width): the noise (B, C, F, h, w).
        """
        batch, _, frames, *_ = sample.shape
        noisy, given = sample.chunk(2, dim=1)
        time = self.time_proj(timestep.expand(batch)).to(sample.dtype)
        time = self.time_embedding(time).repeat_interleave(frames, dim=0)
        text = encoder_hidden_states
        if t5_hidden_states is not None:
            text = torch.cat([self.context_T5_clip_embedding(t5_hidden_states), text], dim=1)
        text = text.repeat_interleave(frames, dim=0)
        x = self.conv_in(torch.cat([noisy, self._condition(given)], dim=1).transpose(1, 2).flatten(0, 1))
        x = self.transformer_in(x, num_frames=frames, return_dict=False)[0]
        x = self.conv_out(self.conv_act(self.conv_norm_out(self._levels(x, time, text, frames))))
        return Clip(x.unflatten(0, (batch, frames)).transpose(1, 2))

    def _condition(self, given: Tensor) -> Tensor:
        """Condition latents (B, C, F, h, w), each frame through convolutions and each pixel through time."""
        batch, _, frames, height, width = given.shape
        x = self.image_latents_proj_in(given.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames))
        x = self.image_latents_temporal_encoder(x.permute(0, 3, 4, 1, 2).flatten(0, 2))
        return x.unflatten(0, (batch, height, width)).permute(0, 4, 3, 1, 2)

    def _levels(self, x: Tensor, time: Tensor, text: Tensor, frames: int) -> Tensor:
        """Down, middle and up: x (B * F, widths[0], h, w) to the same shape."""
        skips: tuple[Tensor, ...] = (x,)
        for block in self.down_blocks:
            told = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            x, more = block(hidden_states=x, temb=time, num_frames=frames, **told)
            skips += more
        x = self.mid_block(x, time, encoder_hidden_states=text, num_frames=frames)
        for block in self.up_blocks:
            resnets: Any = block.resnets
            count = len(resnets)
            skips, own = skips[:-count], skips[-count:]
            told = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            size = skips[-1].shape[2:] if skips else None  # sides that do not divide come out as they went in
            x = block(
                hidden_states=x, res_hidden_states_tuple=own, temb=time, upsample_size=size, num_frames=frames, **told
            )
        return x


def temporal_encoder(channels: int) -> nn.Module:
    """Attention of 2 heads and a feed-forward part over the frames of one pixel, (B, F, C) to the same shape."""
    from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder

    return I2VGenXLTransformerTemporalEncoder(
        channels, num_attention_heads=2, attention_head_dim=channels, activation_fn="gelu", ff_inner_dim=4 * channels
    )


def _levels(
    widths: tuple[int, ...], layers: int, head: int, groups: int, text: int, time: int, sti: dict[str, Any]
) -> tuple[nn.ModuleList, nn.Module, nn.ModuleList]:
    """The library's blocks, their temporal convolutions replaced by STI."""
    from diffusers.models.unets.unet_3d_blocks import UNetMidBlock3DCrossAttn, get_down_block, get_up_block

    # What the library calls number of heads is their width here, as in its own video UNets.
    common: dict[str, Any] = {
        "temb_channels": time, "resnet_eps": 1e-5, "resnet_act_fn": "silu", "resnet_groups": groups,
        "cross_attention_dim": text, "num_attention_heads": head,
    }  # fmt: skip
    last, down, up = len(widths) - 1, nn.ModuleList(), nn.ModuleList()
    for i, width in enumerate(widths):
        kind = "DownBlock3D" if i == last else "CrossAttnDownBlock3D"
        before = widths[max(i - 1, 0)]
        down.append(get_down_block(
            kind, num_layers=layers, in_channels=before, out_channels=width, add_downsample=i < last,
            downsample_padding=1, **common,
        ))  # fmt: skip
    middle = UNetMidBlock3DCrossAttn(in_channels=widths[-1], **common)
    for i, width in reversed(list(enumerate(widths))):
        kind = "UpBlock3D" if i == last else "CrossAttnUpBlock3D"
        up.append(get_up_block(
            kind, num_layers=layers + 1, in_channels=widths[max(i - 1, 0)], out_channels=width,
            prev_output_channel=widths[min(i + 1, last)], add_upsample=i > 0, **common,
        ))  # fmt: skip
    for block in (*down, middle, *up):
        resnets: Any = block.resnets
        block.temp_convs = nn.ModuleList(STI(resnet.out_channels, **sti) for resnet in resnets)
    return down, middle, up
