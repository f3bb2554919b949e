"""Saved activations in few bits: forward passes stay exact, what backward needs is kept as small codes.

A service of the core for any frozen backbone and any method. ``compressed`` intercepts torch's own functions while a
forward pass runs, so no module is swapped and nothing has to be put back. Element-wise functions keep a code of their
derivative (interval codes: Novikov et al., 2023), two-valued derivatives one exact bit, softmax and normalisation with
a frozen weight their output in rows of codes, batch normalisation with frozen statistics nothing, max pooling the place
of each maximum in its window. Where a weight
trains, where a function works in place, and inside ``nn.MultiheadAttention`` (one call for torch) all stays exact.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shared.blocks import saved
from shared.blocks.packing import WIDTHS, check_width
from shared.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How activations are kept for backward.

    bits: of a code, 1, 2, 4 or 8.  codec: of smooth element-wise functions, by the derivative's value or by the
    interval of the input.  attention: also keep queries, keys and values of fused attention as codes and run it again
    backward, which goes beyond the published codecs; else its kernel keeps what it keeps.
    """

    bits: int = 4
    codec: Literal["value", "interval"] = "value"
    attention: bool = False

    def __post_init__(self) -> None:
        check_width(self.bits)
        if self.codec not in ("value", "interval"):
            raise RequestError(f"codec {self.codec!r} of saved activations: use value or interval")


def compressed(saving: Saving | None = None) -> contextlib.AbstractContextManager[Any]:
    """Within it, forward passes keep codes for backward (default: of 4 bits)."""
    return _Compressed(saving or Saving())


class _Compressed(TorchFunctionMode):
    def __init__(self, saving: Saving):
        super().__init__()
        self.bits, self.codec, self.attention = saving.bits, saving.codec, saving.attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handle = HANDLERS.get(func)
        if handle is not None and torch.is_grad_enabled() and args and _differentiable(args[0]):
            output = handle(self, func, args, kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.is_floating_point() and x.numel() > 0


def _smooth(mode: _Compressed, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    x, *rest = args
    if _in_place(rest, kwargs):
        return None
    run = _bound(func, rest, kwargs)
    key = (func, tuple(rest), tuple(sorted(kwargs.items())))
    if mode.codec == "interval":
        return saved.by_interval(x, run, *_interval_table(key, mode.bits), mode.bits)
    return saved.by_value(x, run, _levels(key, mode.bits), mode.bits)


def _two_valued(mode: _Compressed, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    x, *rest = args
    if _in_place(rest, kwargs):
        return None
    slope = 0.0
    if func is F.leaky_relu:
        slope = float(kwargs.get("negative_slope", rest[0] if rest else 0.01))
    low, high = sorted((slope, 1.0))
    return saved.by_value(x, _bound(func, rest, kwargs), torch.tensor([low, high]), 1)


def _in_place(rest: Any, kwargs: dict[str, Any]) -> bool:
    return any(value is True for value in (*rest, *kwargs.values()))


def _bound(func: Any, rest: Any, kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: func(x, *rest, **kwargs)


@functools.cache
def _levels(key: tuple, bits: int) -> Tensor:
    func, rest, kwargs = key
    return saved.value_levels(_bound(func, rest, dict(kwargs)), bits)


@functools.cache
def _interval_table(key: tuple, bits: int) -> tuple[Tensor, Tensor]:
    func, rest, kwargs = key
    return saved.interval_table(_bound(func, rest, dict(kwargs)), bits)


def _softmax(mode: _Compressed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x: Tensor = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None or dim % x.ndim != x.ndim - 1:
        return None
    return saved.Softmax.apply(x, _bound(func, args[1:], kwargs), mode.bits)  # type: ignore[return-value]


def _layer_norm(mode: _Compressed, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    x, shape, weight, bias, eps = _arguments(
        args, kwargs, ("input", "normalized_shape", "weight", "bias", "eps"), (None, None, None, None, 1e-5)
    )
    if _trains(weight):
        return None
    rows = (-1, 1, torch.Size(shape).numel())
    leading = tuple(range(x.ndim - len(shape)))
    run = lambda x: func(x, shape, weight, bias, eps)  # noqa: E731
    return saved.Norm.apply(x, weight, bias, run, rows, weight, leading, eps, mode.bits)  # type: ignore[return-value]


def _group_norm(mode: _Compressed, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    x, groups, weight, bias, eps = _arguments(
        args, kwargs, ("input", "num_groups", "weight", "bias", "eps"), (None, None, None, None, 1e-5)
    )
    if _trains(weight):
        return None
    rows = (len(x), groups, x[0].numel() // groups)
    spread = None if weight is None else weight.reshape(-1, *(1,) * (x.ndim - 2)).expand(x.shape[1:])
    others = (0, *range(2, x.ndim))
    run = lambda x: func(x, groups, weight, bias, eps)  # noqa: E731
    return saved.Norm.apply(x, weight, bias, run, rows, spread, others, eps, mode.bits)  # type: ignore[return-value]


def _batch_norm(mode: _Compressed, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, variance, weight, bias, training, momentum, eps = _arguments(
        args, kwargs, names, (None, None, None, None, None, False, 0.1, 1e-5)
    )
    if training or mean is None or _trains(weight):
        return None
    factor = (variance.float() + eps).rsqrt() * (1 if weight is None else weight.float())
    run = lambda x: func(x, mean, variance, weight, bias, False, momentum, eps)  # noqa: E731
    return saved.Rescaled.apply(x, bias, run, factor)  # type: ignore[return-value]


def _dropout(mode: _Compressed, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    x, p, training, inplace = _arguments(args, kwargs, ("input", "p", "training", "inplace"), (None, 0.5, True, False))
    if not training or inplace or not 0 < p < 1:
        return None
    return saved.Dropout.apply(x, p)  # type: ignore[return-value]


def _max_pool(mode: _Compressed, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    x, kernel, stride, padding, dilation, ceil = _arguments(args, kwargs, names, (None, None, None, 0, 1, False))
    axes, pool = POOLS[func]
    grid = saved.Windows(*(_each(value, axes) for value in (kernel, stride or kernel, padding, dilation)))
    bits = next((width for width in WIDTHS if 2**width >= math.prod(grid.kernel)), None)
    if bits is None:
        return None
    run = lambda x: pool(x, *grid, ceil_mode=ceil, return_indices=True)  # noqa: E731
    return saved.MaxPool.apply(x, run, grid, bits)  # type: ignore[return-value]


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number for each axis, of one for all or as many."""
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


def _attention(mode: _Compressed, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    q, k, v, mask, p, causal, scale, grouped = _arguments(
        args, kwargs, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        (None, None, None, None, 0.0, False, None, False),
    )  # fmt: skip
    if not mode.attention or p or _trains(mask):
        return None
    run = lambda q, k, v: func(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)  # noqa: E731
    return saved.Attention.apply(q, k, v, run, mode.bits)  # type: ignore[return-value]


def _trains(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad


def _arguments(args: tuple, kwargs: dict[str, Any], names: tuple[str, ...], defaults: tuple) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


POOLS: dict[Any, tuple[int, Callable[..., tuple[Tensor, Tensor]]]] = {
    function: (axes, pool)
    for axes, pool in enumerate((F.max_pool1d, F.max_pool2d, F.max_pool3d), 1)
    for function in (pool, getattr(torch, f"max_pool{axes}d"))
}
HANDLERS: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.gelu, F.silu, F.mish, F.hardswish, F.softplus, F.elu), _smooth),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh), _smooth),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, F.relu6, F.hardtanh, F.leaky_relu), _two_valued),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    F.layer_norm: _layer_norm, F.group_norm: _group_norm, F.batch_norm: _batch_norm,
    **dict.fromkeys(POOLS, _max_pool),
    F.dropout: _dropout, F.scaled_dot_product_attention: _attention,
}  # fmt: skip


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts what forward passes within it keep for backward, in bytes by class of the module that runs; parameters
    and buffers of ``model`` do not count, and a tensor kept twice counts once."""
    told: dict[str, int] = {}
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # so that no storage's address is used again
    running = ["outside"]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(tensor)
            told[running[-1]] = told.get(running[-1], 0) + storage.nbytes()
        return tensor

    module = torch.nn.modules.module
    entered = module.register_module_forward_pre_hook(lambda m, _: running.append(type(m).__name__))
    left = module.register_module_forward_hook(lambda *_: running.pop() and None, always_call=True)  # type: ignore[arg-type]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield told
    finally:
        entered.remove()
        left.remove()
