"""Small whole numbers packed into bytes: 8 / b codes of b bits in each, the first in the lowest bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import RequestError

WIDTHS = (1, 2, 4, 8)  # bits of a code


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (any shape, uint8 below 2^bits), row-major, to (ceil(n * bits / 8),) uint8; odd counts end in zero bits."""
    each = 8 // check_width(bits)
    flat = codes.reshape(-1)
    rows = F.pad(flat, (0, -flat.numel() % each)).reshape(-1, each)
    packed = rows[:, 0].clone()
    for place in range(1, each):
        packed |= rows[:, place] << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The codes (uint8, of ``shape``) that ``pack`` put into these bytes."""
    each = 8 // check_width(bits)
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    codes = (packed[:, None] >> shifts) & (2**bits - 1)
    count = torch.Size(shape).numel()
    if packed.numel() != -(-count // each):
        raise RequestError(f"{packed.numel()} bytes hold no {count} codes of {bits} bits")
    return codes.reshape(-1)[:count].reshape(shape)


def check_width(bits: int) -> int:
    """Raises RequestError where codes of that many bits do not fill bytes."""
    if bits not in WIDTHS:
        raise RequestError(f"codes of {bits} bits: use {', '.join(map(str, WIDTHS))}")
    return bits
