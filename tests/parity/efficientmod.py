"""Replay of EfficientMod: the authors' tensors through our network, entry, stages and classifier."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from modalities.images.backbones import EfficientMod
from shared.errors import RequestError


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    state = {name.removeprefix("sd."): torch.as_tensor(t) for name, t in case.items() if name.startswith("sd.")}
    image, config = torch.as_tensor(case["in.image"]), meta["config"]
    ratios = config["mlp_ratio"][0]
    if config["conv_group_dim"] != config["mlp_ratio"] or any(r != ratios for r in config["mlp_ratio"]):
        raise RequestError("only equal ratios in all stages, the same for the context, are built")
    shape = {
        "widths": config["embed_dim"], "depths": config["depths"], "attentions": config["attention_depth"],
        "attention_ratios": config["att_ratio"], "ratios": ratios,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "authors.safetensors"
        save_file(state, file)
        ours = EfficientMod(image.shape[1], name="efficientmod_xxs", checkpoint=file, shape=shape).eval()
    if not config["use_layerscale"]:
        raise RequestError("networks without layer scale are not built: none was released")
    with torch.no_grad():
        features = ours(image)
        found = {"out.patch_embed_nhwc": ours.model.patch_embed(image.permute(0, 2, 3, 1))}
        found["out.logits"] = F.linear(features.summary, state["head.weight"], state["head.bias"])
    found |= {f"out.stage{s}_nhwc": x.permute(0, 2, 3, 1) for s, x in enumerate(features.maps)}
    return {name: (tensor, case[name]) for name, tensor in found.items()}
