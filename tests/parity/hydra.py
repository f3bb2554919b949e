"""Hydra: a ViT block with it at ``proj`` and ``fc2``, its merged ``fc2``, and the CLIP and RoBERTa forms of one layer.

The published merge of ``proj`` takes the weight of ``fc2`` (a bug) and is no part of the case; ours is checked against
the published unmerged block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapted import Adapted, adapt
from shared.methods import Hydra
from shared.sites import Site, Sites

NAMES = ("down_proj", "up_proj"), ("hydra_A", "hydra_B")


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    pairs: dict[str, tuple[Tensor, np.ndarray]] = {}
    x, z = torch.as_tensor(case["in.x"]), torch.as_tensor(case["in.z"])
    with torch.no_grad():
        for name, ours in _vit(case, meta["config"], x).items():
            pairs[name] = (ours, case[name.removesuffix(" merged")])
        for kind, base, par in (("elevater", "linear", "adapter_{}"), ("nlu", "dense", "hydra_{}")):
            frozen = _part(case, f"{kind}/{base}")
            layer = nn.Linear(frozen["weight"].shape[1], frozen["weight"].shape[0])
            layer.load_state_dict(frozen)
            model = _hydra(layer, [Site("mlp.down", 0, "", layer)], case, [f"{kind}/{par}"], 1.0, z)
            pairs[f"out.{kind}"] = (model(z), case[f"out.{kind}"])
            model.merge()
            pairs[f"out.{kind} merged"] = (model(z), case[f"out.{kind}"])
    return pairs


def _vit(case: dict[str, np.ndarray], config: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
    from timm.models.vision_transformer import Block

    block: Any = Block(
        config["d"], config["heads"], len(case["sd.vit/mlp.fc1.bias"]) / config["d"], qkv_bias=True
    ).eval()
    block.load_state_dict({n: t for n, t in _part(case, "vit").items() if "hydra" not in n})
    sites = [
        Site("attention.output", 0, "attn.proj", block.attn.proj),
        Site("mlp.down", 0, "mlp.fc2", block.mlp.fc2),
    ]
    names = ["vit/attn.hydra_proj_{}", "vit/mlp.hydra_mlp_{}"]
    model = _hydra(block, sites, case, names, config["scale"], x)
    found = {"out.vit": model(x), "out.vit/attn": block.attn(x), "out.vit/mlp": block.mlp(x)}
    model.merge()
    found["out.vit/merged_fc2_weight"] = block.mlp.fc2.weight
    found["out.vit/merged_fc2_bias"] = block.mlp.fc2.bias
    return found | {"out.vit merged": model(x), "out.vit/attn merged": block.attn(x)}


def _hydra(
    module: nn.Module, sites: list[Site], case: dict[str, np.ndarray], names: list[str], scale: float, example: Tensor
) -> Adapted:
    """Hydra at ``sites``, its branches filled from the published ones called ``names`` there ({}: par or seq)."""
    first = _part(case, names[0].format("par"))
    down, up = next(pair for pair in NAMES if f"{pair[0]}.weight" in first)
    method = Hydra(
        parallel_rank=len(first[f"{down}.weight"]), scale=scale, bias=f"{down}.bias" in first,
        sequential_rank=len(_part(case, names[0].format("seq"))[f"{down}.weight"]),
        roles=tuple(site.role for site in sites),
    )  # fmt: skip
    model = adapt(module, method, sites=Sites(sites), example=(example,)).eval()
    for site, name in zip(sites, names, strict=True):
        pair: Any = model.bank["default"][site.key]  # type: ignore[index]
        for branch, word in ((pair.parallel, "par"), (pair.sequential, "seq")):
            theirs = _part(case, name.format(word))
            branch.load_state_dict({n.replace(down, "down").replace(up, "up"): t for n, t in theirs.items()})
    return model


def _part(case: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    start = f"sd.{prefix}" + ("." if "/" in prefix else "/")
    return {name.removeprefix(start): torch.as_tensor(t) for name, t in case.items() if name.startswith(start)}
