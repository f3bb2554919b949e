"""Replay of Cloud-Adapter: the side network's map and the tokens after each adapted block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from modalities.remote_sensing.cloud_adapter import CloudAdapter, from_official
from shared import Site, Sites, adapt
from shared.backbone import Backbone, Features


class Bare(Backbone):
    """Identity blocks on given tokens: what is left is the adapter."""

    def __init__(self, bands: int, width: int, layers: int, tokens: Tensor, prefix: int):
        super().__init__("identity")
        self.bands, self.prefix = bands, prefix
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.width, self.tokens = width, tokens

    def sites(self) -> Sites:
        blocks = [
            Site("block", i, f"blocks.{i}", b, None, prefix=self.prefix, width=self.width)
            for i, b in enumerate(self.blocks)
        ]
        return Sites([Site("model", 0, "", self, None), *blocks])

    def forward(self, image: Tensor) -> Features:
        tokens, maps = self.tokens, []
        side = round((tokens.shape[1] - self.prefix) ** 0.5)
        self.context.grid = (side, side)
        for block in self.blocks:
            tokens = block(tokens)
            maps.append(tokens)
        return Features(tuple(maps), tokens[:, 0])


def replay(case: dict[str, np.ndarray], meta: dict) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Pairs (ours, published) of the cache and of the tokens after each block."""
    config = meta["config"]
    image, tokens = torch.from_numpy(case["in.image"]), torch.from_numpy(case["in.feats"])
    aggregate = "multi" if config["return_multi_feats"] else "last" if config["return_last_feature"] else "sum"
    method = CloudAdapter(
        width=config["context_dim"], stages=config["depth"], rank=config["rank_dim"], aggregate=aggregate
    )
    prefix = 0 if round(tokens.shape[1] ** 0.5) ** 2 == tokens.shape[1] else 1
    backbone = Bare(image.shape[1], config["emd_dim"], config["num_layers"], tokens, prefix)
    model = adapt(backbone, method, example=None)
    keys = list(model.bank["default"])
    sd = {name.removeprefix("sd."): torch.from_numpy(value) for name, value in case.items() if name.startswith("sd.")}
    model.load_trained_state({f"adapter.default.{from_official(n, keys)}": t for n, t in sd.items()})
    model.eval()
    with torch.no_grad():
        cache = model.bank["default"][keys[0]].cnn(image)
        maps = model(image).maps
    pairs = {f"out.feats_after_{i}": (m, case[f"out.feats_after_{i}"]) for i, m in enumerate(maps)}
    for i, c in enumerate(cache if isinstance(cache, list) else [cache]):
        name = f"out.cache.{i}" if isinstance(cache, list) else "out.cache"
        pairs[name] = (c, case[name])
    return pairs
