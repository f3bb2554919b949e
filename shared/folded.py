"""Stamps of tensors: whether what was computed from them once still is what they give."""

from __future__ import annotations

from torch import Tensor


def stamp_of(tensor: Tensor) -> tuple:
    """What changes where the tensor does."""
    # The tensor itself is kept, so its identity cannot be reused while the stamp lives.
    return tensor, tensor._version, tensor.data_ptr(), tensor.dtype


def same(old: list, new: list) -> bool:
    """Whether two lists of stamps and plain values are alike, tensors by identity."""
    if len(old) != len(new):
        return False
    for a, b in zip(old, new, strict=True):
        if a and b and isinstance(a[0], Tensor) and isinstance(b[0], Tensor):
            if a[0] is not b[0] or a[1:] != b[1:]:
                return False
        elif a != b:
            return False
    return True
