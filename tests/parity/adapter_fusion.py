"""AdapterFusion: the end of one block, from the output of its MLP; adapters, attention, the fused output, the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapted import Adapted
from shared.methods import AdapterFusion, Pfeiffer
from shared.methods.adapter_fusion import Fusion, distance
from shared.sites import Site, Sites


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, t = meta["config"], {name: torch.as_tensor(value) for name, value in case.items()}
    width, names = config["d"], [f"adapter{i}" for i in range(config["n"])]
    norm = nn.LayerNorm(width, eps=config.get("eps", 1e-5))
    norm.load_state_dict({part: t[f"sd.layer_norm.{part}"] for part in ("weight", "bias")})
    model = Adapted(norm, sites=Sites([Site("norm", 0, "", norm, width=width, tags=("block_end",))]))
    for name in names:
        model.add(Pfeiffer(reduction=width // config["r"]), name=name)
        branch: Any = model.bank[name]["model"].branch  # type: ignore[index]
        branch.load_state_dict({
            f"{ours}.{part}": t[f"sd.{name}.{theirs}.{part}"]
            for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")) for part in ("weight", "bias")
        })  # fmt: skip
    model.add(AdapterFusion(members=dict.fromkeys(names), dropout=0.0), name="fusion")
    fusion: Fusion = model.bank["fusion"]["model"]  # type: ignore[index,assignment]
    value_init = fusion.value.weight.detach().clone()  # type: ignore[union-attr]
    fusion.load_state_dict(
        {name.removeprefix("sd.fusion."): v for name, v in t.items() if name.startswith("sd.fusion.")}
    )
    with torch.no_grad():
        h, total = t["in.ffn_out"], t["in.ffn_out"] + t["in.block_input"]
        with model.disabled():
            z = model(total)
        outputs = torch.stack([branch(z) for branch in fusion.members], dim=-2)
        final, change = model(total), fusion.change(z)
        ours = {
            "query": z, "residual": h, "ups": outputs, "attention": fusion.attention(z, outputs), "fused": change + h,
            "final": final, "value_init": value_init,
            "reg_loss": 0.01 * distance(fusion.value.weight),  # type: ignore[union-attr]
        }  # fmt: skip
    return {f"out.{name}": (value, case[f"out.{name}"]) for name, value in ours.items() if f"out.{name}" in case}
