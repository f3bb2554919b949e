"""Hydra: a low-rank branch beside a linear layer and one after it, merged for inference (Kim et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.blocks.placement import add_rows, take
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

Start = Literal["xavier", "normal", "kaiming"]


class Branch(nn.Module):
    """``scale * up(dropout(down(x)))``, no non-linearity: x (..., inputs) to (..., outputs), zero at the start."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, *, scale: float | Literal["learned"], dropout: float, bias: bool,
        start: Start,
    ):  # fmt: skip
        super().__init__()
        self.dropout = float(dropout)
        self.down, self.up = nn.Linear(inputs, rank, bias=bias), nn.Linear(rank, outputs, bias=bias)
        self.scale = nn.Parameter(torch.ones(())) if scale == "learned" else float(scale)
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if start == "xavier":
            nn.init.xavier_uniform_(self.down.weight)
        elif start == "normal":
            nn.init.normal_(self.down.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.down(x.to(self.down.weight.dtype)), self.dropout, self.training)
        return self.up(h) * self.scale

    def matrix(self) -> Tensor:
        """(outputs, inputs): the branch without its biases and dropout."""
        return self.up.weight @ self.down.weight * self.scale


class Pair(Adapter):
    """``y0 + parallel(x) + sequential(y0)`` with ``y0 = base(x)``, bias included; a branch of rank 0 is absent.

    rows: those of a fused projection that it owns.
    """

    additive = True

    def __init__(self, parallel: Branch | None, sequential: Branch | None, rows: tuple[int, int] | None = None):
        super().__init__()
        self.parallel, self.sequential, self.rows = parallel, sequential, rows

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x, y = take(args, kwargs)[0], base(*args, **kwargs)
        y0 = y[..., slice(*self.rows)] if self.rows else y
        for branch, z in ((self.parallel, x), (self.sequential, y0)):
            if branch is not None:
                y = add_rows(y, branch(z).to(y.dtype), self.rows)
        return y

    def merged(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """W + s (B_p A_p + B_s A_s W), and as bias what ``forward`` gives where the input is zero."""
        whole, bias = tensors["weight"], tensors["bias"]
        assert whole is not None
        whole = whole.to(next(self.parameters()).dtype)
        own = whole[slice(*self.rows)] if self.rows else whole
        change = torch.zeros_like(own)
        if self.parallel is not None:
            change += self.parallel.matrix()
        if self.sequential is not None:
            change += self.sequential.matrix() @ own
        found = {"weight": add_rows(whole.t(), change.t(), self.rows).t()}
        if bias is not None or any(p.ndim == 1 for p in self.parameters()):
            b0 = whole.new_zeros(len(whole)) if bias is None else bias.to(whole.dtype)
            found["bias"] = self(lambda _: b0, whole.new_zeros(whole.shape[1]))
        return found


@dataclass(frozen=True, kw_only=True)
class Hydra(Method):
    """``y + s B_p A_p x + s B_s A_s y`` with ``y = W x + b``, the identity at the start.

    Dropout (between the factors) acts in training; merged, the layer costs what it did.

    parallel_rank, sequential_rank: inner widths, 0 for none (official: 2 and 2; RoBERTa 4 and 8).  scale: s of both
    (official: 0.1 to 4.5 by data set), or "learned", one of each branch that starts at 1.  dropout: between the factors
    (official: 0 to 0.2).  bias: of both factors (official; RoBERTa none).  start: of A, "xavier" uniform (VTAB),
    "normal" of deviation 0.02 (CLIP) or "kaiming" uniform with a = sqrt 5 (RoBERTa).
    roles: which linear layers (official: VTAB these, CLIP and RoBERTa mlp.down).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/LoRA improvement",), acts_on="activations", form="parallel", mergeable="yes",
        trains="parallel_rank * (rows + columns + bias) + sequential_rank * (2 * rows + bias)"
        " + (min(parallel_rank, 1) + min(sequential_rank, 1)) * (rows * bias + (scale == 'learned'))",
        spec="hydra",
        why="Half of it is sequential; it runs around the layer in training and, merged, is a change of its weight.",
    )  # fmt: skip

    parallel_rank: int = 2
    sequential_rank: int = 2
    scale: float | Literal["learned"] = 1.0
    dropout: float = 0.0
    bias: bool = True
    start: Start = "xavier"
    roles: Sequence[str] = ("mlp.down", "attention.output")
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RequestError(f"Hydra dropout {self.dropout}: use a probability from 0 to below 1")
        if self.start not in ("xavier", "normal", "kaiming"):
            raise RequestError(f"Hydra start {self.start!r}: use xavier, normal or kaiming")
        if not self.parallel_rank and not self.sequential_rank:
            raise RequestError("Hydra ranks 0 and 0: one of the two branches must be there")

    def sites(self, sites: Sites) -> Sites:
        return sites.select(self.roles, self.depth)

    def build(self, site: Site) -> Pair:
        module = site.module
        if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise RequestError(
                f"Hydra at {site.key} ({site.role}): it goes around a linear layer that is called, and this is "
                f"{type(module).__name__}"
            )
        outputs, inputs = site.weight.shape
        pair: list[Branch | None] = []
        for name, width in (("parallel", inputs), ("sequential", outputs)):
            rank, limit = getattr(self, f"{name}_rank"), min(width, outputs)
            if not 0 <= rank <= limit:
                raise RequestError(f"Hydra {name}_rank {rank} at {site.key}: use 0 to {limit}")
            pair.append(self._branch(width, outputs, rank) if rank else None)
        return Pair(pair[0], pair[1], site.rows)

    def _branch(self, inputs: int, outputs: int, rank: int) -> Branch:
        return Branch(
            inputs, outputs, rank, scale=self.scale, dropout=self.dropout, bias=self.bias, start=self.start
        )  # fmt: skip
