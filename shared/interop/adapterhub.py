"""Bottleneck adapters of AdapterHub's library: a folder with ``adapter_config.json`` and ``pytorch_adapter.bin``.

Its settings choose where the bottleneck reads, where its residual comes from and whether the norm follows; those that
BERT and RoBERTa's usual adapters have (Houlsby's, Pfeiffer's, the parallel one, and one behind the norm) become a
``BertBottleneck``, and are written from one. All others are refused, and so are its further kinds (invertible,
Compacter, prefixes, LoRA).
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import RequestError
from shared.interop.changes import read_tensors
from shared.interop.peft import CONFIG, read_config
from shared.method import Method
from shared.methods.bert_bottleneck import BertBottleneck

FILES = ("pytorch_adapter.bin", "adapter.safetensors")
KEY = re.compile(
    r"(?:.*\.)?layer\.(?P<block>\d+)\.(?P<part>attention\.output|output)\."
    r"(?:adapters|(?:attention|layer)_text_(?:task|lang)_adapters)\.[^.]+\."
    r"(?P<tensor>adapter_down\.0\.weight|adapter_down\.0\.bias|adapter_up\.weight|adapter_up\.bias|scaling)"
)
TENSORS = {"adapter_down.0": "down", "adapter_up": "up"}
ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "swish",
    "silu": "swish", "tanh": "tanh", "sigmoid": "sigmoid", "leakyrelu": "leaky_relu", "linear": "none",
}  # fmt: skip
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # of files that name no version
# The library's defaults of what decides the computation, and those that must stay as they are.
DEFAULTS: dict[str, Any] = {
    "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True, "is_parallel": False,
    "scaling": 1.0, "non_linearity": "relu", "mh_adapter": False, "output_adapter": False,
    "leave_out": [],
}  # fmt: skip
MORE: dict[str, tuple[type, ...]] = {"residual_before_ln": (str,), "scaling": (int, str)}  # types beside the default's
FIXED: dict[str, Any] = {
    "ln_before": False, "ln_after": False, "use_gating": False, "phm_layer": False, "inv_adapter": None,
    "invertible_adapter": None, "cross_adapter": False, "stochastic_depth": 0.0,
}  # fmt: skip
# Our place as (is_parallel, original_ln_before, original_ln_after, residual_before_ln).
WRITTEN = {
    "houlsby": (False, False, True, True), "pfeiffer": (False, True, True, True),
    "normed": (False, True, False, False), "parallel": (True, False, True, True),
}  # fmt: skip
PLACES = {asked: place for place, asked in WRITTEN.items()} | {(False, False, True, False): "houlsby"}


def read(folder: Path, backbone: nn.Module, skip: tuple[str, ...]) -> tuple[Method, dict[str, Tensor]]:
    """The method and its tensors; a prediction head in the folder is left alone. Errors as of ``peft.read``."""
    whole = read_config(folder)
    where = f"{folder / CONFIG}"
    config = whole.get("config")
    if not isinstance(config, Mapping):
        raise RequestError(f"{where}: config is no mapping of settings but {config!r}")
    if config.get("architecture"):
        raise RequestError(f"{where}: architecture {config['architecture']!r}; read are bottleneck adapters")
    if odd := [name for name, value in FIXED.items() if (config.get(name) or value) != value]:
        raise RequestError(f"{where}: {odd[0]} {config[odd[0]]!r} is not supported")
    config = {**DEFAULTS, **config}
    for name, default in DEFAULTS.items():
        if type(config[name]) not in (type(default), *MORE.get(name, ())):
            raise RequestError(f"{where}: {name} {config[name]!r}: wants such as {default!r}")
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise RequestError(f"{folder}: it holds no {FILES[0]}")
    state = read_tensors(file, skip)
    blocks, width = _shape_of(backbone, where)
    found = _placed(state, str(file))
    kept = [block for block in range(blocks) if block not in config["leave_out"]]
    wanted = {(part, block) for part in _parts(config, where) for block in kept}
    if wrong := sorted(wanted ^ found.keys()):
        what = "lacks" if wrong[0] in wanted else "also has"
        raise RequestError(f"{file}: {what} the adapter of block {wrong[0][1]} {wrong[0][0]}: not as its settings say")
    widths = {block: len(tensors["down.weight"]) for (_, block), tensors in found.items() if "down.weight" in tensors}
    method = _method(config, whole, where, widths)
    keys = [site.key for site in method.sites(backbone.sites())]  # type: ignore[operator]
    return method, _state(method, found, keys, width, str(file))


def _shape_of(backbone: nn.Module, where: str) -> tuple[int, int]:
    config = _config(backbone, where)
    return config.num_hidden_layers, config.hidden_size


def _config(backbone: nn.Module, where: str) -> Any:
    config = getattr(getattr(backbone, "model", backbone), "config", None)
    if getattr(config, "model_type", None) not in ("bert", "roberta", "xlm-roberta"):
        raise RequestError(f"{where}: AdapterHub's bottlenecks are for BERT and RoBERTa, not {type(backbone).__name__}")
    return config


def _parts(config: Mapping[str, Any], where: str) -> list[str]:
    parts = [part for part, on in (("attention", "mh_adapter"), ("mlp", "output_adapter")) if config[on]]
    if not parts:
        raise RequestError(f"{where}: neither mh_adapter nor output_adapter is set: no bottleneck")
    return parts


def _placed(state: Mapping[str, Tensor], source: str) -> dict[tuple[str, int], dict[str, Tensor]]:
    """The tensors by sub-layer and block, with our names."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise RequestError(f"{source}: {name} is no tensor of a plain bottleneck")
        stem, _, kind = match["tensor"].rpartition(".")
        ours = f"{TENSORS[stem]}.{kind}" if stem else "scale"
        place = ("mlp" if match["part"] == "output" else "attention", int(match["block"]))
        if ours in found.setdefault(place, {}):
            raise RequestError(f"{source}: two adapters in block {place[1]}: {name}")
        found[place][ours] = tensor.float()
    return found


def _method(config: Mapping[str, Any], whole: Mapping[str, Any], where: str, widths: dict[int, int]) -> BertBottleneck:
    asked = tuple(config[k] for k in ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln"))
    place = ("parallel" if asked[2] else None) if asked[0] else PLACES.get(asked)
    if place is None:
        names = ("original_ln_before", "original_ln_after", "residual_before_ln")
        settings = ", ".join(f"{name} {value!r}" for name, value in zip(names, asked[1:], strict=True))
        raise RequestError(f"{where}: {'parallel' if asked[0] else 'serial'} with {settings} is not supported")
    name = str(config["non_linearity"]).lower()
    name = name if "version" in whole else OLD_ACTIVATIONS.get(name, name)
    if name not in ACTIVATIONS:
        raise RequestError(f"{where}: non_linearity {name!r}; read are {', '.join(ACTIVATIONS)}")
    scale = config["scaling"]
    if scale not in ("learned", "channel") and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise RequestError(f"{where}: scaling {scale!r}: wants a number, 'learned' or 'channel'")
    common = max(widths.values(), key=list(widths.values()).count, default=1)
    return BertBottleneck(
        place=place, parts=tuple(_parts(config, where)), width=common, activation=ACTIVATIONS[name],  # type: ignore[arg-type]
        widths={str(block): width for block, width in widths.items() if width != common},
        scale=1.0 if scale == "channel" else scale, depth=sorted(widths),  # type: ignore[arg-type]
    )  # fmt: skip


def _state(
    method: BertBottleneck,
    found: Mapping[tuple[str, int], dict[str, Tensor]],
    keys: list[str],
    width: int,
    source: str,
) -> dict[str, Tensor]:
    """The tensors by site key; a scale for each channel goes into the up projection."""
    state: dict[str, Tensor] = {}
    end = {"houlsby": "/dense", "parallel": ""}.get(method.place, "/LayerNorm")
    for (part, block), tensors in found.items():
        inner = method.widths.get(str(block), method.width)
        scale = tensors.pop("scale", None)
        shapes = {
            "down.weight": (inner, width), "down.bias": (inner,), "up.weight": (width, inner), "up.bias": (width,),
        }  # fmt: skip
        for name, shape in shapes.items():
            have = tuple(tensors[name].shape) if name in tensors else "absent"
            if have != shape:
                raise RequestError(f"{source}: block {block} {part}: {name} is {have}, not {shape}")
        place = f"layer/{block}/{'output' if part == 'mlp' else 'attention/output'}{end}"
        key = next(key for key in keys if key.endswith(place))
        if scale is not None and method.scale == "learned":
            state[f"{key}.branch.scale"] = scale.reshape(())
        elif scale is not None:
            tensors["up.weight"], tensors["up.bias"] = tensors["up.weight"] * scale[:, None], tensors["up.bias"] * scale
        state |= {f"{key}.branch.{name}": tensor for name, tensor in tensors.items()}
    return state


def write(model: Any, prefix: str | None) -> dict[str, bytes]:
    """The files of the active ``BertBottleneck``, by name; ``prefix`` (None: none) stands before "encoder.layer".

    Raises RequestError where anything else is active, or the bottleneck at another strength than 1.
    """
    what = "an AdapterHub folder"
    config = _config(model.backbone, what)
    active = model.state.active
    method = model.methods[active[0][0]] if active else None
    if len(active) != 1 or not isinstance(method, BertBottleneck):
        raise RequestError(f"{what} holds one BertBottleneck; active here: {', '.join(model.active) or 'none'}")
    name, strength = active[0]
    if strength != 1:
        raise RequestError(f"{what} holds a bottleneck at strength 1; {name!r} is active at {strength:g}")
    tensors = _named(model.bank[name], name, prefix or "")
    file = io.BytesIO()
    torch.save(tensors, file)
    whole = {
        "config": _settings(method, sorted({int(KEY.fullmatch(n)["block"]) for n in tensors}), config),  # type: ignore[index]
        "hidden_size": config.hidden_size, "model_class": type(model.backbone.model).__name__, "model_name": "",
        "model_type": config.model_type, "name": name, "version": "adapters.1.3.0",
    }  # fmt: skip
    return {CONFIG: (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode(), FILES[0]: file.getvalue()}


def _settings(method: BertBottleneck, blocks: list[int], config: Any) -> dict[str, Any]:
    """The library's settings of a bottleneck in these blocks."""
    names = ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln")
    factors = {block: _factor(config.hidden_size, width) for block, width in method.widths.items()}
    common = _factor(config.hidden_size, method.width)
    return {
        **dict.fromkeys(("adapter_residual_before_ln", "ln_before", "ln_after", "use_gating"), False),
        **dict.fromkeys(("phm_layer", "cross_adapter"), False), "inv_adapter": None,
        "inv_adapter_reduction_factor": None, "init_weights": "bert", "stochastic_depth": 0.0,
        **dict(zip(names, WRITTEN[method.place], strict=True)), "dropout": method.dropout, "scaling": method.scale,
        "mh_adapter": "attention" in method.parts, "output_adapter": "mlp" in method.parts,
        "non_linearity": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == method.activation),
        "reduction_factor": {**factors, "default": common} if factors else common,
        "leave_out": [block for block in range(config.num_hidden_layers) if block not in blocks],
    }  # fmt: skip


def _factor(width: int, inner: int) -> int | float:
    """By which the library divides the model's width, rounding down, to have the inner one."""
    return width // inner if width // (width // inner) == inner else width / (inner + 0.5)


def _named(bank: Any, name: str, prefix: str) -> dict[str, Tensor]:
    """The adapter's tensors as the library names them."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in bank.state_dict().items():
        path, _, ours = key.replace("/", ".").rpartition(".branch.")
        found = re.search(r"layer\.(\d+)\.(attention\.output|output)", path)
        stem, _, kind = ours.partition(".")
        theirs = {"down": "adapter_down.0.", "up": "adapter_up.", "scale": "scaling"}[stem] + kind
        tensor = tensor.detach().cpu().reshape(1) if stem == "scale" else tensor.detach().cpu().contiguous()
        tensors[f"{prefix}encoder.layer.{found[1]}.{found[2]}.adapters.{name}.{theirs}"] = tensor  # type: ignore[index]
    return tensors
