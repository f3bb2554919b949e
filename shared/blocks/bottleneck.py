"""The bottleneck: the small module that most additive adapters put somewhere (Houlsby et al., 2019)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn, ones

from shared.errors import RequestError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "none": lambda x: x,
}
Start = Literal["zero", "normal"]


def reduced(width: int, reduction: int, where: str) -> int:
    """``width // reduction``. Raises RequestError where that is below 1, or the reduction is."""
    if not 1 <= reduction <= width:
        raise RequestError(f"reduction {reduction} at {where}: its width is {width}, so use 1 to {width}")
    return width // reduction


class Bottleneck(nn.Module):
    """``scale * up(act(down(dropout(x))))``: x (..., inputs) to (..., outputs), in float32 whatever flows.

    layout: of what flows (``Site.layout``); with "BCHW" x is (B, inputs, H, W).
    width: channels inside.  scale: a number, or "learned" (a scalar that starts at 1).
    start: "zero" (down Kaiming-uniform with a = sqrt 5, up zero: adds nothing at first; He et al., 2022) or "normal"
    (both normal with deviation 0.02, biases zero).
    layers: down and up in place of linear layers, as they start (``bias`` and ``start`` then say nothing).

    Raises RequestError where the width is below 1 or the activation unknown.
    """

    down: Any
    up: Any

    def __init__(
        self, inputs: int, outputs: int, width: int, *, activation: str = "relu", bias: bool = True,
        dropout: float = 0.0, start: Start = "zero", scale: float | Literal["learned"] = 1.0, where: str = "adapter",
        layers: tuple[nn.Module, nn.Module] | None = None, layout: str = "BNC",
    ):  # fmt: skip
        super().__init__()
        if width < 1:
            raise RequestError(f"bottleneck width {width} at {where}: use at least 1")
        if activation not in ACTIVATIONS:
            raise RequestError(f"activation {activation!r} at {where}: use one of {', '.join(ACTIVATIONS)}")
        self.activation, self.dropout, self.axis = activation, float(dropout), 1 if layout == "BCHW" else -1
        self.down, self.up = layers or (nn.Linear(inputs, width, bias=bias), nn.Linear(width, outputs, bias=bias))
        self.scale = nn.Parameter(ones(())) if scale == "learned" else float(scale)
        if layers is None:
            self._start(self.down, self.up, start)

    @staticmethod
    def _start(down: Any, up: Any, start: Start) -> None:
        for layer in (down, up):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if start == "zero":
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x.movedim(self.axis, -1))).movedim(-1, self.axis).to(x.dtype)

    def inner(self, x: Tensor) -> Tensor:
        """What it holds of x (..., inputs) after its activation, (..., width)."""
        h = F.dropout(x, self.dropout, self.training).to(next(self.down.parameters()).dtype)
        return ACTIVATIONS[self.activation](self.down(h))

    def outer(self, z: Tensor) -> Tensor:
        """What comes of that, (..., outputs)."""
        return self.up(z) * self.scale
