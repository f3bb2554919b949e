"""Adapters on whole pipelines of diffusers: attached in one line, told apart by their keys, and taken off bit for bit.

    adapted = attach(pipe, "resadapter_v2_sd1.5")    # a file or folder of any system here, or a Method
    image = pipe("a cat", width=1024, height=256).images[0]
    detach(pipe)

The pipeline keeps its class, its configuration and its parts; its UNet keeps its identity. Load an IP-Adapter before
an adapter that acts on attention: diffusers makes attention processors anew when it loads one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from modalities.diffusion.backbones.unet import DiffusersUNet
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.method import Method
from shared.store import KEY, check_readable

# System -> the pattern that one of its keys holds, in the order they are looked for.
SYSTEMS = {
    "mv_adapter": r"\.processor\.to_(q|k|v|out)_mv\b",
    "i2v_adapter": r"\.attn1\.(processor\.)?to_(q|out)_ff\b",
    "res_adapter": r"lora_unet_\w+samplers_\d+_conv\.|^(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+\.norm",
}
_MODULES = {"mv_adapter": "multi_view.mv_adapter", "i2v_adapter": "video.i2v_adapter", "res_adapter": "res_adapter"}
_MOTION = re.compile(r"temporal_transformer|motion_modules")
_RECORD = "_omniadapt"  # in the UNet's own dictionary, where neither its state nor its modules see it


@dataclass
class _Attached:
    """What ``detach`` needs: the adapted model, and which modules of the UNet were in training mode."""

    model: Adapted
    training: list[nn.Module]


def attach(
    pipe: Any,
    adapter: str | os.PathLike | Method,
    *,
    name: str | None = None,
    strength: float = 1.0,
    other_backbone: bool = False,
    **options: Any,
) -> Adapted:
    """Put one more adapter on the UNet of a pipeline, beside those that are active, ready for inference.

    pipe: a StableDiffusionPipeline, StableDiffusionXLPipeline, AnimateDiffPipeline or one derived from them or built
    like them (ControlNet, image to image, inpainting), or a bare UNet of diffusers.
    adapter: a ``Method``, which starts anew; or a file or folder: of ResAdapter, MV-Adapter or I2V-Adapter as
    released, an adapter file of ours, or a LoRA of peft, kohya or diffusers for the UNet alone.
    name: None means the system's, or "default".  strength: of what it adds.  other_backbone: take a file of ours for
    other weights of the same shape, such as a personalised model's.  options: of the system's ``load_official``.

    The adapted model switches and blends adapters (``activate``). Adapters follow the UNet to other devices and
    precisions. ``save_pretrained`` of the pipeline writes the frozen weights, without the adapters.

    Raises RequestError where the pipeline has no such UNet, or the file is damaged, of no known system, for another
    base, or not used whole; the pipeline is unchanged then.
    """
    unet = _unet(pipe)
    _check_here(unet)
    fresh = _RECORD not in unet.__dict__
    record = _prepared(unet) if fresh else unet.__dict__[_RECORD]
    model, before = record.model, record.model.state.active
    try:
        name = load(model, adapter, name=name, other_backbone=other_backbone, **options)
        strengths = {**dict(before), name: float(strength)}
        model.activate(*strengths, strength=strengths)
        model.eval()
    except Exception:
        if fresh:
            for added in list(model.methods)[::-1]:
                model.remove(added)
            _restored(unet)
        raise
    return model


def load(
    model: Adapted,
    adapter: str | os.PathLike | Method,
    *,
    name: str | None = None,
    other_backbone: bool = False,
    **options: Any,
) -> str:
    """Add an adapter to a model around a ``DiffusersUNet``, by what its file holds, and make it the active one.

    Arguments and errors as of ``attach``. Returns the adapter's name.
    """
    kind = None if isinstance(adapter, Method) else recognise(Path(adapter))
    if options and kind not in SYSTEMS:
        raise RequestError(f"{adapter}: takes no {', '.join(options)}: it is no system's official file")
    name = name or (kind if kind in SYSTEMS else "default")
    if isinstance(adapter, Method):
        model.add(adapter, name=name)
    elif kind in SYSTEMS:
        system = importlib.import_module(f"modalities.diffusion.{_MODULES[kind]}")
        system.load_official(model, adapter, name=name, **options)
    else:
        from shared.interop import import_adapter

        import_adapter(model, adapter, name=name, other_backbone=other_backbone)
    return name


def detach(pipe: Any, name: str | None = None) -> None:
    """Take an adapter off a pipeline, or all of them; the last one gone, the UNet is bit for bit what it was.

    Raises RequestError where there is none of that name, or none at all.
    """
    unet = _unet(pipe)
    if _RECORD not in unet.__dict__:
        raise RequestError(f"no adapter is attached to this {type(unet).__name__}")
    _check_here(unet)
    model: Adapted = unet.__dict__[_RECORD].model
    for each in [name] if name is not None else list(model.methods)[::-1]:
        model.remove(each)
    if not model.methods:
        _restored(unet)


def attached(pipe: Any) -> Adapted | None:
    """The adapted model of a pipeline; None where nothing is attached."""
    record = _unet(pipe).__dict__.get(_RECORD)
    return None if record is None else record.model


# -- the UNet ----------------------------------------------------------------------------------------------------------


def _unet(pipe: Any) -> Any:
    unet = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None)
    if unet is None or not hasattr(unet, "down_blocks"):
        parts = ", ".join(getattr(pipe, "components", {})) or "no parts"
        raise RequestError(f"{type(pipe).__name__} has no UNet of Stable Diffusion's kind (it has {parts})")
    return unet


def _check_here(unet: Any) -> None:
    """Offloading replaces the ``forward`` of modules: it begins after adapters are attached and ends before they go."""
    hosts = [module for module in unet.modules() if "_port" in module.__dict__]
    if any(p.is_meta for p in unet.parameters()) or any("_hf_hook" in host.__dict__ for host in hosts):
        raise RequestError("the UNet is offloaded: attach before that starts, detach after pipe.remove_all_hooks()")
    for host in hosts:  # which offloading, when it ends, leaves behind as it was when it began
        if getattr(host.__dict__.get("forward"), "__self__", None) is host:
            del host.__dict__["forward"]


def _prepared(unet: Any) -> _Attached:
    """The UNet frozen and in eval mode, with its record; its adapters go where it goes."""
    training = [module for module in unet.modules() if module.training]
    model = Adapted(DiffusersUNet.around(unet))
    unet.__dict__["_apply"] = MethodType(_follow, unet)
    record = unet.__dict__[_RECORD] = _Attached(model, training)
    return record


def _follow(unet: Any, change: Callable[[Any], Any], recurse: bool = True) -> Any:
    """``_apply`` of a UNet with adapters: to another device or precision they go with it."""
    model: Adapted = unet.__dict__[_RECORD].model
    model.bank._apply(change)
    model.state.folds.clear()
    return type(unet)._apply(unet, change, recurse)


def _restored(unet: Any) -> None:
    record: _Attached = unet.__dict__.pop(_RECORD)
    del unet.__dict__["_apply"]
    frozen = {name.removeprefix("unet."): was for name, was in record.model._frozen.items()}
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(frozen.get(name, parameter.requires_grad))
    for module in record.training:
        module.training = True


# -- files -------------------------------------------------------------------------------------------------------------


def recognise(path: Path) -> str:
    """The system whose file or folder this is: a name in ``SYSTEMS``, "omniadapt" (a file of ours) or "lora".

    Raises RequestError where it is missing, damaged, or of none of these.
    """
    files = _files(path)
    keys: list[str] = []
    for file in files:
        found, metadata = _keys(file)
        if KEY in metadata:
            return "omniadapt"
        keys += found
    for system, pattern in SYSTEMS.items():
        if any(re.search(pattern, key) for key in keys):
            return system
    if any(re.search(r"lora_|\.lora\.|_lora\.", key) for key in keys):
        return "lora"
    if any(_MOTION.search(key) for key in keys):
        raise RequestError(f"{path}: a motion module of AnimateDiff, no adapter of a UNet: give it to the pipeline")
    first = f"; its first key is {keys[0]}" if keys else ""
    raise RequestError(f"{path}: of no system known here ({', '.join(SYSTEMS)}, ours, LoRA){first}")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        check_readable(path)
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt"))
    if not found:
        raise RequestError(f"{path}: a folder without a weights file (.safetensors, .pth, .pt, .bin, .ckpt)")
    return found


def _keys(file: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a file's tensors and, of a safetensors file, its metadata; tensors of that are not read."""
    if file.suffix != ".safetensors":
        from shared.weights import read

        return list(read(file)), {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys()), dict(opened.metadata() or {})
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise RequestError(f"{file}: cut short or not a safetensors file ({error})") from error
