"""When a folded tensor is out of date: the stamp of what it was computed from, and whether two stamps are the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def stamp_of(weight: Tensor, active: tuple[tuple[str, float], ...], adapters: Iterable[nn.Module]) -> list:
    """Of a weight and the active adapters on it, with their tensors and plain settings."""
    stamp: list[Any] = [_of(weight), active]
    for adapter in adapters:
        stamp += [_of(t) for t in (*adapter.parameters(), *adapter.buffers())]
        stamp.append(tuple(v for v in adapter.__dict__.values() if isinstance(v, (int, float, str))))
    return stamp


def _of(tensor: Tensor) -> tuple:
    # The tensor itself is kept, so its identity cannot be reused while the stamp lives.
    return tensor, tensor._version, tensor.data_ptr(), tensor.dtype


def same(old: list, new: list) -> bool:
    if len(old) != len(new):
        return False
    for a, b in zip(old, new, strict=True):
        if a and b and isinstance(a[0], Tensor) and isinstance(b[0], Tensor):
            if a[0] is not b[0] or a[1:] != b[1:]:
                return False
        elif a != b:
            return False
    return True
