"""LoRA: a low-rank change of frozen weights (Hu et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shared.blocks.low_rank import LowRank
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """W + (alpha / rank) * B A at the chosen projections, identity at the start.

    rank: inner width (paper: 1 to 64, 4 or 8 typical).  alpha: numerator of the scale; None means rank, scale 1.
    dropout: probability on the input of the branch (official code: 0 to 0.1).
    roles: which projections (paper: query and value).  depth: which blocks ("all", "last 4", indices).
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/low-rank",), acts_on="weights", form="parallel", mergeable="yes",
        trains="rank * (rows + columns)",
    )  # fmt: skip

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    roles: Sequence[str] = ("attention.query", "attention.value")
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RequestError(f"LoRA dropout {self.dropout}: use a probability from 0 to below 1")

    def sites(self, sites: Sites) -> Sites:
        return sites.select(self.roles, self.depth)

    def build(self, site: Site) -> LowRank:
        alpha = self.rank if self.alpha is None else self.alpha
        return LowRank(site.weight.shape, self.rank, alpha / max(self.rank, 1), self.dropout, where=site.key)
