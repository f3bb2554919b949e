"""Light heads: small decoders that fuse feature maps of any strides, and a linear one for probes."""

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


class PixelDecoder(_PixelHead):
    """Scores of every pixel's own bands, linear and at full resolution, plus scores of the tokens around it.

    For classes that a spectrum tells half: clouds. The first map is the image itself (a backbone's ``pixels: true``).
    A pixel is described by its bands and by how far they lie above the dark objects of its tile (Chavez, 1988: here
    the darkest tenth of each band), since a shadow is dark beside its surroundings and not beside other scenes. Few
    scenes train it, so this part is linear; the tokens' part starts at zero.

    channels: of the backbone's maps, the image's bands first.  classes: number of classes.
    width: channels that the tokens are fused in, 0 to leave the tokens out.  dropout: probability of each of these
    channels, in training.
    ignore_index: value of ``mask`` without a label.  class_weights: of the cross entropy, one for each class.
    """

    pace = 10.0  # the linear part learns this many times faster than the rest: it starts far from where it ends

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        *,
        width: int = 32,
        dropout: float = 0.0,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__(classes, ignore_index, class_weights)
        if width < 0 or not 0 <= dropout < 1:
            raise RequestError(f"head: width {width} is at least 0, dropout {dropout} from 0 to below 1")
        if len(channels) < 2:
            raise RequestError("PixelDecoder needs the image and a map of tokens: a backbone with pixels: true")
        bands, *tokens = channels
        self.maps, self.width = len(channels), width
        self.spectrum = nn.Conv2d(2 * bands, classes, 1)
        _zero(self.spectrum)
        if not width:
            return
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1) for c in tokens)
        self.around = _separable(width, norm=False)
        self.dropout, self.mix = nn.Dropout2d(dropout), nn.Conv2d(width, width, 1)
        self.classify = nn.Conv2d(width, classes, 1)
        _zero(self.classify)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Maps (B, bands, *size), (B, C_i, h_i, w_i) ... to logits (B, classes, *size)."""
        image, *maps = expected(features, self.maps)
        if tuple(image.shape[2:]) != tuple(size):
            found = " x ".join(map(str, image.shape[2:]))
            raise RequestError(f"PixelDecoder: the first map is {found} pixels, not the image; set backbone.pixels")
        pixels = self.pace * self.spectrum(torch.cat([image, image - dark_objects(image)], 1))
        if not self.width:
            return pixels
        grid = max((m.shape[2], m.shape[3]) for m in maps)
        tokens = torch.stack([resize(f(m), grid) for f, m in zip(self.project, maps, strict=True)]).sum(0)
        tokens = self.dropout(tokens + self.around(tokens))
        return pixels + resize(self.classify(F.gelu(self.mix(F.gelu(tokens)))), size)


def dark_objects(image: Tensor, share: float = 0.1) -> Tensor:
    """The value (B, bands, 1, 1) below which ``share`` of each band of an image (B, bands, H, W) lies.

    Of means of 4 x 4 pixels, which single bad pixels hardly move.
    """
    coarse = F.avg_pool2d(image.float(), 4) if min(image.shape[2:]) >= 4 else image.float()
    return coarse.flatten(2).quantile(share, 2)[:, :, None, None].to(image)


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


def _zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _norm(width: int) -> nn.GroupNorm:
    """In groups of about 8 channels; not over the batch, since batches of one are common here."""
    return nn.GroupNorm(math.gcd(max(width // 8, 1), width), width)


def _separable(width: int, norm: bool = True) -> nn.Sequential:
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    pointwise = nn.Conv2d(width, width, 1, bias=not norm)
    return nn.Sequential(depthwise, pointwise, *([_norm(width)] if norm else []), nn.GELU())
