"""The sites of diffusers' UNets in standard terms, read from the names of their modules."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from shared.errors import RequestError
from shared.sites import Site, Sites

_TRANSFORMER = r"attentions\.\d+\.transformer_blocks\.\d+\."
# Path of a module inside its block, the role it plays, and its tags. The first pattern that fits the whole path counts.
_PLACES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"(?:down|up)samplers\.\d+\.conv", "conv", ("resample",)),
    (r"resnets\.\d+\.conv(?:1|2|_shortcut)", "conv", ("resnet",)),
    (r"resnets\.\d+\.norm[12]", "norm", ("resnet",)),
    (r"attentions\.\d+\.norm", "norm", ("transformer",)),
    (_TRANSFORMER + r"norm[123]", "norm", ("transformer",)),
    *(
        (_TRANSFORMER + attention + place, role, (kind,))
        for attention, kind in (("attn1", "self"), ("attn2", "cross"))
        for place, role in (
            ("", "attention"),
            (r"\.to_q", "attention.query"),
            (r"\.to_k", "attention.key"),
            (r"\.to_v", "attention.value"),
            (r"\.to_out\.0", "attention.output"),
        )
    ),
    (_TRANSFORMER + "ff", "mlp", ()),
    (_TRANSFORMER + r"ff\.net\.0\.proj", "mlp.up", ()),
    (_TRANSFORMER + r"ff\.net\.2", "mlp.down", ()),
)
_PATTERNS = tuple((re.compile(pattern), role, tags) for pattern, role, tags in _PLACES)


def unet_sites(unet: nn.Module, prefix: str = "") -> Sites:
    """The sites of a diffusers ``UNet2DConditionModel``, or of any UNet that keeps its block names.

    prefix: dotted name of ``unet`` below the model that will be adapted ("" where it is that model).
    Depth counts the blocks in the order they run: down, mid, up. A norm gives two sites, its weight and its bias.
    Tags: "resample" (the convolutions of down- and upsamplers), "resnet", "transformer", "self" and "cross" attention.
    ``mlp.up`` of a GEGLU holds the value's and the gate's rows. A layer that a peft adapter wraps is looked through.
    """
    blocks = _blocks(unet)
    if not blocks:
        raise RequestError(f"{type(unet).__name__} has no down_blocks, mid_block or up_blocks: not a diffusers UNet")
    found = [Site("model", 0, prefix, unet, None, layout="BCHW")]
    for depth, (path, block) in enumerate(blocks):
        path = f"{prefix}.{path}".lstrip(".")
        found.append(Site("block", depth, path, block, None, layout="BCHW"))
        for inner, module in block.named_modules():
            found += _inside(depth, f"{path}.{inner}", inner, module)
    return Sites(found, type(unet).__name__)


def _blocks(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    named: list[tuple[str, nn.Module]] = []
    for name in ("down_blocks", "mid_block", "up_blocks"):
        child: Any = getattr(unet, name, None)
        if isinstance(child, nn.ModuleList):
            named += [(f"{name}.{i}", block) for i, block in enumerate(child)]
        elif child is not None:
            named.append((name, child))
    return named


def _inside(depth: int, path: str, inner: str, module: nn.Module) -> list[Site]:
    """The sites of one module of a block: none, one, or a norm's two."""
    role, tags = next(((role, tags) for pattern, role, tags in _PATTERNS if pattern.fullmatch(inner)), ("", ()))
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "_parameters").get("weight")  # noqa: B009  reading it through a host would change it
    if not role:
        return []
    if role in ("attention", "mlp"):
        return [Site(role, depth, path, module, None, tags=tags)]
    if weight is None:  # pooling in place of a resampling convolution, a norm without an affine part
        return []
    layout = "BCHW" if isinstance(module, (nn.Conv2d, nn.GroupNorm)) else "BNC"
    names = ("weight", "bias") if role == "norm" and module._parameters.get("bias") is not None else ("weight",)
    return [Site(role, depth, path, module, n, layout=layout, width=weight.shape[0], tags=tags) for n in names]
