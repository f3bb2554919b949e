"""Semantic FPN (Kirillov et al., CVPR 2019): a feature pyramid whose levels are brought to the finest and summed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modalities.remote_sensing.heads.light import _PixelHead, expected, resize
from shared.backbone import Features
from shared.errors import RequestError


class SemanticFPN(_PixelHead):
    """torchvision's pyramid over the maps, then from each level 3 x 3 convolutions with doublings to the finest grid.

    Group norm as published. Levels are resized to each other's sizes, so that maps of images whose sides are no
    multiples of the strides fit.

    channels: of the backbone's maps, fine to coarse.  classes: number of classes.  width: channels of the pyramid.
    inner: channels of what is summed.  dropout: probability of each of these channels, in training.
    ignore_index: value of ``mask`` without a label.  class_weights: of the cross entropy, one for each class.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        *,
        width: int = 256,
        inner: int = 128,
        dropout: float = 0.1,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__(classes, ignore_index, class_weights)
        if min(width, inner) < 1 or not 0 <= dropout < 1:
            raise RequestError(f"head: width {width} and inner {inner} must be above 0, dropout {dropout:g} below 1")
        from torchvision.ops import FeaturePyramidNetwork

        self.pyramid = FeaturePyramidNetwork(list(channels), width)
        self.levels = nn.ModuleList(_level(width, inner, max(level, 1)) for level in range(len(channels)))
        self.dropout, self.classify = nn.Dropout2d(dropout), nn.Conv2d(inner, classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Maps (B, C_i, h_i, w_i), fine to coarse, to logits (B, classes, *size)."""
        maps = expected(features, len(self.levels))
        heights = [x.shape[2] for x in maps]
        if heights != sorted(heights, reverse=True):
            raise RequestError(f"SemanticFPN: maps of heights {heights}: they must come fine to coarse")
        levels = self.pyramid({str(i): x for i, x in enumerate(maps)}).values()
        found = []
        for i, (level, steps) in enumerate(zip(levels, self.levels, strict=True)):
            for k, step in enumerate(steps):  # type: ignore[arg-type]
                finer = maps[max(i - 1 - k, 0)].shape[2:]
                level = resize(step(level), (finer[0], finer[1]))
            found.append(level)
        return resize(self.classify(self.dropout(torch.stack(found).sum(0))), size)


def _level(width: int, inner: int, steps: int) -> nn.ModuleList:
    """What comes between the doublings of one level; the finest has one convolution and no doubling."""
    groups = math.gcd(32, inner)
    return nn.ModuleList(
        nn.Sequential(
            nn.Conv2d(inner if step else width, inner, 3, padding=1, bias=False), nn.GroupNorm(groups, inner), nn.ReLU()
        )
        for step in range(steps)
    )
