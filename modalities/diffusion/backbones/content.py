"""The frozen content branch of a UNet: an IP-Adapter (Ye et al., 2023), read from its file and put in by diffusers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import RequestError
from shared.store import check_readable
from shared.weights import clean, read

PARTS = ("image_proj", "ip_adapter")


def read_content(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The image projection and the attention's matrices of an IP-Adapter file, ``image_proj`` and ``ip_adapter``.

    path: a .safetensors file with these two as prefixes, or a torch file with two dictionaries; the second may be
    absent. Raises RequestError where it is neither. Nothing is unpickled but tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state = read(path)
        found = {p: {k.removeprefix(f"{p}."): v for k, v in state.items() if k.startswith(f"{p}.")} for p in PARTS}
        if sum(map(len, found.values())) != len(state):
            other = next(key for key in state if not key.startswith(tuple(f"{p}." for p in PARTS)))
            raise RequestError(f"{path}: no IP-Adapter: {other} is neither of its image_proj nor of its ip_adapter")
    else:
        check_readable(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise RequestError(f"{path}: it cannot be read as plain tensors") from error
        loaded = loaded if isinstance(loaded, Mapping) else {}
        found = {part: clean(loaded[part], f"{path}: {part}") if loaded.get(part) else {} for part in PARTS}
    if not found["image_proj"]:
        raise RequestError(f"{path}: no IP-Adapter: it has no image_proj")
    return found


def attach_content(
    unet: Any, content: Mapping[str, Mapping[str, Tensor]], attention: Mapping[str, Tensor], source: str
) -> None:
    """Give a diffusers UNet an IP-Adapter, frozen.

    content: as ``read_content`` gives it.  attention: its matrices by the UNet's own names, where ``content`` has none
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k_ip.weight").
    Raises RequestError where it does not fit the UNet.
    """
    layers = dict(content["ip_adapter"]) or _numbered(unet, attention, source)
    state = {"image_proj": dict(content["image_proj"]), "ip_adapter": layers}
    try:
        unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    except (KeyError, RuntimeError) as error:
        raise RequestError(f"{source}: an IP-Adapter for another UNet: {' '.join(str(error).split())[:200]}") from error
    unet.requires_grad_(False)


def _numbered(unet: Any, attention: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The matrices by the numbers of IP-Adapter files: 1, 3, 5 ... for the cross-attentions in the UNet's order."""
    paths = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    paths = [path for path in paths if "motion_modules" not in path]
    names = {f"{path}.{part}.weight": f"{2 * i + 1}.{part}.weight" for i, path in enumerate(paths)
             for part in ("to_k_ip", "to_v_ip")}  # fmt: skip
    if attention.keys() != names.keys():
        first = sorted(attention.keys() ^ names.keys())[0]
        raise RequestError(f"{source}: {len(attention)} of the {len(names)} matrices of its attention (first: {first})")
    return {names[key]: tensor for key, tensor in attention.items()}
