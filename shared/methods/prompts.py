"""Soft prompts: trained tokens beside the real ones (Lester et al., 2021; for images VPT, Jia et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.blocks.placement import on_output, take
from shared.blocks.prompt_encoder import PromptEncoder
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class PromptTokens(Adapter):
    """Puts tokens behind the class and register tokens for one block, and takes them out of its output.

    tokens: (n, C), what makes them, or None to go on with what the block before made of its own.
    """

    def __init__(self, tokens: Tensor | PromptEncoder | None, prefix: int):
        super().__init__()
        self.encoder = tokens if isinstance(tokens, PromptEncoder) else None
        self.tokens = nn.Parameter(tokens) if isinstance(tokens, Tensor) else None
        self.prefix = prefix

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x, rest, kwargs = take(args, kwargs)
        own = self.tokens if self.encoder is None else self.encoder()
        tokens = self.context.prompts if own is None else own.to(x.dtype).expand(len(x), -1, -1)
        output, self.context.prompts = with_tokens(base, x, tokens, self.prefix, *rest, **kwargs)
        return output


def with_tokens(
    base: Callable[..., Any], x: Tensor, tokens: Tensor, front: int, *rest: Any, **kwargs: Any
) -> tuple[Any, Tensor]:
    """``base`` of x (B, N, C) with tokens (B, n, C) put behind the first ``front``: its output without them, and what
    it made of them."""
    count = tokens.shape[1]
    output = base(torch.cat([x[:, :front], tokens, x[:, front:]], dim=1), *rest, **kwargs)
    made = (output[0] if isinstance(output, tuple) else output)[:, front : front + count]
    return on_output(output, lambda y: torch.cat([y[:, :front], y[:, front + count :]], dim=1)), made


class PromptInFront(Adapter):
    """At a backbone that puts ``context.prompt`` in front of its tokens (see ``Backbone.prompted``).

    tokens: (n, C), or what makes them.
    """

    def __init__(self, tokens: Tensor | PromptEncoder):
        super().__init__()
        self.encoder = tokens if isinstance(tokens, PromptEncoder) else None
        self.tokens = nn.Parameter(tokens) if isinstance(tokens, Tensor) else None

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own: Any = self.tokens if self.encoder is None else self.encoder()
        with self.context.behind("prompt", own):
            return base(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Prompt(Method):
    """Trained tokens in every block ("deep") or only into the first, going through all others ("shallow").

    Not the identity at the start, since attention shares its weight with the new tokens. On language models (prompt
    tuning) only into the first; their deep form is ``Prefix``.
    count: tokens (paper: 1 to 200, 50 typical).  deep: new tokens for every block (paper: the better form).
    hidden: width of a small network that makes the tokens (Li and Liang, 2021; VL-Adapter: 800 for 40 tokens of 768
    channels), or None: the tokens themselves train.
    depth: which blocks; those of a shallow prompt must follow each other.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/soft prompt",), acts_on="inputs", form="parallel", mergeable="no",
        trains="count * site.width + (0 if hidden is None else hidden * (2 * site.width + 1) + site.width)"
        " if deep or site.depth == 0 else 0",
    )  # fmt: skip

    count: int = 10
    deep: bool = True
    hidden: int | None = None
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RequestError(f"Prompt count {self.count}: use at least 1 token")

    @property
    def by_block(self) -> bool:
        return self.deep

    def sites(self, sites: Sites) -> Sites:
        whole = [s for s in sites if s.role == "model" and getattr(s.module, "prompted", False)]
        if whole:
            if self.deep or self.depth != "all":
                raise RequestError(f"Prompt on {sites.owner}: use deep=False and all blocks, or Prefix for every block")
            return Sites(whole, sites.owner)
        chosen = sites.select("block", self.depth)
        if wrong := [site for site in chosen if site.layout != "BNC"]:
            raise RequestError(f"site {wrong[0].key} has layout {wrong[0].layout}: prompts go between tokens (BNC)")
        depths = [site.depth for site in chosen]
        if not self.deep and depths != list(range(depths[0], depths[0] + len(depths))):
            raise RequestError(f"a shallow prompt goes through consecutive blocks, not {depths}")
        return chosen

    def build_all(self, sites: Sites) -> dict[str, PromptTokens | PromptInFront]:
        if sites[0].role == "model":
            return {site.key: PromptInFront(self._tokens(site)) for site in sites}
        return {
            site.key: PromptTokens(self._tokens(site) if self.deep or not i else None, site.prefix)
            for i, site in enumerate(sites)
        }

    def _tokens(self, site: Site) -> Tensor | PromptEncoder:
        if self.hidden is not None:
            return PromptEncoder(self.count, site.width, self.hidden)
        # uniform with the variance of a projection from a patch (paper), the patch taken as wide as the tokens
        bound = (6 / (4 * site.width)) ** 0.5
        return torch.empty(self.count, site.width).uniform_(-bound, bound)
