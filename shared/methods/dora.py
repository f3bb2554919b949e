"""DoRA: a weight's magnitude and direction trained apart, the direction by a low-rank change (Liu et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shared.adapter import WeightAdapter
from shared.blocks.low_rank import LowRank
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class Decomposed(WeightAdapter):
    """``magnitude * V / |V|`` with ``V = W + scale * up.T @ down``, both by output row; exactly W at the start.

    magnitude: (rows,), the norms of W's rows.  detach_norm: |V| takes no gradient.
    Strength 0 to 1 moves from the frozen weight to this one.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, *, detach_norm: bool = True, where: str = "weight"):
        super().__init__()
        self.change = LowRank(weight.shape, rank, scale, where=where)
        self.detach_norm = detach_norm
        with torch.no_grad():
            self.magnitude = nn.Parameter(_norms(weight.to(self.change.down.dtype)))

    def value(self, weight: Tensor) -> Tensor:
        """The whole new weight, in the adapter's precision."""
        moved = weight.to(self.magnitude.dtype) + self.change.delta(weight)
        norms = _norms(moved.detach() if self.detach_norm else moved)
        # A row of zeros has the norm 0 and the magnitude 0, and stays a row of zeros.
        gain = self.magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return moved * gain.reshape(-1, *(1,) * (weight.ndim - 1))

    def delta(self, weight: Tensor) -> Tensor:
        return self.value(weight) - weight

    def forward(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        # lerp, not a sum: exactly the new weight at strength 1 and the frozen one at 0.
        value = self.value(weight)
        return torch.lerp(weight.to(value.dtype), value, strength).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, norms and m by output, the identity at the start.

    rank: inner width (paper: 16 or 32 on LLaMA).  alpha: numerator of the scale (paper: twice the rank); None means
    rank.  detach_norm: no gradient through the norm, which saves memory (paper, section 4.3; official).
    roles: which projections (paper: these).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/LoRA improvement",), acts_on="weights", form="in place", mergeable="yes",
        trains="rank * (rows + columns) + rows",
    )  # fmt: skip

    rank: int = 16
    alpha: float | None = None
    detach_norm: bool = True
    roles: Sequence[str] = ("attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down")
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        return sites.select(self.roles, self.depth)

    def build(self, site: Site) -> Decomposed:
        alpha = self.rank if self.alpha is None else self.alpha
        scale = alpha / max(self.rank, 1)
        return Decomposed(site.weight, self.rank, scale, detach_norm=self.detach_norm, where=site.key)


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)
