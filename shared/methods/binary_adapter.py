"""Binary adapters: AdaptFormer and LoRA whose matrices take two values each (or 4, 16, 256; Jie, Wang and Deng, 2023).

An adapter trains in float under fake quantisation; ``shared.packed`` writes its codes: tens of kilobytes a task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter, Factors, WeightAdapter
from shared.blocks.placement import Beside, on_output, take
from shared.blocks.quantised import QuantisedLinear, quantise
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class QuantisedBranch(nn.Module):
    """``scale * up(dropout(act(down(x))))`` without biases: x (..., inputs) to (..., outputs).

    Below 32 bits ``up`` starts normal with deviation 0.001, cut at two of them, since rounded zeros are zeros for ever:
    nearly the identity. At 32 bits it starts at zero.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int, *, bits: int, scale: float, dropout: float, relu: bool, where: str
    ):
        super().__init__()
        if width < 1:
            raise RequestError(f"width {width} at {where}: use at least 1")
        self.scale, self.dropout, self.relu = float(scale), float(dropout), relu
        self.down = nn.Linear(inputs, width, bias=False)
        self.up = nn.Linear(width, outputs, bias=False)
        if bits == 32:
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.trunc_normal_(self.up.weight, std=0.001, a=-0.002, b=0.002)
        quantise(self, bits, where)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x.to(self.down.weight.dtype))
        h = F.dropout(F.relu(h) if self.relu else h, self.dropout, self.training)
        return (self.up(h) * self.scale).to(x.dtype)


class QuantisedChange(WeightAdapter):
    """The same branch, without dropout or activation, as a change of the weight: it merges."""

    def __init__(self, branch: QuantisedBranch):
        super().__init__()
        self.branch = branch

    def factors(self) -> Factors:
        down, up = (_in_force(layer) for layer in (self.branch.down, self.branch.up))
        return Factors(down, up.t().contiguous(), self.branch.scale, 0.0)

    def delta(self, weight: Tensor) -> Tensor:
        down, up, scale, _ = self.factors()
        return ((up.t() @ down) * scale).reshape(weight.shape)


def _in_force(layer: nn.Linear) -> Tensor:
    return layer.quantised() if isinstance(layer, QuantisedLinear) else layer.weight


class ReadsStream(Adapter):
    """Changes nothing; tells the context what its norm is given: the residual stream."""

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.context.stream = take(args, kwargs)[0]
        return base(*args, **kwargs)


class BesideStream(Adapter):
    """``base(x) + branch(stream)``: beside a sub-layer, from the stream in front of its norm."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_output(base(*args, **kwargs), lambda y: y + self.branch(self.context.stream))


@dataclass(frozen=True, kw_only=True)
class _Quantised(Method):
    """bits: of a weight, 1, 2, 4 or 8 (paper: 1 is enough), 32 for a plain float adapter.

    width: channels inside (paper: 32, also 1).  scale: of the branch (official code: 0.01, 0.1, 1 or 10, chosen for
    each data set).  dropout: between the two projections (official code: 0.1).  depth: which blocks.
    """

    bits: int = 1
    width: int = 32
    scale: float = 1.0
    dropout: float = 0.1
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.bits not in (1, 2, 4, 8, 32):
            raise RequestError(f"{kind} bits {self.bits}: use 1, 2, 4, 8 or 32")
        if not 0 <= self.dropout < 1:
            raise RequestError(f"{kind} dropout {self.dropout}: use a probability from 0 to below 1")

    def branch(self, inputs: int, outputs: int, site: Site, relu: bool) -> QuantisedBranch:
        return QuantisedBranch(
            inputs, outputs, self.width, bits=self.bits, scale=self.scale, dropout=self.dropout, relu=relu,
            where=site.key,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BinaryAdaptFormer(_Quantised):
    """Bi-AdaptFormer: ``mlp(norm(h)) + scale * up(relu(down(h)))`` in blocks whose MLP has its norm in front."""

    record: ClassVar[Record] = Record(
        categories=("efficient/quantisation", "additive/adapter"), acts_on="activations", form="parallel",
        mergeable="no", trains="2 * width * site.width if site.role == 'mlp' else 0", spec="binary_adapter",
        why="an additive adapter whose contribution is the precision of what is stored",
    )  # fmt: skip

    def sites(self, sites: Sites) -> Sites:
        norms = [s for s in sites.select("norm", self.depth, "norm2") if s.parameter == "weight"]
        calls = Sites([dataclasses.replace(s, parameter=None) for s in norms], sites.owner)
        mlps = sites.select("mlp", self.depth)
        fronted = {norm.path.rpartition(".")[0] for norm in norms}
        if bare := [mlp for mlp in mlps if mlp.path.rpartition(".")[0] not in fronted or mlp.layout == "BCHW"]:
            raise RequestError(
                f"BinaryAdaptFormer at {bare[0].key}: it needs blocks whose MLP has a norm (norm2) in front and "
                f"channels last; of {sites.owner} choose others by depth, or use AdaptFormer"
            )
        return calls + mlps

    def build(self, site: Site) -> Adapter:
        if site.role == "norm":
            return ReadsStream()
        return BesideStream(self.branch(site.width, site.width, site, relu=True))


@dataclass(frozen=True, kw_only=True)
class BinaryLoRA(_Quantised):
    """Bi-LoRA: ``W x + scale * up(dropout(down(x)))`` at query and value; merges where dropout is 0.

    One trained with dropout loads into one without. roles: which projections (paper: query and value).
    """

    record: ClassVar[Record] = Record(
        categories=("efficient/quantisation", "reparameterised/low-rank"), acts_on="weights", form="parallel",
        mergeable="conditional", trains="width * (rows + columns)", spec="binary_adapter",
        why="LoRA whose contribution is the precision of what is stored",
    )  # fmt: skip

    roles: Sequence[str] = ("attention.query", "attention.value")

    def sites(self, sites: Sites) -> Sites:
        return sites.select(self.roles, self.depth)

    def build(self, site: Site) -> Adapter | WeightAdapter:
        rows, columns = len(site.weight), site.weight[0].numel()
        branch = self.branch(columns, rows, site, relu=False)
        if not self.dropout:
            return QuantisedChange(branch)
        if not _called(site.module):
            kind = type(site.module).__name__
            raise RequestError(f"site {site.key}: dropout {self.dropout} cannot act on {kind}; use dropout 0")
        return Beside(branch, site.rows)


def _called(module: nn.Module) -> bool:
    """Whether it is a linear layer whose output is its product: ``nn.MultiheadAttention`` only reads its weights."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
