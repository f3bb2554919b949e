"""Attaching: a method's adapters put on a model's hosts and proven there, and taken off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shared import half
from shared.adapter import Adapter, WeightAdapter
from shared.backbone import Backbone
from shared.convolution import CONVOLUTIONS
from shared.errors import RequestError
from shared.host import Port, become_host
from shared.method import Method, check_choices
from shared.proof import prove
from shared.sites import Site, Sites
from shared.state import State


class Bank(nn.ModuleDict):
    """Modules by name, where any name without a dot will do ("forward", "type", "lora")."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def add(model: Any, method: Method, name: str, example: Sequence[Any] | None) -> None:
    """Attach one more adapter and make it the active one; the model is unchanged where any step of it fails.

    example: inputs for the proof of effect, where the backbone does not bring its own.
    """
    if not name or "." in name or name in model.methods:
        raise RequestError(
            f"adapter name {name!r}: " + ("it is taken" if name in model.methods else "use a name without dots")
        )
    if model.state.merged:
        raise RequestError("adapters are merged into the weights; unmerge() before adding another")
    if model.state.lowest or model.state.most:
        raise RequestError("adapters of the lowest blocks are dropped; drop(0) before adding another")
    check_choices(method)
    if model.cache is not None:
        model.cache.forget()
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
            model.state.folds.clear()  # copies of whole weights, made only for the proof
    except Exception:
        for added in [n for n in model.methods if n not in known][::-1]:
            remove(model, added)
        model.state.active = before
        raise
    if method.trains_backbone:
        model.fingerprint  # noqa: B018  of the weights before they train
        model.backbone.requires_grad_(True)
        model.train(model.training)


def _build(model: Any, method: Method, chosen: Sites | None) -> dict[str, Any]:
    if chosen is None:
        return {}
    device = next((s.module._parameters[s.parameter].device for s in chosen if s.parameter), None)  # type: ignore[union-attr,index]
    device = device or next((p.device for p in model.backbone.parameters()), torch.empty(0).device)
    with torch.device(device):
        modules = method.build_all(chosen)
    if set(modules) != {site.key for site in chosen}:
        raise RequestError(f"{type(method).__name__} built {len(modules)} modules for {len(chosen)} sites")
    for module in modules.values():
        module.context = model.context
    return modules


def remove(model: Any, name: str) -> None:
    """Take an adapter off; the last one gone, the backbone is bit for bit what it was."""
    model.known(name)
    if users := [user for user, method in model.methods.items() if name in method.uses]:
        raise RequestError(f"adapter {name!r} is in use: {users[0]!r} works through it; remove that one first")
    model.unmerge()
    if model.cache is not None:
        model.cache.forget()
    model.state.active = tuple(pair for pair in model.state.active if pair[0] != name)
    for host in model.backbone.modules():
        if "_port" in host.__dict__:
            detach(host, name)
    del model.bank[name], model.methods[name]
    model.prepared.discard(name)
    if not model.methods:
        model.drop(0)
        for parameter_name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(model._frozen.get(parameter_name, True))


def attach(site: Site, adapter: Adapter | WeightAdapter, name: str, state: State) -> None:
    """Put an adapter on a site's module, under ``name``; the module becomes a host if it is not one yet."""
    if isinstance(adapter, WeightAdapter):
        _check_weight_site(site, adapter)
    state.renew()
    host = site.module
    port = host.__dict__.get("_port")
    if port is None:
        port = host.__dict__["_port"] = Port(state, -1 if site.role == "model" else site.depth)
        state.hosts += 1
    elif port.state is not state:
        raise RequestError(
            f"site {site.key}: its module already belongs to another adapted model; detach that one first"
        )
    if isinstance(adapter, WeightAdapter):
        port.on.setdefault(str(site.parameter), {}).setdefault(name, []).append((site.rows, adapter))
    else:
        port.around.setdefault(name, []).append(adapter)
        if stay_called not in host._forward_pre_hooks.values():
            host.register_forward_pre_hook(stay_called)
    become_host(host, port)


def stay_called(host: nn.Module, args: tuple) -> None:
    """Does nothing: torch's fused encoder layer bypasses its children unless one of them has a hook."""


def _check_weight_site(site: Site, adapter: WeightAdapter) -> None:
    site.weight  # noqa: B018  raises where the site has none
    called = isinstance(site.module, (nn.Linear, *CONVOLUTIONS)) and not isinstance(
        site.module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    if adapter.dropout and not called:
        raise RequestError(
            f"site {site.key}: dropout {adapter.dropout:g} cannot act on {site.parameter} of "
            f"{type(site.module).__name__}, whose weight is read without a call; use dropout 0"
        )


def detach(host: nn.Module, name: str) -> None:
    """Take the adapter ``name`` off a host; the last one gone, the module has its own class again."""
    port = host.__dict__["_port"]
    port.around.pop(name, None)
    for by_name in port.on.values():
        by_name.pop(name, None)
    port.on = {parameter: by_name for parameter, by_name in port.on.items() if by_name}
    port.state.renew()
    if not port.around:
        for key in [key for key, hook in host._forward_pre_hooks.items() if hook is stay_called]:
            del host._forward_pre_hooks[key]
    if port.around or port.on:
        become_host(host, port)
    else:
        host.__class__ = type(host)._host_of  # type: ignore[attr-defined]
        del host.__dict__["_port"]
        port.state.hosts -= 1
