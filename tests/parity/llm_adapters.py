"""LLM-Adapters: one frozen linear layer with each of the three adapters; loss mean(y^2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.methods import ParallelAdapter, SeriesAdapter
from shared.sites import Site, Sites

ACTIVATIONS = {"leakyrelu": "leaky_relu", "gelu_new": "gelu_tanh"}
ROLES = {"mh_adapter": "mlp.up", "output_adapter": "mlp.down", "parallel_adapter": "mlp.up"}


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, pairs = meta["config"], {}
    kinds = {name.split(".")[1] for name in case if name.startswith("out.")}
    for kind in kinds:
        linear = nn.Linear(config["in_features"], config["out_features"], bias="sd.base.bias" in case)
        with torch.no_grad():
            for name, parameter in linear.named_parameters():
                parameter.copy_(torch.as_tensor(case[f"sd.base.{name}"]))
        method = (ParallelAdapter if kind == "parallel_adapter" else SeriesAdapter)(
            width=config["bottleneck_size"], activation=ACTIVATIONS.get(name := config["non_linearity"], name),
            scale="learned" if config["scaling"] == "learnable_scalar" else config["scaling"], roles=(ROLES[kind],),
        )  # fmt: skip
        x = torch.as_tensor(case["in.x"])
        model = adapt(linear, method, sites=Sites([Site(ROLES[kind], 0, "", linear)]), example=(x,))
        (adapter,) = model.bank["default"].values()
        linear_form = not hasattr(adapter, "branch")  # it keeps ``up`` transposed
        down, up = (adapter.down, adapter.up) if linear_form else (adapter.branch.down.weight, adapter.branch.up.weight)
        with torch.no_grad():
            down.copy_(torch.as_tensor(case[f"sd.{kind}.adapter_down.weight"]))
            theirs = torch.as_tensor(case[f"sd.{kind}.adapter_up.weight"])
            up.copy_(theirs.t() if linear_form else theirs)
            if (scaling := case.get(f"sd.{kind}.adapter_scaling")) is not None:
                adapter.branch.scale.copy_(torch.as_tensor(scaling).reshape(()))
        y = model(x)
        y.square().mean().backward()
        with model.disabled():
            bare = model(x)
        grad_up = up.grad.t() if linear_form else up.grad
        ours = {"y": y, "grad_down": down.grad, "grad_up": grad_up, "y_disabled": bare}
        pairs |= {f"out.{kind}.{n}": (t, case[f"out.{kind}.{n}"]) for n, t in ours.items()}
    return pairs
