"""SparseAdapter: chained adapters, their scores, masks at a density, and the output behind the global masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.sparse import masked, masks, scores
from shared.methods import SparseAdapter
from shared.sites import Site, Sites

PRUNERS = {"mag": "magnitude", "rand": "random"}
NAMES = {
    "branch.norm.weight": "adapter_layer_norm_before.weight", "branch.norm.bias": "adapter_layer_norm_before.bias",
    "branch.down.weight": "down_proj.weight", "branch.down.bias": "down_proj.bias",
    "branch.up.weight": "up_proj.weight", "branch.up.bias": "up_proj.bias",
    "branch.down.weight_mask": "down_mask", "branch.up.weight_mask": "up_mask",
}  # fmt: skip


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, density = meta["config"], meta["config"]["density"]
    chain = nn.Sequential(*(nn.Identity() for _ in range(config["adapters"])))
    sites = Sites([Site("mlp.down", i, str(i), m, None, width=config["d"]) for i, m in enumerate(chain)])
    x, target = torch.as_tensor(case["in.x"]), torch.as_tensor(case["in.target"])
    method = SparseAdapter(width=config["bottleneck"], where=("mlp",), density=density)
    model = adapt(chain, method, sites=sites, example=(x,))
    bank: Any = model.bank["default"]
    for i in range(config["adapters"]):
        given = {ours: torch.as_tensor(case[f"sd.{i}.{theirs}"]) for ours, theirs in NAMES.items()}
        bank[str(i)].load_state_dict(given)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    found = masked(bank)
    names = [f"A{n.split('.')[0]}_{n.split('.')[2]}" for n in found]  # "0.branch.down.weight" is "A0_down"
    pairs = {"out.dense": (model(x), case["out.dense"])}
    for pruner in {name.split("/")[0] for name in case if name.startswith("out.") and "/" in name}:
        kind = pruner.removeprefix("out.")
        given = scores(PRUNERS.get(kind, kind), [w for w, _ in found.values()], [(x, target)], loss)
        both = {scope: masks(given, density, scope) for scope in ("local", "global")}
        parts = {"score": given, "local_mask": both["local"], "global_mask": both["global"]}
        for part, tensors in parts.items():
            for name, tensor in zip(names, tensors, strict=True):
                pairs[f"{pruner}/{part}/{name}"] = (tensor, case[f"{pruner}/{part}/{name}"])
        for (_, mask), new in zip(found.values(), both["global"], strict=True):
            mask.copy_(new)
        pairs[f"{pruner}/output"] = (model(x), case[f"{pruner}/output"])
        for _, mask in found.values():
            mask.fill_(True)
    return pairs
