"""AdaptFormer: a bottleneck beside every MLP (Chen et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shared.blocks.bottleneck import Bottleneck
from shared.blocks.placement import Beside
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(Method):
    """``mlp(x) + scale * up(relu(down(x)))``, the identity at the start.

    The branch reads what the MLP reads, so its input norm is the frozen one.
    width: channels inside (paper: 64).  scale: of the branch (paper: 0.1).  dropout: on its input (official: 0.1).
    depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="parallel", mergeable="no",
        trains="width * (2 * site.width + 1) + site.width",
    )  # fmt: skip

    width: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RequestError(f"AdaptFormer dropout {self.dropout}: use a probability from 0 to below 1")

    def sites(self, sites: Sites) -> Sites:
        return sites.select("mlp", self.depth)

    def build(self, site: Site) -> Beside:
        branch = Bottleneck(
            site.width, site.width, self.width, dropout=self.dropout, scale=self.scale, where=site.key,
            layout=site.layout,
        )  # fmt: skip
        return Beside(branch)
