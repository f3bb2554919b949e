"""SparseAdapter: an adapter pruned once, before it trains (He et al., 2022).

A wide adapter pruned to the size of a narrow one ("Large-Sparse") is the better of the two: ``width=256, density=0.25``
has the surviving weights of ``width=64``. The published code calls the kept share "sparsity", the paper the pruned one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.blocks.placement import After, Beside, on_output, sublayers
from shared.blocks.sparse import MaskedLinear, MaskedLowRank, masked, masks, scores
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted


class SparseBottleneck(nn.Module):
    """``scale * up(dropout(relu(down(norm(x)))))`` with masks on down and up, in float32: (..., C), or maps
    (B, C, H, W), to the same shape."""

    def __init__(self, method: SparseAdapter, site: Site):
        super().__init__()
        if method.width < 1:
            raise RequestError(f"SparseAdapter width {method.width} at {site.key}: use at least 1")
        self.axis = site.axis
        self.norm = nn.LayerNorm(site.width) if method.norm != "none" else nn.Identity()
        self.before, self.dropout = method.norm == "in", float(method.dropout)
        self.down, self.up = MaskedLinear(site.width, method.width), MaskedLinear(method.width, site.width)
        self.scale = nn.Parameter(torch.ones(())) if method.scale == "learned" else float(method.scale)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if method.start == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = x.movedim(self.axis, -1).to(self.down.weight.dtype)
        h = F.relu(self.down(self.norm(h) if self.before else h))
        y = self.up(F.dropout(h, self.dropout, self.training)) * self.scale
        return (y if self.before else self.norm(y)).to(x.dtype).movedim(-1, self.axis)

    def flow(self) -> Tensor:
        """Mean of what comes out for ones in place of ``norm(x)``, every parameter replaced by its absolute value."""
        down, up = ((m.weight * m.weight_mask).abs() for m in (self.down, self.up))
        inside = down.sum(1) + self.down.bias.abs()  # nothing is below zero, so the relu does nothing
        return (up @ inside + self.up.bias.abs()).mean() * abs(self.scale)


class Again(Adapter):
    """``norm(z + branch(norm(z)))``: what the branch says of a norm's output is added to the norm's input."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        z, *rest = args
        return on_output(base(z, *rest, **kwargs), lambda y: base(z + self.branch(y), *rest, **kwargs))


def flow(modules: Mapping[str, nn.Module]) -> Tensor:
    """What SynFlow differentiates: the flows of the masked modules of an adapter, each fed ones by itself, summed."""
    inner = [m for module in modules.values() for m in module.modules()]
    return torch.stack([m.flow() for m in inner if isinstance(m, SparseBottleneck | MaskedLowRank)]).sum()


@dataclass(frozen=True, kw_only=True)
class _Pruned(Method):
    """density: share of the weights that is kept, or sparse_ratio: share that is pruned; one of them (neither: 0.6 is
    kept, the paper's best).
    pruner: "snip" (the paper's best), "grasp", "synflow", "magnitude" or "random".
    scope: whether the layers compete for the weights ("global") or each keeps the same share ("local").
    batches: how many training batches "snip" and "grasp" look at.

    SynFlow's ones enter behind the bottleneck's norm, and a norm of the output is left out: the published code sends
    them through the norm, where ones become zeros, so that all scores vanish and everything is pruned. It reads no
    batch and runs no backbone; as published, it scores once. It needs start "normal": a zero factor stops the flow.
    """

    density: float | None = None
    sparse_ratio: float | None = None
    pruner: Literal["random", "magnitude", "snip", "grasp", "synflow"] = "snip"
    scope: Literal["global", "local"] = "global"
    batches: int = 32

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.density is not None and self.sparse_ratio is not None:
            raise RequestError(f"{kind}: density is the kept share, sparse_ratio the pruned one: give one of them")
        if not 0 < self.kept <= 1:
            raise RequestError(f"{kind}: density {self.kept:g} (1 - sparse_ratio): use a share above 0, at most 1")
        if self.batches < 1:
            raise RequestError(f"{kind} batches {self.batches}: use at least 1")
        if not 0 <= getattr(self, "dropout", 0) < 1:
            raise RequestError(f"{kind} dropout {getattr(self, 'dropout', 0)}: use a probability from 0 to below 1")

    @property
    def kept(self) -> float:
        """The density, whichever way it was given."""
        if self.sparse_ratio is not None:
            return 1 - self.sparse_ratio
        return 0.6 if self.density is None else self.density

    def prepare(self, model: Adapted, name: str, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Score in eval mode and set the masks, which then stay; weights and gradients are left as they are."""
        found = masked(model.bank[name])  # type: ignore[arg-type]
        weights, training = [w for w, _ in found.values()], model.training
        if self.pruner == "synflow":
            batches, loss = [model.bank[name]], flow
        model.eval()
        try:
            given = scores(self.pruner, weights, list(itertools.islice(iter(batches), self.batches)), loss)
        finally:
            model.train(training)
        for (_, mask), new in zip(found.values(), masks(given, self.kept, self.scope), strict=True):
            mask.copy_(new)


@dataclass(frozen=True, kw_only=True)
class SparseAdapter(_Pruned):
    """Bottlenecks with their own norm, of whose two matrices only the weights that matter most at the start train.

    width: channels inside (published: 64).  form: "sequential" (published: on the output of attention and MLP, before
    the residual), "pfeiffer" (``norm(z + branch(norm(z)))`` at the norm behind the MLP, so for models that have it
    there: BERT, RoBERTa) or "parallel" (beside the MLP).
    where: the sub-layers of the sequential form.  norm: of the branch, on what goes "in" or comes "out", or "none".
    scale: a number or "learned".  start: "normal" (published for pruning: deviation 0.02) or "zero" (up is zero, so
    that nearly all scores are too).  dropout: behind the activation.  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter", "efficient/pruning"), acts_on="activations", form="sequential", mergeable="no",
        trains="(2 * width + 1) * site.width + width + (0 if norm == 'none' else 2 * site.width)"
        " + (scale == 'learned')",
        needs="labels", spec="sparse_adapter",
        why="an adapter that is pruned; the formula counts the dense tensors, of which the masks keep a share",
    )  # fmt: skip

    width: int = 64
    form: Literal["sequential", "pfeiffer", "parallel"] = "sequential"
    where: Sequence[Literal["attention", "mlp"]] = ("attention", "mlp")
    norm: Literal["in", "out", "none"] = "in"
    scale: float | Literal["learned"] = 1.0
    start: Literal["normal", "zero"] = "normal"
    dropout: float = 0.0
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        if self.form == "sequential":
            return sublayers(sites, self.depth, tuple(self.where))
        if self.form == "parallel":
            return sites.select("mlp", self.depth)
        # Behind the MLP stands a norm that shares a module below the block with the MLP's last layer.
        folders = {s.path.rpartition(".")[0] for s in sites.select("mlp.down", self.depth)}
        folders -= {s.path for s in sites if s.role == "block"}
        norms = [s for s in sites if s.role == "norm" and s.parameter == "weight"]
        chosen = [s for s in norms if s.path.rpartition(".")[0] in folders]
        if not chosen:
            raise RequestError(f"SparseAdapter form 'pfeiffer': {sites.owner} has no norm behind its MLPs")
        return Sites(chosen, sites.owner)

    def build(self, site: Site) -> Adapter:
        kind = {"sequential": After, "parallel": Beside, "pfeiffer": Again}[self.form]
        return kind(SparseBottleneck(self, site))


@dataclass(frozen=True, kw_only=True)
class SparseLoRA(_Pruned):
    """A LoRA of whose factors only the weights that matter most at the start train.

    rank: inner width.  alpha: numerator of the scale alpha / rank (published: 32).  start: "normal" (both factors of
    deviation 0.02) or "zero" (LoRA's own: one factor is zero, so that its scores are too).
    dropout: on the branch's input.  roles: which projections.  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/low-rank", "efficient/pruning"), acts_on="weights", form="parallel",
        mergeable="yes", trains="rank * (rows + columns)", needs="labels", spec="sparse_adapter",
    )  # fmt: skip

    rank: int = 8
    alpha: float = 32.0
    start: Literal["normal", "zero"] = "normal"
    dropout: float = 0.0
    roles: Sequence[str] = ("attention.query", "attention.value")
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        return sites.select(self.roles, self.depth)

    def build(self, site: Site) -> MaskedLowRank:
        scale = self.alpha / max(self.rank, 1)
        change = MaskedLowRank(site.weight.shape, self.rank, scale, self.dropout, where=site.key)
        if self.start == "normal":
            nn.init.normal_(change.down, std=0.02)
            nn.init.normal_(change.up, std=0.02)
        return change


def survivors(modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """Of one adapter, such as ``model.bank["default"]``: its prunable ``weights``, how many ``survive``, their share
    ``density``, and ``sparse_ratio``, the share pruned."""
    found = [mask for _, mask in masked(modules).values()]
    weights, survive = sum(m.numel() for m in found), sum(int(m.sum()) for m in found)
    density = survive / max(weights, 1)
    return {"weights": weights, "survive": survive, "density": density, "sparse_ratio": 1 - density}
