"""S2A: biases, prompts and a light side path around frozen weights, activations kept in four bits (2025, 2503.08154).

Only the abstracts of the publication are known: that biases, prompts and a side path train, and that what non-linear
functions keep is coded in 4 bits by their derivatives. The forms here are those of the nearest public methods: deep
prompts (Jia et al., 2022), lite residuals (Cai et al., 2020), ladder side tuning (Sung et al., 2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from shared.adapter import Adapter, WeightAdapter
from shared.blocks.low_rank import Replacement
from shared.blocks.placement import on_output, take
from shared.blocks.side import Border, Ladder, Rung, Side, Tokens, on_grid
from shared.errors import RequestError
from shared.memory import Saving
from shared.method import Method
from shared.methods.bitfit import biases, with_weights
from shared.methods.prompts import with_tokens
from shared.sites import Site, Sites
from shared.taxonomy import Record


class AroundBlock(Adapter):
    """``block(x with prompts) + side(x)``; class and register tokens pass the side path by.

    prompts: tokens between the block's own, or a border added to its maps.
    """

    def __init__(self, prompts: Tokens | Border | None, side: Side | None, site: Site):
        super().__init__()
        self.prompts, self.side, self.prefix, self.layout = prompts, side, site.prefix, site.layout

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x, rest, kwargs = take(args, kwargs)
        if isinstance(self.prompts, Tokens):
            tokens = self.prompts().to(x.dtype).expand(len(x), -1, -1)
            output, _ = with_tokens(base, x, tokens, self.prefix, *rest, **kwargs)
        else:
            output = base(x if self.prompts is None else self.prompts(x), *rest, **kwargs)
        if self.side is None:
            return output
        if self.layout == "BCHW":
            return on_output(output, lambda y: y + self.side(x, y.shape[1:]))  # type: ignore[misc]
        change = on_grid(self.side, x, self.prefix, self.context.grid)
        return on_output(output, lambda y: y + change)


class AddedBias(Adapter):
    """A trained vector on the output of a layer that has no bias of its own; zero at first."""

    def __init__(self, width: int, layout: str):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        self.layout = layout

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shape = (-1, 1, 1) if self.layout == "BCHW" else (-1,)
        return on_output(base(*args, **kwargs), lambda y: y + self.bias.to(y.dtype).reshape(shape))


@dataclass(frozen=True, kw_only=True)
class S2A(Method):
    """Biases, prompts and side path of a vision backbone; the identity at the start but for the prompts.

    bias: train all biases, norms' included; a layer without one gets one (inferred form).
    prompts: tokens in each block (inferred: 8), 0 for none; on maps the width of an added border.
    prompt_rank: of their factorised form (inferred: 4), None for a full matrix.
    side: "lite" (a bottleneck on the grid at half its sides), "ladder" (a narrow network beside the blocks that reads
    their outputs: no gradient enters the backbone, so without bias and prompts), None.
    reduction: channels of a block to those inside its side path (inferred: 16; a ladder: 8, public code).
    kernel: side of the side path's first convolution on maps (public code: up to 5); on tokens it is 1.
    bits: of a saved activation (paper: 4), None for exact ones.  attention: code fused attention's operands too, which
    the abstract leaves open; without it attention is most of what is saved.
    depth: which blocks, and whose biases.
    """

    record: ClassVar[Record] = Record(
        categories=("efficient/memory", "hybrid"), acts_on="activations", form="parallel", mergeable="no",
        trains="(rows if site.parameter == 'weight' else size) if site.parameter else"
        " (width := site.width) * 0 + (inner := max(width // reduction, 1)) * 0 + ("
        "(inner * width + width if site.role == 'norm' else 1 + inner * width + inner + 2 * (inner * inner + inner))"
        " if side == 'ladder' else"
        " (prompts * width if prompt_rank is None else prompt_rank * (prompts + width)) * (prompts > 0)"
        " + (inner * width // 2 + inner * width + 2 * (inner + width)) * (side == 'lite'))",
        spec="s2a", why="a mixture of additive and selective parts, made for the memory of training",
    )  # fmt: skip

    bias: bool = True
    prompts: int = 8
    prompt_rank: int | None = 4
    side: Literal["lite", "ladder"] | None = "lite"
    reduction: int = 16
    kernel: int = 3
    bits: int | None = 4
    attention: bool = True
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not (self.bias or self.prompts or self.side):
            raise RequestError("S2A with neither bias, prompts nor side: switch one of them on")
        if self.prompts < 0 or self.reduction < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise RequestError(
                f"S2A prompts {self.prompts}, reduction {self.reduction}, kernel {self.kernel}: use 0 or more, 1 or "
                "more, an odd number"
            )
        if self.side == "ladder" and (self.bias or self.prompts):
            raise RequestError("S2A's ladder keeps gradients out of the backbone: use bias=False, prompts=0 with it")
        self.saving()

    @property
    def by_block(self) -> bool:
        return self.side != "ladder"

    def saving(self) -> Saving | None:
        return None if self.bits is None else Saving(bits=self.bits, attention=self.attention)

    def sites(self, sites: Sites) -> Sites:
        if self.side == "ladder":
            final = [s for s in sites.select("norm", tags="final") if s.parameter == "weight"]
            return sites.select("block", self.depth) + Sites([dataclasses.replace(s, parameter=None) for s in final])
        chosen: list[Site] = []
        if self.bias:
            layers = sites.select(with_weights(sites), self.depth)
            chosen += [*biases(layers), *_without_bias(layers)]
        if self.prompts or self.side:
            chosen += sites.select("block", self.depth)
        return Sites(chosen, sites.owner)

    def build_all(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        if self.side == "ladder":
            return self._ladder(sites)
        return {site.key: self.build(site) for site in sites}

    def build(self, site: Site) -> Adapter | WeightAdapter:
        if site.role == "block":
            return AroundBlock(self._prompts(site), self._side(site), site)
        if site.parameter == "weight":
            return AddedBias(len(site.weight), site.layout)
        return Replacement(site.weight)

    def _prompts(self, site: Site) -> Tokens | Border | None:
        if not self.prompts:
            return None
        if site.layout == "BCHW":
            return Border(site.inputs or site.width, self.prompts)
        if site.layout != "BNC":
            raise RequestError(f"site {site.key} has layout {site.layout}: prompts go between tokens (BNC)")
        return Tokens(self.prompts, site.width, self.prompt_rank, where=site.key)

    def _side(self, site: Site) -> Side | None:
        if self.side is None:
            return None
        if site.layout not in ("BNC", "BCHW"):
            raise RequestError(
                f"site {site.key} has layout {site.layout}: the side path takes tokens (BNC) or maps (BCHW)"
            )
        if site.inputs not in (0, site.width):
            raise RequestError(f"S2A side at {site.key}: the block takes {site.inputs} channels and gives "
                               f"{site.width}; choose blocks that keep them by depth, or side=null")  # fmt: skip
        on_maps = site.layout == "BCHW"
        return Side(site.width, self.reduction, kernel=self.kernel if on_maps else 1, batch=on_maps, where=site.key)

    def _ladder(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        blocks = [site for site in sites if site.role == "block"]
        if several := [site.key for site in blocks if site.width != blocks[0].width or site.layout == "BCHW"]:
            raise RequestError(f"S2A's ladder climbs blocks of one width with channels last; {several[0]} is another")
        final = [site for site in sites if site.role == "norm"]
        if len(final) != 1:
            raise RequestError(f"{sites.owner} has {len(final)} final norms; S2A's ladder ends in front of one")
        narrow = max(blocks[0].width // self.reduction, 1)
        rungs: dict[str, Adapter | WeightAdapter] = {
            s.key: Rung(s.width, narrow, first=not i) for i, s in enumerate(blocks)
        }
        return rungs | {final[0].key: Ladder(narrow, final[0].width)}


def _without_bias(layers: Sites) -> list[Site]:
    """Linear layers, convolutions and norms that are called and have no bias, each once."""
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    found = {
        s.path: dataclasses.replace(s, rows=None) for s in layers
        if s.parameter == "weight" and isinstance(s.module, kinds) and s.module._parameters.get("bias") is None
        and not isinstance(s.module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    }  # fmt: skip
    return list(found.values())
