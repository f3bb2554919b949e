"""Sparse tensors in a file: of a tensor and its mask only the kept values, and one bit for each place.

A module that keeps some entries of its parameter ``x`` says so by a bool buffer ``x_mask`` of the same shape. What lies
where the mask is false has no effect, is left out of the file, and reads back as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared.errors import RequestError


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors with every masked one as its kept values (k,) and its mask as bits; and the shapes of these."""
    packed, shapes = dict(tensors), {}
    for name, tensor in tensors.items():
        mask = tensors.get(f"{name}_mask")
        if mask is not None and mask.dtype is torch.bool and mask.shape == tensor.shape:
            shapes[name] = list(tensor.shape)
            packed[name], packed[f"{name}_mask"] = tensor[mask], _bits(mask)
    return packed, shapes


def unpack(tensors: Mapping[str, Tensor], shapes: Any, source: str) -> dict[str, Tensor]:
    """What ``pack`` was given. Raises RequestError where bits, values and shape do not belong together."""
    whole = dict(tensors)
    if not isinstance(shapes, Mapping):
        raise RequestError(f"{source}: its header's list of masked tensors does not read")
    for name, shape in shapes.items():
        try:
            values, bits = tensors[name], tensors[f"{name}_mask"]
            places = bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
            size = torch.Size(shape)
            if bits.numel() != -(-size.numel() // 8):
                raise ValueError
            mask = places.flatten()[: size.numel()].bool().reshape(size)
            if int(mask.sum()) != len(values):
                raise ValueError
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError):
            raise RequestError(f"{source}: masked tensor {name}: its values do not fit its mask") from None
        whole[f"{name}_mask"] = mask
        whole[name] = torch.zeros(size, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
    return whole


def _bits(mask: Tensor) -> Tensor:
    """Bool of any shape to uint8, eight entries each, the first in the lowest bit."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)
