"""MoLA: low-rank experts with a router, and another number of them in each block (Gao et al., 2024)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Generator, Tensor, nn

from shared import weights
from shared.adapter import Adapter, WeightAdapter
from shared.blocks.experts import Experts, balance_loss
from shared.blocks.low_rank import LowRank
from shared.blocks.placement import linears
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted


@dataclass(frozen=True, kw_only=True)
class MoLA(Method):
    """``W x + sum of gate * (alpha / rank) * B_e A_e x`` over the experts a token is routed to; identity at the start.

    A layer with one expert is a LoRA without a router, and merges.

    experts: how many, for equal groups of the adapted blocks from the bottom up (see ``allocation``); as numbers or
    digits: "2468" (published: more at the top), "8642", "8228" or "5555", which have as many in all.
    top_k: experts a token takes (published: 2), for all blocks or in groups as ``experts``.
    rank, alpha: of each expert (published: 8, 16; None means rank, scale 1).  dropout: on an expert's input (0.05).
    balance: weight of the balance loss (published: 0 in fine-tuning, 0.001 in instruction tuning).
    roles: which projections; None means every linear layer of the blocks, as published.  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/multiple LoRA",), acts_on="activations", form="parallel", mergeable="conditional",
        trains="(rank * (rows + columns) + columns * (int(experts[block * len(experts) // blocks]) > 1))"
        " * int(experts[block * len(experts) // blocks])",
        spec="mola", why="with one expert everywhere it is LoRA, and merges; the gates of more depend on the token",
    )  # fmt: skip

    experts: str | Sequence[int] = "2468"
    top_k: int | Sequence[int] = 2
    rank: int = 8
    alpha: float | None = 16.0
    dropout: float = 0.05
    balance: float = 0.0
    roles: Sequence[str] | None = None
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RequestError(f"MoLA dropout {self.dropout}: use a probability from 0 to below 1")
        if not 0 <= self.balance < float("inf"):
            raise RequestError(f"MoLA balance {self.balance}: use a weight of at least 0")

    def sites(self, sites: Sites) -> Sites:
        return linears(sites, self.depth) if self.roles is None else sites.select(self.roles, self.depth)

    def build_all(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        blocks = {depth: block for block, depth in enumerate(sorted({site.depth for site in sites}))}
        experts = allocation(self.experts, len(blocks))
        top_k = allocation([self.top_k] if isinstance(self.top_k, int) else self.top_k, len(blocks))
        return {s.key: self._build(s, experts[blocks[s.depth]], top_k[blocks[s.depth]]) for s in sites}

    def _build(self, site: Site, experts: int, top_k: int) -> Adapter | WeightAdapter:
        scale = (self.rank if self.alpha is None else self.alpha) / max(self.rank, 1)
        if experts == top_k == 1:
            return LowRank(site.weight.shape, self.rank, scale, self.dropout, where=site.key)
        if site.weight.ndim != 2:
            raise RequestError(f"site {site.key} ({site.role}): MoLA adapts linear layers")
        return Experts(
            site.weight.shape, experts, top_k, self.rank, scale, dropout=self.dropout, rows=site.rows,
            collect=self.balance > 0, depth=site.depth, where=site.key,
        )  # fmt: skip

    def step(self, adapters: Mapping[str, nn.Module], number: int, generator: Generator) -> None:
        for adapter in _routed(adapters):
            adapter.open()

    def penalty(self, adapters: Mapping[str, nn.Module]) -> Tensor | None:
        """``balance`` times the sum over blocks of the balance loss over all of a block's layers and tokens."""
        if not self.balance:
            return None
        taken: dict[int, list[Tensor]] = {}
        top_k = {}
        for adapter in _routed(adapters):
            if (logits := adapter.take()) is None:
                raise RequestError("MoLA's balance loss is of one training step: call step() before its forward pass")
            taken.setdefault(adapter.depth, []).extend(logits)
            top_k[adapter.depth] = adapter.top_k
        losses = [balance_loss(torch.cat(logits), top_k[depth]) for depth, logits in taken.items() if logits]
        return self.balance * torch.stack(losses).sum() if losses else None


def allocation(experts: str | Sequence[int], blocks: int) -> list[int]:
    """The number of experts of each block, from equal groups of blocks from the bottom up.

    Block j of B is in group floor(j * groups / B): groups differ by at most one block where B is no multiple.

    Raises RequestError where a number is below 1, or there are more groups than blocks.
    """
    groups = [int(n) for n in experts if str(n).isdecimal()]
    if not groups or len(groups) != len(experts) or min(groups) < 1:
        raise RequestError(f"experts {experts!r}: use whole numbers of at least 1, as a list or as digits like '2468'")
    if len(groups) > blocks:
        raise RequestError(f"experts {experts!r}: {len(groups)} groups for {blocks} adapted blocks; use fewer groups")
    return [groups[block * len(groups) // blocks] for block in range(blocks)]


def _routed(adapters: Mapping[str, nn.Module]) -> list[Experts]:
    return [adapter for adapter in adapters.values() if isinstance(adapter, Experts)]


# -- the official files ------------------------------------------------------------------------------------------------

_OFFICIAL = re.compile(r"(?P<layer>.+)\.(?:(?P<part>lora_[AB])\.[^.]+_(?P<expert>\d+)|router\.router)\.weight")


def load_official(model: Adapted, path: str | Path, *, name: str = "default") -> None:
    """Fill the adapter ``name`` from a file of the official code.

    Its keys are ``<layer>.lora_A.<adapter>_<expert>.weight`` (rank, inputs), ``lora_B`` (outputs, rank) and
    ``<layer>.router.router.weight`` (experts, inputs), whatever stands before the layer's name in the backbone.

    Raises RequestError where a key is none of these, or the layers, experts and shapes are not those of the adapter.
    """
    found = from_official(weights.read(path), model.bank[name], str(path))  # type: ignore[arg-type]
    state = {f"adapter.{name}.{key}": tensor for key, tensor in found.items()}
    model.load_trained_state(state, str(path))


def from_official(tensors: Mapping[str, Tensor], adapters: Mapping[str, nn.Module], source: str) -> dict[str, Tensor]:
    """The tensors of ``adapters``, by site key and name, from those of the official code."""
    parts: dict[str, dict[tuple[str, int], Tensor]] = {}
    for key, tensor in tensors.items():
        match = _OFFICIAL.fullmatch(key)
        layer = match and next((k for k in adapters if _same_layer(match["layer"], k)), None)
        if match is None or layer is None:
            raise RequestError(f"{source}: {key} belongs to no layer this MoLA adapts")
        parts.setdefault(layer, {})[match["part"] or "router", int(match["expert"] or 0)] = tensor
    state: dict[str, Tensor] = {}
    for layer, own in parts.items():
        down, up = ([own[k] for k in sorted(own) if k[0] == part] for part in ("lora_A", "lora_B"))
        if not down or len({t.shape for t in down}) != 1 or len({t.shape for t in up}) != 1:
            raise RequestError(f"{source}: the experts of {layer} are not of one shape")
        if isinstance(adapters[layer], LowRank):  # of one expert the router decides nothing
            state |= {f"{layer}.down": down[0], f"{layer}.up": up[0].t().contiguous()}
        else:
            state |= {f"{layer}.down": torch.stack(down), f"{layer}.up": torch.stack(up)}
            state |= {f"{layer}.router": own[k] for k in own if k[0] == "router"}
    return state


def _same_layer(theirs: str, key: str) -> bool:
    """Whether a dotted name of the official code ends in the layer of a site's key."""
    return f".{theirs}".endswith("." + key.replace("/", ".").removeprefix("model."))
