"""Autograd functions whose forward is torch's own, and which save codes for backward (see ``shared.memory``).

``run`` is the exact function of the input alone. Gradients are approximate where codes are, and not differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from shared.blocks.packing import pack, unpack
from shared.blocks.quantised import codes_of

Run = Callable[[Tensor], Tensor]


def with_derivative(run: Run, x: Tensor) -> tuple[Tensor, Tensor]:
    """An element-wise function and its derivative at x."""
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):  # not through the hooks of the step around it
        inner = x.detach().requires_grad_()
        y = run(inner)
        (derivative,) = torch.autograd.grad(y, inner, torch.ones_like(y))
    return y.detach(), derivative


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _normal(count: int) -> Tensor:
    """Evenly likely values of a standard normal variable, rising, float64."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count)


def value_levels(run: Run, bits: int, rounds: int = 2000) -> Tensor:
    """The 2^bits values that stand for the derivative at a standard normal input with the least squared error
    (Lloyd, 1982; Max, 1960), rising."""
    derivative = with_derivative(run, _normal(2**15))[1].sort().values
    sums = F.pad(derivative.cumsum(0), (1, 0))
    levels = torch.linspace(float(derivative[0]), float(derivative[-1]), 2**bits, dtype=torch.float64, device="cpu")
    for _ in range(rounds):
        inner = torch.searchsorted(derivative, (levels[1:] + levels[:-1]) / 2)
        ends = F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(derivative))
        count = ends.diff()
        levels = torch.where(count > 0, sums[ends].diff() / count.clamp(min=1), levels)
    return levels.float()


def interval_table(run: Run, bits: int, points: int = 1024) -> tuple[Tensor, Tensor]:
    """Borders (2^bits - 1) on the input and levels (2^bits) of the piecewise constant function that is nearest to the
    derivative at a standard normal input, by dynamic programming over ``points`` of it."""
    x = _normal(points)
    derivative = with_derivative(run, x)[1]
    first, second = (F.pad(power.cumsum(0), (1, 0)) for power in (derivative, derivative.square()))
    start, stop = torch.arange(points + 1)[:, None], torch.arange(points + 1)[None]
    sums = first[None] - first[:, None]
    cost = (second[None] - second[:, None]) - sums.square() / (stop - start).clamp(min=1)
    cost[stop <= start] = torch.inf
    best, choice = cost[0], []
    for _ in range(2**bits - 1):
        best, previous = (best[:, None] + cost).min(0)
        choice.append(previous)
    ends = [points]
    for previous in reversed(choice):
        ends.insert(0, int(previous[ends[0]]))
    cuts = torch.tensor(ends)
    levels = sums[F.pad(cuts[:-1], (1, 0)), cuts] / F.pad(cuts, (1, 0)).diff()
    return ((x[cuts[:-1] - 1] + x[cuts[:-1]]) / 2).float(), levels.float()


def by_value(x: Tensor, run: Run, levels: Tensor, bits: int) -> Tensor:
    """An element-wise function of which only the nearest of ``levels`` to each derivative is saved."""
    y, derivative = with_derivative(run, x)
    levels = levels.to(x.device)
    return Coded.apply(x, y, pack(codes_of(derivative.float(), levels), bits), levels, bits)  # type: ignore[return-value]


def by_interval(x: Tensor, run: Run, borders: Tensor, levels: Tensor, bits: int) -> Tensor:
    """The same by the ``borders`` between which the input lies; ``levels`` are the derivative there."""
    with torch.no_grad():
        y = run(x.detach())
    codes = torch.searchsorted(borders.to(x.device), x.detach().float().contiguous())
    return Coded.apply(x, y, pack(codes.to(torch.uint8), bits), levels.to(x.device), bits)  # type: ignore[return-value]


class Coded(Function):
    """y, known already, as a function of x whose derivative is ``levels[codes]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, packed: Tensor, levels: Tensor, bits: int) -> Tensor:  # type: ignore[override]
        ctx.levels, ctx.bits, ctx.shape, ctx.dtype = levels, bits, x.shape, x.dtype
        ctx.save_for_backward(packed)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        derivative = ctx.levels[unpack(packed, ctx.bits, ctx.shape).int()]
        return (gradient * derivative.to(gradient.dtype)).to(ctx.dtype), None, None, None, None


def rows_to_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., n) as packed codes between each row's least and greatest value; also the least and the step (..., 1)."""
    least, greatest = x.aminmax(dim=-1, keepdim=True)
    step = (greatest - least) / (2**bits - 1)
    codes = ((x - least) / step.clamp(min=torch.finfo(x.dtype).tiny)).round_().clamp_(0, 2**bits - 1)
    return pack(codes.to(torch.uint8), bits), least, step


def codes_to_rows(packed: Tensor, least: Tensor, step: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The rows (..., n) that these codes stand for."""
    return unpack(packed, bits, shape).to(step.dtype) * step + least


class Softmax(Function):
    """Softmax over the last axis that saves its output in steps of each row's greatest value over 2^bits - 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, bits: int) -> Tensor:  # type: ignore[override]
        y = run(x)
        step = y.amax(-1, keepdim=True) / (2**bits - 1)
        ctx.bits, ctx.shape, ctx.dtype = bits, y.shape, x.dtype
        ctx.save_for_backward(pack((y / step).round_().to(torch.uint8), bits), step)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        packed, step = ctx.saved_tensors
        y = unpack(packed, ctx.bits, ctx.shape).to(step.dtype) * step
        return (y * (gradient - (gradient * y).sum(-1, keepdim=True))).to(ctx.dtype), None, None


class Norm(Function):
    """Layer and group normalisation with a frozen weight: saves the normalised rows in codes, and each row's rstd.

    rows: (-1 or batch, groups, n), the input's shape with what is normalised together last.  weight: frozen; spread:
    the same over one sample's elements.  others: the axes a bias is alike over.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, run: Run, rows: tuple[int, int, int],
        spread: Tensor | None, others: tuple[int, ...], eps: float, bits: int,
    ) -> Tensor:  # fmt: skip
        flat = x.detach().float().reshape(rows)
        variance, mean = torch.var_mean(flat, dim=-1, keepdim=True, correction=0)
        rstd = (variance + eps).rsqrt()
        packed, least, step = rows_to_codes((flat - mean) * rstd, bits)
        ctx.bits, ctx.rows, ctx.dtype, ctx.others, ctx.spread = bits, flat.shape, x.dtype, others, spread
        ctx.save_for_backward(packed, least, step, rstd)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        packed, least, step, rstd = ctx.saved_tensors
        g = gradient.float().reshape(ctx.rows)
        if ctx.spread is not None:
            g = g * ctx.spread.float().reshape(ctx.rows[1:])
        dx = None
        if ctx.needs_input_grad[0]:
            normed = codes_to_rows(packed, least, step, ctx.bits, ctx.rows)
            dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
            dx = dx.reshape(gradient.shape).to(ctx.dtype)
        bias = gradient.sum(ctx.others) if ctx.needs_input_grad[2] else None
        return dx, None, bias, None, None, None, None, None, None


class Rescaled(Function):
    """Batch normalisation with frozen statistics and weight, linear in its input: saves nothing of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, run: Run, factor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.factor, ctx.dtype = factor, x.dtype
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        factor = ctx.factor.reshape(-1, *(1,) * (gradient.ndim - 2))
        others = (0, *range(2, gradient.ndim))
        bias = gradient.sum(others) if ctx.needs_input_grad[1] else None
        return (gradient * factor).to(ctx.dtype), bias, None, None


class Dropout(Function):
    """Dropout that saves one bit for each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:  # type: ignore[override]
        noise = F.dropout(torch.ones_like(x), p)  # draws as dropout of x itself does
        ctx.p, ctx.shape = p, x.shape
        ctx.save_for_backward(pack((noise > 0).to(torch.uint8), 1))
        return x * noise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        (bits,) = ctx.saved_tensors
        kept = unpack(bits, 1, ctx.shape)
        return gradient * kept.to(gradient.dtype).div_(1 - ctx.p), None


class Windows(NamedTuple):
    """The windows of a pooling: one number for each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def codes(self, index: Tensor, sizes: Sequence[int]) -> Tensor:
        """uint8 places in the windows, row-major, of flat ``index`` (..., outputs) into maps of these spatial sizes."""
        code, weight = torch.zeros_like(index, dtype=torch.uint8), 1
        for axis in reversed(range(len(sizes))):
            place = (index % sizes[axis] - self._starts(axis, index)) // self.dilation[axis]
            code += (place * weight).to(torch.uint8)
            index, weight = index // sizes[axis], weight * self.kernel[axis]
        return code

    def index(self, codes: Tensor, sizes: Sequence[int]) -> Tensor:
        """Back from ``codes``."""
        code, index, weight = codes.long(), torch.zeros_like(codes, dtype=torch.long), 1
        for axis in reversed(range(len(sizes))):
            place = code % self.kernel[axis] * self.dilation[axis] + self._starts(axis, codes)
            code, index, weight = code // self.kernel[axis], index + place * weight, weight * sizes[axis]
        return index

    def _starts(self, axis: int, outputs: Tensor) -> Tensor:
        """Where each window begins along an axis; below zero in the padding."""
        after = len(self.kernel) - 1 - axis
        count = outputs.shape[outputs.ndim - 1 - after]
        starts = torch.arange(count, device=outputs.device) * self.stride[axis] - self.padding[axis]
        return starts.reshape(-1, *(1,) * after)


class MaxPool(Function):
    """Max pooling that saves where in its window each maximum was; its gradient is exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[..., tuple[Tensor, Tensor]], grid: Windows, bits: int) -> Tensor:  # type: ignore[override]
        y, index = run(x)
        ctx.grid, ctx.bits, ctx.shape, ctx.sizes = grid, bits, x.shape, x.shape[-len(grid.kernel) :]
        ctx.save_for_backward(pack(grid.codes(index, ctx.sizes), bits))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        index = ctx.grid.index(unpack(packed, ctx.bits, gradient.shape), ctx.sizes)
        axes = len(ctx.sizes)
        dx = gradient.new_zeros(ctx.shape).flatten(-axes)
        return dx.scatter_add_(-1, index.flatten(-axes), gradient.flatten(-axes)).reshape(ctx.shape), None, None, None


class Attention(Function):
    """Fused attention that saves queries, keys and values in codes by rows, and runs again on them backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, run: Callable[..., Tensor], bits: int) -> Tensor:  # type: ignore[override]
        ctx.run, ctx.bits, ctx.shapes, ctx.dtypes = run, bits, (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
        ctx.save_for_backward(*(part for x in (q, k, v) for part in rows_to_codes(x.detach(), bits)))
        return run(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        parts = ctx.saved_tensors
        inputs = [
            codes_to_rows(parts[3 * i], parts[3 * i + 1], parts[3 * i + 2], ctx.bits, shape).requires_grad_()
            for i, shape in enumerate(ctx.shapes)
        ]
        with torch.enable_grad():
            y = ctx.run(*inputs)
        gradients = torch.autograd.grad(y, inputs, gradient.to(y.dtype))
        return *(g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)), None, None
