"""LLM-Adapters: series and parallel bottlenecks on single linear layers of a language model (Hu et al., 2023).

Its LoRA is ``LoRA`` and its prefix tuning ``Prefix``. The published code wraps linear layers where the paper's figure
spans sub-layers; this follows the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from shared.adapter import Adapter, WeightAdapter
from shared.blocks.bottleneck import Bottleneck
from shared.blocks.low_rank import LowRank
from shared.blocks.placement import After, Before, Beside, check_product
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

OUTWARD = ("mlp.down", "attention.output")  # projections out of a sub-layer: adapted after, all others before


@dataclass(frozen=True, kw_only=True)
class _OnLinears(Method):
    """width: channels inside (published: 256).  activation: "tanh" (published), "relu", "gelu", "swish" or "none".

    dropout: on the branch's input.  scale: a number or "learned".  start: "normal" (published: both matrices of
    deviation 0.02, nearly the identity) or "zero" (up starts at zero: the identity).
    roles: which linear layers.  depth: which blocks.
    """

    width: int = 256
    activation: str = "tanh"
    dropout: float = 0.0
    scale: float | Literal["learned"] = 1.0
    start: Literal["normal", "zero"] = "normal"
    roles: Sequence[str] | None = None
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RequestError(f"{type(self).__name__} dropout {self.dropout}: use a probability from 0 to below 1")

    def branch(self, inputs: int, outputs: int, site: Site) -> Bottleneck:
        return Bottleneck(
            inputs, outputs, self.width, activation=self.activation, bias=False, dropout=self.dropout,
            scale=self.scale, start=self.start, where=site.key, layout=site.layout,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SeriesAdapter(_OnLinears):
    """A bottleneck in series with linear layers: ``W(x + Ad(x))`` going into a sub-layer, ``y + Ad(y)`` coming out.

    roles: (None: gate, up and down projection of the MLP, Houlsby-like, as published without targets; its runs take
    ("mlp.gate", "mlp.up") on LLaMA and "mlp.down" on BLOOM and GPT-J; "mlp.down" alone is the Pfeiffer-like form).
    """

    record: ClassVar[Record] = Record(
        categories=("hybrid", "additive/adapter"), acts_on="activations", form="sequential", mergeable="no",
        trains="2 * width * (rows if site.role in ('mlp.down', 'attention.output') else columns)"
        " + (scale == 'learned')",
        spec="llm_adapters", why="the survey files the whole family under hybrid; alone it is a serial adapter",
    )  # fmt: skip

    def sites(self, sites: Sites) -> Sites:
        roles = [role for role in ("mlp.gate", "mlp.up", "mlp.down") if role in sites.roles]
        return sites.select(self.roles or roles or ("mlp.up",), self.depth)

    def build(self, site: Site) -> Adapter:
        check_product(site, "SeriesAdapter", "use roles such as mlp.up and mlp.down")
        rows, columns = site.weight.shape[:2]
        if site.role in OUTWARD:
            return After(self.branch(rows, rows, site), site.rows)
        if site.rows is not None:
            raise RequestError(f"site {site.key}: {site.role} shares its input with others; adapt the whole projection")
        return Before(self.branch(columns, columns, site))


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(_OnLinears):
    """A bottleneck beside linear layers: ``W x + Ad(x)``; with activation "none" it is a low-rank change that merges.

    roles: (None: query, key and value, as published without targets; its runs take ("mlp.up", "mlp.down")).
    """

    record: ClassVar[Record] = Record(
        categories=("hybrid", "additive/adapter"), acts_on="activations", form="parallel", mergeable="conditional",
        trains="width * (rows + columns) + (scale == 'learned')", spec="llm_adapters",
        why="the survey files the whole family under hybrid; alone it is a parallel adapter",
    )  # fmt: skip

    def sites(self, sites: Sites) -> Sites:
        whole = ("attention.qkv",) if "attention.query" not in sites.roles else ()
        return sites.select(self.roles or whole or ("attention.query", "attention.key", "attention.value"), self.depth)

    def build(self, site: Site) -> Adapter | WeightAdapter:
        rows, columns = site.weight.shape[:2]
        branch = self.branch(columns, rows, site)
        if self.activation == "none" and self.scale != "learned":
            change = LowRank(site.weight.shape, self.width, float(self.scale), self.dropout, where=site.key)
            change.down.data, change.up.data = branch.down.weight.data, branch.up.weight.data.t().contiguous()
            return change
        check_product(
            site,
            "ParallelAdapter",
            "use roles such as mlp.up and mlp.down, or activation 'none', a change of the weight",
        )
        return Beside(branch, site.rows)
