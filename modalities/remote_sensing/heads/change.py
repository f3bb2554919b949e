"""Change heads of PeftCD: two dates' feature maps, some of them exchanged, decoded with the same weights.

PeftCD: Leveraging Vision Foundation Models with Parameter-Efficient Fine-Tuning for Remote Sensing Change Detection,
2025. Module names of the parts are those of the official code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.remote_sensing.heads.light import expected, resize
from shared.backbone import Features
from shared.errors import RequestError


def exchange(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The levels of both dates with every other one, from the first on, swapped between them."""
    pairs = [(b, a) if level % 2 else (a, b) for level, (b, a) in enumerate(zip(before, after, strict=True))]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


class _ChangeHead(nn.Module):
    """Decodes the exchanged levels of either date; subclasses give ``decode``.

    No layer compares the dates: change shows where the levels that one decoder is given do not belong together.

    dates: images of one sample, whose maps come one date after the other along the batch.
    adds_up: ``loss`` can be that of a batch which processes share.
    """

    dates: ClassVar[int] = 2
    adds_up: ClassVar[bool] = True

    def __init__(self, levels: int, classes: int, ignore_index: int):
        super().__init__()
        self.levels, self.classes, self.ignore_index = levels, classes, ignore_index

    def decode(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) to logits (B, classes, *size)."""
        raise NotImplementedError

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Maps (2 B, C_i, h_i, w_i), the earlier dates first, to logits (2 B, classes, *size), in this order."""
        maps = expected(features, self.levels)
        if len(maps[0]) % 2:
            raise RequestError(f"{type(self).__name__}: {len(maps[0])} images are no pairs of two dates")
        before, after = zip(*(level.chunk(2) for level in maps), strict=True)
        # Once for each date, not once for both: batch norm's statistics are of one date's list, as published.
        return torch.cat([self.decode(levels, size) for levels in exchange(before, after)])

    def loss(self, output: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
        """The mean of both dates' cross entropy. output: logits (2 B, classes, H, W).  mask: (B, H, W).

        total: adds sums up where processes share the batch. Exactly 0, with zero gradients, where all is ignored.
        """
        both = mask.repeat(2, 1, 1)
        entropy = F.cross_entropy(output.float(), both, ignore_index=self.ignore_index, reduction="sum")
        entropy, pixels = total(torch.stack([entropy, (both != self.ignore_index).sum().to(entropy)]))
        return entropy / pixels.clamp(min=1)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Probabilities (B, classes, *size) by the mean of both dates' logits."""
        before, after = output.float().chunk(2)
        return resize((before + after) / 2, size).softmax(1)


class SSBiFPNDecoder(_ChangeHead):
    """For a plain vision transformer: levels of one stride fused by weights of every pixel, context, up to the image.

    As published the grid is brought up 16 times, the patch of its backbone; other patches are resized to the image.

    channels: of the backbone's maps.  classes: 2, unchanged and changed.  width: channels inside.
    ignore_index: value of ``mask`` without a label.
    """

    def __init__(self, channels: Sequence[int], classes: int, *, width: int = 256, ignore_index: int = 255):
        super().__init__(len(channels), classes, ignore_index)
        if width < 1:
            raise RequestError(f"head.width {width}: use a number above 0")
        self.fuse, self.context = Fusion(channels, width), Context(width)
        self.refine1, self.refine2, self.refine3 = (separable(width) for _ in range(3))
        self.head = nn.Sequential(separable(width), nn.Conv2d(width, classes, 1))

    def decode(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        x = self.context(self.fuse(maps))
        x = self.refine2(doubled(self.refine1(doubled(x))))
        x = doubled(doubled(self.refine3(x)))
        return resize(self.head(x), size)


class Fusion(nn.Module):
    """Maps (B, C_i, h, w) to their sum (B, width, h, w) by weights that add up to 1 at every pixel."""

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.proj = nn.ModuleList(projection(c, width) for c in channels)
        self.score = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)
        self.post = separable(width)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [f(m) for f, m in zip(self.proj, maps, strict=True)]
        shares = self.weights(levels)
        return self.post(sum(shares[:, i : i + 1] * level for i, level in enumerate(levels)))

    def weights(self, levels: Sequence[Tensor]) -> Tensor:
        """Of projected levels (B, width, h, w): (B, levels, h, w), the softmax of what a sigmoid keeps within 0 to 1,
        so that no level is left out."""
        return torch.cat([f(x).sigmoid() for f, x in zip(self.score, levels, strict=True)], 1).softmax(1)


class Context(nn.Module):
    """Four reaches beside one another: dilations of 1, 2, 4 and 8."""

    def __init__(self, width: int):
        super().__init__()
        self.branches = nn.ModuleList(separable(width, dilation) for dilation in (1, 2, 4, 8))
        self.proj = projection(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([branch(x) for branch in self.branches], 1))


class ResidualPyramidDecoder(_ChangeHead):
    """For a hierarchy: a feature pyramid whose levels are summed from coarse to fine between residual bottlenecks.

    channels: of the backbone's maps, fine to coarse.  classes: 2, unchanged and changed.  width: channels inside.
    ignore_index: value of ``mask`` without a label.
    """

    def __init__(self, channels: Sequence[int], classes: int, *, width: int = 256, ignore_index: int = 255):
        super().__init__(len(channels), classes, ignore_index)
        if width < 1:
            raise RequestError(f"head.width {width}: use a number above 0")
        from torchvision.ops import FeaturePyramidNetwork

        self.pyramid = FeaturePyramidNetwork(list(channels), width)
        self.blocks = nn.ModuleList(ResDecodeBlock(width) for _ in channels)
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.classify = nn.Conv2d(width, classes, 1)

    def decode(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        heights = [level.shape[2] for level in maps]
        if heights != sorted(set(heights), reverse=True):
            raise RequestError(f"ResidualPyramidDecoder: maps of heights {heights}: they must come fine to coarse")
        levels = list(self.pyramid({str(i): m for i, m in enumerate(maps)}).values())[::-1]
        x = self.blocks[0](levels[0])
        for block, level in zip(self.blocks[1:], levels[1:], strict=True):  # type: ignore[arg-type]
            x = block(resize(x, (level.shape[2], level.shape[3])) + level)
        return self.classify(resize(self.smooth(doubled(x)), size))


class ResDecodeBlock(nn.Module):
    """Two residual bottlenecks of one width."""

    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(_Residual(width), _Residual(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_function(x) + x)


def projection(inputs: int, outputs: int) -> nn.Sequential:
    """A 1 x 1 convolution with batch norm and GELU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.GELU())


def separable(width: int, dilation: int = 1) -> nn.Sequential:
    """A depthwise 3 x 3 and a 1 x 1 convolution, each with batch norm and GELU."""
    deep = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, groups=width, bias=False)
    return nn.Sequential(deep, nn.BatchNorm2d(width), nn.GELU(), *projection(width, width))


def doubled(x: Tensor) -> Tensor:
    """Twice the height and width, bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
