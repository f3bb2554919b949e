"""PeftCD's adapter: a bottleneck before every frozen block, which the block's own residual carries on.

PeftCD: Leveraging Vision Foundation Models with Parameter-Efficient Fine-Tuning for Remote Sensing Change Detection,
2025. Its other variants are ``LoRA`` and ``IA3`` on ``attention.qkv``; its decoders are in ``heads.change``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from shared import weights
from shared.adapter import Adapter
from shared.blocks.bottleneck import Bottleneck
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class Prompt(Adapter):
    """``block(x + gelu(up(gelu(down(x)))))``: x (B, N, C), (B, h, w, C) or, with layout "BCHW", (B, C, h, w)."""

    def __init__(self, channels: int, width: int, where: str, layout: str = "BNC"):
        super().__init__()
        # With layers of its own a bottleneck starts as torch starts them, so it is not the identity at first.
        self.branch = Bottleneck(
            channels, channels, width, activation="gelu", where=where, layout=layout,
            layers=(nn.Linear(channels, width), nn.Linear(width, channels)),
        )  # fmt: skip

    def forward(self, base: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return base(self.prompted(x), *args, **kwargs)

    def prompted(self, x: Tensor) -> Tensor:
        """What the block is given in place of x."""
        return x + F.gelu(self.branch(x))


@dataclass(frozen=True, kw_only=True)
class PeftCD(Method):
    """The published adapter, for any backbone of blocks. Not the identity at the start.

    width: of the bottlenecks (paper: 32).  depth: adapted blocks (paper: all).
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="sequential", mergeable="no",
        trains="width * (2 * (site.inputs or site.width) + 1) + (site.inputs or site.width)",
        modality="remote_sensing", spec="peftcd",
    )  # fmt: skip

    width: int = 32
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise RequestError(f"PeftCD width {self.width}: use at least 1")

    def sites(self, sites: Sites) -> Sites:
        return sites.select("block", self.depth)

    def build(self, site: Site) -> Prompt:
        return Prompt(site.inputs or site.width, self.width, site.key, site.layout)


# -- files of the official code ----------------------------------------------------------------------------------------

# The detail branch is made and never called there.
_IDLE = ("detail_in.", "detail_gate.")
_PROMPT = re.compile(r"encoder\.blocks\.(\d+)\.prompt_learn\.([02])\.(weight|bias)")
_LORA = re.compile(r"encoder\.base_model\.model\.blocks\.(\d+)\.attn\.qkv\.lora_([AB])\.default\.weight")


def load_official(model: Any, path: str | Path) -> list[str]:
    """Fill the active adapter (``PeftCD``, or ``LoRA`` on "attention.qkv") and an ``SSBiFPNDecoder`` of ``model`` from
    a checkpoint of the official code's DINOv3 variant, strictly.

    Returns the names left aside: those of the frozen backbone and of the decoder's idle branch. Batch norms' counts of
    batches, which nothing reads, may be missing. Raises RequestError where a tensor is missing, unknown or of another
    shape.
    """
    found = {name.removeprefix("change_detection."): tensor for name, tensor in weights.read(path).items()}
    name = model.active[0]
    state, left = {n: t for n, t in model.trained_state().items() if n.endswith("num_batches_tracked")}, []
    depths = {site.depth: site.key for site in model.methods[name].sites(model.sites())}
    for key, tensor in found.items():
        if key.startswith("decoder.") and not key.startswith(tuple(f"decoder.{idle}" for idle in _IDLE)):
            state[f"head.{key.removeprefix('decoder.')}"] = tensor
        elif match := _PROMPT.fullmatch(key):
            layer = "down" if match[2] == "0" else "up"
            state[f"adapter.{name}.{_key(depths, match[1], path)}.branch.{layer}.{match[3]}"] = tensor
        elif match := _LORA.fullmatch(key):
            own, value = ("down", tensor) if match[2] == "A" else ("up", tensor.t().contiguous())
            state[f"adapter.{name}.{_key(depths, match[1], path)}.{own}"] = value
        elif key.startswith(("encoder.", "decoder.")):
            left.append(key)
        else:
            raise RequestError(f"{path}: {key} is no tensor of the official PeftCD")
    model.load_trained_state(state, str(path))
    return sorted(left)


def _key(depths: dict[int, str], block: str, path: str | Path) -> str:
    if int(block) not in depths:
        raise RequestError(f"{path}: adapts block {block}, which the model's adapter does not")
    return depths[int(block)]
