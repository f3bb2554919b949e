"""Replay of BlackVIP: the decoder's prompt, the prompted image, and SPSA-GC on a linear classifier with given draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.images.backbones.black_box import CLIP_MEAN, CLIP_STD
from modalities.images.black_vip import Decoder
from shared.training.spsa import SPSA, assign


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    ours = _prompt(case, meta["config"], "train" in meta.get("mode", "")) | _trajectory(case, meta["config"])
    return {name: (tensor, case[name]) for name, tensor in ours.items()}


def _prompt(case: dict[str, np.ndarray], config: dict[str, Any], training: bool) -> dict[str, Tensor]:
    """The decoder is in the mode that the case names."""
    prefix = "sd.dec."
    state = {n.removeprefix(prefix): torch.as_tensor(t) for n, t in case.items() if n.startswith(prefix)}
    bands = state["body.16.weight"].shape[1]
    side = round((config["src_dim"] / state["body.0.weight"].shape[0]) ** 0.5)
    decoder = Decoder(config["i_dim"], config["src_dim"] - config["i_dim"], side, bands).train(training)
    decoder.load_state_dict(state)
    with torch.no_grad():
        prompt = decoder(torch.as_tensor(case["in.z"]))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    image = torch.as_tensor(case["in.image_s28"])
    low, high = -mean / std, (255 - mean) / std
    painted = image + config["p_eps"] * prompt[..., ::28, ::28]
    return {
        "out.prompt_s8": prompt[..., ::8, ::8],
        "out.prompt_mean": prompt.mean(),
        "out.prompt_std": prompt.std(),
        "out.prompt_shape": torch.tensor(prompt.shape),
        "out.prompted_s28": torch.minimum(torch.maximum(painted, low), high),
    }


def _trajectory(case: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, Tensor]:
    x, y = torch.as_tensor(case["in.toy_x"]), torch.as_tensor(case["in.toy_y"])
    model = nn.Linear(x.shape[1], len(case["sd.toy.bias"]))
    model.load_state_dict({name: torch.as_tensor(case[f"sd.toy.{name}"]) for name in ("weight", "bias")})
    parameters = list(model.parameters())
    spsa = SPSA(**config["spsa"], momentum=config["momentum"], repeats=config["sp_avg"])
    optimiser, schedule = spsa.over(parameters)
    path, losses = [nn.utils.parameters_to_vector(parameters).detach()], []
    for step, draws in enumerate(torch.as_tensor(case["in.perturb"])):
        optimiser.zero_grad()
        gradient, loss = spsa.estimate(lambda: F.cross_entropy(model(x), y), parameters, step, draws)
        assign(gradient, parameters)
        optimiser.step()
        schedule.step()
        path.append(nn.utils.parameters_to_vector(parameters).detach())
        losses.append(loss)
    return {"out.toy_w": torch.stack(path), "out.toy_loss": torch.stack(losses)}
