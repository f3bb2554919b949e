"""What stands beside a frozen block and keeps little for backward: prompts, a path at half the sides, a ladder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.blocks.bottleneck import Bottleneck
from shared.blocks.placement import on_output, take
from shared.errors import RequestError

GROUPS = 2  # of the side path's first convolution (public code of lite residuals)
TEMPERATURE = 0.1  # of a ladder's gates (public code of ladder side tuning)


class Tokens(nn.Module):
    """Prompts (count, width) as ``A @ B``, A (count, rank) uniform and B (rank, width) zero; of full rank, uniform.

    The bound is that of visual prompts, sqrt(6 / (3 patch^2 + width)), the patch's 3 patch^2 numbers taken as width.
    """

    def __init__(self, count: int, width: int, rank: int | None, where: str):
        super().__init__()
        if rank is not None and not 1 <= rank <= min(count, width):
            raise RequestError(f"prompt rank {rank} at {where}: use 1 to {min(count, width)}, or none")
        bound = (6 / (2 * width)) ** 0.5
        self.A = nn.Parameter(torch.empty(count, width if rank is None else rank).uniform_(-bound, bound))
        self.B = None if rank is None else nn.Parameter(torch.zeros(rank, width))

    def forward(self) -> Tensor:
        return self.A if self.B is None else self.A @ self.B


class Border(nn.Module):
    """``x`` (B, C, H, W) plus a frame ``wide`` pixels deep, alike along each side; zero at first."""

    def __init__(self, width: int, wide: int):
        super().__init__()
        self.sides = nn.Parameter(torch.zeros(4, width, wide))  # top, bottom, left, right

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        wide = self.sides.shape[-1]
        if wide > min(height, width):
            raise RequestError(f"a border of {wide} pixels on maps of {height} x {width}: use at most the shorter side")
        top, bottom, left, right = self.sides.to(x.dtype)
        rows = F.pad(top, (0, height - wide)) + F.pad(bottom, (height - wide, 0))
        columns = F.pad(left, (0, width - wide)) + F.pad(right, (width - wide, 0))
        return x + rows[:, :, None] + columns[:, None, :]


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Side(nn.Module):
    """``up(norm2(conv2(relu(norm1(conv1(pool(x)))))))`` on maps (B, C, H, W), zero at first.

    pool and up halve and double the sides, both bilinear: of even sides the pool is the mean of 2 x 2, and unlike
    torch's average pooling it keeps nothing for backward. batch: batch instead of layer norms.

    Raises RequestError where the channels do not fall into two groups.
    """

    def __init__(self, width: int, reduction: int, *, kernel: int, batch: bool, where: str):
        super().__init__()
        inner = width // reduction
        if width % GROUPS or inner < GROUPS or inner % GROUPS:
            raise RequestError(
                f"side path at {where}: {width} channels over reduction {reduction} make {inner}; both must fall into "
                f"{GROUPS} groups"
            )
        norm = nn.BatchNorm2d if batch else _ChannelNorm
        self.conv1 = nn.Conv2d(width, inner, kernel, padding=kernel // 2, groups=GROUPS, bias=False)
        self.norm1 = norm(inner)
        self.conv2 = nn.Conv2d(inner, width, 1, bias=False)
        self.norm2 = norm(width)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor, shape: Any = None) -> Tensor:
        """shape: (C, H, W) of the output, that of x if not given."""
        channels, height, width = shape or x.shape[1:]
        if channels != x.shape[1]:
            raise RequestError(f"side path from {x.shape[1]} to {channels} channels: the block must keep their number")
        half = [-(-side // 2) for side in x.shape[-2:]]
        pooled = F.interpolate(x.to(self.conv1.weight.dtype), size=half, mode="bilinear")
        h = F.relu(self.norm1(self.conv1(pooled)))
        return F.interpolate(self.norm2(self.conv2(h)), size=(height, width), mode="bilinear").to(x.dtype)


def on_grid(side: Side, x: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """The side path of tokens (B, prefix + h * w, C), zero for the prefix."""
    if x.shape[1] != prefix + grid[0] * grid[1]:
        raise RequestError(f"{x.shape[1]} tokens are no {prefix} and a grid of {grid[0]} x {grid[1]}")
    maps = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    return F.pad(side(maps).flatten(2).transpose(1, 2), (0, 0, prefix, 0))


class Rung(Adapter):
    """Leaves its block as it is and takes one step of the ladder: ``h = g s + (1 - g) down(y)`` with the gate
    ``g = sigmoid(alpha / 0.1)``, then ``s = h + bottleneck(h)``; y is the block's output, detached.

    first: s starts there, at zero.
    """

    observes = True

    def __init__(self, width: int, narrow: int, *, first: bool):
        super().__init__()
        self.first = first
        self.alpha = nn.Parameter(torch.zeros(()))
        self.down = nn.Linear(width, narrow)
        self.step = Bottleneck(narrow, narrow, narrow, activation="gelu")

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = base(*args, **kwargs)
        y = (output[0] if isinstance(output, tuple) else output).detach()
        gate = torch.sigmoid(self.alpha / TEMPERATURE)
        h = (1 - gate) * self.down(y.to(self.down.weight.dtype))
        h = h if self.first else gate * self.context.ladder + h
        self.context.ladder = h + self.step(h)
        return output


class Ladder(Adapter):
    """The ladder's end: its state, widened, added behind the final norm, which sees no gradient; zero at first."""

    def __init__(self, narrow: int, width: int):
        super().__init__()
        self.up = nn.Linear(narrow, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x, rest, kwargs = take(args, kwargs)
        state = self.context.ladder
        if x.shape[:-1] != state.shape[:-1]:
            raise RequestError("S2A's ladder needs a final norm that sees every token")
        return on_output(base(x, *rest, **kwargs), lambda y: y + self.up(state).to(y.dtype))
