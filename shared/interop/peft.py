"""Adapters of Hugging Face's peft: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA is read and written, with a rank and an alpha for each layer (``rank_pattern``, ``alpha_pattern``), rank-stabilised
scales (``use_rslora``), magnitudes (DoRA, ``use_dora``) and trained biases; LoHa and LoKr are read. A change of an
attention's output projection (``nn.MultiheadAttention``) counts once, as the file says; peft 0.21.2 adds it twice in
each call (its pull request 3774).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared.errors import RequestError
from shared.interop import names as n
from shared.interop.changes import (
    Change,
    alpha_of,
    collected,
    grouped,
    method_of,
    read_change,
    read_tensors,
    site_key,
    written,
)  # fmt: skip
from shared.method import Method
from shared.store import check_readable

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
TYPES = {"LORA": "low_rank", "LOHA": "hadamard", "LOKR": "kronecker"}
# Settings with which a file's tensors mean something else than a low-rank change of the layer they name.
REFUSED = (
    "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication",
    "target_parameters", "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the frozen weights as well
PREFIX, MAGNITUDE = "base_model.model.", "lora_magnitude_vector"


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a folder. Raises RequestError where there are none that parse."""
    check_readable(folder / CONFIG)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{folder / CONFIG}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise RequestError(f"{folder / CONFIG}: wants a mapping of settings, got {type(config).__name__}")
    return config


def read(folder: Path, backbone: nn.Module, skip: tuple[str, ...]) -> tuple[Method, dict[str, Tensor]]:
    """The method and its tensors. Raises RequestError in one line where a setting, a name or a shape does not fit."""
    config = read_config(folder)
    _check(config, f"{folder / CONFIG}")
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise RequestError(f"{folder}: it holds no {WEIGHTS[0]}")
    state = read_tensors(file, skip)
    found, left = grouped(state)
    if not found:
        raise RequestError(f"{file}: {len(state)} tensors, none of them of a {config['peft_type']} adapter")
    biases = {name.removesuffix(".bias"): t for name, t in left.items() if _trained_bias(name, config)}
    if unknown := [name for name in left if name.removesuffix(".bias") not in biases]:
        raise RequestError(f"{file}: {len(unknown)} of its {len(state)} tensors are none of the adapter: {unknown[0]}")
    named = [_plain(name) for name in found]
    paths = n.locate(backbone, [*named, *({_plain(name) for name in biases} - set(named))], str(file))
    changes: dict[str, Change] = {}
    for name, parts in found.items():
        path = paths[_plain(name)]
        module = backbone.get_submodule(path)
        change = read_change(name, parts, str(file))
        if change.kind != TYPES[config["peft_type"]]:
            raise RequestError(f"{file}: {name} is a {change.kind} change in a {config['peft_type']} adapter")
        change.scale = scale(config, _plain(name).removeprefix(PREFIX), change.rank, str(file))
        check_magnitude(config, change, f"{file}: {name}")
        attention = isinstance(module, nn.MultiheadAttention)
        changes[site_key(path, "in_proj_weight" if attention else "weight")] = change
        if getattr(module, "groups", 1) != 1:
            raise RequestError(f"{file}: {name}: peft's change of a grouped convolution is none of its weight")
    for name, tensor in biases.items():
        changes[site_key(paths[_plain(name)], "bias")] = Change("replaced", {"value": tensor.float()})
    return method_of(changes)


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _trained_bias(name: str, config: Mapping[str, Any]) -> bool:
    return config.get("bias", "none") != "none" and name.endswith(".bias")


def _check(config: Mapping[str, Any], where: str) -> None:
    if not isinstance(config.get("peft_type"), str) or config["peft_type"] not in TYPES:
        raise RequestError(f"{where}: peft_type {config.get('peft_type')!r}; read are {', '.join(TYPES)}")
    if asked := [name for name in REFUSED if config.get(name)]:
        raise RequestError(f"{where}: {asked[0]} {config[asked[0]]!r} is not supported")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise RequestError(f"{where}: {name} is no mapping but {config[name]!r}")
    start = config.get("init_lora_weights", True)
    if config["peft_type"] == "LORA" and start not in STARTS:
        raise RequestError(
            f"{where}: init_lora_weights {start!r} changed the frozen weights too; save it as plain LoRA with peft's "
            "path_initial_model_for_weight_conversion"
        )


def check_magnitude(config: Mapping[str, Any], change: Change, where: str) -> None:
    """Raises RequestError where the settings and the file differ on whether a change is decomposed (DoRA)."""
    has = "magnitude" in change.tensors
    if has != bool(config.get("use_dora")):
        said = f"use_dora is {config.get('use_dora')!r} in its settings"
        raise RequestError(f"{where} {'has a' if has else 'lacks its'} magnitude (DoRA), but {said}")


def scale(config: Mapping[str, Any], module: str, rank: int, source: str) -> float:
    """alpha / r, or alpha / sqrt r, of the module; peft's patterns match the end of its name."""
    lora = config["peft_type"] == "LORA"
    alpha = config.get("lora_alpha" if lora else "alpha", 8)
    try:
        alpha = _pattern(config.get("alpha_pattern"), module, alpha)
        rank = rank if lora else _pattern(config.get("rank_pattern"), module, config.get("r", 8))
        found = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise RequestError(f"{source}: alpha {alpha!r} over rank {rank!r} of {module} is no scale") from error
    if not math.isfinite(found):
        raise RequestError(f"{source}: alpha {alpha!r} over rank {rank!r} of {module} is no finite scale")
    return found


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def write(model: Any, prefix: str | None) -> dict[str, bytes]:
    """The files of the active adapters, by name; ``prefix`` as of ``export_adapter``."""
    from safetensors.torch import save

    config, tensors = described(model, prefix, PREFIX, "a peft LoRA")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {WEIGHTS[0]: save(tensors, metadata={"format": "pt"}), CONFIG: text.encode()}


def described(
    model: Any, prefix: str | None, start: str, what: str, *, attention: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's configuration of the active adapters, and their tensors, whose names begin with ``start``.

    attention: whether ``nn.MultiheadAttention`` is spelled as peft does, its two projections as one target.
    """
    backbone = model.backbone
    prefix = n.whole_prefix(backbone) if prefix is None else prefix
    found = collected(model, what)
    biases = {path: c for (path, parameter), c in found.items() if c.kind == "replaced" and parameter == "bias"}
    changes = {path: c for (path, _), c in found.items() if c.kind != "replaced"}
    if odd := [k for k, c in found.items() if c.kind == "replaced" and (k[1] != "bias" or k[0] not in changes)]:
        raise RequestError(f"{odd[0][0]}.{odd[0][1]} is replaced, which {what} holds of a changed layer's bias alone")
    if len({"magnitude" in change.tensors for change in changes.values()}) == 2:
        bare = next(path for path, change in changes.items() if "magnitude" not in change.tensors)
        raise RequestError(f"{bare} has no magnitude (DoRA), others have; {what} holds one for all layers or none")
    if attention:
        _attentions(changes, backbone)
    ours = n.holder(backbone)
    spelled = {path: f"{prefix}{path.removeprefix(ours)}" for path in changes}
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        module = backbone.get_submodule(path)
        if getattr(module, "groups", 1) != 1:
            raise RequestError(f"{path} is a grouped convolution, whose change {what} cannot hold")
        names = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": MAGNITUDE}
        if "magnitude" in change.tensors:
            change.tensors["magnitude"] = _magnitude(change.tensors["magnitude"], module, path, what)
        if isinstance(module, nn.Embedding) and change.kind == "low_rank":
            table = {"lora_embedding_A": change.tensors["up"], "lora_embedding_B": change.tensors["down"].t()}
            if "magnitude" in change.tensors:
                table[MAGNITUDE] = change.tensors["magnitude"]
            tensors |= {f"{start}{spelled[path]}.{name}": t.contiguous() for name, t in table.items()}
            continue
        stem = spelled[path]
        if attention and isinstance(backbone.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
            stem = f"{stem.rpartition('.')[0]}.base_layer.out_proj"
        tensors |= written(change, module, names, lambda end, stem=stem: f"{start}{stem}.{end}", what)
    tensors |= {f"{start}{spelled[path]}.base_layer.bias": c.tensors["value"] for path, c in biases.items()}
    return _config(model, changes, spelled, prefix, bool(biases)), tensors


def _magnitude(magnitude: Tensor, module: nn.Module, path: str, what: str) -> Tensor:
    """As peft holds it: of the layer's outputs, which are the columns of a table."""
    if (magnitude.ndim == 2) != isinstance(module, nn.Embedding):
        raise RequestError(f"{path}: {what} holds magnitudes (DoRA) of a layer's outputs, these are of its inputs")
    kernel = getattr(module, "kernel_size", ())
    return magnitude.reshape((1, -1, *(1 for _ in kernel)) if kernel else (-1,))


def _attentions(changes: dict[str, Change], backbone: nn.Module) -> None:
    """peft adapts both projections of ``nn.MultiheadAttention`` with one rank and alpha: the lesser is filled up."""
    for path, module in backbone.named_modules():
        pair = (path, f"{path}.out_proj".lstrip("."))
        if not isinstance(module, nn.MultiheadAttention) or not any(p in changes for p in pair):
            continue
        if module.in_proj_weight is None:
            raise RequestError(f"{path}: peft holds no separate query, key and value weights of its attention")
        if any("magnitude" in changes[p].tensors for p in pair if p in changes):
            raise RequestError(f"{path}: peft holds no magnitudes (DoRA) of nn.MultiheadAttention")
        rank = max(changes[p].rank for p in pair if p in changes)
        both = {changes[p].scale for p in pair if p in changes}
        scale = both.pop() if len(both) == 1 else 1.0
        for p, rows in zip(pair, (3 * module.embed_dim, module.embed_dim), strict=True):
            change, like = changes.get(p), module.in_proj_weight
            down, up = like.new_zeros(rank, module.embed_dim), like.new_zeros(rank, rows)
            if change is not None:
                down[: change.rank] = change.tensors["down"]
                up[: change.rank] = change.tensors["up"] * (1 if change.scale == scale else change.scale)
            changes[p] = Change("low_rank", {"down": down.detach(), "up": up.detach()}, scale)


def _config(
    model: Any, changes: Mapping[str, Change], spelled: Mapping[str, str], prefix: str, biases: bool
) -> dict[str, Any]:
    targets = {spelled[path]: change for path, change in changes.items() if not _inside_attention(model.backbone, path)}
    (rank, alpha), _ = Counter((c.rank, alpha_of(c)) for c in targets.values()).most_common(1)[0]
    others = {f"^{re.escape(name)}": c for name, c in targets.items()}
    name = model.backbone_name
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if prefix and getattr(model.backbone, "causal", False) else None,
        "base_model_name_or_path": name if "/" in name else None, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": False,
        "use_dora": any("magnitude" in change.tensors for change in changes.values()),
        "bias": "lora_only" if biases else "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "target_modules": _targets(model.backbone, changes, targets),
        "rank_pattern": {key: c.rank for key, c in others.items() if c.rank != rank},
        "alpha_pattern": {key: alpha_of(c) for key, c in others.items() if alpha_of(c) != alpha},
    }  # fmt: skip


def _inside_attention(backbone: nn.Module, path: str) -> bool:
    parent = path.rpartition(".")[0]
    return isinstance(backbone.get_submodule(parent), nn.MultiheadAttention) and parent != path


def _targets(backbone: nn.Module, paths: Iterable[str], targets: Mapping[str, Any]) -> list[str] | str:
    """The last words of the names where these name no other module, else a pattern of the whole names."""
    last = sorted({name.rpartition(".")[2] for name in targets})
    mine = {path for path in paths if not _inside_attention(backbone, path)}
    named = {path for path, _ in backbone.named_modules() if path.rpartition(".")[2] in last}
    return last if named == mine else "|".join(f"({re.escape(name)})" for name in targets)
