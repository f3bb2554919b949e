"""AdapterFusion: attention over several finished, frozen adapters, in every block (Pfeiffer et al., 2020)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import store
from shared.backbone import fingerprint
from shared.blocks.bottleneck import Bottleneck, reduced
from shared.blocks.placement import AtEnd, ends
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted


class BranchAtEnd(AtEnd):
    """A bottleneck at the end of a block."""

    def __init__(self, branch: Bottleneck, normed: bool):
        super().__init__(normed)
        self.branch = branch

    def change(self, z: Tensor) -> Tensor:
        return self.branch(z)


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Method):
    """One bottleneck where each block ends, what AdapterFusion fuses: after the norm of the MLP's residual sum.

    In a block that ends with a norm LN over the sum s: ``LN(s + a(LN(s)))``, the norm being run twice; else
    ``y + a(y)`` on the block's output. ``a(z) = up(relu(down(z)))``.
    reduction: width over channels inside (published: 16).  activation: see ``Bottleneck``.
    start: "normal" (published: deviation 0.02) or "zero" (up starts at zero: the identity).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="sequential", mergeable="no",
        trains="site.width // reduction * (2 * site.width + 1) + site.width", spec="adapter_fusion",
    )  # fmt: skip

    reduction: int = 16
    activation: str = "relu"
    start: Literal["normal", "zero"] = "normal"
    depth: str | int | Sequence[int] = "all"

    def sites(self, sites: Sites) -> Sites:
        return ends(sites, self.depth)

    def build(self, site: Site) -> BranchAtEnd:
        width, inner = site.width, reduced(site.width, self.reduction, site.key)
        branch = Bottleneck(width, width, inner, activation=self.activation, start=self.start, where=site.key)
        return BranchAtEnd(branch, site.role == "norm")


class Fusion(AtEnd):
    """``sum_i p_i V a_i(z)`` with ``p = softmax_i(dropout((Q z + b) . (K a_i(z) + c)))``: for each token, unscaled.

    members: the branches a_i, set when connected; they belong to other adapters, and no gradient reaches them.
    V starts as the identity with 1e-6 off the diagonal; without it, the a_i are mixed as they are.
    """

    members: tuple[Bottleneck, ...] = ()

    def __init__(self, width: int, value: bool, dropout: float, normed: bool):
        super().__init__(normed)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False) if value else None
        self.dropout = dropout
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if self.value is not None:
            with torch.no_grad():
                self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def change(self, z: Tensor) -> Tensor:
        h = z.to(self.query.weight.dtype)
        outputs = torch.stack([frozen(branch, h) for branch in self.members], dim=-2)  # (..., members, width)
        values = outputs if self.value is None else self.value(outputs)
        return (self.attention(h, outputs).unsqueeze(-1) * values).sum(-2).to(z.dtype)

    def attention(self, z: Tensor, outputs: Tensor) -> Tensor:
        """The shares (..., members) of the members' outputs (..., members, width)."""
        scores = (self.query(z).unsqueeze(-2) * self.key(outputs)).sum(-1)
        return F.dropout(scores, self.dropout, self.training).softmax(-1)


def frozen(branch: Bottleneck, x: Tensor) -> Tensor:
    """What the branch gives for x, with a gradient to x alone."""
    return torch.func.functional_call(branch, {n: p.detach() for n, p in branch.named_parameters()}, (x,))


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """Mixes finished adapters in every block by trained attention; they and the backbone stay frozen.

    The file of a fusion holds its query, key and value alone: the adapters stay in theirs, and in the model under their
    own names, also when the fusion is removed.
    members: the adapters by name, two or more: each with its file, which is loaded (without its head), or None for one
    the model has. All are ``Pfeiffer`` with the same settings, on the sites of the fusion; their order is that of the
    mixture, and changes nothing else. On the meta device no file is read. The file of a fusion knows the weights of its
    members, and is refused with others.
    value: the published form; False mixes the adapters' outputs as they are.  regularisation: weight of the extra loss
    ``|I - V|^2`` of each block (published: 0.01).  dropout: on the scores (published: the backbone's, 0.1 in BERT).
    depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/multi-task",), acts_on="activations", form="sequential", mergeable="no",
        trains="2 * (site.width ** 2 + site.width) + value * site.width ** 2", spec="adapter_fusion",
    )  # fmt: skip

    members: Mapping[str, Path | None]
    value: bool = True
    regularisation: float = 0.01
    dropout: float = 0.1
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.members, Mapping) or len(self.members) < 2:
            names = ", ".join(self.members) or "none"
            raise RequestError(
                f"AdapterFusion members ({names}): name two or more adapters, each with its file or None"
            )
        if not 0 <= self.dropout < 1:
            raise RequestError(f"AdapterFusion dropout {self.dropout}: use a probability from 0 to below 1")
        if not self.regularisation >= 0:
            raise RequestError(f"AdapterFusion regularisation {self.regularisation}: use 0 or more")

    @property
    def uses(self) -> tuple[str, ...]:
        return tuple(self.members)

    def digests(self, model: Adapted) -> dict[str, str]:
        known = [name for name in self.members if name in model.methods]
        return {name: f"{model.methods[name].activation} {fingerprint(model.bank[name])}" for name in known}  # type: ignore[attr-defined]

    def arguments(self) -> dict[str, Any]:
        members = {name: None if path is None else str(path) for name, path in self.members.items()}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {"members": members}

    def sites(self, sites: Sites) -> Sites:
        return ends(sites, self.depth)

    def build(self, site: Site) -> Fusion:
        return Fusion(site.width, self.value, self.dropout, site.role == "norm")

    def connect(self, model: Adapted, modules: Mapping[str, nn.Module]) -> None:
        if any(parameter.is_meta for parameter in model.backbone.parameters()):
            return
        for name, path in self.members.items():
            if path is not None:
                _load(model, name, path)
            elif name not in model.methods:
                have = ", ".join(model.methods) or "none"
                raise RequestError(f"AdapterFusion: no adapter {name!r} to fuse; loaded: {have}; give its file")
            _check(model, name, next(iter(self.members)), modules)
        for key, module in modules.items():
            branches = [model.bank[name][key].branch for name in self.members]  # type: ignore[index]
            module.__dict__["members"] = tuple(branches)  # not as submodules: they are the members' own

    def penalty(self, adapters: Mapping[str, nn.Module]) -> Tensor | None:
        weights: list[Any] = [fusion.value.weight for fusion in adapters.values() if fusion.value is not None]  # type: ignore[union-attr]
        if not self.regularisation or not weights:
            return None
        return self.regularisation * torch.stack([distance(weight) for weight in weights]).sum()


def distance(value: Tensor) -> Tensor:
    """``|I - V|^2``, the sum of squares."""
    return (torch.eye(len(value), device=value.device) - value).square().sum()


def from_adapter_hub(name: str, sites: Sequence[str]) -> str | None:
    """Our tensor name, below the adapter, for one of AdapterHub's, of a ``Pfeiffer`` or of a fusion; None for others.

    Names are those of BERT's kin: ``...layer.<i>.output.adapters.<adapter>.adapter_down.0.weight``,
    ``...layer.<i>.output.adapter_fusion_layer.<adapters>.query.weight``.  sites: the adapter's site keys in order.

    Raises RequestError where the layer is none of the sites.
    """
    found = re.search(
        r"\.(\d+)\.output\.(?:adapters\.[^.]+\.adapter_(down|up)(?:\.0)?|adapter_fusion_layer\.[^.]+\.(query|key|value))"
        r"\.(weight|bias)$",
        name,
    )
    if found is None:
        return None
    layer, branch, part, tensor = found.groups()
    if int(layer) >= len(sites):
        raise RequestError(f"{name}: the adapter has {len(sites)} sites, no layer {layer}")
    return f"{sites[int(layer)]}.{f'branch.{branch}' if branch else part}.{tensor}"


def _load(model: Adapted, name: str, path: Path) -> None:
    """Add the adapter of a file under ``name``, as its file says it was made."""
    method = store.read_header(path)["method"]
    if method["type"] != Pfeiffer.__name__:
        raise RequestError(f"{path}: an adapter of method {method['type']}; AdapterFusion fuses {Pfeiffer.__name__}")
    known = {field.name for field in dataclasses.fields(Pfeiffer)}
    if strange := sorted(method["arguments"].keys() - known):
        raise RequestError(f"{path}: Pfeiffer has no setting {strange[0]!r}")
    model.add(Pfeiffer(**method["arguments"]), name=name)
    model.load(path, head=False)


def _check(model: Adapted, name: str, first: str, modules: Mapping[str, nn.Module]) -> None:
    """Raises RequestError where an adapter cannot be fused with the first one at these sites."""
    method, reference = model.methods[name], model.methods[first]
    if not isinstance(method, Pfeiffer):
        raise RequestError(f"adapter {name!r} is {type(method).__name__}; AdapterFusion fuses {Pfeiffer.__name__}")
    if name != first:
        for field in ("reduction", "activation"):
            if (mine := getattr(method, field)) != (theirs := getattr(reference, field)):
                raise RequestError(f"adapters {first!r} and {name!r} cannot be fused: {field} is {theirs} and {mine}")
    sites = set(model.bank[name])  # type: ignore[arg-type]
    if sites != set(modules):
        key = sorted(sites ^ set(modules))[0]
        where = f"the fusion acts at {key}, the adapter does not" if key in modules else f"it acts at {key} too"
        raise RequestError(f"adapter {name!r} is on other sites: {where}; give the fusion its depth")
