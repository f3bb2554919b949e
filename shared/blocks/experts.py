"""Low-rank experts beside a linear layer, and the router that gives each token a few of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.blocks.placement import add_rows
from shared.errors import RequestError


class Experts(Adapter):
    """``base(x) + scale * sum of gate * up[e] @ down[e] @ dropout(x)`` over the top-k experts of each token.

    The gates are the softmax over all experts of ``router @ x``, in float32, its k largest rescaled to the sum 1.
    down: (experts, rank, inputs), router: (experts, inputs), Kaiming-uniform with a = sqrt 5.  up: (experts, outputs,
    rank), zero, so the start is the identity.  dropout: probability, drawn for each expert anew.
    collect: keep the router's logits of a training step, from ``open`` to ``take``.  depth: of the block it is in.

    Raises RequestError where the rank does not fit the layer, or there are fewer experts than a token takes.
    """

    def __init__(
        self, shape: torch.Size | tuple[int, int], experts: int, top_k: int, rank: int, scale: float, *,
        dropout: float = 0.0, rows: tuple[int, int] | None = None, collect: bool = False, depth: int = 0,
        where: str = "linear",
    ):  # fmt: skip
        super().__init__()
        outputs, inputs = shape
        if not 1 <= top_k <= experts:
            raise RequestError(f"{top_k} of {experts} experts a token at {where}: use 1 to {experts}")
        if not 1 <= rank <= min(outputs, inputs):
            raise RequestError(f"rank {rank} at {where}: its matrix is {outputs} x {inputs}, so use 1 to {min(shape)}")
        self.top_k, self.scale, self.dropout = top_k, float(scale), float(dropout)
        self.rows, self.collect, self.depth = rows, collect, depth
        self.down = nn.Parameter(torch.empty(experts, rank, inputs))
        self.up = nn.Parameter(torch.zeros(experts, outputs, rank))
        self.router = nn.Parameter(torch.empty(experts, inputs))
        for matrix in (*self.down, self.router):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self._logits: list[Tensor] | None = None

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(self.down.dtype)
        logits = F.linear(tokens, self.router)
        values, chosen = logits.float().softmax(-1).topk(self.top_k)
        gates = (values / values.sum(-1, keepdim=True)).to(tokens.dtype)
        self._keep(logits)
        mixed = self.dense if torch.compiler.is_compiling() or not len(tokens) else self.sparse
        change = mixed(tokens, gates, chosen).to(x.dtype).reshape(*x.shape[:-1], self.up.shape[1])
        return add_rows(base(x), change, self.rows)

    def sparse(self, tokens: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on its own tokens: tokens (T, inputs), gates and chosen (T, k) to the change (T, outputs)."""
        order = chosen.flatten().argsort(stable=True)
        token = order // self.top_k
        counts = chosen.flatten().bincount(minlength=len(self.router)).tolist()
        parts = [
            (F.dropout(tokens[own], self.dropout, self.training) @ down.t()) @ up.t()
            for down, up, own in zip(self.down.unbind(), self.up.unbind(), token.split(counts), strict=True)
            if len(own)
        ]
        change = torch.cat(parts) * (gates.flatten()[order, None] * self.scale)
        return change.new_zeros(len(tokens), change.shape[1]).index_add(0, token, change)

    def dense(self, tokens: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """The same by all experts on all tokens, with gates of 0: shapes do not depend on the routing."""
        all_gates = gates.new_zeros(len(tokens), len(self.router)).scatter(1, chosen, gates)
        each = F.dropout(tokens.expand(len(self.router), *tokens.shape), self.dropout, self.training)
        inner = torch.einsum("eti,eri->ter", each, self.down) * (all_gates * self.scale)[..., None]
        return torch.einsum("ter,eor->to", inner, self.up)

    # -- the router's logits of a step -----------------------------------------------------------------------------

    def open(self) -> None:
        """Forget what was kept; keep the logits of training passes from now on."""
        self._logits = []

    def take(self) -> list[Tensor] | None:
        """Logits (tokens, experts) of each pass since ``open``, padding left out; None where it was not called.

        Nothing is kept after it, so what checkpointing computes again in the backward pass is not counted twice.
        """
        taken, self._logits = self._logits, None
        return taken

    def _keep(self, logits: Tensor) -> None:
        if self.collect and self.training and self._logits is not None:
            mask = getattr(self.context, "token_mask", None)
            if mask is not None and mask.numel() == len(logits):
                logits = logits[mask.flatten()]
            self._logits.append(logits)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_logits": None}  # they belong to a graph, which is neither copied nor stored


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """``experts * sum of share * probability``: 1 where the routing is even, ``experts`` where one has all tokens.

    logits: (tokens, experts).  share: of the tokens' choices that fall on an expert, without gradient.  probability:
    its mean.  (Fedus et al., 2022, for k choices.)
    """
    probabilities = logits.float().softmax(-1)
    chosen = probabilities.topk(top_k).indices.flatten()
    share = chosen.bincount(minlength=logits.shape[1]) / max(len(chosen), 1)
    return logits.shape[1] * (share * probabilities.sum(0) / max(len(logits), 1)).sum()
