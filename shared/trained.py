"""What trains in an adapted model: its parameters by name and role, and their state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import RequestError

Modules = Iterable[tuple[str, nn.Module]]


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """``adapter.<name>.<site>.<tensor>``, ``head.<tensor>``, ``backbone.<tensor>``: those that take gradients."""
    small = _parameters(_adapters(model)) | _parameters(_head(model))
    return {n: p for n, p in small.items() if p.requires_grad} | _unfrozen(model)


def _adapters(model: Any) -> list[tuple[str, Any]]:
    """The modules of the active adapters, each once, by name. Those of others, however many, cost nothing."""
    active, seen = set(model.active), set()
    found = [(f"adapter.{name}", bank) for name, bank in model.bank._modules.items() if name in active]
    return [pair for name, bank in found for pair in bank.named_modules(seen, name)]


def _head(model: Any) -> list[tuple[str, nn.Module]]:
    return [] if model.head is None else list(model.head.named_modules(prefix="head"))


def _parameters(modules: Modules) -> dict[str, nn.Parameter]:
    """Each once, under its first name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in modules:
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), (f"{path}.{name}", p))
    return dict(found.values())


def _buffers(modules: Modules) -> dict[str, Tensor]:
    """Each once, under its first name, but for those that are rebuilt (not persistent)."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(buffer), (f"{path}.{name}", buffer))
    return dict(found.values())


def _unfrozen(model: Any) -> dict[str, nn.Parameter]:
    whole = model.backbone.named_modules(prefix="backbone")
    return {name: p for name, p in _parameters(whole).items() if p.requires_grad}


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
    return _state(model, _adapters(model))


def _state(model: Any, adapters: Modules) -> dict[str, Tensor]:
    head, unfrozen = _head(model), _unfrozen(model)
    trained = _parameters(adapters) | _parameters(head) | unfrozen
    buffers = _buffers(adapters) | _buffers(head)
    if unfrozen:
        buffers |= _buffers(model.backbone.named_modules(prefix="backbone"))
    return {name: p.detach() for name, p in trained.items()} | buffers


def load(model: Any, given: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors in, all or none; adapters whose rank was decided by weights or data take that of their tensors.

    Raises RequestError that says how many fit where a name is missing or unknown, or a shape is another.
    """
    adapters = _adapters(model)
    mine, ranks = _state(model, adapters), _ranks(adapters, given)
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


def _ranks(adapters: list[tuple[str, Any]], given: Mapping[str, Tensor]) -> list[tuple[str, Any, int]]:
    """The modules with ranked tensors, by the prefix of their names, and the rank that the given ones have."""
    found = []
    for path, module in adapters:
        first = given.get(f"{path}.{module.ranked[0]}") if getattr(module, "ranked", ()) else None
        if first is not None and first.ndim and len(first):
            found.append((f"{path}.", module, len(first)))
    return found
