"""MoSA and MoSL: an adapter or a LoRA split into sparse experts that train in turn, then merge (Zhang et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Generator, Tensor, nn, randint

from shared.adapter import Adapter
from shared.blocks.placement import Residual
from shared.blocks.split import Drawn, Split, started, symmetric_divergence
from shared.blocks.split_adapters import AfterAttention, AfterMLP, SplitBottleneck, SplitLowRank
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

Style = Literal["adaptformer", "pfeiffer", "houlsby"]


@dataclass(frozen=True, kw_only=True)
class _Split(Method):
    """Of each pair of layers, down and up, one expert or one each is drawn for every step, site and pass.

    experts: parts a layer is split into (published: 4; 2 on cars and for several tasks).
    share: the layer that stays whole and is trained in every pass ("down", published), "up" or "none".
    merge: "mean" (published) or "union" of what was trained.
    copies: a whole matrix for each expert, as the published code trains them; there weight decay also shrinks what an
    expert does not own, which shows in a split ``down`` alone. Without them such entries stay as they were, and a layer
    takes the memory of one.
    consistency: weight of the symmetric divergence between two passes with experts of their own (1; 0: one pass).
    depth: which blocks.
    """

    experts: int = 4
    share: Literal["down", "up", "none"] = "down"
    merge: Literal["mean", "union"] = "mean"
    copies: bool = False
    consistency: float = 1.0
    dropout: float = 0.0
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not 0 <= self.dropout < 1:
            raise RequestError(f"{kind} dropout {self.dropout}: use a probability from 0 to below 1")
        if not 0 <= self.consistency < float("inf"):
            raise RequestError(f"{kind} consistency {self.consistency}: use a weight of at least 0")

    def layer(
        self, part: Literal["down", "up"], inputs: int, outputs: int, where: str, *, bias: bool = True
    ) -> nn.Module:
        """down starts Kaiming-uniform, up at zero."""
        start = "kaiming" if part == "down" else "zero"
        if part != self.share:
            more: dict[str, Any] = {"merge": self.merge, "copies": self.copies, "bias": bias, "where": where}
            return Split(inputs, outputs, self.experts, start=start, **more)
        whole = nn.Linear(inputs, outputs, bias=bias)
        started(whole.weight.data, start)
        if bias:
            nn.init.zeros_(whole.bias)
        return whole

    def step(self, adapters: Mapping[str, nn.Module], number: int, generator: Generator) -> None:
        for adapter in _drawn(adapters):
            adapter.drawn.copy_(randint(self.experts, (2, 2), generator=generator))
            adapter.turn = 0

    def loss(self, task: Any, batch: Any) -> Tensor:
        """The criterion of one pass plus ``consistency`` times its divergence from a second with other experts."""
        if not self.consistency:
            return task.loss(batch)
        adapters = _drawn(task.model.bank[task.model.active[-1]])
        outputs = []
        for turn in (0, 1, None):
            for adapter in adapters:
                adapter.turn = turn
            outputs += [task.outputs(batch)] if turn is not None else []
        if not all(isinstance(output, Tensor) and output.ndim == 2 for output in outputs):
            kind = type(self).__name__
            raise RequestError(f"{kind} compares class scores (B, classes) of two passes; for this task consistency=0")
        return task.criterion(outputs[0], batch) + self.consistency * symmetric_divergence(*outputs)


def _drawn(adapters: Mapping[str, nn.Module]) -> list[Drawn]:
    return [adapter for adapter in adapters.values() if isinstance(adapter, Drawn)]


@dataclass(frozen=True, kw_only=True)
class MoSA(_Split):
    """A bottleneck at every MLP, split into sparse experts; one of them is drawn for each step, block and pass.

    width: channels inside (published: 64, VTAB 16).
    style: "adaptformer" reads the residual stream beside the MLP, through GELU; "pfeiffer" reads the MLP's output,
    through ReLU (published with scale 1, dropout 0); "houlsby" is two on the stream, each adding to it what it makes of
    it, after the attention and after the MLP, through SiLU (published with norm false, scale 1, dropout 0).
    norm: a layer norm in front that trains; without it "adaptformer" reads what the MLP reads (published for Swin).
    scale: of the branch (0.1).  dropout: inside (0.1).
    experts, share, merge, copies, consistency, depth: see ``_Split``.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="parallel", mergeable="no",
        trains="(width * site.width * ((experts if copies and share != 'down' else 1)"
        " + (experts if copies and share != 'up' else 1))"
        " + (1 if share == 'down' else experts) * width + (1 if share == 'up' else experts) * site.width"
        " + 2 * site.width * norm) * ((site.role == 'mlp') != (style == 'houlsby'))",
        spec="mosa", why="its experts merge into one adapter, which stays beside the frozen model",
    )  # fmt: skip

    width: int = 64
    style: Style = "adaptformer"
    norm: bool = True
    scale: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise RequestError(f"MoSA width {self.width}: use at least 1")

    def sites(self, sites: Sites) -> Sites:
        mlps = sites.select("mlp", self.depth)
        if self.style != "adaptformer" and (summed := [site.path for site in mlps if "residual" in site.tags]):
            raise RequestError(f"MoSA: {summed[0]} adds the residual itself: use style=adaptformer")
        if self.style == "pfeiffer" or (self.style == "adaptformer" and not self.norm):
            return mlps
        found = mlps + Sites([_norm_before(sites, mlp) for mlp in mlps])
        if self.style != "houlsby":
            return found
        blocks = sites.select("block", self.depth)
        if bare := [mlp.path for mlp in mlps if _parent(mlp) not in {block.path for block in blocks}]:
            raise RequestError(f"MoSA: {bare[0]} of {sites.owner} lies in no block that could be adapted; "
                               "style=houlsby needs one, use adaptformer or pfeiffer")  # fmt: skip
        return found + blocks

    def build_all(self, sites: Sites) -> dict[str, Adapter]:  # type: ignore[override]
        if self.style == "houlsby":
            return self._on_stream(sites)
        norms = {_parent(site): (site.key, Residual()) for site in sites if site.role == "norm"}
        built: dict[str, Adapter] = {}
        for site in sites:
            if site.role == "mlp":
                key, residual = norms.get(_parent(site), ("", None))
                built[site.key] = SplitBottleneck(**self._parts(site), residual=residual)
                built |= {key: residual} if residual is not None else {}
        return built

    def _on_stream(self, sites: Sites) -> dict[str, Adapter]:
        at, built = {(site.role, _parent(site)): site for site in sites}, {}
        for block in (site for site in sites if site.role == "block"):
            norm, mlp = at["norm", block.path], at["mlp", block.path]
            built[norm.key] = first = AfterAttention(**self._parts(norm))
            built[mlp.key] = reads = Residual()
            built[block.key] = last = AfterMLP(**self._parts(block))
            last.within = (first, reads)
        return built

    def _parts(self, site: Site) -> dict[str, Any]:
        down = self.layer("down", site.width, self.width, site.key)
        up = self.layer("up", self.width, site.width, site.key)
        settings = {name: getattr(self, name) for name in ("norm", "style", "scale", "dropout")}
        return {"width": site.width, "down": down, "up": up, "axis": site.axis, **settings}


@dataclass(frozen=True, kw_only=True)
class MoSL(_Split):
    """A LoRA split into sparse experts; one of them is drawn for each step, projection and pass.

    rank: inner width (published: 16).  scale: of the change (1).  dropout: on the input of the branch, in training.
    roles: which projections (published: query and value).
    experts, share, merge, copies, consistency, depth: see ``_Split``.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/low-rank",), acts_on="weights", form="parallel", mergeable="yes",
        trains="rank * (columns * (experts if copies and share != 'down' else 1)"
        " + rows * (experts if copies and share != 'up' else 1))", spec="mosa",
    )  # fmt: skip

    rank: int = 16
    scale: float = 1.0
    roles: Sequence[str] = ("attention.query", "attention.value")

    def sites(self, sites: Sites) -> Sites:
        return sites.select(self.roles, self.depth)

    def build(self, site: Site) -> SplitLowRank:
        rows, fan_in = site.weight.shape[0], math.prod(site.weight.shape[1:])
        if not 1 <= self.rank <= min(rows, fan_in):
            most = min(rows, fan_in)
            raise RequestError(f"rank {self.rank} at {site.key}: its matrix is {rows} x {fan_in}, so use 1 to {most}")
        down = self.layer("down", fan_in, self.rank, site.key, bias=False)
        up = self.layer("up", rows, self.rank, site.key, bias=False)
        return SplitLowRank(down, up, self.scale, self.dropout)


def _parent(site: Site) -> str:
    """The path of what its module lies in."""
    return site.path.rpartition(".")[0]


def _norm_before(sites: Sites, mlp: Site) -> Site:
    """The norm that the MLP reads through: the last of its block that is not inside the attention."""
    norms = [s for s in sites if s.role == "norm" and s.parameter == "weight" and _parent(s) == _parent(mlp)]
    if not norms:
        raise RequestError(f"MoSA: no norm stands beside {mlp.path} of {sites.owner}; use norm=false or style=pfeiffer")
    return norms[-1]
