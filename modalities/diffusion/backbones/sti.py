"""The spatial-temporal interaction layer of RDTF (2025, arXiv 2503.17735): attention over all frames, and details."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import RequestError


class STI(nn.Module):
    """``GroupNorm(w1 * semantic + w2 * detail)`` of the frames of a clip; stands where a temporal convolution stood.

    semantic: self-attention over the tokens of all frames, pooled by 2, and a residual.  detail: two residual blocks of
    3 x 3 convolutions whose channels are the frames, so a clip has exactly ``frames`` of them.
    fusion: "scalars", as released: w1 and w2 are learnt, from 0 and 1; "mlp", as in the paper's figure: they are told
    for each clip by a small network of both parts' means, and start at the same values.

    At the start the semantic part is silent, but w1 has a gradient; y is normalised, so the layer is no identity.
    Raises RequestError where the clip has another number of frames.
    """

    def __init__(
        self, channels: int, *, frames: int = 8, heads: int = 8, head_width: int = 32, groups: int = 32,
        fusion: Literal["scalars", "mlp"] = "scalars",
    ):  # fmt: skip
        from diffusers.models.attention_processor import Attention
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        self.frames = frames
        self.transformer_blocks = Attention(channels, heads=heads, dim_head=head_width)
        timeless: dict[str, Any] = {"temb_channels": None}
        self.conv_layers = nn.ModuleList(
            ResnetBlock2D(in_channels=frames, out_channels=frames, groups=1, **timeless) for _ in range(2)
        )
        self.weigh = None if fusion == "scalars" else _weigher(channels)
        if self.weigh is None:
            self.w1, self.w2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x (B * frames, C, h, w), the frames of a clip one after the other, to the same shape."""
        if num_frames != self.frames:
            raise RequestError(f"clips of {num_frames} frames: this network takes {self.frames}, pad them")
        semantic, detail = self._semantic(x), self._detail(x)
        w1, w2 = self._weights(semantic, detail)
        return self.norm(w1 * semantic + w2 * detail)

    def _semantic(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        pooled = F.avg_pool2d(x, (min(2, height), min(2, width)))  # a lowest level of one pixel stays as it is
        h, w = pooled.shape[2:]
        tokens = pooled.unflatten(0, (-1, self.frames)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        tokens = self.transformer_blocks(tokens)
        pooled = tokens.unflatten(1, (self.frames, h, w)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        return x + F.interpolate(pooled, size=(height, width), mode="nearest")

    def _detail(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        planes = x.unflatten(0, (-1, self.frames)).transpose(1, 2).flatten(0, 1)
        for layer in self.conv_layers:
            planes = layer(planes, None)
        return planes.unflatten(0, (-1, channels)).transpose(1, 2).flatten(0, 1)

    def _weights(self, semantic: Tensor, detail: Tensor) -> tuple[Tensor, Tensor]:
        if self.weigh is None:
            return self.w1, self.w2
        means = torch.cat([semantic.mean((2, 3)), detail.mean((2, 3))], dim=1)
        told = self.weigh(means.unflatten(0, (-1, self.frames)).mean(1)).repeat_interleave(self.frames, dim=0)
        first, second = told[:, :, None, None, None].unbind(1)
        return first, second


def _weigher(channels: int) -> nn.Sequential:
    """The mean of both parts of a clip (2 C) to the two weights, at the start 0 and 1 whatever they are."""
    last = nn.Linear(max(channels // 4, 1), 2)
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 1.0]))
    return nn.Sequential(nn.Linear(2 * channels, max(channels // 4, 1)), nn.SiLU(), last)
