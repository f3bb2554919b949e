"""Where adapters may go in a timm vision transformer and an open_clip tower: their modules read once, as sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from shared.sites import Site, Sites, multihead_sites, norm_sites

QKV = ("attention.query", "attention.key", "attention.value")


def timm_sites(backbone: Any) -> Sites:
    """Sites of a ``TimmViT``: itself, the patch embedding, every block, the norms outside the blocks."""
    model, prefix, width = backbone.model, backbone.prefix, backbone.width
    conv = model.patch_embed.proj
    sites = [
        Site("model", 0, "", backbone, parameter=None, layout="BCHW", width=backbone.bands),
        Site("conv", -1, "model.patch_embed.proj", conv, layout="BCHW", width=width, tags=("patch_embed",)),
        *norm_sites("model.norm_pre", model.norm_pre, -1, prefix),
    ]
    for depth, block in enumerate(model.blocks):
        path = f"model.blocks.{depth}"
        sites.append(Site("block", depth, path, block, parameter=None, prefix=prefix, width=width))
        sites += _attention(f"{path}.attn", block.attn, depth, prefix, width)
        sites += _mlp(f"{path}.mlp", block.mlp, depth, prefix, width)
        for name in ("norm1", "norm2"):
            sites += norm_sites(f"{path}.{name}", getattr(block, name), depth, prefix)
    last = len(model.blocks) - 1
    sites += norm_sites("model.norm", model.norm, last, prefix, "final")
    if isinstance(model.norm, nn.Identity):  # it acts on the pooled vector instead
        sites += norm_sites("model.fc_norm", model.fc_norm, last, 0, "final")
    return Sites(sites, backbone.name)


def open_clip_sites(backbone: Any) -> Sites:
    """Sites of an ``OpenClipTower``, with the roles and tags a ``TimmViT`` has."""
    tower, width = backbone.tower, backbone.width
    last = len(tower.transformer.resblocks) - 1
    sites = [
        Site("model", 0, "", backbone, parameter=None, layout="BCHW", width=backbone.bands),
        Site("conv", -1, "tower.conv1", tower.conv1, layout="BCHW", width=width, tags=("patch_embed",)),
        *norm_sites("tower.ln_pre", tower.ln_pre, -1, 1),
    ]
    sites += resblock_sites("tower.transformer", tower.transformer, width, prefix=1)
    return Sites([*sites, *norm_sites("tower.ln_post", tower.ln_post, last, 1, "final")], backbone.name)


def resblock_sites(path: str, transformer: Any, width: int, prefix: int) -> Iterator[Site]:
    """Sites of the blocks of an open_clip transformer, of either tower."""
    for depth, block in enumerate(transformer.resblocks):
        here = f"{path}.resblocks.{depth}"
        up, down = block.mlp.c_fc, block.mlp.c_proj
        yield Site("block", depth, here, block, parameter=None, prefix=prefix, width=width)
        yield from multihead_sites(f"{here}.attn", block.attn, depth, prefix=prefix)
        yield Site("mlp", depth, f"{here}.mlp", block.mlp, parameter=None, prefix=prefix, width=width)
        yield Site("mlp.up", depth, f"{here}.mlp.c_fc", up, prefix=prefix, width=up.out_features)
        yield Site("mlp.down", depth, f"{here}.mlp.c_proj", down, prefix=prefix, width=width)
        yield from norm_sites(f"{here}.ln_1", block.ln_1, depth, prefix, "norm1")
        yield from norm_sites(f"{here}.ln_2", block.ln_2, depth, prefix, "norm2")


def _attention(path: str, attention: Any, depth: int, prefix: int, width: int) -> Iterator[Site]:
    """The whole, its query, key and value (rows of one fused projection or three of their own), its output."""
    yield Site("attention", depth, path, attention, parameter=None, prefix=prefix, width=width)
    if attention.qkv is not None:
        whole = attention.qkv.out_features
        third = whole // 3
        yield Site("attention.qkv", depth, f"{path}.qkv", attention.qkv, prefix=prefix, width=whole)
        for i, role in enumerate(QKV):
            rows = (i * third, (i + 1) * third)
            yield Site(role, depth, f"{path}.qkv", attention.qkv, rows=rows, prefix=prefix, width=third)
    else:
        for role, name in zip(QKV, ("q_proj", "k_proj", "v_proj"), strict=True):
            projection = getattr(attention, name)
            yield Site(role, depth, f"{path}.{name}", projection, prefix=prefix, width=projection.out_features)
    yield Site("attention.output", depth, f"{path}.proj", attention.proj, prefix=prefix, width=width)
    yield from norm_sites(f"{path}.norm", getattr(attention, "norm", nn.Identity()), depth, prefix, "attention")


def _mlp(path: str, mlp: Any, depth: int, prefix: int, width: int) -> Iterator[Site]:
    """The whole, its up (and gate) projection, its down projection.

    timm's packed ``GluMlp`` keeps gate and up in one matrix, the gate first unless ``gate_last``; its ``SwiGLU`` keeps
    them apart as ``fc1_g`` and ``fc1_x``.
    """
    yield Site("mlp", depth, path, mlp, parameter=None, prefix=prefix, width=width)
    if hasattr(mlp, "fc1_g"):
        for role, name in (("mlp.gate", "fc1_g"), ("mlp.up", "fc1_x")):
            layer = getattr(mlp, name)
            yield Site(role, depth, f"{path}.{name}", layer, prefix=prefix, width=layer.out_features)
    elif hasattr(mlp, "gate_last"):
        half = mlp.fc1.out_features // 2
        roles = ("mlp.up", "mlp.gate") if mlp.gate_last else ("mlp.gate", "mlp.up")
        for i, role in enumerate(roles):
            yield Site(role, depth, f"{path}.fc1", mlp.fc1, rows=(i * half, (i + 1) * half), prefix=prefix, width=half)
    else:
        yield Site("mlp.up", depth, f"{path}.fc1", mlp.fc1, prefix=prefix, width=mlp.fc1.out_features)
    yield Site("mlp.down", depth, f"{path}.fc2", mlp.fc2, prefix=prefix, width=width)
    yield from norm_sites(f"{path}.norm", mlp.norm, depth, prefix, "mlp")
