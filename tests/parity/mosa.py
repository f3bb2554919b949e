"""Replay of MoSA: masks of given scores, a block with given experts and with the merged ones, the divergence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.split import Split, owners, symmetric_divergence
from shared.methods import MoSA
from shared.sites import Site, Sites


class Block(nn.Module):
    """A pre-norm transformer block of the published layout."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value", "out")})
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (self.attn[n](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
        h = x + self.attn["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.ffn(self.ffn_norm(h))


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config = meta["config"]
    sd = {name.removeprefix("sd."): torch.as_tensor(t) for name, t in case.items() if name.startswith("sd.")}
    block = Block(config["hidden"], config["num_heads"], config["mlp_dim"])
    frozen = {n.replace("ffn.fc1", "ffn.0").replace("ffn.fc2", "ffn.2"): t for n, t in sd.items() if "adapter" not in n}
    block.load_state_dict(frozen)
    width, x = config["hidden"], torch.as_tensor(case["in.x"])
    method = MoSA(
        width=config["bottleneck"], experts=config["experts"], share=config["share"],
        style=config["style"].lower(), scale=config["adapter_scale"], dropout=0.0,
    )  # fmt: skip
    sites = [Site("norm", 0, "ffn_norm", block.ffn_norm), Site("mlp", 0, "ffn", block.ffn, None, width=width)]
    model = adapt(block, method, sites=Sites(sites), example=(x,))
    adapter, ours = model.bank["default"]["ffn"], {}
    with torch.no_grad():
        for n, parameter in adapter.norm.named_parameters():
            parameter.copy_(sd[f"adapter_norm.{n}"])
        for part in ("down", "up"):
            ours |= _fill(getattr(adapter, part), f"adapter_{part}", sd, case)
        model.train()
        for name in [name for name in case if name.startswith("out.train_")]:
            down, up = (int(word[1:]) for word in name.removeprefix("out.train_").split("_"))
            adapter.drawn[0] = torch.tensor([down, up])
            ours[name] = model(x)
        ours["out.eval_merged"] = model.eval()(x)
    p, q = (torch.as_tensor(case[f"in.logits{i}"]) for i in (1, 2))
    ours["out.symmetric_kl"] = symmetric_divergence(p, q)
    return {name: (tensor, case[name]) for name, tensor in ours.items()}


def _fill(layer: nn.Module, name: str, sd: dict[str, Tensor], case: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Copy a projection in; the masks of one that is split, which scores and copies of every expert give."""
    if not isinstance(layer, Split):
        for n, parameter in layer.named_parameters():
            parameter.copy_(sd[f"{name}.{n}"])
        return {}
    copies = torch.stack([sd[f"{name}.{e}.weight"] for e in range(layer.experts)])
    owner = owners(torch.as_tensor(case[f"in.score_{name}"]), layer.experts).long()
    layer.owner.copy_(owner)
    layer.weight.copy_(copies.gather(0, owner[None])[0])
    layer.start = copies.gather(0, ((owner + 1) % layer.experts)[None])[0]  # what all but the owner hold; here up too
    layer.bias.copy_(torch.stack([sd[f"{name}.{e}.bias"] for e in range(layer.experts)]))
    masks = {f"out.mask_{name}_{e}": layer.owner == e for e in range(layer.experts)}
    return masks | {f"out.biasmask_{name}_{e}": torch.ones_like(layer.bias[e]) for e in range(layer.experts)}
