"""Adapters whose two layers are split among experts, one of which runs in each training pass (Zhang et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter, Factors, WeightAdapter
from shared.blocks.bottleneck import ACTIVATIONS
from shared.blocks.placement import Residual, on_output, take
from shared.blocks.split import Drawn, Split
from shared.errors import RequestError, WorkError

ACTIVATION = {"adaptformer": "gelu", "pfeiffer": "relu", "houlsby": "swish"}


class SplitBottleneck(Drawn, Adapter):
    """``mlp(x) + scale * up(dropout(act(down(norm(h)))))``; the start is the identity.

    h: the residual stream where ``residual`` is given, else what the MLP reads ("adaptformer") or gives ("pfeiffer").
    down, up: layers (width to inner and back), split or whole.  style: a key of ``ACTIVATION``.  axis: of the channels.
    """

    def __init__(
        self, width: int, down: nn.Module, up: nn.Module, *, norm: bool, style: str, scale: float, dropout: float,
        residual: Residual | None = None, axis: int = -1,
    ):  # fmt: skip
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6) if norm else nn.Identity()
        self.down, self.up = down, up
        self.style, self.scale, self.dropout, self.axis = style, scale, dropout, axis
        self.residual = (residual,)  # in a tuple, as its modules are not this adapter's

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        h, _, _ = take(args, kwargs)
        if (residual := self.residual[0]) is not None:
            if residual.seen is None:
                raise WorkError("MoSA: the MLP ran without the norm before it, whose input its adapter reads")
            h, residual.seen = residual.seen, None
        output = base(*args, **kwargs)
        if self.style == "pfeiffer":
            return on_output(output, lambda f: f + self.branch(f))
        return on_output(output, lambda f: f + self.branch(h))

    def branch(self, h: Tensor) -> Tensor:
        """h (..., width), or (B, width, H, W), to what is added, of its shape."""
        down, up = self.experts()
        x = self.norm(h.movedim(self.axis, -1).to(next(self.up.parameters()).dtype))
        inner = ACTIVATIONS[ACTIVATION[self.style]](_run(self.down, x, down))
        change = _run(self.up, F.dropout(inner, self.dropout, self.training), up) * self.scale
        return change.to(h.dtype).movedim(-1, self.axis)


class AfterAttention(SplitBottleneck):
    """Around the norm before an MLP, which then reads ``h + branch(h)``; ``AfterMLP`` adds the same to the stream."""

    seen: tuple[Tensor, Tensor, Tensor] | None = None  # the stream, what is added to it, what the norm gives

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        h, rest, kwargs = take(args, kwargs)
        added = self.branch(h)
        self.seen = h, added, base(h + added, *rest, **kwargs)
        return self.seen[2]


class AfterMLP(SplitBottleneck):
    """Around a block: ``y + branch(y)``, y being what it gives plus what ``within``'s first adds to the stream there.

    So layer scale and stochastic depth act on the sub-layers alone, never on an adapter.
    """

    within: tuple[AfterAttention, Residual]  # in a tuple, as above

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, (attention, mlp) = base(*args, **kwargs), self.within
        seen, read, attention.seen, mlp.seen = attention.seen, mlp.seen, None, None
        if seen is None or seen[0] is take(args, kwargs)[0] or read is not seen[2]:
            raise RequestError("MoSA: houlsby needs blocks whose MLP follows the attention and reads the stream "
                               "normed; use style=adaptformer or pfeiffer")  # fmt: skip
        output = on_output(output, lambda y: y + seen[1])
        return on_output(output, lambda y: y + self.branch(y))


class SplitLowRank(Drawn, WeightAdapter):
    """``scale * up.T @ down`` on a weight seen as a matrix (rows, fan_in), as ``LowRank``; the start is the identity.

    down: a layer of weight (rank, fan_in), up: one of weight (rank, rows), split or whole, neither with a bias.
    """

    def __init__(self, down: nn.Module, up: nn.Module, scale: float, dropout: float):
        super().__init__()
        self.down, self.up, self.scale, self.dropout = down, up, float(scale), float(dropout)

    def factors(self) -> Factors:
        down, up = self.experts()
        return Factors(_matrix(self.down, down), _matrix(self.up, up), self.scale, self.dropout)

    def delta(self, weight: Tensor) -> Tensor:
        down, up, scale, _ = self.factors()
        return ((up.t() @ down) * scale).reshape(weight.shape)


def _run(layer: nn.Module, x: Tensor, expert: Tensor | None) -> Tensor:
    return layer(x, expert) if isinstance(layer, Split) else layer(x)


def _matrix(layer: Any, expert: Tensor | None) -> Tensor:
    return layer.matrix(expert) if isinstance(layer, Split) else layer.weight
