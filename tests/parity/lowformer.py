"""Replay of LowFormer: the authors' tensors through our backbone's loading, stem, stages and timm's classifier."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models.lowformer import LowFormer as Whole
from timm.models.lowformer import checkpoint_filter_fn
from torch import Tensor

from modalities.images.backbones import LowFormer


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    state = {name.removeprefix("sd."): torch.as_tensor(t) for name, t in case.items() if name.startswith("sd.")}
    image, arguments = torch.as_tensor(case["in.image"]), dict(meta["timm_kwargs"])
    whole = Whole(in_chans=image.shape[1], **arguments).eval()
    whole.load_state_dict(checkpoint_filter_fn(state, whole))
    arguments.pop("num_classes")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "authors.safetensors"
        save_file(state, file)
        ours = LowFormer(image.shape[1], name=_name(arguments), checkpoint=str(file), model_args=arguments).eval()
    with torch.no_grad():
        features = ours(image)
        found = {"out.stage0": ours.model.stem(image), "out.logits": whole.forward_head(features.maps[-1])}
    found |= dict(zip(("out.stage1", "out.stage2", "out.stage3", "out.stage_final"), features.maps, strict=True))
    return {name: (tensor, case[name]) for name, tensor in found.items()}


def _name(arguments: dict[str, Any]) -> str:
    """A model of timm to override: it only has to exist."""
    return next(name for name in timm.list_models(module="lowformer") if arguments.get("attn", True) or "_e" in name)
