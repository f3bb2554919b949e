"""Sites: where an adapter may go, in standard terms, so that a method never names a library's modules.

A backbone describes its model once as sites; a method asks for roles and depths.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from shared.errors import RequestError

ROLES = (
    "attention.query", "attention.key", "attention.value", "attention.qkv", "attention.output", "attention",
    "mlp.up", "mlp.gate", "mlp.down", "mlp", "block", "norm", "conv", "linear", "embedding", "model",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place of a model where an adapter may act.

    role: one of ``ROLES``.  depth: index of the block it belongs to (0-based; -1 before the first block).
    path: dotted name of ``module`` below the backbone ("" is the backbone itself).
    parameter: the tensor a weight adapter changes, None where the module has none.
    rows: the half-open range of output rows this role owns in a fused projection ("attention.qkv" is the whole one).
    prefix: class and register tokens in front of the grid.  layout: axes of what flows through, "BNC", "BHWC", "BCHW",
    or "B(HW)C" (tokens of a grid that convolutions know, so that none can be added).
    width: its channels, of what comes out.  inputs: of what goes in (0: the same).
    tags: further names a selection may ask for ("resample").
    """

    role: str
    depth: int
    path: str
    module: nn.Module = field(repr=False, compare=False)
    parameter: str | None = "weight"
    rows: tuple[int, int] | None = None
    prefix: int = 0
    layout: str = "BNC"
    width: int = 0
    inputs: int = 0
    tags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A unique, dot-free name: it holds the site's tensors in a bank and in an adapter file."""
        name = self.path.replace(".", "/") or "model"
        if self.rows is not None:
            name = f"{name}:{self.role.rpartition('.')[2]}"
            return f"{name}:bias" if str(self.parameter).endswith("bias") else name
        return name if self.parameter in (None, "weight") else f"{name}:{self.parameter}"

    @property
    def axis(self) -> int:
        """The axis of the channels in what flows through."""
        return 1 if self.layout == "BCHW" else -1

    @property
    def bias(self) -> Site | None:
        """The site of the bias that belongs to this site's weight (its rows of it); None where there is none."""
        name = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(self.parameter or "")
        return replace(self, parameter=name) if name and self.module._parameters.get(name) is not None else None

    @property
    def weight(self) -> Tensor:
        """The frozen tensor (rows of it, for a fused projection) that a weight adapter would change."""
        whole = self.module._parameters.get(self.parameter or "")
        if whole is None:
            raise RequestError(f"site {self.key} ({self.role}) has no parameter {self.parameter!r} to adapt")
        return whole if self.rows is None else whole[self.rows[0] : self.rows[1]]


class Sites(Sequence[Site]):
    """An ordered set of sites with selection by role, depth and tag."""

    def __init__(self, sites: Iterable[Site], owner: str = "model"):
        self._sites, self.owner = tuple(sites), owner

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, index):  # an int gives a Site, a slice a tuple of them
        return self._sites[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __add__(self, other: Sites) -> Sites:
        return Sites((*self, *other), self.owner)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.role for site in self))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return max((site.depth for site in self), default=-1) + 1

    def select(
        self, roles: str | Sequence[str], depth: str | int | Sequence[int] = "all", tags: str | Sequence[str] = ()
    ) -> Sites:
        """The sites with any of ``roles``, at ``depth``, with all ``tags``.

        depth: "all", "first 4", "last 4", an index or indices of blocks.
        Raises RequestError where a role, a depth or the whole selection matches nothing.
        """
        wanted = (roles,) if isinstance(roles, str) else tuple(roles)
        tags = (tags,) if isinstance(tags, str) else tuple(tags)
        for role in wanted:
            self._known(role)
        depths = self._depths(depth)
        chosen = [
            s for s in self if s.role in wanted and (depths is None or s.depth in depths) and set(tags) <= set(s.tags)
        ]
        for role in wanted:
            if not any(site.role == role for site in chosen):
                raise RequestError(
                    f"no site of {self.owner} has role {role!r} at depth {depth!r}"
                    + (f" with tags {tags}" if tags else "")
                )
        return Sites(chosen, self.owner)

    def _known(self, role: str) -> None:
        if role in self.roles:
            return
        near = difflib.get_close_matches(role, self.roles, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise RequestError(
            f"{self.owner} has no site with role {role!r}{hint}; it has {', '.join(self.roles) or 'none'}"
        )

    def _depths(self, depth: str | int | Sequence[int]) -> set[int] | None:
        if depth == "all":
            return None
        if isinstance(depth, str):
            word, _, count = depth.partition(" ")
            if word not in ("first", "last") or not count.isdigit() or not 0 < int(count) <= self.depth:
                raise RequestError(
                    f"depth {depth!r} of {self.owner}: use 'all', 'first N', 'last N' (N to {self.depth}) or indices"
                )
            n = int(count)
            return set(range(n)) if word == "first" else set(range(self.depth - n, self.depth))
        indices = {depth} if isinstance(depth, int) else set(depth)
        if outside := sorted(i for i in indices if not -self.depth <= i < self.depth):
            raise RequestError(f"depth {outside} of {self.owner}: it has blocks 0 to {self.depth - 1}")
        return {i % self.depth for i in indices}


def describe(model: nn.Module, owner: str = "") -> Sites:
    """The sites of any torch model, read from its module types alone, for a model that no backbone wraps.

    Linear, convolution, embedding and norm layers answer to those names; ``nn.MultiheadAttention`` gives query, key,
    value and output rows. Depth is the order of appearance among modules of the same role.
    """
    found: list[Site] = [Site("model", 0, "", model, parameter=None)]
    inside_attention: set[str] = set()
    count: dict[str, int] = {}

    def add(role: str, path: str, module: nn.Module, **more) -> None:
        found.append(Site(role, count.get(role, 0), path, module, **more))
        count[role] = count.get(role, 0) + 1

    for path, module in model.named_modules():
        if path in inside_attention:
            continue
        if isinstance(module, nn.MultiheadAttention):
            found += multihead_sites(path, module, count.get("attention", 0))
            count["attention"] = count.get("attention", 0) + 1
            inside_attention.add(f"{path}.out_proj".lstrip("."))
        elif isinstance(module, nn.Linear):
            add("linear", path, module, width=module.out_features)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            add("conv", path, module, width=module.out_channels, layout="BCHW")
        elif isinstance(module, nn.Embedding):
            add("embedding", path, module, width=module.embedding_dim)
        elif (
            isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
            and module.weight is not None
        ):
            add("norm", path, module)
    return Sites(found, owner or type(model).__name__)


def every_parameter(sites: Sites) -> Sites:
    """A site for each parameter of the model, whole: biases, embeddings and bare tensors too; a shared one once.

    Those that ``sites`` describes keep role, depth and the rest; all others have the role "model" and no depth (-1).
    """
    whole = {s.key: s for site in sites if site.parameter and site.rows is None for s in (site, site.bias) if s}
    root = next(s.module for s in sites if s.role == "model")
    found, seen = [], set()
    for path, module in root.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                site = Site("model", -1, path, module, name)
                found.append(whole.get(site.key, site))
    return Sites(found, sites.owner)


def multihead_sites(path: str, attention: nn.MultiheadAttention, depth: int, **more) -> list[Site]:
    """Sites of ``nn.MultiheadAttention``: its projections are read as tensors, never called, and q, k, v share one."""
    width = attention.embed_dim
    sites = [Site("attention", depth, path, attention, parameter=None, width=width, **more)]
    names = ("query", "key", "value")
    if attention.in_proj_weight is not None:
        rows = [(i * width, (i + 1) * width) for i in range(3)]
        sites.append(Site("attention.qkv", depth, path, attention, "in_proj_weight", width=3 * width, **more))
        sites += [
            Site(f"attention.{name}", depth, path, attention, "in_proj_weight", rows=r, width=width, **more)
            for name, r in zip(names, rows, strict=True)
        ]
    else:
        sites += [
            Site(
                f"attention.{name}",
                depth,
                path,
                attention,
                f"{name[0]}_proj_weight",
                rows=(0, width),
                width=width,
                **more,
            )
            for name in names
        ]
    out = f"{path}.out_proj".lstrip(".")
    return [*sites, Site("attention.output", depth, out, attention.out_proj, width=width, **more)]


def norm_sites(
    path: str, norm: nn.Module, depth: int, prefix: int = 0, *tags: str, layout: str = "BNC"
) -> Iterator[Site]:
    """A norm's weight and bias, as far as it has them; its own name is a tag."""
    for parameter in ("weight", "bias"):
        tensor = norm._parameters.get(parameter)
        if tensor is not None:
            names = (path.rpartition(".")[2], *tags)
            more = {"prefix": prefix, "layout": layout, "width": tensor.numel(), "tags": names}
            yield Site("norm", depth, path, norm, parameter, **more)
