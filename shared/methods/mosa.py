"""MoSA: one adapter split into sparse experts, one of which trains at a time, then merged (Zhang et al., 2023)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared import weights
from shared.adapter import Adapter
from shared.blocks.bottleneck import ACTIVATIONS
from shared.blocks.placement import Residual, on_output, take
from shared.blocks.split import Split, symmetric_divergence
from shared.errors import RequestError, WorkError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted

Style = Literal["adaptformer", "pfeiffer", "houlsby"]
ACTIVATION = {"adaptformer": "gelu", "pfeiffer": "relu", "houlsby": "swish"}


class Sparse(Adapter):
    """``mlp(x) + scale * up(dropout(act(down(norm(h)))))`` with split projections; the start is the identity.

    h: the residual stream where ``residual`` is given, else what the MLP reads ("adaptformer") or gives ("pfeiffer").
    In training one expert of each split projection runs, as ``drawn`` says; in inference the merged ones.
    drawn: int64 (2, 2), for each of a step's two passes the expert of down and of up.  turn: the pass in progress,
    None after both.
    """

    drawn: Tensor

    def __init__(self, width: int, method: MoSA, residual: Residual | None, where: str):
        super().__init__()
        split: dict[str, Any] = {"merge": method.merge, "where": where}
        inner, experts, share = method.width, method.experts, method.share
        self.norm = nn.LayerNorm(width, eps=1e-6) if method.norm else nn.Identity()
        self.down = nn.Linear(width, inner)
        if share != "down":
            self.down = Split(width, inner, experts, start="kaiming", **split)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.down.bias)
        self.up = nn.Linear(inner, width)
        if share != "up":
            self.up = Split(inner, width, experts, **split)
        else:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self.style, self.scale, self.dropout = method.style, method.scale, method.dropout
        self.residual = (residual,)  # in a tuple, as its modules are not this adapter's
        self.register_buffer("drawn", torch.zeros(2, 2, dtype=torch.long))
        self.turn: int | None = 0

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        h, _, _ = take(args, kwargs)
        if (residual := self.residual[0]) is not None:
            if residual.seen is None:
                raise WorkError("MoSA: the MLP ran without the norm before it, whose input its adapter reads")
            h, residual.seen = residual.seen, None
        output = base(*args, **kwargs)
        if self.style == "pfeiffer":
            return on_output(output, lambda f: f + self.branch(f))
        return on_output(output, lambda f: f + self.branch(h))

    def branch(self, h: Tensor) -> Tensor:
        """h (..., width) to what is added, of its shape."""
        down, up = self._experts()
        inner = ACTIVATIONS[ACTIVATION[self.style]](_run(self.down, self.norm(h.to(self.up.weight.dtype)), down))
        return (_run(self.up, F.dropout(inner, self.dropout, self.training), up) * self.scale).to(h.dtype)

    def _experts(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.training:
            return None, None
        if self.turn is None:
            raise WorkError(
                "MoSA runs in training mode after both passes of its step: with method.consistency=0 gradient "
                "checkpointing can compute its pass again; without checkpointing, call step() first"
            )
        return self.drawn[self.turn, 0], self.drawn[self.turn, 1]


class AfterAttention(Sparse):
    """Around the norm before an MLP, which then reads ``h + branch(h)``; ``AfterMLP`` adds the same to the stream."""

    seen: tuple[Tensor, Tensor, Tensor] | None = None  # the stream, what is added to it, what the norm gives

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        h, rest, kwargs = take(args, kwargs)
        added = self.branch(h)
        self.seen = h, added, base(h + added, *rest, **kwargs)
        return self.seen[2]


class AfterMLP(Sparse):
    """Around a block: ``y + branch(y)``, y being what it gives plus what ``attention`` adds to the stream within.

    So layer scale and stochastic depth act on the sub-layers alone, never on an adapter.
    """

    def __init__(self, width: int, method: MoSA, attention: AfterAttention, mlp: Residual, where: str):
        super().__init__(width, method, None, where)
        self.within = (attention, mlp)  # in a tuple, as above

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, (attention, mlp) = base(*args, **kwargs), self.within
        seen, read, attention.seen, mlp.seen = attention.seen, mlp.seen, None, None
        if seen is None or seen[0] is take(args, kwargs)[0] or read is not seen[2]:
            raise WorkError("MoSA: houlsby needs blocks whose MLP follows the attention and reads the stream normed")
        output = on_output(output, lambda y: y + seen[1])
        return on_output(output, lambda y: y + self.branch(y))


def _run(layer: nn.Module, x: Tensor, expert: Tensor | None) -> Tensor:
    return layer(x, expert) if isinstance(layer, Split) else layer(x)


@dataclass(frozen=True, kw_only=True)
class MoSA(Method):
    """A bottleneck at every MLP, split into sparse experts; one of them is drawn for each step, block and pass.

    width: channels inside (published: 64, VTAB 16).  experts: parts a projection is split into (4; 2 on cars).
    share: the projection that stays whole and is trained in every pass ("down", published), "up" or "none".
    style: "adaptformer" reads the residual stream beside the MLP, through GELU; "pfeiffer" reads the MLP's output,
    through ReLU (published with scale 1, dropout 0); "houlsby" is two on the stream, each adding to it what it makes of
    it, after the attention and after the MLP, through SiLU (published with norm false, scale 1, dropout 0).
    norm: a layer norm in front that trains; without it "adaptformer" reads what the MLP reads (published for Swin).
    scale: of the branch (0.1).  dropout: inside (0.1).  merge: "mean" (published) or "union" of what was trained.
    consistency: weight of the symmetric divergence between two passes with experts of their own (1; 0: one pass).
    depth: which blocks.

    Of a split ``down``, the published weight decay also shrinks what an expert does not own; here that stays as it was.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="parallel", mergeable="no",
        trains="(2 * width * site.width + (1 if share == 'down' else experts) * width"
        " + (1 if share == 'up' else experts) * site.width + 2 * site.width * norm)"
        " * ((site.role == 'mlp') != (style == 'houlsby'))",
        spec="mosa", why="its experts merge into one adapter, which stays beside the frozen model",
    )  # fmt: skip

    width: int = 64
    experts: int = 4
    share: Literal["down", "up", "none"] = "down"
    style: Style = "adaptformer"
    norm: bool = True
    scale: float = 0.1
    dropout: float = 0.1
    merge: Literal["mean", "union"] = "mean"
    consistency: float = 1.0
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise RequestError(f"MoSA width {self.width}: use at least 1")
        if not 0 <= self.dropout < 1:
            raise RequestError(f"MoSA dropout {self.dropout}: use a probability from 0 to below 1")
        if not 0 <= self.consistency < float("inf"):
            raise RequestError(f"MoSA consistency {self.consistency}: use a weight of at least 0")

    def sites(self, sites: Sites) -> Sites:
        mlps = sites.select("mlp", self.depth)
        if self.style != "adaptformer" and (summed := [site.path for site in mlps if "residual" in site.tags]):
            raise RequestError(f"MoSA: {summed[0]} adds the residual itself: use style=adaptformer")
        if self.style == "pfeiffer" or (self.style == "adaptformer" and not self.norm):
            return mlps
        found = mlps + Sites([_norm_before(sites, mlp) for mlp in mlps])
        return found + sites.select("block", self.depth) if self.style == "houlsby" else found

    def build_all(self, sites: Sites) -> dict[str, Adapter]:  # type: ignore[override]
        if self.style == "houlsby":
            return self._on_stream(sites)
        norms = {site.depth: (site.key, Residual()) for site in sites if site.role == "norm"}
        built: dict[str, Adapter] = {}
        for site in sites:
            if site.role == "mlp":
                key, residual = norms.get(site.depth, ("", None))
                built[site.key] = Sparse(site.width, self, residual, site.key)
                built |= {key: residual} if residual is not None else {}
        return built

    def _on_stream(self, sites: Sites) -> dict[str, Adapter]:
        at, built = {(site.role, site.depth): site for site in sites}, {}
        for block in (site for site in sites if site.role == "block"):
            norm, mlp = at["norm", block.depth], at["mlp", block.depth]
            built[norm.key] = first = AfterAttention(block.width, self, None, norm.key)
            built[mlp.key] = reads = Residual()
            built[block.key] = AfterMLP(block.width, self, first, reads, block.key)
        return built

    def step(self, adapters: Mapping[str, nn.Module], number: int, generator: Generator) -> None:
        for adapter in _sparse(adapters):
            adapter.drawn.copy_(torch.randint(self.experts, (2, 2), generator=generator))
            adapter.turn = 0

    def loss(self, task: Any, batch: Any) -> Tensor:
        """The criterion of one pass plus ``consistency`` times its divergence from a second with other experts."""
        if not self.consistency:
            return task.loss(batch)
        adapters = _sparse(task.model.bank[task.model.active[-1]])
        outputs = []
        for turn in (0, 1, None):
            for adapter in adapters:
                adapter.turn = turn
            outputs += [task.outputs(batch)] if turn is not None else []
        if not all(isinstance(output, Tensor) and output.ndim == 2 for output in outputs):
            raise RequestError("MoSA compares class scores (B, classes) of two passes; for this task consistency=0")
        return task.criterion(outputs[0], batch) + self.consistency * symmetric_divergence(*outputs)


def _sparse(adapters: Mapping[str, nn.Module]) -> list[Sparse]:
    return [adapter for adapter in adapters.values() if isinstance(adapter, Sparse)]


def _norm_before(sites: Sites, mlp: Site) -> Site:
    """The norm that the MLP reads through: the last of its block that is not inside the attention."""
    block = mlp.path.rpartition(".")[0]
    norms = [
        site for site in sites
        if site.role == "norm" and site.parameter == "weight" and site.path.rpartition(".")[0] == block
    ]  # fmt: skip
    if not norms:
        raise RequestError(f"MoSA: no norm stands beside {mlp.path} of {sites.owner}; use norm=false or style=pfeiffer")
    return norms[-1]


# -- the official files ------------------------------------------------------------------------------------------------

_OFFICIAL = re.compile(r"(?:.*\.)?layer\.(?P<depth>\d+)\.adapter_(?P<part>norm|down|up)(?:\.(?P<expert>\d+))?\.(\w+)")


def merged_state(model: Adapted, name: str = "default") -> dict[str, Tensor]:
    """The one plain adapter the experts become, under the official names: norm, down and up of each block."""
    found: dict[str, Tensor] = {}
    for site, adapter in _by_depth(model, name).items():
        for part in ("norm", "down", "up"):
            layer, merge = getattr(adapter, part), isinstance(getattr(adapter, part), Split)
            pair = layer.merged() if merge else tuple(layer.parameters())
            prefix = f"enc.transformer.encoder.layer.{site}.adapter_{part}{'_merge' if merge else ''}"
            found |= {f"{prefix}.{n}": t.detach().clone() for n, t in zip(("weight", "bias"), pair, strict=False)}
    return found


def load_official(model: Adapted, path: str | Path, *, name: str = "default") -> None:
    """Fill the adapter ``name`` from a file of the official code, with share "down".

    Its keys are ``...layer.<block>.adapter_norm.<tensor>``, ``adapter_down.<tensor>`` and ``adapter_up.<expert>
    .<tensor>``; merged layers follow from the experts, and the head stays as it is. Who owns an entry of up is not in
    the file: it is the expert in which the entry is farthest from its start, zero.

    Raises RequestError where a key is none of these, or numbers and shapes are not those of the adapter.
    """
    adapters, state = _by_depth(model, name), model.trained_state()
    keys = {id(module): f"adapter.{name}.{key}" for key, module in model.bank[name].items()}  # type: ignore[operator]
    experts: dict[str, dict[int, Tensor]] = {}
    found: dict[str, Tensor] = {n: t for n, t in state.items() if n.endswith(".drawn") or n.startswith("head.")}
    for key, tensor in weights.read(path).items():
        if key.startswith("head.") or "_merge." in key:
            continue
        match = _OFFICIAL.fullmatch(key)
        if match is None or (depth := int(match["depth"])) not in adapters:
            raise RequestError(f"{path}: {key} belongs to no block this MoSA adapts")
        place = f"{keys[id(adapters[depth])]}.{match['part']}.{match[4]}"
        if match["expert"] is None:
            found[place] = tensor
        elif match["part"] == "up":
            experts.setdefault(place, {})[int(match["expert"])] = tensor
        else:
            raise RequestError(f"{path}: {key}: a split down projection without its masks cannot be taken over")
    count: int = model.methods[name].experts  # type: ignore[attr-defined]
    for place, each in experts.items():
        if sorted(each) != list(range(count)) or len({t.shape for t in each.values()}) > 1:
            raise RequestError(f"{path}: {place} has experts {sorted(each)}, of one shape; this MoSA has {count}")
        copies = torch.stack([each[i] for i in sorted(each)])
        if place.endswith(".bias"):
            found[place] = copies
        else:
            owner = copies.abs().argmax(0)
            found[place] = copies.gather(0, owner[None])[0]
            found[place.replace(".weight", ".owner")] = owner.to(torch.uint8)
    model.load_trained_state(found, str(path))


def _by_depth(model: Adapted, name: str) -> dict[int, Sparse]:
    if model.methods[name].style == "houlsby":  # type: ignore[attr-defined]
        raise RequestError(f"MoSA {name!r} has style houlsby: the official files name one adapter a block, not two")
    depths = {site.key: site.depth for site in model.sites()}
    adapters: Any = model.bank[name]
    return {depths[key]: adapter for key, adapter in adapters.items() if isinstance(adapter, Sparse)}
