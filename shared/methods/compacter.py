"""Compacter: bottlenecks whose two layers are sums of Kronecker products (Mahabadi et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from shared.blocks.bottleneck import Bottleneck, reduced
from shared.blocks.phm import LowRankLinear, PHMLinear, PHMRule
from shared.blocks.placement import After, sublayers
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class Compacter(Method):
    """``y + up(gelu(down(y)))`` on what each sub-layer adds, with ``H = sum_i kron(A_i, W_i)`` for down and up.

    n: summands (paper: 4; VL-Adapter: 2).  rank: of every W_i (paper: 1; VL-Adapter: None, whole).
    shared_rule: one set of A for all layers (paper), or one for each (VL-Adapter).  factorised_rule: A_i of rank 1.
    reduction: width over channels inside (VL-Adapter: 8).  activation: see ``Bottleneck``.
    start: "random" (published: A normal with deviation ``rule_deviation``, W Glorot-uniform: nearly the identity) or
    "zero" (W of up starts at zero: the identity).
    sublayers: which.  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/low-rank", "additive/adapter"), acts_on="activations", form="sequential",
        mergeable="no", spec="vl_adapter",
        trains="site.width // reduction + site.width"
        " + (0 if shared_rule else 2 * (2 * n ** 2 if factorised_rule else n ** 3))"
        " + 2 * (site.width * (site.width // reduction) // n if rank is None"
        " else rank * (site.width + site.width // reduction))",
        once="(2 * n ** 2 if factorised_rule else n ** 3) if shared_rule else 0",
        why="the survey files it under low rank, for its layers; it stands as a serial adapter and does not merge",
    )  # fmt: skip

    n: int = 4
    rank: int | None = 1
    shared_rule: bool = True
    factorised_rule: bool = False
    rule_deviation: float = 0.01
    reduction: int = 8
    activation: str = "gelu_tanh"
    start: Literal["random", "zero"] = "random"
    sublayers: Sequence[Literal["attention", "mlp"]] = ("attention", "mlp")
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise RequestError(f"Compacter n {self.n}: use at least 1")

    def sites(self, sites: Sites) -> Sites:
        return sublayers(sites, self.depth, tuple(self.sublayers))

    def build_all(self, sites: Sites) -> dict[str, After]:
        shared = self._rule() if self.shared_rule else None
        return {site.key: self._after(site, shared) for site in sites}

    def build(self, site: Site) -> After:
        return self._after(site, None)

    def _rule(self) -> PHMRule:
        return PHMRule(self.n, factorised=self.factorised_rule, deviation=self.rule_deviation)

    def _after(self, site: Site, shared: PHMRule | None) -> After:
        wide, narrow, zero = site.width, reduced(site.width, self.reduction, site.key), self.start == "zero"
        down = PHMLinear(wide, narrow, shared or self._rule(), rank=self.rank, where=site.key)
        up = PHMLinear(narrow, wide, shared or self._rule(), rank=self.rank, zero=zero, where=site.key)
        return After(Bottleneck(wide, wide, narrow, activation=self.activation, where=site.key, layers=(down, up),
                                layout=site.layout))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LowRankAdapter(Method):
    """``y + up(gelu(down(y)))`` on what each sub-layer adds, with down and up of rank ``rank`` (Compacter's baseline).

    rank: of both layers (published: 1).  start: "random" (published: Glorot-uniform) or "zero" (the identity).
    reduction, activation, sublayers, depth: as of ``Compacter``.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="sequential", mergeable="no", spec="vl_adapter",
        trains="(2 * rank + 1) * (site.width + site.width // reduction)",
    )  # fmt: skip

    rank: int = 1
    reduction: int = 8
    activation: str = "gelu_tanh"
    start: Literal["random", "zero"] = "random"
    sublayers: Sequence[Literal["attention", "mlp"]] = ("attention", "mlp")
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        return sublayers(sites, self.depth, tuple(self.sublayers))

    def build(self, site: Site) -> After:
        wide, narrow, zero = site.width, reduced(site.width, self.reduction, site.key), self.start == "zero"
        down = LowRankLinear(wide, narrow, self.rank, where=site.key)
        up = LowRankLinear(narrow, wide, self.rank, zero=zero, where=site.key)
        return After(Bottleneck(wide, wide, narrow, activation=self.activation, where=site.key, layers=(down, up),
                                layout=site.layout))  # fmt: skip
