"""Replay of MoLA: one adapted linear layer in each block, all on one input; loss mean(y^2), and the balance loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.experts import balance_loss
from shared.methods import MoLA
from shared.methods.mola import from_official
from shared.sites import Site, Sites


class Layers(nn.ModuleDict):
    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [layer(x) for layer in self.values()]


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, x = meta["config"], torch.as_tensor(case["in.x"]).requires_grad_()
    names = [f"layer{i}" for i in range(len(config["number_experts"]))]
    given = {name.removeprefix("sd."): torch.as_tensor(t) for name, t in case.items() if name.startswith("sd.")}
    layers = Layers({n: nn.Linear(config["in_features"], config["out_features"], config["bias"]) for n in names})
    layers.load_state_dict({n: given.pop(n) for n in list(given) if n in layers.state_dict()})
    method = MoLA(
        experts=config["number_experts"], top_k=config["top_k"], rank=config["r"], alpha=config["lora_alpha"],
        dropout=0.0, balance=1.0, roles=("linear",),
    )  # fmt: skip
    sites = Sites([Site("linear", i, name, layers[name]) for i, name in enumerate(names)])
    model = adapt(layers, method, sites=sites, example=(x.detach(),)).train()
    bank: Any = model.bank["default"]
    model.load_trained_state({f"adapter.default.{n}": t for n, t in from_official(given, bank, "case").items()})
    model.step(0)
    model(x)
    ours = {"balance_loss": model.penalty()}
    model.step(1)
    for i, (name, y) in enumerate(zip(names, model(x), strict=True)):
        adapter, router = bank[name], given[f"{name}.router.router.weight"].requires_grad_()
        if alone := config["number_experts"][i] == 1:  # a LoRA without the router, whose gate is 1 whatever it says
            ours["balance_loss"] = ours["balance_loss"] + 1
        (logits,) = (nn.functional.linear(x.flatten(0, -2), router),) if alone else adapter.take()
        leaves = x, adapter.up, router if alone else adapter.router
        grad_x, grad_up, grad_router = torch.autograd.grad(
            y.square().mean(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        ours |= {f"{name}.y": y, f"{name}.router_logits": logits, f"{name}.grad_router": grad_router}
        ours |= {f"{name}.grad_x": grad_x, f"balance_loss.{name}": balance_loss(logits, config["top_k"][i])}
        ours |= {f"{name}.grad_lora_B.{e}": g for e, g in enumerate(grad_up.t()[None] if alone else grad_up)}
    return {f"out.{name}": (tensor, case[f"out.{name}"]) for name, tensor in ours.items()}
