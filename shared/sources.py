"""What a layer's input was made from, where its maker keeps that for backward anyway: the input need not be saved too.

A frozen layer keeps nothing of its input; one with a trained change needs it for the change's gradient. Behind a layer
norm, a GELU or a SiLU, autograd already holds what the input is a function of, so backward makes the input again.
T tokens, I inputs, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.skinny import product

CHUNK = 2**19  # elements of an input made again at a time: they stay in the cache and take no fresh memory


class Source(NamedTuple):
    """An input x (..., I) as a function of tensors that are kept.

    again: of ``tensors``, gives x, differentiably.  pulled: of g (r, T) and ``tensors``, gives g @ x (r, I).
    """

    tensors: tuple[Tensor | None, ...]
    again: Callable[..., Tensor]
    pulled: Callable[..., Tensor]


def source(x: Tensor) -> Source | None:
    """What ``x`` was made from; None where its maker is not known here, or what it keeps may not be read.

    Under hooks on saved tensors (checkpoints, offloading) reading has effects of its own, and inside a transform of
    torch.func what is kept belongs to another level.
    """
    node = x.grad_fn
    read = KNOWN.get(type(node).__name__)
    if read is None or type(x) is not Tensor or x._version or x.output_nr:
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    if hooks is not None or torch._C._are_functorch_transforms_active():
        return None
    try:
        return read(node)
    except RuntimeError:  # changed in place since: the maker's own backward, if it comes to that, will tell
        return None


def itself(x: Tensor) -> Tensor:
    return x


def pulled_itself(g: Tensor, x: Tensor) -> Tensor:
    return product(g, x.reshape(-1, x.shape[-1]))


def _layer_norm(node: Any) -> Source | None:
    if len(node._saved_normalized_shape) != 1:
        return None
    # Copies of the two vectors: a sharded norm gives its own up after its forward, before this is read.
    vectors = (None if each is None else each.clone() for each in (node._saved_weight, node._saved_bias))
    tensors = (node._saved_input, node._saved_result1, node._saved_result2, *vectors)
    return Source(tensors, _normed_again, _pulled_normed)


def _normed_again(z: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    variance = wide.var(-1, correction=0, keepdim=True)
    epsilon = scale.to(wide.dtype) ** -2 - variance  # the maker keeps no other trace of it
    x = (wide - wide.mean(-1, keepdim=True)) * (variance + epsilon.detach()).rsqrt()
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(z.dtype)


def _pulled_normed(
    g: Tensor, z: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x = (z - mean) * scale * weight + bias, so the norm is applied to the r rows and not to the T."""
    scaled = g * scale.reshape(1, -1).to(g.dtype)
    wide = torch.promote_types(g.dtype, torch.float32)
    moved = (scaled.to(wide) * mean.reshape(1, -1)).sum(1, keepdim=True)
    out = product(scaled, z.reshape(-1, z.shape[-1])) - moved
    out = out if weight is None else out * weight
    return out if bias is None else out + g.sum(1, keepdim=True, dtype=wide) * bias


def _element_wise(function: Callable[[Tensor], Tensor], node: Any) -> Source:
    return Source((node._saved_self,), function, functools.partial(_pulled_through, function))


def _pulled_through(function: Callable[[Tensor], Tensor], g: Tensor, u: Tensor) -> Tensor:
    flat = u.reshape(-1, u.shape[-1])
    size = max(1, CHUNK // max(1, flat.shape[1]))
    wide = torch.promote_types(g.dtype, torch.float32)
    out = torch.zeros(len(g), flat.shape[1], dtype=wide, device=g.device)
    for part, values in zip(g.split(size, 1), flat.split(size), strict=True):
        out += product(part, function(values))
    return out


def _gelu(node: Any) -> Source:
    return _element_wise(functools.partial(F.gelu, approximate=node._saved_approximate), node)


KNOWN: dict[str, Callable[[Any], Source | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _gelu,
    "SiluBackward0": functools.partial(_element_wise, F.silu),
}
