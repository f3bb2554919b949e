"""Adapters of kohya's scripts and of LyCORIS: one file of ``lora_unet_<path with _>.<tensor>`` and an alpha for each.

LoRA and LoCon (with a core too), LoHa and LoKr are read and written, with magnitudes (DoRA, ``dora_scale``) of rows or
columns. Names of the layers as in Stable Diffusion's own code (``input_blocks_4_1_...``, as SDXL files have them) are
read by diffusers' tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import RequestError
from shared.interop import names as n
from shared.interop.changes import Change, alpha_of, collected, method_of, read_adapter, read_change, site_key, written
from shared.method import Method

START = re.compile(r"(lora|lycoris)_\w+\.")
TENSORS = {
    "low_rank": {"down": "lora_down.weight", "up": "lora_up.weight"},
    "tucker": {"down": "lora_down.weight", "mid": "lora_mid.weight", "up": "lora_up.weight"},
    "hadamard": {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "kronecker": {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
# Stable Diffusion's own names and diffusers', once its loader has told the blocks apart.
LAYERS = {
    "^lora_unet_input_blocks_0_0$": "lora_unet_conv_in",
    "^lora_unet_out_2$": "lora_unet_conv_out",
    "^lora_unet_time_embed_0$": "lora_unet_time_embedding_linear_1",
    "^lora_unet_time_embed_2$": "lora_unet_time_embedding_linear_2",
    "^lora_unet_label_emb_0_0$": "lora_unet_add_embedding_linear_1",
    "^lora_unet_label_emb_0_2$": "lora_unet_add_embedding_linear_2",
    "^lora_unet_input_blocks": "lora_unet_down_blocks",
    "^lora_unet_middle_block": "lora_unet_mid_block",
    "^lora_unet_output_blocks": "lora_unet_up_blocks",
    "_in_layers_2$": "_conv1",
    "_out_layers_3$": "_conv2",
    "_emb_layers_1$": "_time_emb_proj",
    "_skip_connection$": "_conv_shortcut",
    "_op$": "_conv",
}


def is_kohya(names: Iterable[str]) -> bool:
    """Whether all names of a file begin as kohya's do."""
    return all(START.match(name) for name in names)


def read(path: Path, backbone: nn.Module, skip: tuple[str, ...]) -> tuple[Method, dict[str, Tensor]]:
    """The method and its tensors; errors as of ``peft.read``."""
    found = read_adapter(path, skip)
    ours = _of_diffusers(list(found), backbone, str(path))
    paths = n.locate(backbone, ours.values(), str(path), "_")
    changes = {}
    for name, parts in found.items():
        place = paths[ours[name]]
        attention = isinstance(backbone.get_submodule(place), nn.MultiheadAttention)
        key = site_key(place, "in_proj_weight" if attention else "weight")
        changes[key] = read_change(name, parts, str(path))
    return method_of(changes)


def _of_diffusers(names: list[str], backbone: nn.Module, source: str) -> dict[str, str]:
    """The names with diffusers' words for the layers, where they have Stable Diffusion's own."""
    words = ("input_blocks", "middle_block", "output_blocks", "lora_unet_time_embed_", "lora_unet_label_emb")
    if not any(word in name for name in names for word in words):
        return {name: name for name in names}
    configs = (getattr(m, "config", None) for m in backbone.modules())
    config = next((c for c in configs if hasattr(c, "layers_per_block")), None)
    if config is None:
        raise RequestError(f"{source}: its names are of Stable Diffusion's own UNet, this backbone is none")
    try:
        from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
    except ImportError as error:
        raise RequestError(f"{source}: its names need diffusers: pip install 'omniadapt[diffusion]'") from error
    try:
        blocks = {old: new for new, old in _maybe_map_sgm_blocks_to_diffusers({k: k for k in names}, config).items()}
    except (ValueError, IndexError, KeyError) as error:
        raise RequestError(f"{source}: its names are no UNet's that diffusers knows ({error})") from error
    for old, new in blocks.items():
        for pattern, word in LAYERS.items():
            new = re.sub(pattern, word, new)
        blocks[old] = new
    if lost := [name for name in names if name not in blocks]:
        raise RequestError(f"{source}: it mixes names of two UNets: {lost[0]}")
    return blocks


def write(model: Any, prefix: str | None) -> dict[str, bytes]:
    """The file of the active adapters, by name; ``prefix`` as of ``export_adapter``."""
    from safetensors.torch import save

    backbone, what = model.backbone, "a kohya file"
    ours = n.holder(backbone)
    if prefix is None:
        prefix = {"unet.": "lora_unet_", "": "lycoris_"}.get(ours, "lora_te_")
    tensors: dict[str, Tensor] = {}
    for (path, parameter), change in collected(model, what).items():
        stem = prefix + path.removeprefix(ours).replace(".", "_")
        module = backbone.get_submodule(path)
        if change.kind == "replaced" or isinstance(module, nn.Embedding):
            raise RequestError(f"{path}.{parameter}: {what} holds changes of linear and convolution layers alone")
        names = TENSORS[change.kind] | {"magnitude": "dora_scale"}
        new = written(change, module, names, lambda end, stem=stem: f"{stem}.{end}", what)
        if (magnitude := new.get(f"{stem}.dora_scale")) is not None:
            ones = (1,) * (module._parameters[parameter].ndim - magnitude.ndim)
            new[f"{stem}.dora_scale"] = magnitude.reshape(*magnitude.shape, *ones)
        new[f"{stem}.alpha"] = torch.tensor(_alpha(change))
        if repeated := new.keys() & tensors.keys():
            raise RequestError(f"{path}: another layer's name gives {min(repeated)} too")
        tensors |= new
    return {"lora.safetensors": save(tensors, metadata={"format": "pt"})}


def _alpha(change: Change) -> float:
    """Readers take a Kronecker product of two whole factors as it is: its scale must be 1."""
    whole = change.kind == "kronecker" and not any(name.endswith("_b") for name in change.tensors)
    if whole and change.scale != 1:
        raise RequestError(f"a Kronecker product of whole factors has scale {change.scale:g}; kohya files hold none")
    return alpha_of(change)
