"""Where a small module stands to the frozen one it adapts: before it, after it, or beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shared.adapter import Adapter, Branch
from shared.blocks.bottleneck import Bottleneck
from shared.errors import RequestError
from shared.sites import Site, Sites


class Before(Adapter):
    """``base(x + branch(x))``: series, on the input."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x, rest, kwargs = take(args, kwargs)
        return base(x + self.branch(x), *rest, **kwargs)

    def as_branch(self) -> Branch | None:
        return _as_branch("before", self.branch, None) if type(self) is Before else None


class After(Adapter):
    """``y + branch(y)`` with ``y = base(x)``: series, on the output (its rows of a fused projection)."""

    def __init__(self, branch: nn.Module, rows: tuple[int, int] | None = None):
        super().__init__()
        self.branch, self.rows = branch, rows

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_output(base(*args, **kwargs), lambda y: add_rows(y, self.branch(_rows(y, self.rows)), self.rows))

    def as_branch(self) -> Branch | None:
        return _as_branch("after", self.branch, self.rows) if type(self) is After else None


class Beside(Adapter):
    """``base(x) + branch(x)``: parallel (to its rows of a fused projection)."""

    def __init__(self, branch: nn.Module, rows: tuple[int, int] | None = None):
        super().__init__()
        self.branch, self.rows = branch, rows

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x, _, _ = take(args, kwargs)
        return on_output(base(*args, **kwargs), lambda y: add_rows(y, self.branch(x), self.rows))

    def as_branch(self) -> Branch | None:
        return _as_branch("beside", self.branch, self.rows) if type(self) is Beside else None


def _as_branch(place: str, branch: nn.Module, rows: tuple[int, int] | None) -> Branch | None:
    if type(branch) is not Bottleneck or type(branch.down) is not nn.Linear or type(branch.up) is not nn.Linear:
        return None
    down, up = branch.down, branch.up
    return Branch(
        place, rows, down.weight, down.bias, branch.activation, up.weight.t(), up.bias, branch.scale, branch.dropout
    )


def take(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """The tensor a module is called with, then the other arguments: transformers passes some by name."""
    if args:
        return args[0], args[1:], kwargs
    name = next((n for n in ("hidden_states", "input", "x", "query") if n in kwargs), None)
    if name is None:
        raise RequestError(f"the adapted module is called with {', '.join(kwargs) or 'nothing'}: no input to adapt")
    return kwargs[name], (), {n: v for n, v in kwargs.items() if n != name}


def on_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` of the output, or of the first part where it is a tuple (attention also gives weights, caches)."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def add_rows(y: Tensor, change: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """``y`` (..., O) plus ``change`` on all of the last axis or on the range ``rows``."""
    if rows is None:
        return y + change
    left, middle, right = y.tensor_split(rows, dim=-1)
    return torch.cat([left, middle + change, right], dim=-1)


def _rows(y: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return y if rows is None else y[..., rows[0] : rows[1]]


class Residual(Adapter):
    """Around a module, which it leaves as it is: it keeps what that reads for another adapter of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, base: Callable[..., Any], x: Tensor) -> Any:
        self.seen = x
        return base(x)


class AtEnd(Adapter):
    """``change(z)`` added to the stream where a block ends, z being the stream there.

    normed: it stands around the norm that ends the block, so ``LN(s + change(LN(s)))`` for the sum s that the norm is
    given; else around a block that ends without one, ``y + change(y)``. Subclasses give ``change``.
    """

    def __init__(self, normed: bool):
        super().__init__()
        self.normed = normed

    def change(self, z: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no change")

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.normed:
            return on_output(base(*args, **kwargs), lambda y: y + self.change(y))
        s, rest, kwargs = take(args, kwargs)
        return base(s + self.change(base(s, *rest, **kwargs)), *rest, **kwargs)


def ends(sites: Sites, depth: Any = "all") -> Sites:
    """Where blocks end: the norm over the residual sum (tag "block_end") where the backbone has one, else the block."""
    normed = any("block_end" in site.tags for site in sites)
    chosen = sites.select("norm", depth, "block_end") if normed else sites.select("block", depth)
    chosen = Sites([site for site in chosen if site.parameter in (None, "weight")], sites.owner)
    if wrong := [site for site in chosen if site.layout == "BCHW"]:
        raise RequestError(f"site {wrong[0].key} has layout {wrong[0].layout}: channels must come last (BNC, BHWC)")
    return chosen


def sublayers(sites: Sites, depth: Any = "all", which: tuple[str, ...] = ("attention", "mlp")) -> Sites:
    """The modules whose output each sub-layer adds to the stream: its last projection, where that is called.

    ``nn.MultiheadAttention`` reads its output projection without calling it: there the attention itself stands in.
    """
    found: list[Site] = []
    for name in which:
        last = {"attention": "attention.output", "mlp": "mlp.down"}[name]
        found += [site if called(site) else _whole(sites, name, site) for site in sites.select(last, depth)]
    return Sites(found, sites.owner)


def linears(sites: Sites, depth: Any = "all") -> Sites:
    """Every linear layer of the blocks that is called, once and whole: query, key and value in one where fused."""
    inside = {
        site for site in sites
        if site.depth >= 0 and site.parameter == "weight" and site.rows is None
        and isinstance(site.module, nn.Linear) and called(site)
    }  # fmt: skip
    if not inside:
        raise RequestError(f"{sites.owner} has no linear layer in its blocks; name roles to adapt")
    chosen = sites.select(tuple(dict.fromkeys(site.role for site in inside)), depth)
    return Sites([site for site in chosen if site in inside], sites.owner)


def check_product(site: Site, method: str, hint: str) -> None:
    """Raises RequestError unless the site's module gives the product of its weight with each place of its input.

    So do a linear layer that is called and a 1 x 1 convolution; other convolutions do not, and the weights of
    ``nn.MultiheadAttention`` are read without a call of their own.
    """
    module: Any = site.module
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == module.stride == (1, 1) and module.padding in ((0, 0), "same", "valid")
        if plain and module.groups == 1:
            return
        what = f"a convolution of {' x '.join(map(str, module.kernel_size))} pixels, stride {module.stride[0]}"
        what += f", in {module.groups} groups" if module.groups > 1 else ""
    elif isinstance(module, nn.Linear) and called(site):
        return
    else:
        what = f"{type(module).__name__}, whose weight is read without a call"
    raise RequestError(f"{method} at {site.key} ({site.role}): it goes around linear layers that are called, and 1 x 1 "
                       f"convolutions; this is {what}: {hint}")  # fmt: skip


def called(site: Site) -> bool:
    return not isinstance(site.module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _whole(sites: Sites, role: str, part: Site) -> Site:
    return next(s for s in sites if s.role == role and s.depth == part.depth and part.path.startswith(s.path))
