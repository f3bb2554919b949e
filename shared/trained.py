"""What trains in an adapted model: its parameters by name and role, and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import RequestError


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """``adapter.<name>.<site>.<tensor>``, ``head.<tensor>``, ``backbone.<tensor>``: those that take gradients."""
    return {n: p for n, p in _small(model).items() if p.requires_grad} | _unfrozen(model)


def _unfrozen(model: Any) -> dict[str, nn.Parameter]:
    return {f"backbone.{n}": p for n, p in model.backbone.named_parameters() if p.requires_grad}


def _small(model: Any) -> dict[str, nn.Parameter]:
    """All parameters of the active adapters and the head."""
    active = set(model.active)
    found = {f"adapter.{n}": p for n, p in model.bank.named_parameters() if n.partition(".")[0] in active}
    if model.head is not None:
        found |= {f"head.{n}": p for n, p in model.head.named_parameters()}
    return found


def groups(model: Any) -> list[dict[str, Any]]:
    """The parameters by role."""
    roles: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters(model).items():
        role = name.partition(".")[0]
        group = roles.setdefault(role, {"role": role, "names": [], "params": []})
        group["names"].append(name)
        group["params"].append(parameter)
    return list(roles.values())


def count(model: Any) -> dict[str, int]:
    """Numbers of parameters: trainable, of them adapter and head, and frozen."""
    sizes = {group["role"]: sum(p.numel() for p in group["params"]) for group in groups(model)}
    frozen = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)
    adapter, head = sizes.get("adapter", 0), sizes.get("head", 0)
    return {"trainable": sum(sizes.values()), "adapter": adapter, "head": head, "frozen": frozen}


def state(model: Any) -> dict[str, Tensor]:
    """All of the active adapters and the head, but for buffers that are rebuilt (not persistent), and what else trains.

    Of adapters and head that somebody froze too: a file must hold them whole.
    """
    active = set(model.active)
    found: dict[str, Tensor] = {n: p.detach() for n, p in (_small(model) | _unfrozen(model)).items()}
    found |= {f"adapter.{n}": b for n, b in _buffers(model.bank).items() if n.partition(".")[0] in active}
    if model.head is not None:
        found |= {f"head.{n}": b for n, b in _buffers(model.head).items()}
    if any(n.startswith("backbone.") for n in found):
        found |= {f"backbone.{n}": b for n, b in _buffers(model.backbone).items()}
    return found


def _buffers(root: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in root.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                found[f"{path}.{name}".lstrip(".")] = buffer
    return found


def load(model: Any, given: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors in, all or none; adapters whose rank was decided by weights or data take that of their tensors.

    Raises RequestError that says how many fit where a name is missing or unknown, or a shape is another.
    """
    mine, ranks = state(model), _ranks(model, given)
    fitting = {n: t.shape for n, t in mine.items()}
    for prefix, module, rank in ranks:
        names = [f"{prefix}{n}" for n in module.ranked if f"{prefix}{n}" in mine]
        fitting |= {n: (rank, *mine[n].shape[1:]) for n in names}
    missing, extra = sorted(mine.keys() - given.keys()), sorted(given.keys() - mine.keys())
    shapes = [n for n in mine if n in given and given[n].shape != fitting[n]]
    if missing or extra or shapes or not given:
        problems = [
            f"{len(v)} {what} (first: {v[0]})"
            for what, v in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
            if v
        ]
        used = len(given) - len(extra) - len(shapes)
        raise RequestError(
            f"{source}: {used} of its {len(given)} tensors fit this model; {', '.join(problems) or 'it is empty'}"
        )
    for _, module, rank in ranks:
        module.resize(rank)
    mine = state(model) if ranks else mine
    with torch.no_grad():
        for name, tensor in given.items():
            mine[name].copy_(tensor)


def _ranks(model: Any, given: Mapping[str, Tensor]) -> list[tuple[str, Any, int]]:
    """The active adapters with ranked tensors, by the prefix of their names, and the rank that the given ones have."""
    found = []
    for path, module in model.bank.named_modules():
        first = given.get(f"adapter.{path}.{module.ranked[0]}") if getattr(module, "ranked", ()) else None
        if first is not None and path.partition(".")[0] in model.active and first.ndim and len(first):
            found.append((f"adapter.{path}.", module, len(first)))
    return found
