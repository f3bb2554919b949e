"""Products of a matrix of few rows with a tall one, shared out among the threads.

A library's product divides its work by blocks of rows, of which a rank of 8 has one; here each thread gets a part of
the tall matrix. r rows, T tokens, I columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALL = 2**16  # elements of the tall matrix below which sharing out costs more than it saves


def product(a: Tensor, x: Tensor) -> Tensor:
    """a (r, T) @ x (T, I): each thread has some of the columns."""
    parts = _parts(x, x.shape[1])
    if parts < 2:
        return a @ x
    columns = x.unflatten(1, (parts, -1)).transpose(0, 1)  # (parts, T, I / parts)
    return torch.bmm(a.expand(parts, *a.shape), columns).transpose(0, 1).flatten(1)


def product_t(a: Tensor, x: Tensor) -> Tensor:
    """a (r, I) @ x.T (I, T): each thread has some of the tokens."""
    parts = _parts(x, len(x))
    if parts < 2:
        return a @ x.t()
    tokens = x.unflatten(0, (parts, -1)).transpose(1, 2)  # (parts, I, T / parts)
    return torch.bmm(a.expand(parts, *a.shape), tokens).transpose(0, 1).flatten(1)


def _parts(x: Tensor, size: int) -> int:
    if x.device.type != "cpu" or x.numel() < SMALL:
        return 1
    return math.gcd(size, torch.get_num_threads())
