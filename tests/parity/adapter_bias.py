"""AdapterBias: the ends of BERT layers, ``LayerNorm(dense(u) + alpha v + x)``, each run on the same u and x."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.methods.adapter_bias import AdapterBias, token_weights
from shared.sites import Site, Sites


class Ends(nn.Module):
    """The ends of all layers side by side."""

    def __init__(self, layers: int, inputs: int, width: int):
        super().__init__()
        self.dense = nn.ModuleList(nn.Linear(inputs, width) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(width, eps=1e-12) for _ in range(layers))

    def forward(self, u: Tensor, x: Tensor) -> list[Tensor]:
        return [norm(dense(u) + x) for dense, norm in zip(self.dense, self.norm, strict=True)]


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, tensors = meta["config"], {name: torch.as_tensor(value) for name, value in case.items()}
    layers = range(config["layers"])
    model = Ends(config["layers"], config["intermediate"], config["d"])
    sites = Sites(
        [Site("mlp.down", i, f"dense.{i}", model.dense[i]) for i in layers]
        + [Site("norm", i, f"norm.{i}", model.norm[i], name) for i in layers for name in ("weight", "bias")]
    )
    u, x = tensors["in.hidden"], tensors["in.resid"]
    adapted = adapt(model, AdapterBias(share_alpha=bool(config["share_alpha"])), sites=sites, example=(u, x))
    bank: Any = adapted.bank["default"]
    with torch.no_grad():
        for i in layers:
            theirs = {n.split("/")[1]: t for n, t in tensors.items() if n.startswith(f"sd.L{i}/")}
            model.dense[i].load_state_dict({n: theirs[f"dense.{n}"] for n in ("weight", "bias")})
            bank[f"norm/{i}"].value.copy_(theirs["LayerNorm.weight"])
            bank[f"norm/{i}:bias"].value.copy_(theirs["LayerNorm.bias"])
            bank[f"dense/{i}"].up.copy_(theirs["adapter_vector"][None])
            bank[f"dense/{i}"].down.copy_(theirs["adapter_alpha.weight"])
            bank[f"dense/{i}:bias"].constant.copy_(theirs["adapter_alpha.bias"])
    outputs, alphas, pairs = adapted(u, x), token_weights(adapted, u, x), {}
    for i in layers:
        shift = alphas[f"dense/{i}"][..., None] * bank[f"dense/{i}"].up[0]
        pairs |= {f"out.L{i}": (outputs[i], case[f"out.L{i}"]), f"out.L{i}/shift": (shift, case[f"out.L{i}/shift"])}
    return pairs
