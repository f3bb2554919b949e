"""How changes of a convolution's weight are applied: in the weight or, in training, beside the product.

The weight (O, I/g, ...) is seen as a matrix (O, K), K = I/g times the kernel's size, for g groups. B batch, I and O
channels, r rank, S the output's places. With groups every group sees the same r kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.linear import Piece, add_rows

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def convolution(host: Any, x: Tensor, weight: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """``x`` (B, I, ...) convolved with (weight + sum of pieces), with gradients of rank r where those are shorter."""
    if host.padding_mode != "zeros":
        x, padding = F.pad(x, host._reversed_padding_repeated_twice, mode=host.padding_mode), (0,) * (x.ndim - 2)
    else:
        padding = _padding(host)
    rows = tuple((piece.rows or (0, weight.shape[0]), piece.scale) for piece in pieces)
    outputs, inner, rank = weight.shape[0], weight[0].numel(), sum(len(piece.down) for piece in pieces)
    ranked = outputs * inner > 2 * rank * (host.groups * inner + outputs)  # products a place: of dW, and of rank r
    how = (host.stride, padding, host.dilation, False, (0,) * (x.ndim - 2), host.groups)
    factors = [f for piece in pieces for f in (piece.down, piece.up)]
    plan = _Plan(rows, how, ranked, any(piece.up.requires_grad for piece in pieces))
    return _LowRankConvolution.apply(x, weight, host.bias, plan, *factors)[0]  # type: ignore[index]


def fits(host: Any, x: Tensor, pieces: Sequence[Piece]) -> bool:
    """Whether ``convolution`` can do it: a batch, the same padding on both sides, and no rows of a grouped weight."""
    whole = host.groups == 1 or all(piece.rows is None for piece in pieces)
    return (
        x.ndim == len(host.kernel_size) + 2 and whole and (host.padding_mode != "zeros" or _padding(host) is not None)
    )


def _padding(host: Any) -> tuple[int, ...] | None:
    if not isinstance(host.padding, str):
        return host.padding
    before, after = host._reversed_padding_repeated_twice[::2], host._reversed_padding_repeated_twice[1::2]
    return tuple(before[::-1]) if before == after else None


def convolution_beside(host: Any, x: Tensor, y: Tensor, pieces: Sequence[Piece], training: bool) -> Tensor:
    """``y`` (B, O, ...) plus each piece's convolution of ``x`` (B, I, ...): kernel ``down``, then 1x1 ``up``.

    With g groups every group sees the same r kernels, since the change is of rank r in the weight (O, I/g * k).
    """
    convolve = next(f for kind, f in CONVOLUTIONS.items() if isinstance(host, kind))
    ones = (1,) * len(host.kernel_size)
    pad = host._reversed_padding_repeated_twice
    for rows, down, up, scale, dropout in pieces:
        kernel = down.to(x.dtype).reshape(-1, host.in_channels // host.groups, *host.kernel_size)
        branch = F.dropout(x, dropout, training)
        padding = host.padding
        if host.padding_mode != "zeros":
            branch, padding = F.pad(branch, pad, mode=host.padding_mode), 0
        h = convolve(
            branch,
            kernel.repeat(host.groups, *(1,) * (kernel.ndim - 1)),
            None,
            host.stride,
            padding,
            host.dilation,
            host.groups,
        )
        h = convolve(h, up.to(x.dtype).t().reshape(up.shape[1], up.shape[0], *ones), groups=host.groups)
        y = add_rows(y, h * scale, rows, 1)
    return y


class _Plan(NamedTuple):
    """pieces: rows and scale of each.  how: stride, padding, dilation, transposed, output padding and groups.

    ranked: whether gradients go by the r channels, else by the weight's own gradient.  keep: whether any ``up`` trains.
    """

    pieces: tuple[tuple[tuple[int, int], float], ...]
    how: tuple[Any, ...]
    ranked: bool
    keep: bool

    @property
    def groups(self) -> int:
        return self.how[-1]


class _LowRankConvolution(torch.autograd.Function):
    """Folds the change into the weight where that is shorter, else adds it in place to the product.

    Saves the input (as the frozen layer does), the factors, and r channels. In half precision a small change would be
    lost in the weight's last bit, so forward adds it to the product.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, *factors: Tensor):  # type: ignore[override]
        downs, ups = [f.to(x.dtype) for f in factors[::2]], [f.to(x.dtype) for f in factors[1::2]]
        half = torch.finfo(x.dtype).bits < 32
        h = y = None
        if half or not _long(x, weight, plan):
            y = torch.convolution(x, weight, bias, *plan.how)
        if y is not None or (plan.ranked and plan.keep):
            h = _inner(x, torch.cat(downs), weight, plan)
        if y is None or h is None:
            return torch.convolution(x, _folded(weight, plan, downs, ups), bias, *plan.how), h
        for ((a, b), scale), each, up in zip(plan.pieces, _split(h, downs), ups, strict=True):
            _add(y[:, a:b], each, up, scale)
        return y, h if plan.ranked and plan.keep else None

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, ctx.plan, *factors = inputs
        ctx.set_materialize_grads(False)
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1], *factors)

    @staticmethod
    def backward(ctx, gy: Tensor | None, _):  # type: ignore[override]
        if gy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, h, *factors = ctx.saved_tensors
        need_x, need_weight, need_bias, _, *need = ctx.needs_input_grad
        downs, ups = [f.to(gy.dtype) for f in factors[::2]], [f.to(gy.dtype) for f in factors[1::2]]
        plan, places = ctx.plan, len(gy) * math.prod(gy.shape[2:])
        dense = need_weight or torch.is_grad_enabled() or (any(need) and not plan.ranked)
        fold = dense or not any(need) or places > 2 * weight.shape[0]  # a fold passes over the weight twice
        used = _folded(weight, plan, downs, ups) if fold and need_x else weight
        gx, gw, _ = torch.ops.aten.convolution_backward(gy, x, used, None, *plan.how, (need_x, dense, False))
        if not any(need):
            small: list[Tensor] = [gy] * len(need)
        elif dense:
            small = _from_dense(gw.flatten(1), plan, downs, ups)
        else:
            part, small = _from_rank(x, gy, weight, h, plan, downs, ups, need_x and not fold)
            gx = gx if part is None else gx.add_(part)
        return (
            gx if need_x else None,
            gw if need_weight else None,
            gy.sum((0, *range(2, gy.ndim))) if need_bias else None,
            None,
            *(s.to(f.dtype) if n else None for s, f, n in zip(small, factors, need, strict=True)),
        )


def _from_dense(gw: Tensor, plan: _Plan, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the factors from that of the weight (O, K)."""
    small: list[Tensor] = []
    for ((a, b), scale), down, up in zip(plan.pieces, downs, ups, strict=True):
        small += [up @ gw[a:b] * scale, down @ gw[a:b].t() * scale]
    return small


def _from_rank(
    x: Tensor,
    gy: Tensor,
    weight: Tensor,
    h: Tensor | None,
    plan: _Plan,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The input's gradient through the change, where asked for, and the factors'; h (B, g, r of all pieces, S)."""
    groups, small = plan.groups, []
    inner = []
    hs = [None] * len(downs) if h is None else _split(h, downs)
    for ((a, b), scale), each, up in zip(plan.pieces, hs, ups, strict=True):
        rows = gy[:, a:b].flatten(2).unflatten(1, (groups, -1))  # (B, g, O/g, S)
        inner.append(torch.matmul(_grouped(up, groups), rows) * scale)
        change = up if each is None else torch.matmul(each, rows.mT).sum(0).transpose(0, 1).flatten(1) * scale
        small += [up, change]
    g, down = torch.cat(inner, 2), torch.cat(list(downs))  # (B, g, r of all pieces, S)
    if _pointwise(weight, plan):
        gx = torch.matmul(down.t(), g[:, 0]).view(x.shape) if need_x else None
        gdown = torch.matmul(g[:, 0], x.flatten(2).mT).sum(0)
    else:
        channels, kernels = g.flatten(1, 2).unflatten(2, gy.shape[2:]), _kernels(down, weight, groups)
        mask = (need_x, True, False)
        gx, gdown, _ = torch.ops.aten.convolution_backward(channels, x, kernels, None, *plan.how, mask)
        gdown = gdown.flatten(1).unflatten(0, (groups, -1)).sum(0)
    small[::2] = gdown.split([len(down) for down in downs])
    return gx if need_x else None, small


def _inner(x: Tensor, down: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
    """The r channels (B, g, r, S) between the factors."""
    if _pointwise(weight, plan):
        return torch.matmul(down, x.flatten(2)).unsqueeze(1)
    return (
        torch.convolution(x, _kernels(down, weight, plan.groups), None, *plan.how)
        .flatten(2)
        .unflatten(1, (plan.groups, -1))
    )


def _kernels(down: Tensor, weight: Tensor, groups: int) -> Tensor:
    """``down`` (r, K) as r kernels for each group."""
    return down.unflatten(1, weight.shape[1:]).repeat(groups, *(1,) * (weight.ndim - 1))


def _add(y: Tensor, h: Tensor, up: Tensor, scale: float) -> None:
    """Adds to y (B, O, ...) in place, without a second tensor of its size where it lies row by row."""
    groups = h.shape[1]
    if not y[0].is_contiguous():
        y += (torch.matmul(_grouped(up, groups).mT, h) * scale).flatten(1, 2).view(y.shape)
        return
    flat = y.view(len(y) * groups, -1, h.shape[-1])
    turned = _grouped(up, groups).mT.repeat(len(y), 1, 1)
    flat.baddbmm_(turned, h.flatten(0, 1), alpha=scale)


def _split(h: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (h,) if len(downs) == 1 else h.split([len(down) for down in downs], 2)


def _grouped(up: Tensor, groups: int) -> Tensor:
    """up (r, O) as (g, r, O/g)."""
    return up.unflatten(1, (groups, -1)).transpose(0, 1)


def _pointwise(weight: Tensor, plan: _Plan) -> bool:
    stride, padding = plan.how[:2]
    return plan.groups == 1 and weight[0, 0].numel() == 1 and set(stride) == {1} and set(padding) == {0}


def _long(x: Tensor, weight: Tensor, plan: _Plan) -> bool:
    """Whether the output's places outnumber K, so that folding is shorter."""
    return len(x) * math.prod(x.shape[2:]) > 2 * weight[0].numel() * math.prod(plan.how[0])


def _folded(weight: Tensor, plan: _Plan, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    if torch.is_grad_enabled():
        changes = [(up.t() @ down) * scale for (_, scale), down, up in zip(plan.pieces, downs, ups, strict=True)]
        for (rows, _), change in zip(plan.pieces, changes, strict=True):
            weight = add_rows(weight, change.unflatten(1, weight.shape[1:]), rows, 0)
        return weight
    folded = weight.clone(memory_format=torch.contiguous_format)
    for ((a, b), scale), down, up in zip(plan.pieces, downs, ups, strict=True):
        folded[a:b].flatten(1).addmm_(up.t(), down, alpha=scale)
    return folded
