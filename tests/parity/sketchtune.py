"""Replay of SketchTune: a sketched layer forward and backward, and a sketch learnt from calibration inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.sketch import dense
from shared.blocks.sketch_learning import learn
from shared.methods import SketchTune
from shared.sites import Site, Sites
from shared.statistics import SecondMoment


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config = meta["config"]
    given = {name: torch.as_tensor(value) for name, value in case.items()}
    rows, groups, values = given["sd.quant_grid"].shape
    linear = nn.Linear(given["in.x"].shape[-1], rows, bias=False)
    method = SketchTune(bits=values.bit_length() - 1, groups=groups, roles=("linear",))
    x = given["in.x"].requires_grad_()
    model = adapt(linear, method, sites=Sites([Site("linear", 0, "", linear)]), example=(x.detach(),))
    adapter: Any = model.bank["default"]["model"]
    adapter.set(given["sd.quant_grid"], given["sd.weight_codes"])
    y = model(x)
    (y * given["in.grad_out"]).sum().backward()
    ours = {"W": adapter.dense(), "y": y, "grad_quant_grid": adapter.table.grad, "grad_x": x.grad}
    if "in.learn.W" in given:
        ours |= {f"learn.{n}": t for n, t in _learnt(given, config["learn"]).items()}
    return {f"out.{name}": (tensor, case[f"out.{name}"]) for name, tensor in ours.items()}


def _learnt(given: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    inputs = given["in.learn.X"]
    hessian = torch.zeros(inputs.shape[-1], inputs.shape[-1])
    for count, sample in enumerate(inputs, 1):  # scaled as it grows, as published, for the same rounding
        moment = SecondMoment()
        moment.add((2 / count) ** 0.5 * sample[None], torch.ones(1, len(sample), dtype=torch.bool))
        hessian = hessian * ((count - 1) / count) + moment.total
    table, codes = learn(
        given["in.learn.W"], hessian, config["bits"], 1, exponent=config["exponent"], damping=config["percdamp"],
        block=config["blocksize"],
    )  # fmt: skip
    order = given["out.learn.centroids"].argsort(1)  # the published centres have no order of their own
    packed = codes[:, 0]
    return {
        "H": hessian,
        "centroids": table[:, 0].gather(1, order.argsort(1)),
        "codes_packed": packed,
        "Wq": dense(table, codes),
    }
