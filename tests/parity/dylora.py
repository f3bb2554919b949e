"""DyLoRA: one linear layer at every rank, outputs and gradients in both modes, and merged; loss mean(y^2).

The case counts ranks from 0: ``b`` in its names is one below the number of components in use.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.methods import DyLoRA
from shared.methods.dylora import set_rank
from shared.sites import Site, Sites


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    x = torch.as_tensor(case["in.x"])
    pairs: dict[str, tuple[Tensor, np.ndarray]] = {}
    for mode in ("frozen", "nested"):
        model = _model(case, meta["config"], mode == "frozen", x)
        (adapter,) = model.bank["default"].values()  # type: ignore[operator]
        found = [re.fullmatch(rf"out\.train_{mode}_b(\d+)\.y", name) for name in case]
        for index in sorted(int(match[1]) for match in found if match):
            model.train().zero_grad()
            adapter.drawn.fill_(index + 1)
            y = model(x)
            y.square().mean().backward()
            ours = {"y": y, "grad_A": adapter.down.grad, "grad_B": adapter.up.grad.t()}
            start = f"out.train_{mode}_b{index}"
            pairs |= {f"{start}.{name}": (t.clone(), case[f"{start}.{name}"]) for name, t in ours.items()}
    set_rank(model, meta["config"]["r"] // 2 + 1)
    model.eval().merge()
    pairs["out.merged.weight"] = (model.backbone._parameters["weight"], case["out.merged.weight"])  # type: ignore[assignment]
    pairs["out.merged.y"] = (model(x), case["out.merged.y"])
    return pairs


def _model(case: dict[str, np.ndarray], config: dict[str, Any], freeze_lower: bool, x: Tensor) -> Any:
    frozen = {name: torch.as_tensor(case[f"sd.{name}"]) for name in ("weight", "bias") if f"sd.{name}" in case}
    linear = nn.Linear(frozen["weight"].shape[1], frozen["weight"].shape[0], bias="bias" in frozen)
    linear.load_state_dict(frozen)
    method = DyLoRA(
        rank=config["r"], alpha=config["lora_alpha"], dropout=config["lora_dropout"], freeze_lower=freeze_lower,
        roles="linear",
    )  # fmt: skip
    model: Any = adapt(linear, method, sites=Sites([Site("linear", 0, "", linear)]), example=(x,))
    (adapter,) = model.bank["default"].values()
    with torch.no_grad():
        adapter.down.copy_(torch.as_tensor(case["sd.lora_A"]))
        adapter.up.copy_(torch.as_tensor(case["sd.lora_B"]).t())
    return model
