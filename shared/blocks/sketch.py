"""Sketched weights: a small table of values for each row and group of columns, and a 4-bit code for each entry.

W[i, g * S + c] = table[i, g, code[i, g, c]], with S columns a group; two codes a byte, that of
the even column in the high half.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.errors import RequestError, WorkError

ENTRIES = 1 << 21  # of a weight that are ever dense at once


def pack(codes: Tensor) -> Tensor:
    """Codes 0 to 15 (R, G, S), S even, to bytes (R, G, S / 2)."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpack(packed: Tensor) -> Tensor:
    """Bytes (R, G, S / 2) to codes (R, G, S), uint8."""
    return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)


def dense(table: Tensor, packed: Tensor) -> Tensor:
    """The weight (R, C) of a table (R, G, V) and packed codes, in the table's precision; differentiable."""
    return table.gather(2, unpack(packed).long()).flatten(1)


def rounded(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """A sketch without data: values evenly spaced from a group's least to its greatest, the nearest for each entry."""
    grouped = weight.float().unflatten(1, (groups, -1))
    low, high = grouped.aminmax(dim=2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    table = low + step * torch.arange(2**bits, device=weight.device)
    codes = ((grouped - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp_(0, 2**bits - 1)
    return table, pack(codes)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows with at most ``ENTRIES`` entries each."""
    step = max(1, ENTRIES // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


class _Product(torch.autograd.Function):
    """``x @ dense(table, packed).T``, some rows of the weight at a time; saves x, the table and the codes only.

    Gradients of the table are sums over the entries of a code, in float32.
    """

    @staticmethod
    def forward(x: Tensor, table: Tensor, packed: Tensor) -> Tensor:  # type: ignore[override]
        y = x.new_empty(*x.shape[:-1], len(table))
        for own in blocks(len(table), x.shape[-1]):
            y[..., own] = F.linear(x, dense(table[own], packed[own]).to(x.dtype))
        return y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, table, packed = ctx.saved_tensors
        need_x, need_table, _ = ctx.needs_input_grad
        rows, flat = gradient.reshape(-1, len(table)), x.reshape(-1, x.shape[-1])
        gx = torch.zeros_like(flat) if need_x else None
        gt = torch.zeros_like(table, dtype=torch.float32) if need_table else None
        for own in blocks(len(table), x.shape[-1]):
            if gx is not None:
                gx += rows[:, own] @ dense(table[own], packed[own]).to(x.dtype)
            if gt is not None:
                whole = (rows[:, own].t() @ flat).float().unflatten(1, (table.shape[1], -1))
                gt[own].scatter_add_(2, unpack(packed[own]).long(), whole)
        return None if gx is None else gx.reshape(x.shape), None if gt is None else gt.to(table.dtype), None


def product(x: Tensor, table: Tensor, packed: Tensor) -> Tensor:
    """x (..., C) times the sketched weight, transposed, to (..., R) in the precision of x."""
    if torch.compiler.is_compiling():
        return F.linear(x, dense(table, packed).to(x.dtype))
    return _Product.apply(x, table, packed)  # type: ignore[return-value]


class Sketched(Adapter):
    """In place of a linear layer: the product with its sketched weight, plus its own bias; the layer is not called.

    It starts as ``rounded``. The frozen weight leaves main memory: from here on it is a mapped, already unlinked file
    in the folder for temporary files, so it is read from disk where it is still read (by the bare model, or after the
    adapter is removed) and is bit for bit what it was. A model that moves to another device leaves it there.

    table: (R, G, 2^bits), what trains.  codes: uint8 (R, G, C / G / 2).  bare: run the frozen layer instead.
    """

    codes: Tensor

    def __init__(self, host: nn.Linear, bits: int, groups: int, dtype: torch.dtype, where: str):
        super().__init__()
        weight = host._parameters["weight"]
        assert weight is not None
        rows, columns = weight.shape
        if groups < 1 or columns % (2 * groups):
            raise RequestError(
                f"{groups} groups at {where}: its {columns} columns do not divide into groups of even size"
            )
        self.host, self.bare = (host,), False  # in a tuple, as it is no module of this adapter's
        self.table = nn.Parameter(torch.empty(rows, groups, 2**bits, dtype=dtype, device=weight.device))
        packed = torch.empty(rows, groups, columns // groups // 2, dtype=torch.uint8, device=weight.device)
        self.register_buffer("codes", packed)
        self._mapped = 0
        if not weight.is_meta:
            if not weight.isfinite().all():
                raise RequestError(f"the weight at {where} holds numbers that are not finite")
            for own in blocks(rows, columns):
                self.set(*rounded(weight[own].detach(), bits, groups), own)
            self._unload()

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        if self.bare:
            return base(x)
        device = x.device.type
        flowing = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        y, bias = product(flowing, self.table, self.codes), self.host[0].bias
        return y if bias is None else y + bias.to(y.dtype)

    def dense(self) -> Tensor:
        """The weight (R, C) that the tables give."""
        return dense(self.table.detach(), self.codes)

    def set(self, table: Tensor, codes: Tensor, own: slice = slice(None)) -> None:
        """Take over a table and packed codes, for the rows ``own``."""
        with torch.no_grad():
            self.table[own].copy_(table)
            self.codes[own].copy_(codes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._unload()
        return self

    def _unload(self) -> None:
        """Put the frozen weight on disk, unless it is there already."""
        weight, port = self.host[0]._parameters["weight"], self.host[0].__dict__.get("_port")
        attached = port is None or any(self in own for own in port.around.values())
        if weight is None or weight.is_meta or not attached or weight.data_ptr() == self._mapped:
            return
        weight.data = _on_disk(weight.detach())
        self._mapped = weight.data_ptr()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_mapped": 0})


def _on_disk(tensor: Tensor) -> Tensor:
    """The same values in a mapped file that no longer has a name, so it is gone with the last who maps it."""
    if not tensor.numel():
        return tensor
    file, path = tempfile.mkstemp(prefix="omniadapt-")
    try:
        with open(file, "wb") as stream:
            tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(stream)
        flat = torch.from_file(path, shared=False, size=tensor.numel(), dtype=tensor.dtype)
    except (OSError, RuntimeError) as error:
        raise WorkError(f"{path}: the frozen weights cannot be kept there: {error}; set TMPDIR") from error
    finally:
        os.unlink(path)
    return flat.view(tensor.shape)
