"""Merging: weight adapters written into the stored weights, and taken out again bit for bit."""

from __future__ import annotations

from typing import Any

import torch

from shared.errors import RequestError


def merge(model: Any) -> None:
    """Store what reading each adapted parameter gives now, keeping a copy of the frozen one.

    Raises RequestError where an active adapter acts on activations; nothing is changed then.
    """
    unmerge(model)
    for name in model.active:
        if stuck := [path for path, port in model.hosts().items() if name in port.around]:
            raise RequestError(
                f"adapter {name!r} cannot be merged: it acts on activations at {stuck[0] or 'the model'}"
            )
    hosts = [(host, host.__dict__["_port"]) for host in model.backbone.modules() if "_port" in host.__dict__]
    with torch.no_grad():
        values = [
            (host, port, name, port.read(host, name).clone())
            for host, port in hosts
            for name, adapters in port.on.items()
            if adapters.keys() & set(model.active)
        ]
        for host, port, name, value in values:
            raw = host._parameters[name]
            port.stored[name] = raw.detach().clone()
            raw.copy_(value)
    model.state.merged = model.state.active


def unmerge(model: Any) -> None:
    """Copy the frozen weights back."""
    with torch.no_grad():
        for host in model.backbone.modules():
            port = host.__dict__.get("_port")
            for name, original in port.stored.items() if port else ():
                host._parameters[name].copy_(original)
            if port:
                port.stored.clear()
    model.state.merged = ()
