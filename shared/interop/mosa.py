"""Files of MoSA's official code (Zhang et al., 2023): experts are read; the merged adapter is given by its names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared import weights
from shared.blocks.split import Split
from shared.blocks.split_adapters import SplitBottleneck
from shared.errors import RequestError
from shared.methods.mosa import MoSA

if TYPE_CHECKING:
    from shared.adapted import Adapted

_OFFICIAL = re.compile(r"(?:.*\.)?layer\.(?P<depth>\d+)\.adapter_(?P<part>norm|down|up)(?:\.(?P<expert>\d+))?\.(\w+)")


def merged_state(model: Adapted, name: str = "default") -> dict[str, Tensor]:
    """The one plain adapter the experts become, under the official names: norm, down and up of each block."""
    found: dict[str, Tensor] = {}
    for site, adapter in _by_depth(model, name).items():
        for part in ("norm", "down", "up"):
            layer, merge = getattr(adapter, part), isinstance(getattr(adapter, part), Split)
            pair = layer.merged() if merge else tuple(layer.parameters())
            prefix = f"enc.transformer.encoder.layer.{site}.adapter_{part}{'_merge' if merge else ''}"
            found |= {f"{prefix}.{n}": t.detach().clone() for n, t in zip(("weight", "bias"), pair, strict=False)}
    return found


def load_official(model: Adapted, path: str | Path, *, name: str = "default") -> None:
    """Fill the adapter ``name`` from a file of the official code, with share "down".

    Its keys are ``...layer.<block>.adapter_norm.<tensor>``, ``adapter_down.<tensor>`` and ``adapter_up.<expert>
    .<tensor>``; merged layers follow from the experts, and the head stays as it is. Who owns an entry of up is not in
    the file: it is the expert in which the entry is farthest from its start, zero.

    Raises RequestError where a key is none of these, or numbers and shapes are not those of the adapter.
    """
    adapters, state = _by_depth(model, name), model.trained_state()
    method: Any = model.methods[name]
    if method.copies:
        raise RequestError(f"adapter {name!r} has copies: the official files are read into one without")
    keys = {id(module): f"adapter.{name}.{key}" for key, module in model.bank[name].items()}  # type: ignore[operator]
    experts: dict[str, dict[int, Tensor]] = {}
    found: dict[str, Tensor] = {n: t for n, t in state.items() if n.endswith(".drawn") or n.startswith("head.")}
    for key, tensor in weights.read(path).items():
        if key.startswith("head.") or "_merge." in key:
            continue
        match = _OFFICIAL.fullmatch(key)
        if match is None or (depth := int(match["depth"])) not in adapters:
            raise RequestError(f"{path}: {key} belongs to no block this MoSA adapts")
        place = f"{keys[id(adapters[depth])]}.{match['part']}.{match[4]}"
        if match["expert"] is None:
            found[place] = tensor
        elif match["part"] == "up":
            experts.setdefault(place, {})[int(match["expert"])] = tensor
        else:
            raise RequestError(f"{path}: {key}: a split down projection without its masks cannot be taken over")
    for place, each in experts.items():
        if sorted(each) != list(range(method.experts)) or len({t.shape for t in each.values()}) > 1:
            raise RequestError(
                f"{path}: {place} has experts {sorted(each)}, of one shape; this MoSA has {method.experts}"
            )
        copies = torch.stack([each[i] for i in sorted(each)])
        if place.endswith(".bias"):
            found[place] = copies
        else:
            owner = copies.abs().argmax(0)
            found[place] = copies.gather(0, owner[None])[0]
            found[place.replace(".weight", ".owner")] = owner.to(torch.uint8)
    model.load_trained_state(found, str(path))


def _by_depth(model: Adapted, name: str) -> dict[int, SplitBottleneck]:
    method: Any = model.methods[name]
    if not isinstance(method, MoSA) or method.style == "houlsby":
        what = "style houlsby" if isinstance(method, MoSA) else f"method {type(method).__name__}"
        raise RequestError(f"adapter {name!r} has {what}: the official files name one MoSA adapter a block")
    depths = {site.key: site.depth for site in model.sites()}
    adapters: Any = model.bank[name]
    return {depths[key]: adapter for key, adapter in adapters.items() if isinstance(adapter, SplitBottleneck)}
