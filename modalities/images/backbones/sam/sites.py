"""Where adapters may go in Segment Anything: its image encoder and its mask decoder, read once, as sites.

Tags: the part ("encoder", "decoder"); of the encoder's attention "window" or "global"; of the decoder's "self",
"token_to_image", "image_to_token".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from modalities.images.backbones.sites import QKV
from shared.sites import Site, norm_sites


def encoder_sites(path: str, encoder: Any) -> list[Site]:
    """Patch kernel, blocks (their tokens are (B, h, w, C), in windows within a windowed attention), and neck."""
    conv, last = encoder.patch_embed.proj, len(encoder.blocks) - 1
    sites = [Site("conv", -1, f"{path}.patch_embed.proj", conv, width=conv.out_channels, tags=("patch_embed",))]
    for depth, block in enumerate(encoder.blocks):
        at, width = f"{path}.blocks.{depth}", block.norm1.normalized_shape[0]
        kind = ("window",) if block.window_size else ("global",)
        sites.append(Site("block", depth, at, block, None, width=width, tags=kind))
        sites += _fused(f"{at}.attn", block.attn, depth, width, kind)
        sites += _mlp(f"{at}.mlp", block.mlp, depth)
        for name in ("norm1", "norm2"):
            sites += norm_sites(f"{at}.{name}", getattr(block, name), depth)
    sites = [replace(site, layout="BCHW" if site.role == "conv" else "BHWC") for site in sites]
    for place, module in enumerate(encoder.neck):
        at, width = f"{path}.neck.{place}", next(module.parameters()).shape[0]
        if isinstance(module, nn.Conv2d):
            sites.append(Site("conv", last, at, module, layout="BCHW", width=width, tags=("neck",)))
        else:
            sites += [replace(site, layout="BCHW") for site in norm_sites(at, module, last, 0, "neck")]
    return _tagged(sites, "encoder")


def decoder_sites(path: str, decoder: Any, first: int) -> list[Site]:
    """Attentions, MLPs and norms of the two-way transformer; ``first`` is the depth of its first layer.

    The last attention, from tokens to image, belongs to the last layer. It offers no blocks: each takes and gives two
    streams.
    """
    transformer, sites = decoder.transformer, []
    last = first + len(transformer.layers) - 1
    for depth, layer in enumerate(transformer.layers, first):
        at = f"{path}.transformer.layers.{depth - first}"
        for name, kind in (
            ("self_attn", "self"),
            ("cross_attn_token_to_image", "token_to_image"),
            ("cross_attn_image_to_token", "image_to_token"),
        ):
            sites += _apart(f"{at}.{name}", getattr(layer, name), depth, kind)
        sites += _mlp(f"{at}.mlp", layer.mlp, depth)
        for name in ("norm1", "norm2", "norm3", "norm4"):
            sites += norm_sites(f"{at}.{name}", getattr(layer, name), depth)
    at = f"{path}.transformer.final_attn_token_to_image"
    sites += _apart(at, transformer.final_attn_token_to_image, last, "token_to_image")
    sites += norm_sites(f"{path}.transformer.norm_final_attn", transformer.norm_final_attn, last, 0, "final")
    return _tagged(sites, "decoder")


def _tagged(sites: list[Site], part: str) -> list[Site]:
    return [replace(site, tags=(*site.tags, part)) for site in sites]


def _fused(path: str, attention: Any, depth: int, width: int, kind: tuple[str, ...]) -> Iterator[Site]:
    """Query, key and value as rows of one projection."""
    yield Site("attention", depth, path, attention, None, width=width, tags=kind)
    yield Site("attention.qkv", depth, f"{path}.qkv", attention.qkv, width=3 * width, tags=kind)
    for third, role in enumerate(QKV):
        rows = (third * width, (third + 1) * width)
        yield Site(role, depth, f"{path}.qkv", attention.qkv, rows=rows, width=width, tags=kind)
    yield Site("attention.output", depth, f"{path}.proj", attention.proj, width=width, tags=kind)


def _apart(path: str, attention: Any, depth: int, kind: str) -> Iterator[Site]:
    """Query, key and value as three projections, narrower than the stream in cross attention."""
    yield Site("attention", depth, path, attention, None, width=attention.embedding_dim, tags=(kind,))
    for role, name in zip((*QKV, "attention.output"), ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
        layer = getattr(attention, name)
        yield Site(role, depth, f"{path}.{name}", layer, width=layer.out_features, tags=(kind,))


def _mlp(path: str, mlp: Any, depth: int) -> Iterator[Site]:
    yield Site("mlp", depth, path, mlp, None, width=mlp.lin2.out_features)
    yield Site("mlp.up", depth, f"{path}.lin1", mlp.lin1, width=mlp.lin1.out_features)
    yield Site("mlp.down", depth, f"{path}.lin2", mlp.lin2, width=mlp.lin2.out_features)
