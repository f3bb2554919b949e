"""DyLoRA: a LoRA trained to be cut to any rank up to its own (Valipour et al., 2022)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from shared import store
from shared.adapter import Factors
from shared.blocks.low_rank import LowRank
from shared.errors import RequestError
from shared.method import Method
from shared.methods.lora import LoRA
from shared.sites import Site, Sites
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted


class DynamicRank(LowRank):
    """``alpha / b * up[:b].T @ down[:b]``: b is the rank ``drawn`` for the step in training, ``served`` in eval mode.

    In training the rank is a tensor and masks the rows, so that drawing costs no synchronisation and no compilation.
    """

    drawn: Tensor

    def __init__(
        self, shape: torch.Size, rank: int, alpha: float, *, dropout: float, freeze_lower: bool, served: int, where: str
    ):
        super().__init__(shape, rank, 1.0, dropout, where)
        self.alpha, self.freeze_lower, self.served = float(alpha), freeze_lower, served
        self.register_buffer("drawn", torch.tensor(rank))

    def factors(self) -> Factors:
        if not self.training:
            return Factors(self.down[: self.served], self.up[: self.served], self.alpha / self.served, self.dropout)
        row = torch.arange(len(self.down), device=self.down.device)[:, None]
        down, up = self.down, self.up
        if self.freeze_lower:
            top = row == self.drawn - 1
            down, up = (torch.where(top, t, t.detach()) for t in (down, up))
        return Factors(down, up * (row < self.drawn) * (self.alpha / self.drawn), 1.0, self.dropout)

    def delta(self, weight: Tensor) -> Tensor:
        down, up, scale, _ = self.factors()
        return ((up.t() @ down) * scale).reshape(weight.shape)


@dataclass(frozen=True, kw_only=True)
class DyLoRA(Method):
    """W + (alpha / b) * B[:, :b] A[:b]; each step draws one b from 1 to ``rank`` for the whole model.

    One trained file serves at every rank: ``serve`` may differ from what it was trained with (``set_rank`` changes it
    at run time), and ``truncate`` writes the first b rows as a plain LoRA, which is the same function.

    rank: the greatest (official: 8).  alpha: numerator of the scale (official: 16).
    dropout: probability on the input of the branch (official: 0).
    freeze_lower: only the b-th component of a step takes its gradient (official); else all b do.
    odds: of the ranks 1 to ``rank``, uniform if not given as published; other odds are ours.
    serve: the rank in eval mode, the greatest if not given.
    roles: which projections (official: query and value).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/dynamic rank",), acts_on="weights", form="parallel", mergeable="yes",
        trains="rank * (rows + columns)", spec="dylora",
    )  # fmt: skip

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    freeze_lower: bool = True
    odds: Sequence[float] | None = None
    serve: int | None = None
    roles: Sequence[str] = ("attention.query", "attention.value")
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RequestError(f"DyLoRA dropout {self.dropout}: use a probability from 0 to below 1")
        if self.serve is not None:
            _check_rank(self.serve, self.rank)
        odds = self.odds
        if odds is not None and not (
            len(odds) == self.rank and all(0 <= o < math.inf for o in odds) and 0 < sum(odds) < math.inf
        ):
            raise RequestError(f"DyLoRA odds {list(odds)}: give {self.rank} numbers from 0, one a rank, not all 0")

    def sites(self, sites: Sites) -> Sites:
        return sites.select(self.roles, self.depth)

    def build(self, site: Site) -> DynamicRank:
        return DynamicRank(
            site.weight.shape, self.rank, self.alpha, dropout=self.dropout, freeze_lower=self.freeze_lower,
            served=self.serve or self.rank, where=site.key,
        )  # fmt: skip

    def step(self, adapters: Mapping[str, nn.Module], number: int, generator: Generator) -> None:
        odds = torch.ones(self.rank) if self.odds is None else torch.tensor(self.odds, dtype=torch.float64)
        drawn = int(torch.multinomial(odds, 1, generator=generator)) + 1
        for adapter in adapters.values():
            adapter.drawn.fill_(drawn)  # type: ignore[operator,union-attr]


def set_rank(model: Adapted, rank: int, *, name: str | None = None) -> None:
    """Serve a DyLoRA at another rank from the next call in eval mode on.

    name: which adapter; None means the only DyLoRA of the model. Raises RequestError while adapters are merged.
    """
    names = [n for n, method in model.methods.items() if isinstance(method, DyLoRA)]
    if name not in names and not (name is None and len(names) == 1):
        asked = "there are several DyLoRAs, name one" if name is None and names else f"no DyLoRA {name or ''!r}"
        raise RequestError(f"{asked}; loaded: {', '.join(names) or 'none'}")
    name = name or names[0]
    method: Any = model.methods[name]
    _check_rank(rank, method.rank)
    if model.state.merged:
        raise RequestError("adapters are merged into the weights; unmerge() before changing the rank")
    for adapter in model.bank[name].values():  # type: ignore[operator]
        adapter.served = rank
    model.methods[name] = dataclasses.replace(method, serve=rank)


def truncate(source: str | os.PathLike, target: str | os.PathLike, rank: int) -> None:
    """Write a DyLoRA file cut to ``rank`` as one of a plain LoRA: that many rows, the same alpha, the same function.

    Raises RequestError where ``source`` holds another method or no such rank.
    """
    tensors, header = store.read(source)
    kind, arguments = header["method"]["type"], header["method"]["arguments"]
    if kind != DyLoRA.__name__:
        raise RequestError(f"{source}: an adapter of method {kind}; only DyLoRA can be cut to a rank")
    _check_rank(rank, arguments["rank"], f"{source}: ")
    kept = {n: t for n, t in tensors.items() if not (n.startswith("adapter.") and n.endswith(".drawn"))}
    for name, tensor in kept.items():
        if name.startswith("adapter."):
            kept[name] = tensor[:rank].clone()
    shared = {n: arguments[n] for n in ("alpha", "dropout", "roles", "depth")}
    method = {"type": LoRA.__name__, "arguments": LoRA(rank=rank, **shared).arguments()}
    store.save(target, kept, {n: header[n] for n in store.KEYS} | {"method": method})


def _check_rank(rank: int, greatest: int, where: str = "") -> None:
    if not 1 <= rank <= greatest:
        raise RequestError(f"{where}rank {rank} of a DyLoRA trained to {greatest}: use 1 to {greatest}")
