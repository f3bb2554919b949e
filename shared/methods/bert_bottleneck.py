"""Bottlenecks in blocks whose norms come after the residual sums (BERT, RoBERTa), in the places AdapterHub gives them:
Houlsby et al. (2019), Pfeiffer et al. (2020), parallel (He et al., 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from shared.adapter import Adapter
from shared.blocks.bottleneck import Bottleneck
from shared.blocks.placement import After
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

PARTS = {"attention": "attention.output", "mlp": "mlp.down"}  # role of each sub-layer's last projection
PLACES = ("houlsby", "pfeiffer", "normed", "parallel")


@dataclass(frozen=True, kw_only=True)
class BertBottleneck(Method):
    """One bottleneck ``A`` for each sub-layer; h is what the sub-layer adds to the stream x, and LN the norm after it.

    place: "houlsby" LN(x + h + A(h)); "pfeiffer" LN(s + A(LN(s))) with s = x + h; "normed" n + A(n) with n = LN(x + h);
    "parallel" LN(x + h + A(x)).
    parts: which sub-layers (Houlsby both, Pfeiffer "mlp", parallel "mlp").  width: channels inside (published: a 16th
    of the model's, parallel a half).  widths: of single blocks, by index.  activation: as of ``Bottleneck`` (Houlsby
    "swish").  scale: a number (parallel: 4) or "learned".  dropout: on the bottleneck's input.  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="sequential", mergeable="no",
        trains="widths.get(str(site.depth), width) * (2 * site.width + 1) + site.width + (scale == 'learned')",
        why="its parallel place stands beside the sub-layer",
    )  # fmt: skip

    place: Literal["houlsby", "pfeiffer", "normed", "parallel"] = "pfeiffer"
    parts: Sequence[Literal["attention", "mlp"]] = ("mlp",)
    width: int = 48
    widths: Mapping[str, int] = field(default_factory=dict)
    activation: str = "relu"
    scale: float | Literal["learned"] = 1.0
    dropout: float = 0.0
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RequestError(f"BertBottleneck dropout {self.dropout}: use a probability from 0 to below 1")
        if self.place not in PLACES or not self.parts or not set(self.parts) <= PARTS.keys():
            raise RequestError(
                f"BertBottleneck place {self.place!r} in {', '.join(self.parts) or 'no parts'}: use one of "
                f"{', '.join(PLACES)}, in attention and mlp"
            )

    def sites(self, sites: Sites) -> Sites:
        chosen = [self._at(sites, last) for part in self.parts for last in sites.select(PARTS[part], self.depth)]
        return Sites(chosen, sites.owner)

    def _at(self, sites: Sites, last: Site) -> Site:
        """Where the bottleneck of the sub-layer that ends in the projection ``last`` goes."""
        if self.place == "houlsby":
            return last
        inside = last.path.rpartition(".")[0]  # the module that adds the residual and norms the sum
        norm = next((s for s in sites if s.path == f"{inside}.LayerNorm" and s.parameter == "weight"), None)
        if norm is None:
            raise RequestError(f"{sites.owner} has no norm after the sum at {inside}; BertBottleneck needs one")
        if self.place != "parallel":
            return norm
        root = next(site for site in sites if site.role == "model")
        return Site(last.role, last.depth, inside, root.module.get_submodule(inside), None, width=last.width)

    def build(self, site: Site) -> Adapter:
        branch = Bottleneck(
            site.width, site.width, self.widths.get(str(site.depth), self.width), activation=self.activation,
            dropout=self.dropout, scale=self.scale, where=site.key, layout=site.layout,
        )  # fmt: skip
        kind = {"pfeiffer": AroundNorm, "parallel": OnResidual}.get(self.place, After)
        return kind(branch)


class AroundNorm(Adapter):
    """``LN(s + branch(LN(s)))`` around a norm: its input s is the residual sum."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, base: Callable[..., Tensor], s: Tensor) -> Tensor:
        return base(s + self.branch(base(s)))


class OnResidual(Adapter):
    """``base(h, x + branch(x))`` around a module that is given a sub-layer's inside h and the residual stream x."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, base: Callable[..., Any], hidden: Tensor, x: Tensor) -> Any:
        return base(hidden, x + self.branch(x))
