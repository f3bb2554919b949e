"""Starts from a part of the frozen weight: its decompositions, and the adapter that trains a part in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.adapter import Factors
from shared.blocks.low_rank import LowRank
from shared.errors import RequestError, WorkError
from shared.sites import Sites

Sides = Literal["both", "up", "down"]
Precision = Literal["float64", "float32"]
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


class Decomposition(NamedTuple):
    """``W = left @ diag(values) @ right``: left (rows, k), values (k,) descending, right (k, fan_in)."""

    left: Tensor
    values: Tensor
    right: Tensor
    damping: float

    def part(self, mode: str, rank: int, sides: Sides = "both", balance: bool = False) -> tuple[Tensor, Tensor]:
        """The r largest ("ipa") or smallest ("kpa") components as up (r, rows) and down (r, fan_in)."""
        kept = slice(0, rank) if mode == "ipa" else slice(len(self.values) - rank, None)
        left, values, right = self.left[:, kept].t(), self.values[kept, None], self.right[kept]
        share = {"both": 0.5, "up": 1.0, "down": 0.0}[sides]
        up, down = left * values**share, right * values ** (1 - share)
        if balance and up.norm() > 0 and down.norm() > 0:
            ratio = (down.norm() / up.norm()).sqrt()
            up, down = up * ratio, down / ratio
        return up, down


def decompose(
    weight: Tensor, moment: Tensor | None, precision: Precision = "float64", where: str = "weight"
) -> Decomposition:
    """The context-oriented SVD of a weight (rows, fan_in) given the second moment of its inputs; None: the plain SVD.

    Raises WorkError where the moment is zero or not finite.
    """
    device = "cpu" if weight.device.type == "mps" else weight.device  # which has no float64
    dtype = getattr(torch, precision)
    matrix = weight.detach().flatten(1).to(device, dtype)
    if moment is None:
        return Decomposition(*torch.linalg.svd(matrix, full_matrices=False), damping=0.0)
    damped, damping = damp(moment.to(device), where)
    left, values, right = torch.linalg.svd(matrix @ damped.to(dtype), full_matrices=False)
    return Decomposition(left, values, right @ torch.linalg.inv(damped.to(dtype)), damping)


def damp(moment: Tensor, where: str = "weight") -> tuple[Tensor, float]:
    """``C + damping * mean(diag C) * I`` (float32) with the first damping of 0.01, 0.02, 0.04, ... at which it inverts.

    Its inverse in float32 must be within 0.05 (Frobenius norm of ``C C^-1 - I``), as published.
    """
    moment = moment.float()
    level, one = torch.diag(moment).mean(), torch.eye(len(moment), device=moment.device)
    if not moment.isfinite().all() or level <= 0:
        what = "not finite" if level != 0 else "zero"
        raise WorkError(f"calibration: the second moment of the inputs of {where} is {what}; look at the samples")
    damping = 0.01
    while True:
        damped = moment + one * level * damping
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, one) < 0.05:
            return damped, damping
        damping *= 2


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``count`` left vectors (P, k), values (k,) and right vectors (Q, k) by a randomised SVD (Halko,
    Martinsson and Tropp, 2011) with a seed of its own: alike at every call, and no random state is changed."""
    cuda = matrix.is_cuda
    with torch.random.fork_rng(devices=[matrix.device] if cuda else []):
        generator = torch.cuda.default_generators[matrix.device.index] if cuda else torch.default_generator
        generator.manual_seed(0)  # torch.manual_seed would also seed every other accelerator
        left, values, right = torch.svd_lowrank(matrix, q=min(2 * count + 16, *matrix.shape), niter=6)
    return left[:, :count], values[:count], right[:, :count]


def without_smallest(
    weight: Tensor, rank: int, moment: Tensor | None = None, precision: Precision = "float64"
) -> Tensor:
    """The weight less its ``rank`` smallest components, along its context or (no moment) of the plain SVD: the paper's
    measure of what a decomposition keeps."""
    left, values, right, _ = decompose(weight, moment, precision)
    kept = len(values) - rank
    return ((left[:, :kept] * values[:kept]) @ right[:kept]).to(weight).view_as(weight)


def projections(sites: Sites, roles: str | Sequence[str] | None, depth: str | int | Sequence[int]) -> Sites:
    """The sites with these roles; None: all projections of attention and MLP, or all linear layers where none is named.

    A fused projection is taken whole where its parts have no sites of their own.
    """
    if roles is None:
        known = LINEARS if "attention.query" in sites.roles else ("attention.qkv", *LINEARS)
        roles = [role for role in known if role in sites.roles]
        if not roles:
            raise RequestError(f"{sites.owner} has no linear layer to decompose; it has {', '.join(sites.roles)}")
    return sites.select(roles, depth)
