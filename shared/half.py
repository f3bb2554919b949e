"""Frozen weights in half precision: the backbone's products run in bfloat16, all that adds up stays in float32.

What is stored in half are the weights of linear and convolution layers and of ``nn.MultiheadAttention``; embeddings,
positions, norms and biases stay as they are, so the residual stream is float32: a bfloat16 product is added to it, and
never rounds it. Torch's autocast gives each product its operands. Adapters compute in float32, with casts where they
meet the backbone, and so do the head and what the backbone returns.

A low-rank change of a layer goes into the sum of the layer's product and is not folded into its weight: most changes
are smaller than half a step of a bfloat16 weight and would be lost there. Where the change is no product of factors, or
the weight is read without a call, or a method reads it before training, the weight stays in float32, the change is
added to that, and the sum is rounded for the product. Merging on request writes what the stored precision holds of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from shared.convolution import CONVOLUTIONS, convolution_beside
from shared.errors import RequestError
from shared.linear import Piece, changed, linear_beside

if TYPE_CHECKING:
    from shared.adapted import Adapted

PRODUCTS = (nn.Linear, *CONVOLUTIONS)


def halve(model: Adapted, dtype: torch.dtype = torch.bfloat16) -> None:
    """Store the weights of the backbone's products in ``dtype``; done once, further calls change nothing.

    The fingerprint stays that of the weights as they were, and adapter files fit both.

    Raises RequestError where a method trains the backbone, or adapters are merged.
    """
    if model.state.half is not None:
        return
    if trains := [name for name, method in model.methods.items() if method.trains_backbone]:
        raise RequestError(f"adapter {trains[0]!r} trains the backbone, whose weights therefore cannot be {dtype}")
    model.fingerprint  # noqa: B018  raises where adapters are merged
    kept = _kept(model)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.backbone.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    for places in owners.values():
        parameter = places[0][0]._parameters[places[0][1]]
        assert parameter is not None
        if parameter.dtype == torch.float32 and all(_is_product(*p) and (id(p[0]), p[1]) not in kept for p in places):
            halved = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            for module, name in places:
                module._parameters[name] = halved
    model.state.half = dtype
    model.state.folds.clear()


def check(model: Adapted) -> None:
    """Raises RequestError where an adapter came to weights that would have to be in float32 and are not."""
    half = model.state.half
    if half is None:
        return
    for path, module in model.backbone.named_modules():
        for owner, name in _kept_of(model, module):
            if owner._parameters[name] is not None and owner._parameters[name].dtype == half:  # type: ignore[union-attr]
                raise RequestError(f"{path}.{name} is stored in {half} already: attach adapters before halve()")


def _is_product(module: nn.Module, name: str) -> bool:
    in_attention = isinstance(module, nn.MultiheadAttention) and name.endswith("_weight")
    return in_attention or (isinstance(module, PRODUCTS) and name == "weight")


def _kept(model: Adapted) -> set[tuple[int, str]]:
    return {(id(owner), name) for module in model.backbone.modules() for owner, name in _kept_of(model, module)}


def _kept_of(model: Adapted, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The parameters of a module that stay in float32 for the sake of the adapters on them."""
    port = module.__dict__.get("_port")
    called = isinstance(module, PRODUCTS) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    for name, by_adapter in port.on.items() if port is not None else ():
        beside = all(a.factors() is not None for rows in by_adapter.values() for _, a in rows)
        read_before = any(model.methods[adapter].starts_from_data() for adapter in by_adapter)
        if not (called and beside) or read_before:
            yield module, name


def in_half(host: nn.Module) -> bool:
    """Whether a host's weight is stored in half precision, where a low-rank change would be lost."""
    port = host.__dict__["_port"]
    return port.state.half is not None and port.frozen(host, "weight").dtype == port.state.half


@contextlib.contextmanager
def computing(model: Adapted) -> Iterator[None]:
    """Within it the backbone's products run in half precision, where its weights are stored so."""
    if model.state.half is None:
        yield
        return
    device = next((p.device.type for p in model.backbone.parameters()), "cpu")
    with torch.autocast(device, dtype=model.state.half, cache_enabled=False):
        yield


def full(value: Any) -> Any:
    """The same with half-precision tensors in float32."""
    return tree_map(_full, value)


def _full(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16) else leaf


def in_full(adapter: Callable[..., Any], base: Callable[..., Any], half: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """An adapter around ``base`` computed in float32, and within it ``base`` as before."""
    device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")

    def again(*inner: Any, **named: Any) -> Any:
        with torch.autocast(device, dtype=half, cache_enabled=False):
            return full(base(*inner, **named))

    with torch.autocast(device, enabled=False):
        return adapter(again, *full(args), **full(kwargs))


def changed_exactly(weight: Tensor, parts: Any) -> Tensor:
    """``changed`` without autocast: the sum is in the precision of the weight and its changes."""
    with torch.autocast(weight.device.type, enabled=False):
        return changed(weight, parts)


def convolution_in_half(host: Any, x: Tensor, y: Tensor, pieces: Sequence[Piece], training: bool) -> Tensor:
    """The convolution's product ``y`` plus each piece's, computed and summed in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return convolution_beside(host, x.float(), y, pieces, training)


def linear_in_half(
    x: Tensor, weight: Tensor, bias: Tensor | None, pieces: Sequence[Piece], training: bool
) -> Tensor:  # fmt: skip
    """``x @ weight.T + bias`` plus each piece's product with x: x (..., I) to (..., O) in the weight's precision."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(weight.dtype)
        if training and any(piece.dropout for piece in pieces):
            return linear_beside(x.float(), F.linear(x.to(weight.dtype), weight, bias).float(), pieces, training)
        spec = tuple((piece.rows or (0, weight.shape[0]), piece.scale) for piece in pieces)
        small = [f.to(weight.dtype) for piece in pieces for f in (piece.down, piece.up)]
        return _Beside.apply(x, weight, bias, spec, *small)  # type: ignore[return-value]


class _Beside(torch.autograd.Function):
    """A product with its low-rank changes as further columns of it, so that one sum in float32 is rounded once: added
    to the rounded product, a change of 0.3 % of it would lose a twentieth (measured). Saves the input and the factors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec, *factors: Tensor) -> Tensor:  # type: ignore[override]
        outputs, inputs = weight.shape
        width = inputs + sum(map(len, factors[::2]))
        columns, rows = weight.new_empty(x.numel() // inputs, width), weight.new_zeros(outputs, width)
        columns[:, :inputs], rows[:, :inputs], at = x.reshape(-1, inputs), weight, inputs
        for ((a, b), scale), down, up in zip(spec, factors[::2], factors[1::2], strict=True):
            columns[:, at : at + len(down)] = (down @ columns[:, :inputs].t()).t() * scale
            rows[a:b, at : at + len(down)] = up.t()
            at += len(down)
        ctx.spec, ctx.shape, ctx.dtype = spec, x.shape, x.dtype
        ctx.save_for_backward(columns, weight, *factors)
        return F.linear(columns, rows, bias).reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        columns, weight, *factors = ctx.saved_tensors
        gy, at = gradient.reshape(-1, gradient.shape[-1]), weight.shape[1]
        flat = columns[:, :at]
        gx = gy @ weight if ctx.needs_input_grad[0] else None
        small: list[Tensor] = []
        for ((a, b), scale), down, up in zip(ctx.spec, factors[::2], factors[1::2], strict=True):
            rows = gy[:, a:b]
            g = (up @ rows.t()) * scale  # (r, T)
            if gx is not None:
                gx.addmm_(g.t(), down)
            small += [g @ flat, columns[:, at : at + len(down)].t() @ rows]
            at += len(down)
        bias = gy.sum(0) if ctx.needs_input_grad[2] else None
        return None if gx is None else gx.to(ctx.dtype).reshape(ctx.shape), None, bias, None, *small
