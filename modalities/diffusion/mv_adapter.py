"""MV-Adapter: an untouched text-to-image UNet makes consistent views of one object (Huang et al., 2024).

Beside every self-attention stand copies of it: one attends along rows (and columns) of all views, one to what the same
UNet makes of a reference image. An encoder of camera or geometry maps adds its features to the down blocks.

Images of a batch are views: those of one prompt lie together, and with guidance the whole unconditional half comes
first, as a pipeline with ``num_images_per_prompt`` has them. What a call wants travels in the UNet's
``cross_attention_kwargs`` (or in the ``context`` of an adapted model); see ``mv_condition.WANTED``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.diffusion.mv_condition import Conditioning, condition_encoder
from shared.adapter import Adapter
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class MVAdapter(Method):
    """The published system; with no control maps given it is the identity at the start.

    views: "row", for cameras at one height; "row_column", for the six sides of ``cameras.geometry_guided``.
    reference: a branch that attends to a reference image (published image models).
    condition: the encoder of control maps.  vae_factor: pixels of a side for each of the UNet's (1: no autoencoder).
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="parallel", mergeable="no",
        trains="(4 * site.module.query_dim ** 2 + site.module.query_dim) * (1 + reference) if site.role == 'attention' "
        "else condition and 54 * (vae_factor * (2 if len(c := site.module.config.block_out_channels) == 3 else 1))"
        " ** 2 * c[0] + c[0] + c[0] * c[1] + c[1] + (c[1] * c[2] + c[2] if c[1] != c[2] else 0) + (10 * (c[0] ** 2"
        " + c[1] ** 2 + c[2] ** 2 + c[-1] ** 2) + 2 * (c[0] + c[1] + c[2] + c[-1]))"
        " * site.module.config.layers_per_block",
        modality="diffusion", spec="mv_adapter",
        why="copies of attentions beside the frozen ones; the encoder is counted at its four published levels",
    )  # fmt: skip

    views: Literal["row", "row_column"] = "row"
    reference: bool = False
    condition: bool = True
    vae_factor: int = 8

    def __post_init__(self) -> None:
        if self.vae_factor < 1:
            raise RequestError(f"vae_factor {self.vae_factor}: at least 1")

    def sites(self, sites: Sites) -> Sites:
        return sites.select("attention", tags="self") + sites.select("model")

    def build(self, site: Site) -> Adapter:
        if site.role == "attention":
            return ViewAttention(site.module, published(site), self.views, self.reference)
        encoder = condition_encoder(site.module, self.vae_factor) if self.condition else None
        return Conditioning(site.module, encoder, self.vae_factor, self.reference)

    def example(self) -> dict[str, Any]:
        told: dict[str, Any] = {"num_views": 1}
        if self.condition:
            told["control"] = torch.linspace(0.1, 0.9, 6, device="cpu").view(1, 6, 1, 1)
        if self.reference:
            told["ref_latents"] = torch.full((1, 1, 1, 1), 0.5, device="cpu")
        return told


def published(site: Site) -> str:
    """The name the published code gives the adapter of a self-attention: that of its processor in the UNet."""
    path = site.path
    start = min(i for i in (path.find("down_blocks"), path.find("mid_block"), path.find("up_blocks")) if i >= 0)
    return f"{path[start:]}.processor"


# -- attention ---------------------------------------------------------------------------------------------------------


class ViewAttention(Adapter):
    """Around a self-attention: adds that between the views and that to the reference, both of the same input."""

    def __init__(self, attention: Any, name: str, views: str = "row", reference: bool = False):
        super().__init__()
        self.name, self.views, self.reference, self.heads = name, views, reference, attention.heads
        for branch in ("mv", "ref") if reference else ("mv",):
            for part in ("to_q", "to_k", "to_v"):
                self.add_module(f"{part}_{branch}", _copy(getattr(attention, part)))
            out = _copy(attention.to_out[0])
            with torch.no_grad():
                for parameter in out.parameters():
                    parameter.zero_()
            self.add_module(f"to_out_{branch}", nn.ModuleList([out, nn.Dropout(0.0)]))

    def forward(self, base: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        told = vars(self.context)
        cache = told.get("cache_hidden_states")
        if cache is not None:
            cache[self.name] = hidden_states
        output = base(hidden_states, *args, **kwargs)
        x = hidden_states.to(self.to_q_mv.weight.dtype)  # type: ignore[union-attr]
        if told.get("use_mv", True):
            output = output + told.get("mv_scale", 1.0) * self.between_views(x).to(output.dtype)
        references = told.get("ref_hidden_states")
        if self.reference and references is not None and told.get("use_ref", True):
            added = self.to_reference(x, references[self.name].to(x))
            output = output + told.get("ref_scale", 1.0) * added.to(output.dtype)
        return output

    def between_views(self, x: Tensor) -> Tensor:
        """x (B * V, H * W, C): every token attends to its row in all V views (or see ``rows_and_columns``)."""
        views, (height, width) = self.context.num_views, _grid(x.shape[1], vars(self.context).get("latent_size"))
        if len(x) % views:
            raise RequestError(f"num_views {views}: the batch of {len(x)} is no whole number of objects")
        queries, keys, values = (
            getattr(self, f"to_{part}_mv")(x).reshape(-1, views, height, width, x.shape[-1]) for part in "qkv"
        )
        if self.views == "row_column" and views > 1:
            found = rows_and_columns(queries, keys, values, self.heads)
        else:
            found = rows(queries, keys, values, self.heads)
        return _through(self.to_out_mv, found.reshape(x.shape))

    def to_reference(self, x: Tensor, reference: Tensor) -> Tensor:
        """x (n, tokens, C) attends to reference (r, tokens, C), whose rows serve n / r images each, in order."""
        if len(x) % len(reference):
            raise RequestError(f"ref_hidden_states of {len(reference)} rows do not go into a batch of {len(x)}")
        queries = self.to_q_ref(x).reshape(len(reference), -1, x.shape[-1])  # type: ignore[operator]
        found = attend(queries, self.to_k_ref(reference), self.to_v_ref(reference), self.heads)  # type: ignore[operator]
        return _through(self.to_out_ref, found.reshape(x.shape))


def rows(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Attention of each row over that row of all views. All (B, V, H, W, C)."""
    batch, views, height, width, channels = queries.shape
    q, k, v = (t.transpose(1, 2).reshape(-1, views * width, channels) for t in (queries, keys, values))
    return attend(q, k, v, heads).reshape(batch, height, views, width, channels).transpose(1, 2)


def rows_and_columns(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Front, right, back, left, top, bottom (B, 6, H, W, C): rows among the first four, columns among the front
    (mirrored, as the back is seen), back, top and bottom; front and back take the mean of both."""
    if queries.shape[1] != 6:
        raise RequestError(f"num_views {queries.shape[1]}: attention along rows and columns is for the 6 sides")
    row = rows(queries[:, :4], keys[:, :4], values[:, :4], heads)
    q, k, v = (
        torch.stack([t[:, 0].flip(2), t[:, 2], t[:, 4], t[:, 5]], 1).transpose(2, 3) for t in (queries, keys, values)
    )
    column = rows(q, k, v, heads).transpose(2, 3)
    front, back = (row[:, 0] + column[:, 0].flip(2)) / 2, (row[:, 2] + column[:, 1]) / 2
    return torch.stack([front, row[:, 1], back, row[:, 3], column[:, 2], column[:, 3]], 1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention of (n, tokens, C)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _copy(layer: Any) -> nn.Linear:
    """A linear layer with the frozen values of another one; adapters on it are looked through."""
    own = getattr(layer, "base_layer", layer)._parameters
    rows, columns = own["weight"].shape
    twin = nn.Linear(columns, rows, bias=own.get("bias") is not None, device="meta")
    for name, value in own.items():
        if value is not None:
            setattr(twin, name, nn.Parameter(value.detach().clone()))
    return twin


def _grid(tokens: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W) of a level's tokens below latents of ``size``, which each level halves, rounding up; else a square."""
    height, width = size or (math.isqrt(tokens),) * 2
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        what = (
            f"level of latents {size[0]}x{size[1]}" if size else "square: say the size (height, width) of the latents"
        )
        raise RequestError(f"{tokens} tokens are no {what}")
    return height, width
