"""Interval codes of derivatives with given tables: codes, approximate and true gradients (no S2A code was released)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.blocks.packing import unpack
from shared.blocks.saved import by_interval, with_derivative

FUNCTIONS = {
    "gelu": F.gelu, "silu": F.silu, "hardswish": F.hardswish, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "softplus": F.softplus, "elu": F.elu, "selu": F.selu, "celu": F.celu, "mish": F.mish, "logsigmoid": F.logsigmoid,
    "softsign": F.softsign, "tanhshrink": F.tanhshrink,
}  # fmt: skip


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    pairs = {}
    for name, bits in meta["config"]["functions"]:
        x, run = torch.as_tensor(case["in.x"]).clone().requires_grad_(), FUNCTIONS[name]
        borders, levels = (torch.as_tensor(case[f"sd.{name}{bits}.{part}"]) for part in ("borders", "levels"))
        y = by_interval(x, run, borders, levels, bits)
        codes = unpack(y.grad_fn.saved_tensors[0], bits, x.shape)  # type: ignore[union-attr]
        (gradient,) = torch.autograd.grad(y.sum(), x)
        ours = {"code": codes, "grad": gradient, "true_grad": with_derivative(run, x)[1]}
        pairs |= {f"out.{name}{bits}.{n}": (t, case[f"out.{name}{bits}.{n}"]) for n, t in ours.items()}
    return pairs
