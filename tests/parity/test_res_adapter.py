"""The ResAdapter replay works for other UNets, ranks, strengths and seeds than the golden case's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from modalities.diffusion.backbones.unet import CONFIGS, DiffusersUNet
from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.res_adapter import ResAdapter, official_names
from shared.errors import RequestError
from tests.parity.res_adapter import replay


def case(
    config: str, rank: int, alpha: float, weight: float, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A case made by overwriting weights, as the golden one was by the published loader."""
    backbone = DiffusersUNet(config=config)
    unet, generator = backbone.unet.eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            scale, centre = (0.15, 0.0) if p.ndim > 1 else (0.1, float("norm" in name and name.endswith("weight")))
            p.copy_(centre + scale * torch.randn(p.shape, generator=generator))
    adapted: dict[str, dict[str, torch.Tensor]] = {"lora": {}, "norm": {}}
    for key, (site, part) in official_names(ResAdapter().sites(unet_sites(unet))).items():
        wide = {"down": (rank, *site.weight.shape[1:]), "up": (site.width, rank, 1, 1), "value": site.weight.shape}
        value = torch.tensor(alpha) if part == "alpha" else 0.3 * torch.randn(wide[part], generator=generator)
        adapted["norm" if part == "value" else "lora"][key] = value
    given: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 16, generator=generator),
        "timestep": torch.tensor([7.0]),
    } | backbone.blank(2)
    given |= given.pop("added_cond_kwargs", {})
    outputs = {
        "base": _output(unet, given),
        "lora_only.weight": _output(_merged(unet, adapted["lora"], weight * alpha / rank), given),
        "full": _output(_merged(unet, adapted["lora"], alpha / rank, adapted["norm"]), given),
        "norm_only": _output(_merged(unet, {}, 0, adapted["norm"]), given),
    }
    found = {f"sd.unet.{n}": t for n, t in unet.state_dict().items()} | {f"in.{n}": t for n, t in given.items()}
    found |= {f"sd.{kind}.{n}": t for kind, state in adapted.items() for n, t in state.items()}
    found |= {f"out.{n}": t for n, t in outputs.items()}
    meta = {"unet_config": dict(CONFIGS[config]), "seed": seed, "weight": weight}
    return {n: t.numpy().copy() for n, t in found.items()}, meta


@torch.no_grad()
def _merged(
    unet: Any, lora: dict[str, torch.Tensor], scale: float, norms: dict[str, torch.Tensor] | None = None
) -> Any:
    unet = copy.deepcopy(unet)
    unet.load_state_dict(norms or {}, strict=False)
    for name, module in unet.named_modules():
        stem = f"lora_unet_{name.replace('.', '_')}"
        if f"{stem}.alpha" in lora:
            up, down = lora[f"{stem}.lora_up.weight"], lora[f"{stem}.lora_down.weight"]
            module.weight += scale * torch.einsum("okab,kihw->oihw", up, down)
    return unet


@torch.no_grad()
def _output(unet: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    extra = {n: t for n, t in given.items() if n in ("text_embeds", "time_ids")}
    rest = {n: t for n, t in given.items() if n not in extra}
    return unet(**rest, added_cond_kwargs=extra or None).sample


@pytest.mark.parametrize(
    ("config", "rank", "alpha", "weight", "seed"), [("tiny_sd15", 2, 6.0, 0.3, 11), ("tiny_sdxl", 8, 1.0, 1.4, 5)]
)
@pytest.mark.parametrize("replaced", [False, True])
def test_other_cases(config, rank, alpha, weight, seed, replaced):
    stored, meta = case(config, rank, alpha, weight, seed)
    if replaced:  # a case written after the norms were replaced
        stored |= {n.replace("sd.norm.", "sd.unet."): a for n, a in stored.items() if n.startswith("sd.norm.")}
    pairs = replay(stored, meta)
    assert set(pairs) == {name for name in stored if name.startswith("out.")}
    for ours, theirs in pairs.values():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    spread = [float((pairs["out.base"][1] - theirs).abs().max()) for _, theirs in list(pairs.values())[1:]]
    assert min(spread) > 1e-2  # every part matters


def test_frozen_norms_that_cannot_be_recovered_are_not_invented():
    stored, meta = case("tiny_sd15", 2, 1.0, 1.0, 3)
    stored |= {n.replace("sd.norm.", "sd.unet."): a for n, a in stored.items() if n.startswith("sd.norm.")}
    with pytest.raises(
        RequestError, match=r"sd.unet holds the replaced norms, and seed 4 does not give conv_in.weight"
    ):
        replay(stored, meta | {"seed": 4})
