"""DoRA: a weight's magnitude and direction trained apart, the direction by a low-rank change (Liu et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shared.blocks.low_rank import LowRank
from shared.blocks.magnitude import Decomposed
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, norms and m by output, the identity at the start.

    rank: inner width (paper: 16 or 32 on LLaMA).  alpha: numerator of the scale (paper: twice the rank); None means
    rank.  dropout: probability on the input of all that is added to the frozen product, the new magnitude's part of it
    too (official: 0.05).  detach_norm: no gradient through the norm, which saves memory (paper, section 4.3; official).
    roles: which projections (paper: these).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/LoRA improvement",), acts_on="weights", form="in place", mergeable="yes",
        trains="rank * (rows + columns) + rows",
    )  # fmt: skip

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    detach_norm: bool = True
    roles: Sequence[str] = ("attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down")
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RequestError(f"DoRA dropout {self.dropout}: use a probability from 0 to below 1")

    def sites(self, sites: Sites) -> Sites:
        return sites.select(self.roles, self.depth)

    def build(self, site: Site) -> Decomposed:
        alpha = self.rank if self.alpha is None else self.alpha
        change = LowRank(site.weight.shape, self.rank, alpha / max(self.rank, 1), where=site.key)
        return Decomposed(site.weight, change, detach_norm=self.detach_norm, dropout=self.dropout)
