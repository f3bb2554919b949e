"""A batch whose samples use different adapters: each distinct adapter runs once, on its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shared.errors import RequestError


def run_by_rows(model: Any, adapters: Sequence[str | None], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call ``model`` for each distinct name on its samples and put the outputs back in order.

    Tensors (in nested inputs too) are batched along the model's ``batch_dim`` (0 unless its backbone says otherwise):
    those of the batch's length there are split, all others are passed whole.
    """
    names, axis = list(adapters), getattr(model.backbone, "batch_dim", 0)
    first = next((leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)), None)
    if first is None or first.ndim <= axis or first.shape[axis] != len(names):
        size = "no tensor" if first is None else f"{first.shape[axis] if first.ndim > axis else 0} samples"
        raise RequestError(f"adapters names {len(names)} samples; the batch has {size}")
    before, parts, order = model.state.active, [], []
    try:
        for name in dict.fromkeys(names):
            model.activate(*(() if name is None else (name,)))
            index = torch.tensor([i for i, n in enumerate(names) if n == name], device=first.device)

            def pick(leaf: Any, index: Tensor = index) -> Any:
                batched = isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == len(names)
                return leaf.index_select(axis, index) if batched else leaf

            parts.append(model(*tree_map(pick, args), **tree_map(pick, kwargs)))
            order.append(index)
    finally:
        model.state.active = before
    back = torch.argsort(torch.cat(order))
    leaves, spec = zip(*(tree_flatten(part) for part in parts), strict=True)
    joined = [
        torch.cat(group, dim=axis).index_select(axis, back)
        if isinstance(group[0], Tensor) and group[0].ndim > axis
        else group[0]
        for group in zip(*leaves, strict=True)
    ]
    return tree_unflatten(joined, spec[0])
