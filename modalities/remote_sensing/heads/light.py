"""Light heads: a small decoder that fuses feature maps of any strides, and a linear one for probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.remote_sensing.losses import cross_entropy_dice
from shared.backbone import Features
from shared.errors import RequestError


class _PixelHead(nn.Module):
    """Scores every pixel: cross entropy plus Dice for a loss, softmax for a prediction.

    adds_up: ``loss`` can be that of a batch which processes share.
    """

    adds_up: ClassVar[bool] = True

    def __init__(self, classes: int, ignore_index: int, class_weights: Sequence[float] | None):
        super().__init__()
        if class_weights is not None and (len(class_weights) != classes or min(class_weights) < 0):
            raise RequestError(f"head.class_weights {list(class_weights)}: give {classes} numbers, none negative")
        self.classes, self.ignore_index, self.class_weights = classes, ignore_index, class_weights

    def loss(self, output: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
        """output: logits (B, classes, H, W).  mask: (B, H, W).  Returns a scalar (see ``cross_entropy_dice``)."""
        # No buffer: an adapter file holds what training found, and the weights belong to the recipe.
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=output.device)
        return cross_entropy_dice(output, mask, ignore_index=self.ignore_index, class_weights=weights, total=total)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Class probabilities (B, classes, H, W) at ``size``."""
        return resize(output.float(), size).softmax(1)


class LightDecoder(_PixelHead):
    """Each map to ``width`` channels, summed on the finest grid, refined there and at stride 4, classified.

    The shape of the all-MLP decoder (SegFormer, Xie et al., 2021), with depthwise-separable 3 x 3 convolutions for
    its fusing layer, since token maps are coarse.

    channels: of the backbone's maps.  classes: number of classes.  width: channels inside.
    ignore_index: value of ``mask`` without a label.  class_weights: of the cross entropy, one for each class.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        *,
        width: int = 64,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__(classes, ignore_index, class_weights)
        if width < 1:
            raise RequestError(f"head.width {width}: use a number above 0")
        self.project = nn.ModuleList(nn.Sequential(nn.Conv2d(c, width, 1), _norm(width)) for c in channels)
        self.coarse, self.fine = _separable(width), _separable(width)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) to logits (B, classes, *size)."""
        maps = expected(features, len(self.project))
        grid = max((m.shape[2], m.shape[3]) for m in maps)
        fused = torch.stack([resize(f(m), grid) for f, m in zip(self.project, maps, strict=True)]).sum(0)
        fused = self.coarse(fused)
        quarter = (max(grid[0], size[0] // 4), max(grid[1], size[1] // 4))
        return resize(self.classify(self.fine(resize(fused, quarter))), size)


class LinearDecoder(_PixelHead):
    """The linear probe (Oquab et al., 2023): batch norm and one linear layer on the concatenated maps.

    channels: of the backbone's maps.  classes: number of classes.
    ignore_index: value of ``mask`` without a label.  class_weights: of the cross entropy, one for each class.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__(classes, ignore_index, class_weights)
        self.maps = len(channels)
        self.norm = nn.BatchNorm2d(sum(channels))
        self.classify = nn.Conv2d(sum(channels), classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) to logits (B, classes, *size)."""
        maps = expected(features, self.maps)
        grid = max((m.shape[2], m.shape[3]) for m in maps)
        return resize(self.classify(self.norm(torch.cat([resize(m, grid) for m in maps], 1))), size)


def expected(features: Features, count: int) -> tuple[Tensor, ...]:
    """The maps. Raises RequestError where the backbone gives another number than the head was built for."""
    if len(features.maps) != count:
        raise RequestError(f"the head was built for {count} feature maps, the backbone gives {len(features.maps)}")
    return features.maps


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear to ``size``, the same tensor where it has it."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _norm(width: int) -> nn.GroupNorm:
    """In groups of about 8 channels; not over the batch, since batches of one are common here."""
    return nn.GroupNorm(math.gcd(max(width // 8, 1), width), width)


def _separable(width: int) -> nn.Sequential:
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(width, width, 1, bias=False), _norm(width), nn.GELU())
