"""Rein: learnt tokens that refine a frozen block's features by attention, linked to a mask head's queries.

Wei et al., Stronger, Fewer, & Superior: Harnessing Vision Foundation Models for Domain Generalized Semantic
Segmentation, CVPR 2024 (arXiv 2312.04265). Module names are those of the released weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from modalities.remote_sensing.official import adapter_of
from shared.adapter import Adapter, WeightAdapter
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Sites
from shared.taxonomy import Record


class LinkedFeatures(NamedTuple):
    """What a vision backbone returns (see ``shared.backbone.Features``), with the object queries of Rein's link.

    queries: (B, tokens, query width), alike for every image.
    """

    maps: tuple[Tensor, ...]
    summary: Tensor
    queries: Tensor


class Reins(nn.Module):
    """The tokens of some blocks of one width and what these share.

    layers: number of blocks.  width: their channels.  tokens, rank: learnt tokens a block, as a product of that rank,
    or full.  patch: see ``Rein``.  zero: start as the identity.  queries: channels of the link's, None: no link.
    """

    def __init__(
        self, layers: int, width: int, *, tokens: int, rank: int | None, patch: int, zero: bool, queries: int | None
    ):
        super().__init__()
        inner = width if rank is None else (width * rank) ** 0.5
        bound = math.sqrt(6 / (3 * patch**2 + inner))
        self.learnable_tokens = self.learnable_tokens_a = self.learnable_tokens_b = None
        if rank is None:
            self.learnable_tokens = _uniform(bound, layers, tokens, width)
        else:
            self.learnable_tokens_a = _uniform(bound, layers, tokens, rank)
            self.learnable_tokens_b = _uniform(bound, layers, rank, width)
        self.mlp_token2feat, self.mlp_delta_f = nn.Linear(width, width), nn.Linear(width, width)
        self.scale: float | nn.Parameter = 1.0 if zero else nn.Parameter(torch.tensor(0.001))
        if zero:
            nn.init.zeros_(self.mlp_delta_f.weight)
            nn.init.zeros_(self.mlp_delta_f.bias)
        if queries is not None:
            self.transform, self.merge = nn.Linear(width, queries), nn.Linear(3 * queries, queries)

    def tokens(self, layer: int | slice) -> Tensor:
        """The learnt tokens (tokens, width) of a block, or (blocks, tokens, width) of several."""
        if self.learnable_tokens is not None:
            return self.learnable_tokens[layer]
        assert self.learnable_tokens_a is not None
        assert self.learnable_tokens_b is not None
        return self.learnable_tokens_a[layer] @ self.learnable_tokens_b[layer]

    def forward(self, patches: Tensor, layer: int) -> Tensor:
        """Patch tokens (B, N, width) after block ``layer``, refined.

        The first learnt token takes attention and gives nothing: it is dropped after the softmax.
        """
        tokens = self.tokens(layer)
        patches = patches.to(tokens.dtype)
        shares = (patches @ tokens.t() * tokens.shape[1] ** -0.5).softmax(-1)
        read = shares[..., 1:] @ self.mlp_token2feat(tokens[1:])
        return patches + self.mlp_delta_f(read + patches) * self.scale

    def queries(self) -> Tensor:
        """The link's object queries (tokens, query width): over the blocks, each channel's greatest, mean and last."""
        found = self.transform(self.tokens(slice(None)))
        return self.merge(torch.stack([found.amax(0), found.mean(0), found[-1]], -1).flatten(-2))


class Refine(Adapter):
    """After a block: its patch tokens (B, prefix + N, C), or its maps (B, C, h, w), refined; prefix tokens pass."""

    def __init__(self, reins: Reins, layer: int, prefix: int, layout: str):
        super().__init__()
        self.reins, self.layer, self.prefix, self.layout = reins, layer, prefix, layout

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = base(*args, **kwargs)
        if self.layout == "BCHW":
            refined = self.reins(output.flatten(2).transpose(1, 2), self.layer)
            return refined.transpose(1, 2).unflatten(2, output.shape[2:]).to(output.dtype)
        refined = self.reins(output[:, self.prefix :], self.layer).to(output.dtype)
        return torch.cat([output[:, : self.prefix], refined], dim=1)


class Link(Adapter):
    """Around the whole model: gives its features with the object queries, summed over the widths of a hierarchy."""

    def __init__(self, reins: Sequence[Reins]):
        super().__init__()
        self.reins: Any = nn.ModuleList(reins)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> LinkedFeatures:
        features = base(*args, **kwargs)
        if not hasattr(features, "maps"):
            raise RequestError(f"Rein link: the model gives {type(features).__name__}, no maps for a mask head; use "
                               "link=false")  # fmt: skip
        queries = torch.stack([reins.queries() for reins in self.reins]).sum(0)
        return LinkedFeatures(features.maps, features.summary, queries.expand(len(features.summary), -1, -1))


@dataclass(frozen=True, kw_only=True)
class Rein(Method):
    """The published system: tokens for each block, everything else shared by all blocks of a width.

    tokens: learnt tokens a block.  rank: of their factors (paper: 16), None for full tokens.
    link: make the object queries of a mask head from the tokens; for ``Mask2FormerHead`` with ``linked: true``. Without
    such a head, leave it out.  query_width: channels of the queries, the head's width.
    zero: start as the identity (``zero_mlp_delta_f`` of the official code), with a fixed scale of 1.
    patch: pixels a side of the backbone's patches, which bounds the tokens at the start.  depth: adapted blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter", "additive/soft prompt"), acts_on="activations", form="sequential",
        mergeable="no", modality="remote_sensing", spec="earth_adapter",
        trains="0 if site.role == 'model' else tokens * rank + rank * site.width if rank else tokens * site.width",
        once="2 * first.width * (first.width + 1) + (not zero)"
        " + (query_width * (first.width + 3 * query_width + 2) if link else 0)",
        why="adapters whose tokens are read by attention; the formula counts one width of blocks",
    )  # fmt: skip

    tokens: int = 100
    rank: int | None = 16
    link: bool = True
    query_width: int = 256
    zero: bool = False
    patch: int = 16
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise RequestError(f"Rein tokens {self.tokens}: use at least 2, the first one only takes attention")
        for name, value in (("rank", self.rank or 1), ("query_width", self.query_width), ("patch", self.patch)):
            if value < 1:
                raise RequestError(f"Rein {name} {value}: use at least 1")

    def sites(self, sites: Sites) -> Sites:
        blocks = sites.select("block", self.depth)
        return blocks + sites.select("model") if self.link else blocks

    def build_all(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        blocks = [site for site in sites if site.role == "block"]
        found: dict[str, Adapter | WeightAdapter] = {}
        every: list[Reins] = []
        for width in dict.fromkeys(site.width for site in blocks):
            own = [site for site in blocks if site.width == width]
            reins = Reins(
                len(own), width, tokens=self.tokens, rank=self.rank, patch=self.patch, zero=self.zero,
                queries=self.query_width if self.link else None,
            )  # fmt: skip
            every.append(reins)
            found |= {site.key: Refine(reins, layer, site.prefix, site.layout) for layer, site in enumerate(own)}
        return {site.key: found.get(site.key) or Link(every) for site in sites}


def _uniform(bound: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def load_official(model: Any, path: str | Path) -> list[str]:
    """Fill the active Rein of ``model`` from a released checkpoint (.pth, .pt or .safetensors), strictly.

    Releases hold the adapter and the head. The head's layer of the link is taken too where ours has one. Returns the
    names left aside: those of the frozen backbone and of the rest of the mmseg head.
    Raises RequestError where a tensor of the adapter is missing, unknown or of another shape, or where the model has
    blocks of several widths, for which there is no release.
    """
    mine, left = adapter_of(path, "reins.")
    name = model.active[0]
    state: dict[str, Tensor] = {n: t for n, t in model.trained_state().items() if n.startswith("head.")}
    owners = {key.partition(".reins.")[0] for key, _ in model.bank[name].named_parameters()}
    if len(owners) != 1:
        raise RequestError(f"{path}: {len(owners)} widths of blocks are adapted, a released file has one")
    (owner,) = owners
    state |= {f"adapter.{name}.{owner}.reins.{key}": tensor for key, tensor in mine.items()}
    for part in ("weight", "bias"):
        if f"head.queries_to_features.{part}" in state and f"decode_head.querys2feat.{part}" in left:
            state[f"head.queries_to_features.{part}"] = left.pop(f"decode_head.querys2feat.{part}")
    model.load_trained_state(state, str(path))
    return sorted(left)
