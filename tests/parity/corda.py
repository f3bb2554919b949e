"""CorDA: calibration of one linear layer, both modes, and the weight without its smallest components."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.decomposition import damp, decompose, without_smallest
from shared.methods import CorDA
from shared.sites import Site, Sites
from shared.statistics import SecondMoment, collect

MODES: tuple[Literal["kpa", "ipa"], ...] = ("kpa", "ipa")
SIDES = {"UV": "both", "U": "up", "V": "down"}


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config = meta["config"]
    rank, batches = config["r"], [torch.as_tensor(x)[None] for x in case["in.calib"]]
    moment, weight = _moment(case, config, batches)
    damped, damping = damp(moment)
    ours: dict[str, Tensor] = {
        "covariance": moment,
        "damp": torch.tensor(damping),
        "covariance_damped": damped,
        "singular_values": decompose(weight, moment, "float32").values,
        "full_decompose.co_svd.weight": without_smallest(weight, rank, moment, "float32"),
        "full_decompose.plain_svd.weight": without_smallest(weight, rank, None, "float32"),
    }
    for mode in MODES:
        sides: Any = SIDES[config.get("sigma_fuse", "UV")]
        method = CorDA(mode=mode, rank=rank, samples=len(batches), singular_values=sides, precision="float32")
        model = adapt(_layer(case, config), method)
        model.prepare(batches, lambda batch, model=model: model(batch).square().mean())
        (adapter,) = model.bank["default"].values()
        signs = torch.sign((adapter.up * torch.as_tensor(case[f"out.{mode}.ALinear.weight"]).t()).sum(1))[:, None]
        product = adapter.up.t() @ adapter.down
        ours |= {
            f"{mode}.weight_residual": weight - adapter.up_start.t() @ adapter.down_start,
            f"{mode}.BA": product,
            f"{mode}.ALinear.weight": (adapter.up * signs).t(),  # each component has a sign of its own
            f"{mode}.BLinear.weight": adapter.down * signs,
            f"{mode}.y": model(torch.as_tensor(case["in.x"])),
        }
    return {f"out.{name}": (tensor, case[f"out.{name}"]) for name, tensor in ours.items() if f"out.{name}" in case}


def _layer(case: dict[str, np.ndarray], config: dict[str, Any]) -> nn.Linear:
    layer = nn.Linear(config["in_features"], config["out_features"], bias="sd.fc.bias" in case)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.as_tensor(case[f"sd.fc.{name}"]))
    return layer


def _moment(case: dict[str, np.ndarray], config: dict[str, Any], batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What the layer's calibration measures, by the official constant, and its weight."""
    layer = _layer(case, config)
    model = adapt(layer, CorDA(rank=config["r"]))
    ((_, found),) = collect(
        model, Sites([Site("linear", 0, "", layer)]), batches, model, lambda: SecondMoment(normalised=True)
    )
    return found.total / 256, layer._parameters["weight"].detach()  # type: ignore[union-attr]
