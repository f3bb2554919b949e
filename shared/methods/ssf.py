"""SSF: every operation's output scaled and shifted by trained vectors (Lian et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shared.blocks.scale import Scale, ScaleShift
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

ROLES = ("conv", "attention.qkv", "attention.query", "attention.key", "attention.value", "attention.output",
         "mlp.up", "mlp.gate", "mlp.down", "linear", "norm")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SSF(Method):
    """``gamma * y + beta`` after linear layers, convolutions and norms, kept as a change of their weight and bias.

    The identity at the start (the paper draws gamma around 1 and beta around 0 with deviation 0.02; ones and zeros
    here). An operation without a bias gets its scale only.
    roles: which operations (None: all there are, as published).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/other",), acts_on="weights", form="in place", mergeable="yes",
        trains="rows",
    )  # fmt: skip

    roles: Sequence[str] | None = None
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        roles = [role for role in ROLES if role in sites.roles] if self.roles is None else self.roles
        weights = [s for s in sites.select(roles, self.depth) if s.parameter and s.parameter != "bias"]
        whole = {s.path for s in weights if s.rows is None}
        weights = [s for s in weights if s.rows is None or s.path not in whole]
        if not weights:
            raise RequestError(f"{sites.owner} has no weight at {', '.join(roles)}: nothing for SSF to scale")
        found = {s.key: s for weight in weights for s in (weight, weight.bias) if s is not None}
        return Sites(found.values(), sites.owner)

    def build_all(self, sites: Sites) -> dict[str, Scale]:
        found: dict[str, Scale] = {}
        scales = {}
        for site in sites:
            rows = len(site.weight)
            if site.parameter and site.parameter.endswith("bias"):
                found[site.key] = ScaleShift(rows, scales[site.path, site.rows])
            else:
                found[site.key] = scale = Scale(rows)
                scales[site.path, site.rows] = scale.scale
        return found

    def build(self, site: Site) -> Scale:
        return self.build_all(Sites([site]))[site.key]
