"""Replay of what the published ResAdapter files do to a diffusers UNet, for ``python -m tests.parity``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.res_adapter import attach_official
from shared.errors import RequestError


def replay(case: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Our output and the published one for every output of the case.

    case: ``in.*`` (the UNet's arguments), ``sd.unet.*``, ``sd.lora.*`` (kohya names), ``sd.norm.*``, ``out.*``.
    meta: ``unet_config``, ``seed``, and ``weight``, the strength of the outputs whose name ends in ".weight".
    """
    lora, norms, inputs = _under(case, "sd.lora."), _under(case, "sd.norm."), _inputs(_under(case, "in."))
    backbone = DiffusersUNet(config=meta["unet_config"])
    backbone.unet.load_state_dict(_frozen(backbone.unet, _under(case, "sd.unet."), norms, meta), strict=True)
    parts: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]
    parts = {"base": ({}, {}), "lora_only": (lora, {}), "norm_only": ({}, norms), "full": (lora, norms)}
    pairs = {}
    for output, expected in _under(case, "out.").items():
        what, _, suffix = output.partition(".")
        if what not in parts or suffix not in ("", "weight"):
            raise RequestError(f"out.{output}: known are out.{', out.'.join(parts)}, each also with .weight")
        strength = float(meta["weight"]) if suffix else 1.0
        pairs[f"out.{output}"] = (_run(backbone, parts[what], strength, inputs), expected)
    return pairs


def _under(case: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): array for name, array in case.items() if name.startswith(prefix)}
    return {name: torch.from_numpy(np.array(array)) for name, array in found.items()}


def _inputs(given: dict[str, Tensor]) -> dict[str, Any]:
    """The UNet's keyword arguments; SDXL's vectors travel in a dictionary of their own."""
    extra = {name.rpartition(".")[2]: given.pop(name) for name in list(given) if name.endswith(("_embeds", "_ids"))}
    return {**given, **({"added_cond_kwargs": extra} if extra else {})}


def _frozen(
    unet: nn.Module, stored: dict[str, Tensor], norms: dict[str, Tensor], meta: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The UNet's weights before the norms were replaced.

    A case whose ``sd.unet`` was written after the replacement has lost the frozen norms. Its weights were drawn one
    after the other from one generator (matrices 0.15 * n, norm weights 1 + 0.1 * n, other vectors 0.1 * n); they are
    drawn again, and used only where every weight that was not replaced comes out as stored.
    """
    if not norms or any(not torch.equal(stored[name], value) for name, value in norms.items()):
        return stored
    generator, drawn = torch.Generator().manual_seed(int(meta["seed"])), {}
    for name, parameter in unet.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale, centre = (0.15, 0.0) if parameter.ndim > 1 else (0.1, float("norm" in name and name.endswith("weight")))
        drawn[name] = centre + scale * noise
    if wrong := [n for n, t in stored.items() if n not in norms and not torch.allclose(drawn[n], t, atol=1e-6)]:
        raise RequestError(f"sd.unet holds the replaced norms, and seed {meta['seed']} does not give {wrong[0]}")
    return drawn


@torch.no_grad()
def _run(
    backbone: DiffusersUNet,
    parts: tuple[dict[str, Tensor], dict[str, Tensor]],
    strength: float,
    inputs: dict[str, Any],
) -> Tensor:
    if not any(parts):
        return backbone.eval()(**inputs).sample
    model = attach_official(backbone, *parts, name="res")
    model.activate("res", strength=strength)
    output = model(**inputs).sample
    model.remove("res")
    return output
