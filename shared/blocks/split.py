"""A linear layer split among experts: each owns a random part of one matrix (Zhang et al., 2023)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import RequestError

Merge = Literal["mean", "union"]


class Split(nn.Module):
    """``experts`` linear layers that differ from one start, each at the entries it owns, and their merged layer.

    One matrix holds what all of them trained: expert e's is ``start + (weight - start) * (owner == e)``. So memory is
    that of one layer, an entry gets gradients from its owner alone, and it is at its start in every other expert.

    weight: (outputs, inputs).  bias: (experts, outputs), one for each, zero at the start.  owner: uint8, as weight.
    start: "zero" or "kaiming" (uniform with a = sqrt 5; kept beside the weight).
    merge: "mean" of the experts, as published: what was trained counts 1 / experts; or their "union".

    Raises RequestError where there are fewer than 2 experts, more than 255, or more than entries.
    """

    start: Tensor | None
    owner: Tensor

    def __init__(
        self, inputs: int, outputs: int, experts: int, *, start: Literal["zero", "kaiming"] = "zero",
        merge: Merge = "mean", where: str = "linear",
    ):  # fmt: skip
        super().__init__()
        if not 2 <= experts <= min(255, inputs * outputs):
            most = min(255, inputs * outputs)
            raise RequestError(f"{experts} experts at {where}: split {outputs} x {inputs} among 2 to {most}")
        self.experts, self.merge = experts, merge
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))
        if start == "kaiming":
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("start", self.weight.detach().clone() if start == "kaiming" else None)
        self.register_buffer("owner", owners(torch.rand(outputs, inputs), experts))

    def forward(self, x: Tensor, expert: Tensor | None = None) -> Tensor:
        """x (..., inputs) through expert ``expert`` (an index, of shape ()), or through the merged layer."""
        if expert is None:
            return F.linear(x, *self.merged())
        return F.linear(x, self._moved(self.owner == expert), self.bias.index_select(0, expert.reshape(1))[0])

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight (outputs, inputs) and bias (outputs) of the one layer the experts become."""
        return self._moved(1.0 if self.merge == "union" else 1.0 / self.experts), self.bias.mean(0)

    def _moved(self, share: Tensor | float) -> Tensor:
        if self.start is None:
            return self.weight * share
        return self.start + (self.weight - self.start) * share

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, experts={self.experts}"


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
