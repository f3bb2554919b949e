"""A linear layer split among experts: each owns a random part of one matrix (Zhang et al., 2023)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import RequestError, WorkError

Merge = Literal["mean", "union"]
Start = Literal["zero", "kaiming"]


class Split(nn.Module):
    """``experts`` linear layers that differ from one start, each at the entries it owns, and their merged layer.

    One matrix holds what all of them trained: expert e's is ``start + (weight - start) * (owner == e)``. So memory is
    that of one layer, an entry gets gradients from its owner alone, and it is at its start in every other expert.

    weight: (outputs, inputs).  bias: (experts, outputs), one for each, zero at the start, or none.  owner: uint8,
    (outputs, inputs).  start: "zero" or "kaiming" (uniform with a = sqrt 5; kept beside the weight).
    merge: "mean" of the experts, as published: what was trained counts 1 / experts; or their "union".
    copies: a whole matrix for each expert, (experts, outputs, inputs), as the published code keeps them. Gradients are
    the same, zero where an expert owns nothing, but weight decay shrinks all of every copy.

    Raises RequestError where there are fewer than 2 experts, more than 255, or more than entries.
    """

    start: Tensor | None
    owner: Tensor

    def __init__(
        self, inputs: int, outputs: int, experts: int, *, start: Start = "zero", merge: Merge = "mean",
        bias: bool = True, copies: bool = False, where: str = "linear",
    ):  # fmt: skip
        super().__init__()
        if not 2 <= experts <= min(255, inputs * outputs):
            most = min(255, inputs * outputs)
            raise RequestError(f"{experts} experts at {where}: split {outputs} x {inputs} among 2 to {most}")
        self.experts, self.merge, self.copies = experts, merge, copies
        first = started(torch.empty(outputs, inputs), start)
        self.weight = nn.Parameter(first.repeat(experts, 1, 1) if copies else first)
        self.bias = nn.Parameter(torch.zeros(experts, outputs)) if bias else None
        self.register_buffer("start", first.clone() if start == "kaiming" and not copies else None)
        self.register_buffer("owner", owners(torch.rand(outputs, inputs), experts))

    def forward(self, x: Tensor, expert: Tensor | None = None) -> Tensor:
        """x (..., inputs) through expert ``expert`` (an index, of shape ()), or through the merged layer."""
        if expert is None:
            return F.linear(x, *self.merged())
        bias = None if self.bias is None else self.bias.index_select(0, expert.reshape(1))[0]
        return F.linear(x, self.matrix(expert), bias)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (outputs, inputs) and bias (outputs), if any, of the one layer the experts become."""
        return self.matrix(None), None if self.bias is None else self.bias.mean(0)

    def matrix(self, expert: Tensor | None) -> Tensor:
        """The weight (outputs, inputs) of an expert, or of the merged layer."""
        if self.copies:
            return self._of_copies(expert)
        if expert is None:
            return self._moved(1.0 if self.merge == "union" else 1.0 / self.experts)
        return self._moved(self.owner == expert)

    def _moved(self, share: Tensor | float) -> Tensor:
        if self.start is None:
            return self.weight * share
        return self.start + (self.weight - self.start) * share

    def _of_copies(self, expert: Tensor | None) -> Tensor:
        if expert is not None:
            copy = self.weight.index_select(0, expert.reshape(1))[0]
            return torch.where(self.owner == expert, copy, copy.detach())
        if self.merge == "union":
            return self.weight.gather(0, self.owner.long()[None])[0]
        return self.weight.mean(0)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[-1]}, {self.weight.shape[-2]}, experts={self.experts}"


class Drawn(nn.Module):
    """What every adapter with split layers ``down`` and ``up`` has: the experts a step drew for it.

    drawn: int64 (2, 2), for each of a step's two passes the expert of down and of up.  turn: the pass in progress,
    None after both.
    """

    drawn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drawn", torch.zeros(2, 2, dtype=torch.long))
        self.turn: int | None = 0

    def experts(self) -> tuple[Tensor | None, Tensor | None]:
        """Those of down and up that run now; None for the merged ones, in inference."""
        if not self.training:
            return None, None
        if self.turn is None:
            raise WorkError(
                "MoSA runs in training mode after both passes of its step: with method.consistency=0 gradient "
                "checkpointing can compute its pass again; without checkpointing, call step() first"
            )
        return self.drawn[self.turn, 0], self.drawn[self.turn, 1]


def started(weight: Tensor, start: Start) -> Tensor:
    """``weight``, filled in place."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5)) if start == "kaiming" else nn.init.zeros_(weight)


def owners(scores: Tensor, experts: int) -> Tensor:
    """The expert of each entry, uint8: expert i has those whose score ranks from i n / experts on, n entries in all."""
    count, owner = scores.numel(), torch.empty(scores.numel(), dtype=torch.uint8, device=scores.device)
    order = scores.flatten().argsort()
    for expert in range(experts):
        owner[order[expert * count // experts : (expert + 1) * count // experts]] = expert
    return owner.reshape(scores.shape)


def symmetric_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Half of KL(q || p) + KL(p || q) of logits (B, classes), mean over samples; each target without gradient."""
    p, q = p.float().log_softmax(1), q.float().log_softmax(1)
    one, other = (F.kl_div(a, b.detach(), reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p)))
    return 0.5 * (one + other)
