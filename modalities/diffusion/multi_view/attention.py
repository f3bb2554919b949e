"""The attentions of MV-Adapter: between the views of one object, and to a reference image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.errors import RequestError


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
