"""Replay of Earth-Adapter: the frequencies of the patch tokens, and the tokens after each block in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalities.remote_sensing.earth_adapter import EarthAdapter, from_official
from shared import Site, Sites, adapt
from shared.backbone import Backbone
from shared.blocks.frequency import split


class Bare(Backbone):
    """Identity blocks on given tokens (B, prefix + h * w, C) of a grid: what is left is the adapter."""

    def __init__(self, layers: int, width: int, grid: tuple[int, int], prefix: int):
        super().__init__("identity")
        self.prefix = prefix
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.width, self.grid = width, grid

    def sites(self) -> Sites:
        return Sites(
            Site("block", i, f"blocks.{i}", block, None, prefix=self.prefix, width=self.width)
            for i, block in enumerate(self.blocks)
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        self.context.grid = self.grid
        found = []
        for block in self.blocks:
            tokens = block(tokens)
            found.append(tokens)
        return tuple(found)


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, tokens = meta["config"], torch.from_numpy(case["in.feats"])
    grid, adapted = tuple(config["grid"]), list(config["adapter_layer"])
    divided = [layer for layer in config["fft_layer"] if layer in adapted]
    prefix = tokens.shape[1] - grid[0] * grid[1]
    backbone = Bare(config["num_layers"], config["embed_dim"], grid, prefix)
    method = EarthAdapter(width=config["dim"], depth=adapted, split=divided, cutoff=config["cutoff_ratio"])
    model = adapt(backbone, method)
    bank: Any = model.bank["default"]
    modules = dict(zip(sorted(adapted), bank.values(), strict=True))
    official = {n.removeprefix("sd."): torch.from_numpy(a) for n, a in case.items() if n.startswith("sd.")}
    for place, tensor in from_official(official, modules, "case").items():
        block, _, name = place.partition("/")
        with torch.no_grad():
            modules[int(block)].get_parameter(name).copy_(tensor)
    low, high = split(tokens[:, prefix:].transpose(1, 2).unflatten(2, grid), config["cutoff_ratio"])
    found = {"out.low_freq": low, "out.high_freq": high}
    found |= {f"out.feats_after_{i}": after for i, after in enumerate(model(tokens))}
    return {name: (value, case[name]) for name, value in found.items() if name in case}
