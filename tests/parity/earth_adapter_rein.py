"""Replay of Rein, Earth-Adapter's baseline: the tokens after each block in turn, and the link's object queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalities.remote_sensing.rein import Rein
from shared import Site, Sites, adapt
from shared.backbone import Backbone, Features


class Bare(Backbone):
    """Identity blocks on given tokens (B, 1 + N, C): what is left is the adapter."""

    def __init__(self, layers: int, width: int):
        super().__init__("identity")
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.width = width

    def sites(self) -> Sites:
        blocks = [
            Site("block", i, f"blocks.{i}", block, None, prefix=1, width=self.width)
            for i, block in enumerate(self.blocks)
        ]
        return Sites([*blocks, Site("model", 0, "", self, None)])

    def forward(self, tokens: Tensor) -> Features:
        found = []
        for block in self.blocks:
            tokens = block(tokens)
            found.append(tokens)
        return Features(tuple(found), tokens[:, 0])


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, tokens = meta["config"], torch.from_numpy(case["in.feats"])
    link = "out.querys" in case
    method = Rein(
        tokens=config["token_length"], rank=config.get("lora_dim"), link=link, patch=config["patch_size"],
        query_width=config.get("query_dims", 256), zero=bool(config.get("zero_mlp_delta_f", False)),
    )  # fmt: skip
    model = adapt(Bare(config["num_layers"], config["embed_dims"]), method)
    owner = next(iter(model.trained_state())).split(".")[2]  # the site whose name what they share has
    official = {n.removeprefix("sd."): torch.from_numpy(a) for n, a in case.items() if n.startswith("sd.")}
    if not link:  # the official class makes the link's layers all the same
        official = {n: t for n, t in official.items() if not n.startswith(("transform.", "merge."))}
    model.load_trained_state({f"adapter.default.{owner}.reins.{n}": t for n, t in official.items()}, "case")
    features: Any = model(tokens)
    pairs = {f"out.feats_after_{i}": (after, case[f"out.feats_after_{i}"]) for i, after in enumerate(features.maps)}
    if link:
        pairs["out.querys"] = (features.queries[0], case["out.querys"])
    return pairs
