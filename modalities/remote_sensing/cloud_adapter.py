"""Cloud-Adapter: a side network that reads the image once and a cross-attention to it after every block.

Zou et al., Adapting Vision Foundation Models for Robust Cloud Segmentation in Remote Sensing Images, 2024
(arXiv 2411.13127). Module names are those of the released weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter, WeightAdapter
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class SeparableConv(nn.Module):
    """k x k convolution, BatchNorm, 1x1 convolution, BatchNorm, and a skip where the shape is kept.

    The released code passes an activation that its library ignores, so the published unit is linear; ``relu`` applies
    one after each norm.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, relu: bool):
        super().__init__()
        self.skip, self.relu = stride == 1 and inputs == outputs, relu
        self.conv_dw = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        for conv in (self.conv_dw, self.conv_pw):
            fan_out = conv.kernel_size[0] ** 2 * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, std=(2 / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        act: Callable[[Tensor], Tensor] = F.relu if self.relu else nn.Identity()
        y = act(self.bn2(self.conv_pw(act(self.bn1(self.conv_dw(x))))))
        return x + y if self.skip else y


class SpatialPerception(nn.Module):
    """The side network: image (B, bands, H, W) to maps of ``width`` channels at H / 2^depth.

    Returns one map (the sum of all stages pooled to the smallest, or the last) or, for "multi", the list of stages.
    """

    def __init__(self, bands: int, width: int, depth: int, aggregate: str, relu: bool):
        super().__init__()
        self.aggregate = aggregate
        self.proj_1x1 = SeparableConv(bands, width, 1, 1, bands, relu)
        # The 3x3 convolutions are dense: the official "group size" equals the width, which makes one group.
        strides = [1] + [2] * depth
        self.spp_dw = nn.ModuleList(SeparableConv(width, width, 3, stride, 1, relu) for stride in strides)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        maps, x = [], self.proj_1x1(image)
        for stage in self.spp_dw:
            x = stage(x)
            maps.append(x)
        if self.aggregate == "multi":
            return maps[1:]
        if self.aggregate == "last":
            return x
        return torch.stack([F.adaptive_avg_pool2d(m, x.shape[-2:]) for m in maps]).sum(0)


class Factorised(nn.Module):
    """A linear map without bias as a product of two of rank r."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.loramlp = nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.loramlp(x)


class CrossAttention(nn.Module):
    """Queries (B, N, E) read a context (B, M, C); 8 heads of 64, fixed in the published system."""

    heads, head_width = 8, 64

    def __init__(self, width: int, context: int, rank: int | None):
        super().__init__()
        inner = self.heads * self.head_width

        def project(inputs: int, outputs: int) -> nn.Module:
            return Factorised(inputs, outputs, rank) if rank else nn.Linear(inputs, outputs, bias=False)

        self.to_q, self.to_out = project(width, inner), project(inner, width)
        self.to_k, self.to_v = project(context, inner), project(context, inner)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = (q @ k.transpose(-1, -2) * self.head_width**-0.5).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Perceive(Adapter):
    """Around the whole model: the side network sees the raw image, once, before the backbone does."""

    observes = True

    def __init__(self, cnn: SpatialPerception):
        super().__init__()
        self.cnn = cnn

    def forward(self, base: Callable[..., Any], image: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.context.cloud_maps = self.cnn(image)
        return base(image, *args, **kwargs)


class Interact(Adapter):
    """After a block: patch tokens (B, prefix + h*w, E) read the side network's map; prefix tokens pass unchanged.

    gridded: the tokens come as (B, h, w, E), without a prefix, and leave so.
    """

    def __init__(self, width: int, context: int, rank: int | None, prefix: int, stage: int, gridded: bool = False):
        super().__init__()
        self.attn, self.prefix, self.stage = CrossAttention(width, context, rank), prefix, stage
        self.gridded = gridded

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tokens, maps = base(*args, **kwargs), self.context.cloud_maps
        if not self.gridded:
            return self.read(tokens, maps, self.context.grid)
        grid = (tokens.shape[1], tokens.shape[2])
        return self.read(tokens.flatten(1, 2), maps, grid).unflatten(1, grid)

    def read(self, tokens: Tensor, maps: Tensor | list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Tokens after the cross-attention to the stage's map, resized to the token grid (h, w)."""
        cloud = maps if isinstance(maps, Tensor) else maps[self.stage]
        if cloud.shape[-2:] != tuple(grid):
            cloud = F.interpolate(cloud, grid, mode="bilinear", align_corners=False)
        patches = tokens[:, self.prefix :]
        patches = patches + self.attn(patches, cloud.flatten(2).transpose(1, 2))
        return torch.cat([tokens[:, : self.prefix], patches], dim=1)


@dataclass(frozen=True, kw_only=True)
class CloudAdapter(Method):
    """The published system, for any number of bands and any token backbone. Not the identity at the start.

    width: channels of the side network (paper: 64).  stages: its halvings; 4 meets a patch of 16 (paper: 4).
    rank: of the attention's projections (paper: 16); None makes them full matrices.
    depth: adapted blocks (paper: all).  aggregate: "sum" of all stages (paper), the "last" one, or "multi": a stage
    for each quarter of the blocks.  relu: an activation after each norm; the released weights need it off.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="sequential", mergeable="no",
        trains="3 * site.width + (site.width + 2) * width + (stages + 1) * (10 * width + 4) * width"
        " if site.role == 'model' else 2 * rank * (site.width + width + 1024) if rank else 1024 * (site.width + width)",
        modality="remote_sensing", spec="cloud_adapter",
    )  # fmt: skip

    width: int = 64
    stages: int = 4
    rank: int | None = 16
    depth: str | int | Sequence[int] = "all"
    aggregate: Literal["sum", "last", "multi"] = "sum"
    relu: bool = False

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("stages", self.stages), ("rank", self.rank or 1)):
            if value < 1:
                raise RequestError(f"CloudAdapter {name} {value}: use at least 1")

    def sites(self, sites: Sites) -> Sites:
        blocks = sites.select("block", self.depth)
        if other := [site for site in blocks if site.layout not in ("BNC", "BHWC")]:
            raise RequestError(
                f"CloudAdapter acts on tokens (BNC or BHWC); {other[0].key} of {sites.owner} has {other[0].layout}"
            )
        return sites.select("model") + blocks

    def build_all(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        whole, *blocks = sites
        cnn = SpatialPerception(_bands(whole), self.width, self.stages, self.aggregate, self.relu)
        # The official rule is block // (blocks // 4); a last incomplete quarter reads the last stage.
        quarter = max(len(blocks) // 4, 1)
        interact = {
            site.key: Interact(
                site.width,
                self.width,
                self.rank,
                site.prefix,
                min(j // quarter, self.stages - 1),
                site.layout == "BHWC",
            )
            for j, site in enumerate(blocks)
        }
        return {whole.key: Perceive(cnn), **interact}


def _bands(whole: Site) -> int:
    bands = getattr(whole.module, "bands", None)
    if not isinstance(bands, int):
        raise RequestError(
            f"CloudAdapter needs an image backbone that states its bands; {type(whole.module).__name__} does not"
        )
    return bands


def from_official(name: str, sites: Sequence[str]) -> str:
    """Our tensor name for a released one (``cnn.…`` or ``net.<j>.…``, without the prefix ``backbone.cloud_adapter.``).

    sites: the adapter's site keys, the model's first and the adapted blocks' in order, as in an adapter file.
    """
    part, _, rest = name.partition(".")
    if part == "cnn":
        return f"{sites[0]}.{name}"
    index, _, rest = rest.partition(".")
    if part != "net" or not index.isdigit() or int(index) >= len(sites) - 1:
        raise RequestError(f"{name}: no Cloud-Adapter tensor for a model with {len(sites) - 1} adapted blocks")
    return f"{sites[int(index) + 1]}.{rest}"


def load_official(model: Any, path: str | os.PathLike) -> list[str]:
    """Fill the active Cloud-Adapter of ``model`` from a released checkpoint (.pth, .pt or .safetensors), strictly.

    Returns the names left aside: the frozen backbone's and the mmseg head's (``decode_head.…``), which belong to other
    modules. Raises RequestError where a tensor of the adapter is missing, unknown or of another shape.
    """
    state, prefix = _read_checkpoint(path), "backbone.cloud_adapter."
    name = model.active[0]
    keys = list(model.bank[name])
    ours = {
        f"adapter.{name}.{from_official(n.removeprefix(prefix), keys)}": t
        for n, t in state.items()
        if n.startswith(prefix)
    }
    if not ours:
        raise RequestError(f"{path}: none of its {len(state)} tensors is a Cloud-Adapter's ({prefix}…)")
    rest = [n for n in state if not n.startswith(prefix)]
    if unknown := [n for n in rest if not n.startswith(("backbone.", "decode_head."))]:
        raise RequestError(f"{path}: {len(unknown)} unknown tensors (first: {unknown[0]})")
    head = {n: t for n, t in model.trained_state().items() if n.startswith("head.")}
    model.load_trained_state(ours | head, str(path))
    return rest


def _read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    from pathlib import Path

    if not Path(path).is_file():
        raise RequestError(f"{path}: no such file; the weights are on the hub as XavierJiezou/cloud-adapter-models")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RequestError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    return loaded.get("state_dict", loaded)
