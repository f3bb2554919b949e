"""Masks over trained tensors, and the scores by which pruning at initialisation chooses them.

A tensor ``x`` of a module is prunable where the module has a bool buffer ``x_mask`` beside it (see ``shared.masks``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.blocks.low_rank import LowRank
from shared.errors import RequestError, WorkError

Loss = Callable[[Any], Tensor]


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by its mask; the bias is never pruned."""

    weight_mask: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("weight_mask", torch.ones_like(self.weight, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_mask, self.bias)


class MaskedLowRank(LowRank):
    """A low-rank change with a mask on each factor."""

    down_mask: Tensor
    up_mask: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("down_mask", torch.ones_like(self.down, dtype=torch.bool))
        self.register_buffer("up_mask", torch.ones_like(self.up, dtype=torch.bool))

    def delta(self, weight: Tensor) -> Tensor:
        down, up, scale, _ = self.factors()
        return ((up.t() @ down) * scale).reshape(weight.shape)

    def factors(self):
        return super().factors()._replace(down=self.down * self.down_mask, up=self.up * self.up_mask)

    def flow(self) -> Tensor:
        """Mean of what comes out for an input of ones where every factor is replaced by its absolute value."""
        down, up, scale, _ = self.factors()
        return (up.abs().t() @ down.abs().sum(1)).mean() * abs(scale)


def masked(modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The prunable tensors of an adapter and their masks, by name."""
    found = {}
    for key, module in modules.items():
        buffers = dict(module.named_buffers())
        for name, parameter in module.named_parameters():
            if f"{name}_mask" in buffers:
                found[f"{key}.{name}"] = (parameter, buffers[f"{name}_mask"])
    return found


def scores(pruner: str, weights: Sequence[nn.Parameter], batches: Iterable[Any], loss: Loss) -> list[Tensor]:
    """How much each entry of ``weights`` matters; the largest are worth keeping. Nothing of the model is changed.

    pruner: "random" (normal), "magnitude" (|W|), "snip" (|W * dL/dW|; Lee et al., 2019) or "grasp" (W * Hg with the
    Hessian H and the gradient g; Wang et al., 2020), both of the losses summed over ``batches``, and divided by a
    number that leaves their order: the published code's. "synflow" (Tanaka et al., 2020) is |W * dL/dW| undivided,
    where ``loss`` is the flow through absolute weights and the one batch is the adapter.

    Raises RequestError where there is no batch, WorkError where a score is not finite.
    """
    if pruner == "random":
        found = [torch.randn(w.shape).to(w) for w in weights]
    elif pruner == "magnitude":
        found = [w.detach().abs() for w in weights]
    elif pruner in ("snip", "synflow"):
        found = [(w.detach() * g).abs() for w, g in zip(weights, _gradient(weights, batches, loss), strict=True)]
        if pruner == "snip" and (top := max(float(score.max()) for score in found)):
            found = _divided(found, sum(float((score / top).sum()) for score in found))
    else:
        product = _hessian_times_gradient(weights, batches, loss)
        found = [w.detach() * p for w, p in zip(weights, product, strict=True)]
        found = _divided(found, abs(sum(float(score.sum()) for score in found)) + 1e-10)
    if not all(bool(score.isfinite().all()) for score in found):
        raise WorkError(f"pruner {pruner!r}: scores are not finite; check the batches and their loss")
    return found


def masks(found: Sequence[Tensor], density: float, scope: str) -> list[Tensor]:
    """Bool masks that keep the largest scores: a share of about ``density`` of all ("global") or of each ("local").

    As published: the k-th smallest score and all equal to it go, with ``k = ceil((1 - density) N)`` of all N entries or
    ``k = floor((1 - density) n)`` of the n of a tensor; k = 0 keeps everything.

    Raises WorkError where no entry is left.
    """
    if scope == "global":
        whole = torch.cat([score.flatten() for score in found])
        limits = [_limit(whole, math.ceil((1.0 - density) * whole.numel()))] * len(found)
    else:
        limits = [_limit(score.flatten(), int((1.0 - density) * score.numel())) for score in found]
    kept = [score > limit for score, limit in zip(found, limits, strict=True)]
    if not any(bool(mask.any()) for mask in kept):
        raise WorkError("pruning leaves no weight: the density is too low, or all scores are equal (zero, say)")
    return kept


def _limit(flat: Tensor, k: int) -> float:
    return float(flat.kthvalue(k).values) if k >= 1 else -math.inf


def _divided(found: Sequence[Tensor], norm: float) -> list[Tensor]:
    return [score / norm for score in found]


def _gradient(weights: Sequence[nn.Parameter], batches: Iterable[Any], loss: Loss) -> list[Tensor]:
    """Of the losses summed over batches; ``.grad`` is left alone."""
    total: list[Tensor] = []
    for batch in batches:
        given = _of(loss(batch), weights)
        total = [a + b for a, b in zip(total, given, strict=True)] if total else given
    if not total:
        raise RequestError("pruning by gradients needs at least one batch: there is none")
    return total


def _hessian_times_gradient(weights: Sequence[nn.Parameter], batches: Iterable[Any], loss: Loss) -> list[Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    total = [torch.zeros_like(w) for w in weights]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        first = _gradient(weights, batches, loss)
        for batch in batches:
            second = _of(loss(batch), weights, create_graph=True)
            along = sum((g * f).sum() for g, f in zip(second, first, strict=True))
            for part, product in zip(total, _of(along, weights), strict=True):  # type: ignore[arg-type]
                part += product
    return total


def _of(value: Tensor, weights: Sequence[nn.Parameter], create_graph: bool = False) -> list[Tensor]:
    gradients = torch.autograd.grad(value, weights, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
