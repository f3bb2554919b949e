"""AdapterBias: one vector for each MLP, and one linear unit that says how much of it a token gets (Fu et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from shared.adapter import WeightAdapter
from shared.blocks.low_rank import LowRank, Replacement
from shared.errors import RequestError
from shared.method import Method
from shared.methods.norm_tuning import NormTuning
from shared.sites import Site, Sites
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted


class Offset(WeightAdapter):
    """The unit's constant times the vector, on the bias: ``up`` (1, rows) is the one of the weight's change."""

    def __init__(self, constant: nn.Parameter, up: nn.Parameter):
        super().__init__()
        self.constant, self.up = constant, up

    def delta(self, weight: Tensor) -> Tensor:
        return self.constant * self.up[0]


@dataclass(frozen=True, kw_only=True)
class AdapterBias(Method):
    """``W u + b + alpha v`` after every MLP, ``alpha = w . u + c`` a number for each token; the identity at the start.

    u (B, N, F) is what the MLP's last layer reads, v its trained vector. Since alpha is linear in u, this is the change
    ``v w^T`` of the weight and ``c v`` of the bias, so it merges exactly; where the layer has no bias, neither has
    alpha. w starts normal with deviation 0.02, c and v at zero.
    share_alpha: one w and c for all layers.  norms: train the norms whose path does not say "attention" as well, as
    published (of BERT those after the MLPs and after the embeddings).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="weights", form="parallel", mergeable="yes",
        trains="size if site.role == 'norm' else (rows if site.parameter == 'weight' else 0)"
        " + (0 if share_alpha and site.depth else columns if site.parameter == 'weight' else 1)",
        spec="adapter_bias", why="an adapter by name and by its token-dependent shift; it acts through the weights",
    )  # fmt: skip

    share_alpha: bool = False
    norms: bool = True
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        layers = [s for down in sites.select("mlp.down", self.depth) for s in (down, down.bias) if s is not None]
        if self.share_alpha and len({s.weight.shape[1] for s in layers if s.parameter == "weight"}) > 1:
            raise RequestError(f"share_alpha: the MLPs of {sites.owner} differ in width: one alpha cannot read all")
        norms = NormTuning(depth=self.depth).sites(sites) if self.norms else ()
        return Sites([*layers, *(s for s in norms if "attention" not in s.path)], sites.owner)

    def build_all(self, sites: Sites) -> dict[str, Any]:
        found: dict[str, Any] = {}
        down, constant = None, None
        for site in sites:
            if site.role == "norm":
                found[site.key] = Replacement(site.weight)
            elif site.parameter == "weight":
                change = found[site.key] = LowRank(site.weight.shape, 1, 1.0, where=site.key)
                nn.init.normal_(change.down, std=0.02)
                if self.share_alpha:
                    down = change.down = change.down if down is None else down
            else:
                if constant is None or not self.share_alpha:
                    constant = nn.Parameter(torch.zeros(1))
                found[site.key] = Offset(constant, change.up)  # its weight comes just before it
        return found


@torch.no_grad()
def token_weights(model: Adapted, *inputs: Any, name: str = "default") -> dict[str, Tensor]:
    """alpha (B, N) of every token by site, in one run of the model: how much of its vector a layer gives to whom.

    inputs: of the model.  name: of the adapter, in force or not. Layers that see (B * N, F) give (B * N,).

    Raises RequestError where that is no AdapterBias.
    """
    method = model.methods.get(name)
    if not isinstance(method, AdapterBias):
        raise RequestError(f"token_weights: no AdapterBias is called {name!r}; loaded: {', '.join(model.methods)}")
    found: dict[str, Tensor] = {}
    bank: Any = model.bank[name]

    def watch(site: Site) -> Any:
        change, bias = bank[site.key], site.bias

        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alpha = args[0].to(change.down.dtype) @ change.down[0]
            found[site.key] = alpha if bias is None else alpha + bank[bias.key].constant

        return site.module.register_forward_pre_hook(read)

    hooks = [watch(s) for s in method.sites(model.sites()) if s.role == "mlp.down" and s.parameter == "weight"]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
