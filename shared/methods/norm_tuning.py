"""Norm tuning: only the affine part of the norms trains (Basu et al., 2023, for transformers; Frankle et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shared.blocks.low_rank import Replacement
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class NormTuning(Method):
    """Weight and bias of every norm replaced by trained copies; the identity at the start.

    depth: which blocks ("all" has the norms outside the blocks too).  tags: further names a norm must have ("norm1").
    """

    record: ClassVar[Record] = Record(
        categories=("selective/structured",), acts_on="weights", form="in place", mergeable="yes", trains="size"
    )

    depth: str | int | Sequence[int] = "all"
    tags: Sequence[str] = ()

    def sites(self, sites: Sites) -> Sites:
        norms = sites.select("norm", self.depth, self.tags)
        return Sites({s.key: s for norm in norms for s in (norm, norm.bias) if s is not None}.values(), sites.owner)

    def build(self, site: Site) -> Replacement:
        return Replacement(site.weight)
