"""Soft prompts: trained tokens beside the real ones (Lester et al., 2021; for images VPT, Jia et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.blocks.placement import on_output, take
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class PromptTokens(Adapter):
    """Puts tokens behind the class and register tokens for one block, and takes them out of its output.

    tokens: (n, C), or None to go on with what the block before made of its own.
    """

    def __init__(self, tokens: Tensor | None, prefix: int):
        super().__init__()
        self.tokens = None if tokens is None else nn.Parameter(tokens)
        self.prefix = prefix

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x, rest, kwargs = take(args, kwargs)
        tokens = self.context.prompts if self.tokens is None else self.tokens.to(x.dtype).expand(len(x), -1, -1)
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


@dataclass(frozen=True, kw_only=True)
class Prompt(Method):
    """Trained tokens in every block ("deep") or only into the first, going through all others ("shallow").

    For blocks that see all tokens at once (vision transformers); not the identity at the start, since attention shares
    its weight with the new tokens. Language models take ``Prefix``.
    count: tokens (paper: 1 to 200, 50 typical).  deep: new tokens for every block (paper: the better form).
    depth: which blocks; those of a shallow prompt must follow each other.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/soft prompt",), acts_on="inputs", form="parallel", mergeable="no",
        trains="count * site.width if deep or site.depth == 0 else 0",
    )  # fmt: skip

    count: int = 10
    deep: bool = True
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RequestError(f"Prompt count {self.count}: use at least 1 token")

    def sites(self, sites: Sites) -> Sites:
        chosen = sites.select("block", self.depth)
        if wrong := [site for site in chosen if site.layout != "BNC"]:
            raise RequestError(f"site {wrong[0].key} has layout {wrong[0].layout}: prompts go between tokens (BNC)")
        depths = [site.depth for site in chosen]
        if not self.deep and depths != list(range(depths[0], depths[0] + len(depths))):
            raise RequestError(f"a shallow prompt goes through consecutive blocks, not {depths}")
        return chosen

    def build_all(self, sites: Sites) -> dict[str, PromptTokens]:
        return {
            site.key: PromptTokens(self._tokens(site) if self.deep or not i else None, site.prefix)
            for i, site in enumerate(sites)
        }

    def _tokens(self, site: Site) -> Tensor:
        # uniform with the variance of a projection from a patch (paper), the patch taken as wide as the tokens
        bound = (6 / (4 * site.width)) ** 0.5
        return torch.empty(self.count, site.width).uniform_(-bound, bound)
