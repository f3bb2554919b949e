"""Earth-Adapter: bottlenecks on the whole, the low and the high frequencies of a block's tokens, mixed by a router.

Hu et al., Earth-Adapter: Bridge the Geospatial Domain Gaps with Mixture of Frequency Adaptation, 2025
(arXiv 2504.06220). Weights of the official code load by ``load_official``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modalities.remote_sensing.official import adapter_of
from shared.adapter import Adapter
from shared.blocks.bottleneck import Bottleneck
from shared.blocks.frequency import split
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class Adaptation(Adapter):
    """After a block: ``p + scale * expert(p)`` on its patch tokens; prefix tokens pass unchanged.

    cutoff: where given, three experts on the tokens, their low and their high frequencies (``blocks.frequency``),
    summed with each token's softmax of ``router`` on the unfiltered tokens; None: one expert.
    """

    def __init__(self, width: int, inner: int, prefix: int, cutoff: float | None, scale: float):
        super().__init__()
        self.prefix, self.cutoff = prefix, cutoff
        self.scale = nn.Parameter(torch.tensor(scale))
        # With layers of its own a bottleneck starts as torch starts them: Kaiming-uniform with a = sqrt 5, W2 not zero.
        self.experts = nn.ModuleList(
            Bottleneck(width, width, inner, layers=(nn.Linear(width, inner), nn.Linear(inner, width)))
            for _ in range(1 if cutoff is None else 3)
        )
        self.router = None if cutoff is None else nn.Linear(width, 3)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tokens = base(*args, **kwargs)
        patches = tokens[:, self.prefix :]
        change = self.experts[0](patches) if self.cutoff is None else self.mixed(patches, self.context.grid)
        return torch.cat([tokens[:, : self.prefix], patches + (self.scale * change).to(patches.dtype)], dim=1)

    def mixed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The experts' sum on patch tokens (B, h * w, C), weighted by the router."""
        parts = (patches, *self.frequencies(patches, grid))
        each = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return (torch.stack(each, -1) * self.weights(patches)[..., None, :]).sum(-1)

    def frequencies(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The low and the high frequencies of patch tokens (B, h * w, C) on their grid (h, w)."""
        if patches.shape[1] != grid[0] * grid[1]:
            raise RequestError(f"{patches.shape[1]} patch tokens are no grid of {grid[0]} x {grid[1]}")
        assert self.cutoff is not None
        parts = split(patches.transpose(1, 2).unflatten(2, grid), self.cutoff)
        low, high = (part.flatten(2).transpose(1, 2) for part in parts)
        return low, high

    def weights(self, patches: Tensor) -> Tensor:
        """The experts' weights (B, N, 3) of each token."""
        assert self.router is not None
        return self.router(patches.to(self.router.weight.dtype)).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class EarthAdapter(Method):
    """The published system, for any token backbone. Not the identity at the start.

    Defaults are those published for adaptation from Potsdam to Vaihingen; other pairs have other widths, blocks and
    cutoffs (12 to 64, the first or the last three or six, 0.2 or 0.3).

    width: of the bottlenecks (d in the paper).  depth: adapted blocks (paper: all).  split: indices of those of them
    that have three experts, the others have one (``fft_layer`` in the official code).  cutoff: of the shorter side of
    the grid, the share that the square of low frequencies takes, rounded down.  scale: of each block's change at first;
    it trains. Like all scalars and biases here it has no weight decay, which the official code gives it.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="sequential", mergeable="no",
        trains="1 + (2 * site.width * width + width + site.width) * (3 if site.depth in split else 1)"
        " + (3 * site.width + 3) * (site.depth in split)",
        modality="remote_sensing", spec="earth_adapter",
    )  # fmt: skip

    width: int = 64
    depth: str | int | Sequence[int] = "all"
    split: Sequence[int] = (0, 1, 2)
    cutoff: float = 0.3
    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.width < 1 or not 0 <= self.cutoff <= 1:
            raise RequestError(f"EarthAdapter width {self.width} is at least 1, cutoff {self.cutoff} from 0 to 1")

    def sites(self, sites: Sites) -> Sites:
        chosen = sites.select("block", self.depth)
        if other := [site.key for site in chosen if site.layout != "BNC"]:
            raise RequestError(f"EarthAdapter acts on tokens; {other[0]} of {sites.owner} gives maps")
        if bad := sorted(set(self.split) - {site.depth for site in chosen}):
            have = ", ".join(str(site.depth) for site in chosen)
            raise RequestError(f"EarthAdapter split {bad}: the adapted blocks of {sites.owner} are {have}")
        return chosen

    def build(self, site: Site) -> Adaptation:
        cutoff = self.cutoff if site.depth in self.split else None
        return Adaptation(site.width, self.width, site.prefix, cutoff, self.scale)


# -- the official files ------------------------------------------------------------------------------------------------

_OFFICIAL = re.compile(r"mlp_list(?P<expert>[123])\.(?P<e>\d+)\.(?P<layer>[02])\.(?P<t>weight|bias)|"
                       r"router\.(?P<r>\d+)\.(?P<rt>weight|bias)")  # fmt: skip


def from_official(tensors: Mapping[str, Tensor], adapters: Mapping[int, nn.Module], source: str) -> dict[str, Tensor]:
    """The tensors of ``adapters``, as ``<block>/<name>``, from those of the official code without their prefix.

    adapters: by index of the block. The official class makes three experts and a router for every block; those that its
    forward never runs (second and third experts and routers of blocks that are not split, all of blocks not adapted)
    are left aside.

    Raises RequestError where a name is none of the official ones.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "scale":
            found |= {f"{block}/scale": value for block, value in enumerate(tensor.unbind())}
        elif match := _OFFICIAL.fullmatch(name):
            block = int(match["e"] or match["r"])
            layer = "down" if match["layer"] == "0" else "up"
            own = f"router.{match['rt']}" if match["r"] else f"experts.{int(match['expert']) - 1}.{layer}.{match['t']}"
            found[f"{block}/{own}"] = tensor
        else:
            raise RequestError(f"{source}: {name} is no tensor of the official Earth-Adapter")
    wanted = {f"{block}/{name}" for block, module in adapters.items() for name, _ in module.named_parameters()}
    return {name: tensor for name, tensor in found.items() if name in wanted}


def load_official(model: Any, path: str | Path) -> list[str]:
    """Fill the active Earth-Adapter of ``model`` from a released segmentor (.pth, .pt or .safetensors), strictly.

    Returns the names left aside: those of the frozen backbone and of the mmseg head, which belong to other modules.
    Raises RequestError where a tensor of the adapter is missing, unknown or of another shape.
    """
    mine, left = adapter_of(path, "refine_feat.")
    name = model.active[0]
    depths = [site.depth for site in model.methods[name].sites(model.sites())]
    keys = dict(zip(depths, model.bank[name], strict=True))
    found = from_official(mine, {depth: model.bank[name][key] for depth, key in keys.items()}, str(path))
    state: dict[str, Tensor] = {n: t for n, t in model.trained_state().items() if n.startswith("head.")}
    for place, tensor in found.items():
        block, _, own = place.partition("/")
        state[f"adapter.{name}.{keys[int(block)]}.{own}"] = tensor
    model.load_trained_state(state, str(path))
    return sorted(left)
