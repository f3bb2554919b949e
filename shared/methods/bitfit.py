"""BitFit: only the biases train (Ben Zaken, Goldberg and Ravfogel, 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shared.blocks.low_rank import Replacement
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Every bias of the backbone, those of norms included, replaced by a trained copy; the identity at the start.

    roles: whose biases (None: all there are; the paper's small form is ("attention.query", "mlp.up")).
    depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("selective/structured",), acts_on="weights", form="in place", mergeable="yes", trains="size"
    )

    roles: Sequence[str] | None = None
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        roles = with_weights(sites) if self.roles is None else self.roles
        kept = biases(sites.select(roles, self.depth))
        if not kept:
            raise RequestError(f"{sites.owner} has no bias at {', '.join(roles)}: nothing for BitFit to train")
        return Sites(kept, sites.owner)

    def build(self, site: Site) -> Replacement:
        return Replacement(site.weight)


def with_weights(sites: Sites) -> tuple[str, ...]:
    """The roles of everything that may have a bias."""
    return tuple(dict.fromkeys(s.role for s in sites if s.parameter and s.role not in ("model", "embedding")))


def biases(sites: Sites) -> list[Site]:
    """The biases that belong to these sites, each once: rows of one only where the whole is not among them."""
    found = {bias.key: bias for s in sites if (bias := _bias(s)) is not None}
    whole = {(s.path, s.parameter) for s in found.values() if s.rows is None}
    return [s for s in found.values() if s.rows is None or (s.path, s.parameter) not in whole]


def _bias(site: Site) -> Site | None:
    return site if site.parameter == "bias" else site.bias
