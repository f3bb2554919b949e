"""How changes of a linear layer's weight are applied: in the weight or, in training, beside the product.

T tokens, I inputs, O outputs, r rank. Factors lie as ``down`` (r, I) and ``up`` (r, O), rows contiguous, and every
skinny product has its r side first: measured 2 to 3 times faster than the usual (O, r) layout at small ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.skinny import product, product_t
from shared.sources import Source, itself, pulled_itself, source


class Piece(NamedTuple):
    """One active low-rank change: its factors and the rows of the host's weight it belongs to (None: all)."""

    rows: tuple[int, int] | None
    down: Tensor
    up: Tensor
    scale: float
    dropout: float


def by_hand(x: Tensor, pieces: Sequence[Piece], form: str, training: bool) -> bool:
    """Whether hand-written gradients serve: no dropout on the branch, no autocast, no transform of torch.func."""
    if form != "auto" or (training and any(piece.dropout for piece in pieces)):
        return False
    return not (torch.is_autocast_enabled(x.device.type) or torch._C._are_functorch_transforms_active())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pieces: Sequence[Piece]) -> Tensor:
    """``x @ (weight + sum of pieces).T + bias`` with gradients of rank r: x (..., I) to (..., O)."""
    rows = tuple((piece.rows or (0, weight.shape[0]), piece.scale) for piece in pieces)
    plan = _Plan(rows, source(x), any(piece.up.requires_grad for piece in pieces))
    factors = [f for piece in pieces for f in (piece.down, piece.up)]
    return _LowRankLinear.apply(x, weight, bias, plan, *factors)[0]  # type: ignore[index]


def linear_beside(x: Tensor, y: Tensor, pieces: Sequence[Piece], training: bool) -> Tensor:
    """``y`` plus each piece's product with ``x``, by autograd: for dropout on the branch, and the reference form."""
    for rows, down, up, scale, dropout in pieces:
        h = F.linear(F.dropout(x, dropout, training), down.to(x.dtype))
        y = add_rows(y, (h @ up.to(x.dtype)) * scale, rows, -1)
    return y


def add_rows(y: Tensor, change: Tensor, rows: tuple[int, int] | None, axis: int) -> Tensor:
    """``y`` with ``change`` added to these rows of an axis."""
    if rows is None:
        return y + change
    left, middle, right = y.tensor_split(rows, dim=axis)
    return torch.cat([left, middle + change, right], dim=axis)


def changed(weight: Tensor, parts) -> Tensor:
    """``weight`` after each active adapter in turn; out of place and differentiable."""
    for strength, rows in parts:
        if rows[0][0] is None:
            for _, adapter in rows:
                weight = adapter(weight, strength)
            continue
        out, at = [], 0
        for (start, stop), adapter in sorted(rows, key=lambda part: part[0]):
            out += [weight[at:start], adapter(weight[start:stop], strength)]
            at = stop
        weight = torch.cat([*out, weight[at:]])
    return weight


def dropped(product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, parts) -> Tensor:
    """The product, and that of what each change in turn adds to ``weight`` with its own dropout of ``x``, in training.

    For changes that are no factors. product: of an input, a weight and a bias.  parts: as of ``changed``.
    """
    y = product(x, weight, bias)
    for strength, rows in parts:
        for part in rows:
            new = changed(weight, [(strength, [part])])
            y = y + product(F.dropout(x, part[1].dropout, part[1].training), new - weight, None)
            weight = new
    return y


class _Plan(NamedTuple):
    """pieces: rows and scale of each.  source: what the input was made from.  keep: whether any ``up`` trains."""

    pieces: tuple[tuple[tuple[int, int], float], ...]
    source: Source | None
    keep: bool


class _LowRankLinear(torch.autograd.Function):
    """Folds the change into the weight where that is shorter, else adds it in place to the product.

    Saves the input, or what it was made from, the factors, and r numbers a token: nothing of the output's size.
    In half precision a small change would be lost in the weight's last bit, so forward adds it to the product.
    A backward that is to be differentiated itself is made of differentiable operations.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, *factors: Tensor):  # type: ignore[override]
        flat = x.reshape(-1, weight.shape[1])
        downs, ups = _cast(factors, x.dtype)
        beside = len(flat) <= 2 * weight.shape[1] or torch.finfo(x.dtype).bits < 32
        h = product_t(_joined(downs), flat) if beside or plan.keep else None  # (r of all pieces, T)
        if h is None or not beside:
            return F.linear(x, _folded(weight, plan, downs, ups), bias), h
        y = F.linear(x, weight, bias)
        flat = y.view(-1, weight.shape[0])
        for ((a, b), scale), each, up in zip(plan.pieces, _split(h, downs), ups, strict=True):
            flat[:, a:b].addmm_(each.t(), up, alpha=scale)
        return y, h if plan.keep else None

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, plan, *factors = inputs
        made = Source((x,), itself, pulled_itself) if plan.source is None else plan.source
        ctx.plan, ctx.count, ctx.shape = plan._replace(source=None), len(made.tensors), x.shape
        ctx.again, ctx.pulled = made.again, made.pulled
        ctx.set_materialize_grads(False)
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*made.tensors, weight, output[1], *factors)

    @staticmethod
    def backward(ctx, gradient: Tensor | None, _):  # type: ignore[override]
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        made, weight, h, factors = saved[: ctx.count], *saved[ctx.count : ctx.count + 2], saved[ctx.count + 2 :]
        gy = gradient.reshape(-1, weight.shape[0])
        _, need_weight, need_bias = ctx.needs_input_grad[:3]
        x = ctx.again(*made).reshape(-1, weight.shape[1]) if need_weight or torch.is_grad_enabled() else None
        if torch.is_grad_enabled():
            gx, small = _differentiable(ctx, gy, x, weight, factors)
        else:
            gx, small = _quick(ctx, gy, made, weight, h, factors)
        return (
            None if gx is None else gx.reshape(ctx.shape),
            gy.t() @ x if need_weight and x is not None else None,
            gy.sum(0) if need_bias else None,
            None,
            *small,
        )


def _quick(ctx: Any, gy: Tensor, made: Sequence[Tensor], weight: Tensor, h: Tensor | None, factors: Sequence[Tensor]):
    """Gradients of the input (T, I) and of the factors."""
    need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
    downs, ups = _cast(factors, gy.dtype)
    fold = len(gy) > 2 * weight.shape[0]  # a fold passes over the weight twice
    g = gx = None
    if any(need[::2]) or (need_x and not fold):
        pairs = zip(ctx.plan.pieces, ups, strict=True)
        g = _joined([product_t(up, gy[:, a:b]) * scale for ((a, b), scale), up in pairs])  # (r of all pieces, T)
    if need_x and fold:
        gx = gy @ _folded(weight, ctx.plan, downs, ups)
    elif need_x and g is not None:
        gx = (gy @ weight).addmm_(g.t(), _joined(downs))
    small: list[Tensor | None] = [None] * len(factors)
    if g is not None and any(need[::2]):
        small[::2] = _split(ctx.pulled(g, *made), downs)
    if h is not None:
        for index, (((a, b), scale), each) in enumerate(zip(ctx.plan.pieces, _split(h, downs), strict=True)):
            small[2 * index + 1] = product(each, gy[:, a:b]) * scale
    return gx, [s.to(f.dtype) if s is not None and n else None for s, f, n in zip(small, factors, need, strict=True)]


def _differentiable(ctx: Any, gy: Tensor, x: Tensor | None, weight: Tensor, factors: Sequence[Tensor]):
    """The same by operations that autograd follows; x (T, I)."""
    assert x is not None
    gx = gy @ weight if ctx.needs_input_grad[0] else None
    small: list[Tensor] = []
    for ((a, b), scale), down, up in zip(ctx.plan.pieces, factors[::2], factors[1::2], strict=True):
        rows = gy[:, a:b]
        g = (up.to(gy.dtype) @ rows.t()) * scale
        gx = None if gx is None else torch.addmm(gx, g.t(), down.to(gy.dtype))
        small += [(g @ x).to(down.dtype), ((down.to(gy.dtype) @ x.t()) @ rows * scale).to(up.dtype)]
    need = ctx.needs_input_grad[4:]
    return gx, [each if needed else None for each, needed in zip(small, need, strict=True)]


def _cast(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [f.to(dtype) for f in factors[::2]], [f.to(dtype) for f in factors[1::2]]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _split(joined: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of each piece again."""
    return (joined,) if len(downs) == 1 else joined.split([len(down) for down in downs])


def _folded(weight: Tensor, plan: _Plan, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    folded = weight.clone()
    for ((a, b), scale), down, up in zip(plan.pieces, downs, ups, strict=True):
        folded[a:b].addmm_(up.t(), down, alpha=scale)
    return folded
