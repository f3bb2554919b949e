"""Prefix tuning: trained keys and values in front of every attention's own (Li and Liang, 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shared.adapter import Adapter
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class PrefixTokens(Adapter):
    """What both forms train: (n, blocks, 2, channels) of keys and values, directly or through a small network.

    embedding: (n, 2 * blocks * channels), of deviation 1; with ``projection`` (n, channels), then linear, tanh, linear.
    """

    def __init__(self, count: int, blocks: int, channels: int, projection: int | None):
        super().__init__()
        self.shape, total = (count, blocks, 2, channels), 2 * blocks * channels
        self.embedding = nn.Parameter(torch.randn(count, total if projection is None else channels))
        self.project: nn.Module = nn.Identity()
        if projection is not None:
            self.project = nn.Sequential(nn.Linear(channels, projection), nn.Tanh(), nn.Linear(projection, total))

    def tokens(self) -> Tensor:
        return self.project(self.embedding).view(self.shape)


class CachedPrefix(PrefixTokens):
    """At a backbone that takes ``context.prefix`` (see ``Backbone.keys``): it sees to positions and masks."""

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.context.behind("prefix", self.tokens()):
            return base(*args, **kwargs)


class AttentionPrefix(PrefixTokens):
    """At one attention in which every token sees all others, as it calls torch's fused attention. where: its site."""

    def __init__(self, count: int, blocks: int, channels: int, projection: int | None, where: str):
        super().__init__(count, blocks, channels, projection)
        self.where = where

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _InFront(self.tokens()[:, 0], self.where) as mode:
            output = base(*args, **kwargs)
        if not torch.compiler.is_compiling() and not mode.seen:
            raise RequestError(f"Prefix at {self.where}: this attention is not torch's fused one, into which the "
                               "prefix goes; use another method, such as LoRA")  # fmt: skip
        return output


class _InFront(TorchFunctionMode):
    """Within the block ``scaled_dot_product_attention`` sees keys and values (n, 2, channels) in front of its own."""

    def __init__(self, prefix: Tensor, where: str):
        super().__init__()
        self.prefix, self.where, self.seen = prefix, where, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value, *rest = args
        if kwargs.get("is_causal") or kwargs.get("attn_mask") is not None or any(part is not None for part in rest[:1]):
            raise RequestError("Prefix: this attention is masked; its backbone has to take the prefix itself")
        self.seen = True
        if key.ndim != 4 or key.shape[1] * key.shape[3] != self.prefix.shape[2] or key.shape != value.shape:
            shapes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
            raise RequestError(f"Prefix at {self.where}: {shapes} are no heads of {self.prefix.shape[2]} channels each "
                               "between them; use another method, such as LoRA")  # fmt: skip
        heads = self.prefix.to(key.dtype).unflatten(2, (key.shape[1], key.shape[3])).permute(1, 2, 0, 3)
        keys, values = (part.expand(len(key), -1, -1, -1) for part in heads)
        return function(query, torch.cat([keys, key], 2), torch.cat([values, value], 2), *rest, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """``count`` trained keys and values a block; not the identity at the start, since attention shares its weight.

    In every block this is P-Tuning v2 (Liu et al., 2022). On language models the positions of the real tokens begin
    behind the prefix, as the library has them behind past tokens. ``nn.MultiheadAttention`` has no place for it.
    count: tokens (LLM-Adapters: 10 in its runs, 30 by default).  projection: hidden width of a network that makes them
    from an embedding (Li and Liang: it steadies training), None to train them directly (LLM-Adapters, P-Tuning v2).
    depth: which blocks; on a language model all.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/soft prompt",), acts_on="attention states", form="parallel", mergeable="no",
        trains="2 * count * (site.module.keys[0] * site.module.keys[1] if site.role == 'model' else site.width)"
        " if projection is None else count * (site.module.keys[1] if site.role == 'model' else site.width)"
        " + (1 + (site.module.keys[1] if site.role == 'model' else site.width)) * projection"
        " + (1 + projection) * 2 * (site.module.keys[0] * site.module.keys[1] if site.role == 'model' else site.width)",
        spec="llm_adapters",
    )  # fmt: skip

    count: int = 10
    projection: int | None = None
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.count < 1 or (self.projection is not None and self.projection < 1):
            raise RequestError(f"Prefix count {self.count}, projection {self.projection}: both are at least 1")

    def sites(self, sites: Sites) -> Sites:
        whole = [s for s in sites if s.role == "model" and getattr(s.module, "keys", None)]
        if not whole:
            return sites.select("attention", self.depth)
        if self.depth != "all":
            raise RequestError(
                f"Prefix depth {self.depth!r}: {sites.owner} takes a prefix of all its blocks: use 'all'"
            )
        return Sites(whole, sites.owner)

    def build(self, site: Site) -> PrefixTokens:
        if site.role == "model":
            blocks, channels = site.module.keys  # type: ignore[misc]
            return CachedPrefix(self.count, blocks, channels, self.projection)  # type: ignore[arg-type]
        if isinstance(site.module, nn.MultiheadAttention):
            raise RequestError(f"site {site.key}: nn.MultiheadAttention has no place for a prefix; use Prompt")
        return AttentionPrefix(self.count, 1, site.width, self.projection, site.key)
