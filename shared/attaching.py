"""Attaching: an adapter put on a model's sites and proved to have an effect, or nothing done at all; and taken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shared import half
from shared.backbone import Backbone
from shared.errors import RequestError
from shared.host import attach, detach
from shared.method import Method, check_choices
from shared.proof import prove
from shared.sites import Sites

if TYPE_CHECKING:
    from shared.adapted import Adapted


class Bank(nn.ModuleDict):
    """Modules by name, where any name without a dot will do ("forward", "type", "lora")."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def add(model: Adapted, method: Method, name: str, example: Sequence[Any] | None) -> None:
    """See ``Adapted.add``."""
    if not name or "." in name or name in model.methods:
        raise RequestError(
            f"adapter name {name!r}: " + ("it is taken" if name in model.methods else "use a name without dots")
        )
    if model.state.merged:
        raise RequestError("adapters are merged into the weights; unmerge() before adding another")
    check_choices(method)
    chosen = method.sites(model.sites())
    if chosen is not None and not len(chosen):
        raise RequestError(f"{type(method).__name__} attaches to zero sites of {model.backbone_name}")
    modules = _build(model, method, chosen)
    before, known = model.state.active, tuple(model.methods)
    if not known:  # the last one that was removed left the backbone as it had come
        model.backbone.requires_grad_(False)
    try:
        method.connect(model, modules)
        model.bank[name] = Bank(modules)
        model.methods[name] = method
        for site in chosen or ():
            attach(site, modules[site.key], name, model.state)
        half.check(model)
        model.activate(name)
        if example is None and modules and isinstance(model.backbone, Backbone):
            example = model.backbone.example()
        if example is not None and modules:
            prove(model, name, example)
            for port in model.hosts().values():
                port.folded.clear()  # copies of whole weights, made only for the proof
    except Exception:
        for added in [n for n in model.methods if n not in known][::-1]:
            remove(model, added)
        model.state.active = before
        raise
    if method.trains_backbone:
        model.fingerprint  # noqa: B018  of the weights before they train
        model.backbone.requires_grad_(True)
        model.train(model.training)


def _build(model: Adapted, method: Method, chosen: Sites | None) -> dict[str, Any]:
    if chosen is None:
        return {}
    device = next((s.module._parameters[s.parameter].device for s in chosen if s.parameter), None)  # type: ignore[union-attr,index]
    device = device or next((p.device for p in model.backbone.parameters()), torch.device("cpu"))
    with torch.device(device):
        modules = method.build_all(chosen)
    if set(modules) != {site.key for site in chosen}:
        raise RequestError(f"{type(method).__name__} built {len(modules)} modules for {len(chosen)} sites")
    for module in modules.values():
        module.context = model.context
    return modules


def remove(model: Adapted, name: str) -> None:
    """See ``Adapted.remove``."""
    model._known(name)
    if users := [user for user, method in model.methods.items() if name in method.uses]:
        raise RequestError(f"adapter {name!r} is in use: {users[0]!r} works through it; remove that one first")
    model.unmerge()
    for host in model.backbone.modules():
        if "_port" in host.__dict__:
            detach(host, name)
    del model.bank[name], model.methods[name]
    model.prepared.discard(name)
    model.state.active = tuple(pair for pair in model.state.active if pair[0] != name)
    if not model.methods:
        for parameter_name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(model._frozen.get(parameter_name, True))
