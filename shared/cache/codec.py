"""Records: the tokens of one image as bytes, exact, in half precision or in codes of 8 bits, and back."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared.errors import WorkError

GROUP = 64  # channels of a token that share a scale: a few of a transformer's are far larger than all others
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KIND = struct.Struct("<I")  # dtype as computed, in the lowest byte, and the number of axes; the shape follows


def encode(outputs: Tensor, precision: str) -> list[bytes]:
    """outputs (B, L, ..., C), of L depths, to one record for each of the B images.

    Raises WorkError where a value is too large for float16.
    """
    shape = outputs.shape[1:]
    head = struct.pack(f"<{1 + len(shape)}I", _DTYPES.index(outputs.dtype) | len(shape) << 8, *shape)
    if precision == "exact":
        parts = [outputs]
    elif precision == "float16":
        parts = [outputs.half()]
        if bool((parts[0].isinf() & outputs.isfinite()).any()):
            raise WorkError(f"cache precision float16: an activation of {outputs.abs().max().item():.3g} is above its "
                            "65504; use int8 or exact")  # fmt: skip
    else:
        parts = _codes(outputs)
    rows = [_bytes(part) for part in parts]
    return [b"".join([head, *(row[i].tobytes() for row in rows)]) for i in range(len(outputs))]


def decode(records: Sequence[bytes], precision: str, device: torch.device) -> Tensor:
    """The outputs (B, L, ..., C) that records of images of one size hold, in the dtype they were computed in."""
    (kind,) = _KIND.unpack_from(records[0])
    dtype, axes = _DTYPES[kind & 255], kind >> 8
    shape = struct.unpack_from(f"<{axes}I", records[0], _KIND.size)
    offset = _KIND.size * (1 + axes)
    stacked = np.stack([np.frombuffer(record, np.uint8, offset=offset) for record in records])
    data = torch.from_numpy(stacked).to(device)
    if precision == "exact":
        return data.view(dtype).unflatten(1, shape)
    if precision == "float16":
        return data.view(torch.float16).unflatten(1, shape).to(dtype)
    group, count = _group(shape[-1]), math.prod(shape)
    codes = data[:, :count].contiguous().view(torch.int8).unflatten(1, (-1, group))
    scales = data[:, count:].contiguous().view(torch.float32)
    return (codes * scales[..., None]).flatten(1).unflatten(1, shape).to(dtype)


def _codes(outputs: Tensor) -> list[Tensor]:
    """int8 (B, groups, channels of one) and their scales (B, groups), float32."""
    groups = outputs.float().flatten(1).unflatten(1, (-1, _group(outputs.shape[-1])))
    scales = groups.abs().amax(-1) / 127
    codes = (groups / scales.masked_fill(scales == 0, 1)[..., None]).round().to(torch.int8)
    return [codes, scales]


def _group(channels: int) -> int:
    return math.gcd(channels, GROUP)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
