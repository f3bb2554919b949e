"""Adapters that start from a part of the frozen weight: the part is trained in its place, the stored weight stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.adapter import Factors
from shared.blocks.low_rank import LowRank
from shared.errors import RequestError
from shared.sites import Sites

LINEARS = ("attention.query", "attention.key", "attention.value", "attention.output",
           "mlp.up", "mlp.gate", "mlp.down", "linear")  # fmt: skip


class Split(LowRank):
    """``W + scale * (up.T @ down - up_start.T @ down_start)``: a part of rank r of the weight, and how it started.

    So the residual ``W - scale * up_start.T @ down_start`` of published decompositions is never stored: the weight is
    not rewritten, a file loads on the original weights, and the change as such has rank 2r (``factors``). Until
    ``start`` it is a LoRA.
    """

    down_start: Tensor
    up_start: Tensor

    def __init__(self, shape: torch.Size | tuple[int, ...], rank: int, scale: float = 1.0, where: str = "weight"):
        super().__init__(shape, rank, scale, where=where)
        self.register_buffer("down_start", self.down.detach().clone())
        self.register_buffer("up_start", self.up.detach().clone())

    @torch.no_grad()
    def start(self, up: Tensor, down: Tensor) -> None:
        """Begin at this part of the weight, which is the identity: up (r, rows), down (r, fan_in)."""
        for tensor, value in ((self.up, up), (self.up_start, up), (self.down, down), (self.down_start, down)):
            tensor.copy_(value)

    def delta(self, weight: Tensor) -> Tensor:
        # Two equal products, so that the start is the identity bit for bit.
        change = self.up.t() @ self.down - self.up_start.t() @ self.down_start
        return (change * self.scale).reshape(weight.shape)

    def factors(self) -> Factors:
        down, up = torch.cat([self.down, self.down_start]), torch.cat([self.up, -self.up_start])
        return Factors(down, up, self.scale, self.dropout)


def linears(sites: Sites, roles: str | Sequence[str] | None, depth: str | int | Sequence[int]) -> Sites:
    """The sites with these roles; None: all projections of attention and MLP, or all linear layers where none is named.

    A fused projection is taken whole where its parts have no sites of their own.
    """
    if roles is None:
        known = LINEARS if "attention.query" in sites.roles else ("attention.qkv", *LINEARS)
        roles = [role for role in known if role in sites.roles]
        if not roles:
            raise RequestError(f"{sites.owner} has no linear layer to decompose; it has {', '.join(sites.roles)}")
    return sites.select(roles, depth)
