"""Binary adapters: one Bi-AdaptFormer branch a bit width; loss mean(y^2), and the packed form of its down matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.blocks.packing import pack
from shared.methods.binary_adapter import QuantisedBranch


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, pairs = meta["config"], {}
    width = config["in_dim"]
    for bits in config["bits"]:
        branch = QuantisedBranch(
            width, width, config["dim"], bits=bits, scale=1.0, dropout=0.1, relu=True, where="case"
        ).eval()
        with torch.no_grad():
            branch.down.weight.copy_(torch.as_tensor(case[f"sd.bit{bits}.adapter_down.weight"]))
            branch.up.weight.copy_(torch.as_tensor(case[f"sd.bit{bits}.adapter_up.weight"]))
        y = branch(torch.as_tensor(case["in.x"]))
        y.square().mean().backward()
        ours: dict[str, Any] = {"adapter": y, "grad_down": branch.down.weight.grad, "grad_up": branch.up.weight.grad}
        if bits != 32:
            mean, deviation, _ = branch.down.statistics()
            packed = pack(branch.down.codes(), bits)
            ours |= {"code": branch.down.levels, "down_bytes": packed, "down_mean": mean, "down_std": deviation}
        found = {f"out.{name}_bit{bits}": value for name, value in ours.items()}
        pairs |= {name: (value, case[name]) for name, value in found.items() if name in case}
    return pairs
