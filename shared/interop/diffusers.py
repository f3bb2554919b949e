"""LoRA files of diffusers: ``unet.<path>.lora_A.weight`` with peft's configuration in the header, and older forms.

Older: ``<path>.lora.down.weight`` and attention processors' ``<path>.processor.to_q_lora.down.weight``, of scale 1.
Magnitudes (DoRA) are read and written as peft's are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared.errors import RequestError
from shared.interop import names as n
from shared.interop import peft
from shared.interop.changes import Change, method_of, read_adapter, read_change, site_key
from shared.method import Method

FILE, HEADER = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether any name of a file is one of diffusers': of a part of a pipeline, or in its older forms."""
    parts = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")
    forms = ("lora.down.weight", "lora_linear_layer.down.weight", ".lora_A.weight")
    return any(name.startswith(parts) or name.endswith(forms) for name in names)


def read(path: Path, backbone: nn.Module, skip: tuple[str, ...]) -> tuple[Method, dict[str, Tensor]]:
    """The method and its tensors, of one part of a pipeline; errors as of ``peft.read``."""
    path = path / FILE if path.is_dir() else path
    found = read_adapter(path, skip)
    spelled = {name: _plain(name) for name in found}
    paths = n.locate(backbone, spelled.values(), str(path))
    config = _header(path)
    changes: dict[str, Change] = {}
    for name, parts in found.items():
        change = read_change(name, parts, str(path))
        part, _, inside = spelled[name].partition(".")
        mine = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
        if not mine:
            mine, inside = config, spelled[name]
        if "peft_type" in mine or "r" in mine:
            change.scale = peft.scale({"peft_type": "LORA", **mine}, inside, change.rank, str(path))
        if mine:
            peft.check_magnitude(mine, change, f"{path}: {name}")
        changes[site_key(paths[spelled[name]])] = change
    return method_of(changes)


def _plain(name: str) -> str:
    """The module's name in diffusers: without the processor, and with the output projection's place in its list."""
    name = name.replace(".processor.", ".")
    return f"{name}.0" if name.endswith(".to_out") else name


def _header(path: Path) -> Mapping[str, Any]:
    """peft's configuration in a file's header, settings by ``<part>.<name>``; empty where there is none."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(HEADER)
    try:
        config = json.loads(text) if text else {}
    except ValueError as error:
        raise RequestError(f"{path}: {HEADER} in its header is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path}: {HEADER} in its header is no mapping")
    for name in config:
        if name.rpartition(".")[2] in peft.REFUSED and config[name]:
            raise RequestError(f"{path}: {name} {config[name]!r} is not supported")
    return config


def write(model: Any, prefix: str | None) -> dict[str, bytes]:
    """The file of the active adapters, by name; ``prefix`` as of ``export_adapter``.

    Of a backbone that trained whole and knows the library's folder of it (``files``), that folder.
    """
    if any(model.methods[name].trains_backbone for name in model.active) and hasattr(model.backbone, "files"):
        return model.backbone.files()
    from safetensors.torch import save

    part = "unet." if prefix is None else prefix
    config, tensors = peft.described(model, "", part, "a diffusers LoRA", attention=False)
    if config["bias"] != "none":
        raise RequestError("a diffusers LoRA holds no biases; take them off, or export to peft")
    names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora")
    kept = {key: config[key] for key in names}
    header = json.dumps({f"{part}{key}": value for key, value in kept.items()}, sort_keys=True)
    return {FILE: save(tensors, metadata={"format": "pt", HEADER: header})}
