"""(IA)^3: keys, values and the hidden activations of the MLP rescaled (Liu et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shared.blocks.scale import Scale
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

INPUTS = ("mlp.down", "attention.output")


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Learned vectors, ones at the start, kept as a change of weights: exact, and merged at no cost.

    roles: projections whose output is scaled, bias included; of ``mlp.down`` and ``attention.output`` it is the input
    (paper: key, value and the input of the MLP's last layer).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/other",), acts_on="weights", form="in place", mergeable="yes",
        trains="columns if site.role in ('mlp.down', 'attention.output')"
        " else 0 if str(site.parameter).endswith('bias') else rows",
    )  # fmt: skip

    roles: Sequence[str] = ("attention.key", "attention.value", "mlp.down")
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        chosen = sites.select(self.roles, self.depth)
        pairs = [(s, None if s.role in INPUTS else s.bias) for s in chosen]
        return Sites([s for pair in pairs for s in pair if s is not None], sites.owner)

    def build_all(self, sites: Sites) -> dict[str, Scale]:
        found: dict[str, Scale] = {}
        scales = {}
        for site in sites:
            place = site.path, site.rows
            if site.role in INPUTS:
                found[site.key] = Scale(site.weight.shape[1], axis=1)
            elif str(site.parameter).endswith("bias"):
                found[site.key] = Scale(len(site.weight), scale=scales[place])
            else:
                found[site.key] = Scale(len(site.weight))
                scales[place] = found[site.key].scale
        return found

    def build(self, site: Site) -> Scale:
        return self.build_all(Sites([site]))[site.key]
