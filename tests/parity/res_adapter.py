"""Replay of the published ResAdapter files' effect on a diffusers UNet, for ``python -m tests.parity``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.res_adapter import attach_official
from shared.errors import RequestError


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Our output and the published one for every output of the case.

    case: ``in.*`` (the UNet's arguments), ``sd.unet.*``, ``sd.lora.*`` (kohya names), ``sd.norm.*``, ``out.*``.
    meta: ``unet_config`` and ``weight``, the strength of the outputs whose name ends in ".weight".
    """
    backbone = DiffusersUNet(config=meta["unet_config"])
    backbone.unet.load_state_dict(_under(case, "sd.unet."), strict=True)
    lora, norms = _under(case, "sd.lora."), _under(case, "sd.norm.")
    inputs = _inputs(_under(case, "in."))
    pairs = {}
    for output, expected in _under(case, "out.").items():
        what, _, suffix = output.partition(".")
        parts = {"base": ({}, {}), "lora_only": (lora, {}), "norm_only": ({}, norms), "full": (lora, norms)}
        if what not in parts or suffix not in ("", "weight"):
            raise RequestError(f"out.{output}: known are out.{', out.'.join(parts)}, each also with .weight")
        strength = float(meta["weight"]) if suffix else 1.0
        pairs[f"out.{output}"] = (_run(backbone, *parts[what], strength, inputs), expected)
    return pairs


def _under(case: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): array for name, array in case.items() if name.startswith(prefix)}
    return {name: torch.from_numpy(np.array(array)) for name, array in found.items()}


def _inputs(given: dict[str, Tensor]) -> dict[str, Any]:
    """The UNet's keyword arguments; SDXL's vectors travel in a dictionary of their own."""
    extra = {name.rpartition(".")[2]: given.pop(name) for name in list(given) if name.endswith(("_embeds", "_ids"))}
    return {**given, **({"added_cond_kwargs": extra} if extra else {})}


@torch.no_grad()
def _run(
    backbone: DiffusersUNet, lora: dict[str, Tensor], norms: dict[str, Tensor], strength: float, inputs: dict[str, Any]
) -> Tensor:
    if not (lora or norms):
        return backbone.eval()(**inputs).sample
    model = attach_official(backbone, lora, norms, name="res")
    model.activate("res", strength=strength)
    output = model(**inputs).sample
    model.remove("res")
    return output
